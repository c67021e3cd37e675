// Types whose codes of 4 bits index 16 values: decoders and the table of codecs.
//
//   IQ4_NL  half d; uint8 qs[16]                                        x = d · value[q]            4.5 bits per weight
//   IQ4_XS  half d; uint16 scales_h; uint8 scales_l[4]; uint8 qs[128]   x = d · (s − 32) · value[q] 4.25
//   MXFP4   uint8 e; uint8 qs[16]                                       x = 2^(e − 128) · value[q]  4.25
//   NVFP4   uint8 s[4]; uint8 qs[32]                                    x = E4M3(s) / 2 · value[q]  4.5
//
// A sub-block of n weights holds code j in the low and code j + n / 2 in the high half of byte j. n is 32, and 16 in
// NVFP4. The 6 bits of IQ4_XS's scale i: the low 4 in half i % 2 of scales_l[i / 2], the high 2 at bit 2 · i of
// scales_h.

#include "codebooks.hpp"

namespace lowbit::LOWBIT_ISA {
namespace {

static_assert(2 + 16 == 18 && 2 + 2 + 4 + 128 == 136 && 1 + 16 == 17 && 4 + 32 == 36);

template <size_t n>
LANES_INLINE void decode_nibbles(const uint8_t* bytes, const int8_t* values, float d, float* weights) {
    float scaled[16];
    for (size_t i = 0; i < 16; ++i) scaled[i] = d * float(values[i]);
    for (size_t j = 0; j < n / 2; ++j) {
        weights[j] = scaled[bytes[j] & 15];
        weights[j + n / 2] = scaled[bytes[j] >> 4];
    }
}

LANES_INLINE float half_at(const uint8_t* from) {
    uint16_t half;
    std::memcpy(&half, from, 2);
    return float_of_half(half);
}

void decode_iq4_nl(const uint8_t* blocks, size_t count, float* weights) {
    for (size_t b = 0; b < count; ++b, blocks += 18, weights += 32)
        decode_nibbles<32>(blocks + 2, kIq4Values, half_at(blocks), weights);
}

void decode_iq4_xs(const uint8_t* blocks, size_t count, float* weights) {
    for (size_t b = 0; b < count; ++b, blocks += 136, weights += 256) {
        const float d = half_at(blocks);
        uint16_t high;
        std::memcpy(&high, blocks + 2, 2);
        for (size_t i = 0; i < 8; ++i) {
            const int low = blocks[4 + i / 2] >> (4 * (i % 2)) & 15;
            const int scale = (low | (high >> (2 * i) & 3) << 4) - 32;
            decode_nibbles<32>(blocks + 8 + 16 * i, kIq4Values, d * float(scale), weights + 32 * i);
        }
    }
}

void decode_mxfp4(const uint8_t* blocks, size_t count, float* weights) {
    for (size_t b = 0; b < count; ++b, blocks += 17, weights += 32)
        decode_nibbles<32>(blocks + 1, kFp4Values, float_of_e8m0_half(blocks[0]), weights);
}

void decode_nvfp4(const uint8_t* blocks, size_t count, float* weights) {
    for (size_t b = 0; b < count; ++b, blocks += 36, weights += 64)
        for (size_t i = 0; i < 4; ++i)
            decode_nibbles<16>(blocks + 4 + 8 * i, kFp4Values, float_of_ue4m3_half(blocks[i]), weights + 16 * i);
}

constexpr GgmlCodec kCodecs[] = {
    {20, 32, 18, decode_iq4_nl, encode_iq4_nl},
    {23, 256, 136, decode_iq4_xs, encode_iq4_xs},
    {39, 32, 17, decode_mxfp4, encode_mxfp4},
    {40, 64, 36, decode_nvfp4, encode_nvfp4},
};

}  // namespace

GgmlCodecs codebook_codecs() { return {kCodecs, sizeof kCodecs / sizeof kCodecs[0]}; }

}  // namespace lowbit::LOWBIT_ISA
