// ggml's first types: 32 weights with one half-precision scale, some with a minimum. Decoders, Q8_0, table of codecs.
//
//   Q4_0   half d; uint8 qs[16]                       x = d · (q − 8)       4.5 bits per weight
//   Q4_1   half d; half m; uint8 qs[16]               x = d · q + m         5
//   Q5_0   half d; uint32 qh; uint8 qs[16]            x = d · (q − 16)      5.5
//   Q5_1   half d; half m; uint32 qh; uint8 qs[16]    x = d · q + m         6
//   Q8_0   half d; int8 q[32]                         x = d · q             8.5
//
// qs: byte j has the low 4 bits of codes j (low half) and j + 16 (high half). qh: bit j is bit 4 of code j.

#include "legacy.hpp"

namespace lowbit::LOWBIT_ISA {
namespace {

constexpr size_t kBlock = kLegacyBlock;
static_assert(2 + 16 == 18 && 4 + 16 == 20 && 2 + 4 + 16 == 22 && 4 + 4 + 16 == 24 && 2 + 32 == 34);

LANES_INLINE float half_at(const uint8_t* from) {
    uint16_t half;
    std::memcpy(&half, from, 2);
    return float_of_half(half);
}

// Blocks of `bits` bits; `minimum` says that m follows d, else codes are around 2^(bits − 1).
template <int bits, bool minimum>
void decode_packed(const uint8_t* blocks, size_t count, float* weights) {
    constexpr size_t kParams = minimum ? 4 : 2, kHigh = bits == 5 ? 4 : 0;
    for (size_t b = 0; b < count; ++b, blocks += kParams + kHigh + 16, weights += kBlock) {
        const float d = half_at(blocks), m = minimum ? half_at(blocks + 2) : 0.0f;
        uint32_t high = 0;
        if constexpr (kHigh) std::memcpy(&high, blocks + kParams, 4);
        const uint8_t* bytes = blocks + kParams + kHigh;
        for (size_t j = 0; j < 16; ++j) {
            const int low_code = (bytes[j] & 15) | int(high >> j & 1) << 4;
            const int high_code = bytes[j] >> 4 | int(high >> (j + 16) & 1) << 4;
            if constexpr (minimum) {
                weights[j] = d * float(low_code) + m;
                weights[j + 16] = d * float(high_code) + m;
            } else {
                weights[j] = d * float(low_code - (1 << (bits - 1)));
                weights[j + 16] = d * float(high_code - (1 << (bits - 1)));
            }
        }
    }
}

void decode_q8_0(const uint8_t* blocks, size_t count, float* weights) {
    for (size_t b = 0; b < count; ++b, blocks += 34, weights += kBlock) {
        const float d = half_at(blocks);
        const int8_t* q = reinterpret_cast<const int8_t*>(blocks + 2);
        for (size_t i = 0; i < kBlock; ++i) weights[i] = d * float(q[i]);
    }
}

constexpr GgmlCodec kCodecs[] = {
    {2, kBlock, 18, decode_packed<4, false>, encode_q4_0}, {3, kBlock, 20, decode_packed<4, true>, encode_q4_1},
    {6, kBlock, 22, decode_packed<5, false>, encode_q5_0}, {7, kBlock, 24, decode_packed<5, true>, encode_q5_1},
    {8, kBlock, 34, decode_q8_0, encode_q8_0},
};

}  // namespace

// The largest magnitude gets code ±127: at 8 bits the error that a wider search saves is not worth its time. The
// maximum is taken of bit patterns, which is exact in any order.
void encode_q8_0(const GgmlRows& rows, uint8_t* blocks) {
    const size_t count = rows.weights.rows * rows.weights.columns / kBlock;
    for (size_t b = 0; b < count; ++b, blocks += 34) {
        float x[kBlock];
        load_weights(rows.weights, b * kBlock, kBlock, x);
        int32_t bits[kBlock], largest = 0;
        std::memcpy(bits, x, sizeof bits);
        for (size_t i = 0; i < kBlock; ++i) {
            const int32_t magnitude = bits[i] & 0x7fffffff;
            largest = largest < magnitude ? magnitude : largest;
        }
        uint16_t half = half_of(__builtin_bit_cast(float, largest) / 127.0f);
        half = half > 0x7bff ? 0x7bff : half;
        const float d = float_of_half(half);
        const float inverse = d > 0 ? 1.0f / d : 0.0f;
        std::memcpy(blocks, &half, 2);
        int8_t codes[kBlock];
        for (size_t i = 0; i < kBlock; ++i) {
            float q = x[i] * inverse;
            q = q > 127.0f ? 127.0f : q;
            q = q < -127.0f ? -127.0f : q;
            codes[i] = int8_t(__builtin_bit_cast(int32_t, q + kLaneRounder));  // the low byte of the rounded mantissa
        }
        std::memcpy(blocks + 2, codes, kBlock);
    }
}

GgmlCodecs legacy_codecs() { return {kCodecs, sizeof kCodecs / sizeof kCodecs[0]}; }

}  // namespace lowbit::LOWBIT_ISA
