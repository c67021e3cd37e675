// IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S: vectors of a codebook. Layouts: iq_layout.hpp.

#include "families.hpp"
#include "iq_decode.hpp"
#include "iq_encode.hpp"

namespace lowbit::LOWBIT_ISA {

namespace {

template <class Type>
constexpr GgmlCodec codec() {
    return {Type::kType, kIqBlock, Type::kBytes, iq_decode<Type>, iq_encode<Type>};
}

constexpr GgmlCodec kCodecs[] = {codec<Iq1S>(),  codec<Iq1M>(),   codec<Iq2Xxs>(), codec<Iq2Xs>(),
                                 codec<Iq2S>(),  codec<Iq3Xxs>(), codec<Iq3S>()};

}  // namespace

GgmlCodecs iquant_codecs() { return {kCodecs, sizeof kCodecs / sizeof *kCodecs}; }

}  // namespace lowbit::LOWBIT_ISA
