// Decoders of the K-quants. Products are made in the order in which ggml makes them: (d · s) · q − (dmin · m).

#include "kquants.hpp"

namespace lowbit::LOWBIT_ISA {
namespace {

LANES_INLINE float half_at(const uint8_t* from) {
    uint16_t half;
    std::memcpy(&half, from, 2);
    return float_of_half(half);
}

// The 6-bit scales and minima of Q4_K and Q5_K. Bytes 0–3: scales 0–3, above them the high bits of scales 4–7;
// bytes 4–7: the same of the minima; bytes 8–11: low four bits of scales 4–7, above them those of the minima.
LANES_INLINE void scales_and_minima(const uint8_t* packed, uint8_t* scales, uint8_t* minima) {
    for (size_t i = 0; i < 4; ++i) {
        scales[i] = packed[i] & 63;
        minima[i] = packed[4 + i] & 63;
        scales[4 + i] = uint8_t((packed[8 + i] & 15) | (packed[i] >> 6) << 4);
        minima[4 + i] = uint8_t((packed[8 + i] >> 4) | (packed[4 + i] >> 6) << 4);
    }
}

}  // namespace

// Bits 2n, 2n + 1 of qs[32·h + i]: weight 128·h + 32·n + i. scales: s in the low nibble, m in the high one.
void decode_q2_k(const uint8_t* __restrict blocks, size_t count, float* __restrict weights) {
    for (size_t b = 0; b < count; ++b, blocks += 84) {
        const float d = half_at(blocks + 80), dmin = half_at(blocks + 82);
        for (size_t g = 0; g < 16; ++g, weights += 16) {
            const float scale = d * float(blocks[g] & 15), minimum = dmin * float(blocks[g] >> 4);
            const uint8_t* qs = blocks + 16 + 32 * (g / 8) + 16 * (g % 2);
            const int shift = 2 * int(g % 8 / 2);
            for (size_t i = 0; i < 16; ++i) weights[i] = scale * float((qs[i] >> shift) & 3) - minimum;
        }
    }
}

// Low bits as Q2_K. Bit n of hmask[i]: the third bit of weight 32·n + i. Scale g: four bits in nibble g / 8 of
// scales[g % 8], two in bits 2·(g / 4) of scales[8 + g % 4].
void decode_q3_k(const uint8_t* __restrict blocks, size_t count, float* __restrict weights) {
    for (size_t b = 0; b < count; ++b, blocks += 110) {
        const float d = half_at(blocks + 108);
        const uint8_t* scales = blocks + 96;
        for (size_t g = 0; g < 16; ++g, weights += 16) {
            const int low = (scales[g % 8] >> (4 * (g / 8))) & 15, high = (scales[8 + g % 4] >> (2 * (g / 4))) & 3;
            const float scale = d * float((low | high << 4) - 32);
            const uint8_t* qs = blocks + 32 + 32 * (g / 8) + 16 * (g % 2);
            const uint8_t* hmask = blocks + 16 * (g % 2);
            const int shift = 2 * int(g % 8 / 2), bit = int(g / 2);
            for (size_t i = 0; i < 16; ++i)
                weights[i] = scale * float(((qs[i] >> shift) & 3) + (((hmask[i] >> bit) & 1) << 2) - 4);
        }
    }
}

// Low nibble of qs[32·c + i]: weight 64·c + i; high nibble: weight 64·c + 32 + i.
void decode_q4_k(const uint8_t* __restrict blocks, size_t count, float* __restrict weights) {
    for (size_t b = 0; b < count; ++b, blocks += 144) {
        const float d = half_at(blocks), dmin = half_at(blocks + 2);
        uint8_t scales[8], minima[8];
        scales_and_minima(blocks + 4, scales, minima);
        for (size_t g = 0; g < 8; ++g, weights += 32) {
            const float scale = d * float(scales[g]), minimum = dmin * float(minima[g]);
            const uint8_t* qs = blocks + 16 + 32 * (g / 2);
            const int shift = 4 * int(g % 2);
            for (size_t i = 0; i < 32; ++i) weights[i] = scale * float((qs[i] >> shift) & 15) - minimum;
        }
    }
}

// Low bits as Q4_K. Bit n of qh[i]: the fifth bit of weight 32·n + i.
void decode_q5_k(const uint8_t* __restrict blocks, size_t count, float* __restrict weights) {
    for (size_t b = 0; b < count; ++b, blocks += 176) {
        const float d = half_at(blocks), dmin = half_at(blocks + 2);
        const uint8_t* qh = blocks + 16;
        uint8_t scales[8], minima[8];
        scales_and_minima(blocks + 4, scales, minima);
        for (size_t g = 0; g < 8; ++g, weights += 32) {
            const float scale = d * float(scales[g]), minimum = dmin * float(minima[g]);
            const uint8_t* qs = blocks + 48 + 32 * (g / 2);
            const int shift = 4 * int(g % 2), bit = int(g);
            for (size_t i = 0; i < 32; ++i)
                weights[i] = scale * float(((qs[i] >> shift) & 15) | ((qh[i] >> bit) & 1) << 4) - minimum;
        }
    }
}

// Nibble n of ql[64·h + i], i < 64: low bits of weight 128·h + 64·n + i. Bits 2n, 2n + 1 of qh[32·h + i], i < 32:
// high bits of weight 128·h + 32·n + i.
void decode_q6_k(const uint8_t* __restrict blocks, size_t count, float* __restrict weights) {
    for (size_t b = 0; b < count; ++b, blocks += 210) {
        const float d = half_at(blocks + 208);
        const int8_t* scales = reinterpret_cast<const int8_t*>(blocks + 192);
        for (size_t g = 0; g < 16; ++g, weights += 16) {
            const float scale = d * float(scales[g]);
            const size_t half = g / 8, part = g % 8 / 2, start = 16 * (g % 2);
            const uint8_t* ql = blocks + 64 * half + 32 * (part % 2) + start;
            const uint8_t* qh = blocks + 128 + 32 * half + start;
            const int low = 4 * int(part / 2), high = 2 * int(part);
            for (size_t i = 0; i < 16; ++i)
                weights[i] = scale * float((((ql[i] >> low) & 15) | ((qh[i] >> high) & 3) << 4) - 32);
        }
    }
}

}  // namespace lowbit::LOWBIT_ISA
