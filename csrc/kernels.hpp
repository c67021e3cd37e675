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
};

// Null where the library was built without that instruction set, or where this machine does not have it.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace lowbit
