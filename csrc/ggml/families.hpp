// The families of ggml types; each is one file of this folder (or a few) and is compiled once per instruction set.
#pragma once

#include "lanes.hpp"

namespace lowbit::LOWBIT_ISA {

GgmlCodecs plain_codecs();     // F32 F16 BF16
GgmlCodecs legacy_codecs();    // Q4_0 Q4_1 Q5_0 Q5_1 Q8_0
GgmlCodecs low_bit_codecs();   // Q1_0 Q2_0
GgmlCodecs kquant_codecs();    // Q2_K Q3_K Q4_K Q5_K Q6_K
GgmlCodecs codebook_codecs();  // IQ4_NL IQ4_XS MXFP4 NVFP4
GgmlCodecs ternary_codecs();   // TQ1_0 TQ2_0
GgmlCodecs iquant_codecs();    // IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S

}  // namespace lowbit::LOWBIT_ISA
