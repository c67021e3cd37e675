// Decoding of the i-quants: x = d · kUnit · (2 · scale + 1) · sign · point, IQ1: d · (2 · scale + 1) · (point ± 1/8).
#pragma once

#include "iq_search.hpp"

namespace lowbit::LOWBIT_ISA {


template <class Type>
void iq_decode(const uint8_t* blocks, size_t count, float* weights) {
    const IqGrid& grid = iq_grid(Type::kType);
    for (size_t b = 0; b < count; ++b, blocks += Type::kBytes) {
        IqBlock block;
        Type::unpack(blocks, block);
        const float d = float_of_half(block.d);
        for (size_t first = 0; first < kIqBlock; first += 8, weights += 8) {
            // All these products are exact, so that their order does not matter.
            const float scale = d * Type::kUnit * float(2 * block.scale[first / Type::kGroup] + 1);
            const uint32_t sign = block.sign[first / 8];
            const uint16_t* entry = block.point + first / Type::kColumns;
            float point[8];
            for (size_t i = 0; i < 8; ++i)
                point[i] = float(grid.point[entry[i / Type::kColumns] * Type::kColumns + i % Type::kColumns]);
            if constexpr (Type::kSigns == IqSigns::none) {
                const float shift = sign ? -kIqShift : kIqShift;
                for (size_t i = 0; i < 8; ++i) weights[i] = scale * (point[i] + shift);
            } else {
                uint32_t bits[8];
                for (size_t i = 0; i < 8; ++i)
                    bits[i] = __builtin_bit_cast(uint32_t, scale * point[i]) ^ (sign << (31 - i) & 0x80000000u);
                std::memcpy(weights, bits, sizeof bits);
            }
        }
    }
}

}  // namespace lowbit::LOWBIT_ISA
