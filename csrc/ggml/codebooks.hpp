// The grids of the codebook types and their encoders, one file per family of values.
#pragma once

#include "one_scale.hpp"

namespace lowbit::LOWBIT_ISA {

// The 16 values of IQ4_NL and IQ4_XS, dense around zero.
constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Twice the values of E2M1; codes 8 to 15 are the negatives.
constexpr int8_t kFp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// 2^(e − 128), the scale of twice E2M1; the two smallest are subnormal.
LANES_INLINE float float_of_e8m0_half(uint8_t e) {
    const uint32_t bits = e < 2 ? 0x00200000u << e : uint32_t(e - 1) << 23;
    return __builtin_bit_cast(float, bits);
}

// Half of an unsigned E4M3, 0 for the code of its NaN; the top bit has no meaning, except that 0xff is not that NaN.
LANES_INLINE float float_of_ue4m3_half(uint8_t code) {
    const int exponent = (code >> 3) & 15, mantissa = code & 7;
    if (code == 0x7f) return 0.0f;
    if (exponent == 0) return float(mantissa) * 0x1p-10f;
    const uint32_t bits = uint32_t(exponent - 7 - 1 + 127) << 23 | uint32_t(mantissa) << 20;
    return __builtin_bit_cast(float, bits);
}

void encode_iq4_nl(const GgmlRows& rows, uint8_t* blocks);
void encode_iq4_xs(const GgmlRows& rows, uint8_t* blocks);
void encode_mxfp4(const GgmlRows& rows, uint8_t* blocks);
void encode_nvfp4(const GgmlRows& rows, uint8_t* blocks);

}  // namespace lowbit::LOWBIT_ISA
