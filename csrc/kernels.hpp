// The interface between the bindings and the kernels: plain pointers and sizes, one table of functions per instruction
// set. Nothing here knows Python.
//
//   N = rows, K = columns, g = group, G = ceil(K / g); the last group of a row may be short.
//   All matrices are row-major and contiguous; per-group parameters are [N, G].
//
// This header is compiled with several sets of ISA flags, so it holds declarations only: an inline function here could
// be merged by the linker into its AVX-512 version and run on a machine without it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

enum class FloatType : std::uint8_t { float32, bfloat16, float16 };

// w [N, K], cut along K into groups of g columns.
struct Weights {
    const void* data;
    FloatType type;
    std::size_t rows, columns, group;
};

// Codes [N, K], same cut. int8 for integers, the bit pattern for minifloats, the index for codebooks.
struct Codes {
    const void* data;
    std::size_t rows, columns, group;
};

// x = scale * (code - zero_point); zero_point is null on symmetric grids.
struct Affine {
    const float* scale;
    const std::int32_t* zero_point;
    int qmin, qmax;
};

// x = scale * value(code); |value| = 2^(1 - bias - m) * integer for subnormals, 1.mantissa * 2^(e - bias) otherwise.
struct Minifloat {
    const float* scale;
    int exponent_bits, mantissa_bits, bias;
    float max_value;
};

// x = scale * value. 16 values in ascending order, the code of each, and the 15 midpoints between neighbours.
struct Codebook {
    const float* scale;
    const float* midpoints;
    const float* values;
    const std::uint8_t* codes;
};

// What a squared error is weighed with: importance of its column (null: 1), and |w| if `magnitude`.
struct ErrorWeights {
    const float* importance;
    bool magnitude;
};

struct SquaredError {
    double error, weight, max_abs_error;
};

// w [rows, columns], in columns begin .. end  -=  change [rows, depth] @ spread [depth, columns]
struct Product {
    float* w;
    const float* change;
    const float* spread;
    std::size_t rows, columns, depth, begin, end;
};

// Rounding with error feedback (kernels/feedback.inc.hpp), in place on w [rows, columns], of columns begin .. end. All
// matrices have that shape, but for spread [columns, columns]; offset and zero_point may be null. decoded holds the
// former values where `descend`.
struct Feedback {
    float* w;
    const float* spread;
    std::size_t rows, columns, begin, end, block;
    bool descend;
    const float* scale;
    const float* offset;
    const std::int32_t* zero_point;
    std::uint8_t* codes;
    float* decoded;
};

// Vectors x [count, columns] of an i-quant, what each column's squared error counts, and what each level decodes to,
// [count, levels].
struct IqVectors {
    const float* x;
    const float* w;
    const float* scaled;
    std::size_t count;
};

struct GgmlCodec;
struct GgmlRows;
struct GgmlCodecs;

struct Kernels {
    const char* isa;
    GgmlCodecs (*ggml_codecs)();
    // Blocks of rows, and Σ (w − ŵ)², Σ w², max |w − ŵ|: NaN where a weight is NaN or inf, and then the blocks are not
    // all written. `ggml_error` measures blocks that are there.
    SquaredError (*ggml_encode)(const GgmlCodec&, const GgmlRows&, std::uint8_t* blocks);
    SquaredError (*ggml_error)(const GgmlCodec&, const Weights&, const std::uint8_t* blocks);
    void (*iq_nearest)(int type, const IqVectors&, std::int32_t* entry, float* cost);
    // `scaled` is the scale of each vector [count]; false for types without signs.
    bool (*iq_round)(int type, const IqVectors&, std::int32_t* codes);
    void (*group_range)(const Weights&, float* low, float* high);
    void (*round_int)(const Weights&, const Affine&, std::int8_t* codes);
    void (*round_minifloat)(const Weights&, const Minifloat&, std::uint8_t* codes);
    void (*round_codebook)(const Weights&, const Codebook&, std::uint8_t* codes);
    void (*decode_int)(const Codes&, const Affine&, float* weights);
    void (*decode_table)(const Codes&, const float* scale, const float* values, float* weights);
    void (*error_int)(const Weights&, const Affine&, const ErrorWeights&, float* errors);
    void (*error_minifloat)(const Weights&, const Minifloat&, const ErrorWeights&, float* errors);
    void (*error_codebook)(const Weights&, const Codebook&, const ErrorWeights&, float* errors);
    SquaredError (*squared_error_int)(const Weights&, const Codes&, const Affine&);
    SquaredError (*squared_error_table)(const Weights&, const Codes&, const float* scale, const float* values);
    // False where a code + offset does not fit in `bits` bits; the words are then meaningless.
    bool (*pack_dense)(const Codes&, int bits, int offset, std::uint32_t* words);
    void (*unpack_dense)(const std::uint32_t* words, std::size_t rows, std::size_t columns, int bits, int offset,
                         std::uint8_t* codes);
    void (*subtract_product)(const Product&);
    void (*feedback_int)(const Feedback&, int qmin, int qmax);
    void (*feedback_minifloat)(const Feedback&, const Minifloat&);
    void (*feedback_codebook)(const Feedback&, const Codebook&);
};

// Null where the library was built without that instruction set, or where this machine does not have it.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace lowbit
