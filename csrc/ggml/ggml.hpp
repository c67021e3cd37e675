// The interface of the ggml codecs: what a type can do, one table of types per instruction set.
//
// A ggml type stores a row as blocks of `weights` numbers in `bytes` bytes. Blocks do not influence each other, so a
// codec sees a run of them and nothing else. Declarations only, for the reason given in kernels.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels.hpp"

namespace lowbit {

// Whole rows of weights and what their errors are weighed with: importance [columns], or null for 1.
// `columns` is a multiple of the type's block; `weights.group` is not used.
struct GgmlRows {
    Weights weights;
    const float* importance;
};

struct GgmlCodec {
    int type;  // ggml's number
    std::size_t weights, bytes;
    // blocks of `bytes` → float32
    void (*decode)(const std::uint8_t* blocks, std::size_t count, float* weights);
    // rows → rows · columns / weights blocks. Weights are finite and importance is finite and not negative, which the
    // caller has checked; null where the type cannot be encoded.
    void (*encode)(const GgmlRows& rows, std::uint8_t* blocks);
};

struct GgmlCodecs {
    const GgmlCodec* first;
    std::size_t count;
};

}  // namespace lowbit
