// The kernels and their table, for the instruction set whose flags this file is compiled with.
//
// The including file defines LOWBIT_ISA_NAME and LOWBIT_ISA, the namespace of the ggml codecs built alike. Everything is in an unnamed namespace and nothing but <cstdint> types
// comes from outside, so no function compiled with these flags can be linked into code that other machines run.

#include <new>

#include "../ggml/ggml.hpp"
#include "../kernels.hpp"

namespace lowbit {

namespace LOWBIT_ISA {
GgmlCodecs ggml_codecs();
SquaredError ggml_encode(const GgmlCodec&, const GgmlRows&, std::uint8_t* blocks);
SquaredError ggml_error(const GgmlCodec&, const Weights&, const std::uint8_t* blocks);
void iq_nearest(int type, const IqVectors&, std::int32_t* entry, float* cost);
bool iq_round(int type, const IqVectors&, std::int32_t* codes);
}

namespace {

#include "common.inc.hpp"
#include "range.inc.hpp"

#include "codebook.inc.hpp"
#include "integer.inc.hpp"
#include "minifloat.inc.hpp"

#include "error.inc.hpp"
#include "packing.inc.hpp"

#include "feedback.inc.hpp"

constexpr Kernels kTable = {
    LOWBIT_ISA_NAME,   LOWBIT_ISA::ggml_codecs, LOWBIT_ISA::ggml_encode, LOWBIT_ISA::ggml_error,
    LOWBIT_ISA::iq_nearest, LOWBIT_ISA::iq_round,
    group_range,       round_int,           round_minifloat, round_codebook,
    decode_int,        decode_table,        error_int,  error_minifloat, error_codebook,
    squared_error_int, squared_error_table, pack_dense, unpack_dense,
    subtract_product,  feedback_int,        feedback_minifloat, feedback_codebook,
};

}  // namespace
}  // namespace lowbit
