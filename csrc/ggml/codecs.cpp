// The table of ggml codecs of one instruction set. A family is a file that defines its rows.

#include "families.hpp"

namespace lowbit::LOWBIT_ISA {

GgmlCodecs ggml_codecs() {
    constexpr size_t kMost = 64;
    static GgmlCodec table[kMost];
    static const size_t count = [] {
        size_t filled = 0;
        const GgmlCodecs families[] = {plain_codecs(),    legacy_codecs(),  low_bit_codecs(), kquant_codecs(),
                                       codebook_codecs(), ternary_codecs(), iquant_codecs()};
        for (const GgmlCodecs& family : families)
            for (size_t i = 0; i < family.count; ++i) table[filled++] = family.first[i];
        return filled;
    }();
    return {table, count};
}

}  // namespace lowbit::LOWBIT_ISA
