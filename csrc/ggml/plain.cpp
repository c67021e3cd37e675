// Unquantized types, little-endian; conversions round to nearest, ties to even.
//
//   F32    float                     32 bits per weight
//   F16    IEEE half                 16 bits; above 65519 becomes inf, as torch and ggml do
//   BF16   upper half of a float     16 bits
//
// Importance is not used.

#include "families.hpp"

namespace lowbit::LOWBIT_ISA {
namespace {

constexpr size_t kRun = 1024;  // weights converted at a time: they stay in the first-level cache

// half_of and float_of_half without branches, so that the loops over them are vectorised.
LANES_INLINE uint16_t half_bits(uint32_t bits) {
    const uint32_t sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    const uint32_t normal = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13;
    const uint32_t subnormal = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, bits) + 0.5f) - 0x3f000000;
    const uint32_t infinite = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t magnitude = bits < 0x38800000 ? subnormal : normal;
    return uint16_t(sign | (bits >= 0x47800000 ? infinite : magnitude));
}
LANES_INLINE uint32_t bits_of_half(uint16_t half) {
    const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
    const uint32_t subnormal =
        __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude + (113u << 23)) -
                                         __builtin_bit_cast(float, 113u << 23));
    uint32_t bits = magnitude + (112u << 23);
    bits = magnitude < (1u << 23) ? subnormal : bits;
    bits = magnitude >= (31u << 23) ? magnitude | 0x7f800000u : bits;
    return bits | (uint32_t(half & 0x8000) << 16);
}

void decode_f32(const uint8_t* blocks, size_t count, float* weights) { std::memcpy(weights, blocks, 4 * count); }

void decode_f16(const uint8_t* blocks, size_t count, float* weights) {
    for (size_t i = 0; i < count; ++i) {
        uint16_t half;
        std::memcpy(&half, blocks + 2 * i, 2);
        const uint32_t bits = bits_of_half(half);
        std::memcpy(weights + i, &bits, 4);
    }
}

void decode_bf16(const uint8_t* blocks, size_t count, float* weights) {
    for (size_t i = 0; i < count; ++i) {
        uint16_t half;
        std::memcpy(&half, blocks + 2 * i, 2);
        const uint32_t bits = uint32_t(half) << 16;
        std::memcpy(weights + i, &bits, 4);
    }
}

void encode_f32(const GgmlRows& rows, uint8_t* blocks) {
    const size_t total = rows.weights.rows * rows.weights.columns;
    for (size_t first = 0; first < total; first += kRun) {
        const size_t count = total - first < kRun ? total - first : kRun;
        float x[kRun];
        load_weights(rows.weights, first, count, x);
        std::memcpy(blocks + 4 * first, x, 4 * count);
    }
}

// Converts runs of float bits with a function of uint32_t.
template <typename Convert>
LANES_INLINE void encode_16(const GgmlRows& rows, uint8_t* blocks, Convert convert) {
    const size_t total = rows.weights.rows * rows.weights.columns;
    for (size_t first = 0; first < total; first += kRun) {
        const size_t count = total - first < kRun ? total - first : kRun;
        float x[kRun];
        uint16_t halves[kRun];
        load_weights(rows.weights, first, count, x);
        for (size_t i = 0; i < count; ++i) halves[i] = convert(__builtin_bit_cast(uint32_t, x[i]));
        std::memcpy(blocks + 2 * first, halves, 2 * count);
    }
}

void encode_f16(const GgmlRows& rows, uint8_t* blocks) {
    encode_16(rows, blocks, [](uint32_t bits) { return half_bits(bits); });
}

void encode_bf16(const GgmlRows& rows, uint8_t* blocks) {
    encode_16(rows, blocks, [](uint32_t bits) { return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); });
}

constexpr GgmlCodec kCodecs[] = {
    {0, 1, 4, decode_f32, encode_f32},
    {1, 1, 2, decode_f16, encode_f16},
    {30, 1, 2, decode_bf16, encode_bf16},
};

}  // namespace

GgmlCodecs plain_codecs() { return {kCodecs, sizeof kCodecs / sizeof kCodecs[0]}; }

}  // namespace lowbit::LOWBIT_ISA
