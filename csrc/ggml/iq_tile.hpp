// Sixteen sub-blocks of an i-quant, one per lane, made ready for the search.
//
// Within each block of 256 weights are divided by the largest magnitude and importance by its largest, which keeps all
// sums in range; importance is at least 2^-20, so that weights that do not matter are still sensible. Where signs are
// stored apart, x holds magnitudes; where their number has to be even and is not, the x that costs least is made
// negative instead.
#pragma once

#include "iq_layout.hpp"

namespace lowbit::LOWBIT_ISA {

constexpr float kIqLeastImportance = 0x1p-20f;

template <class Type>
struct IqTile {
    static constexpr size_t kGroup = Type::kGroup;
    static constexpr size_t kPoints = kGroup / Type::kColumns;  // in a sub-block
    static constexpr size_t kSubBlocks = kIqBlock / kGroup;     // in a block
    static constexpr size_t kBlocks = kLanes / kSubBlocks;      // in a tile

    F32 x[kGroup], w[kGroup];
    I32 negative[kGroup];  // −1 where the sign bit will be set
    float unit[kBlocks];   // what the weights of a block were divided by
};

LANES_INLINE float largest_magnitude(const float* values) {
    F32 most = splat(0.0f);
    for (size_t i = 0; i < kIqBlock; i += kLanes) most = larger(most, absolute(load(values + i)));
    float lanes[kLanes];
    store(most, lanes);
    for (size_t i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
}

// Weights and importance of a block, normalized in place; returns the largest magnitude, or 1.
LANES_INLINE float normalize(float* weights, float* importance) {
    float largest = largest_magnitude(weights);
    const float most = largest_magnitude(importance);
    if (!(largest > 0)) largest = 1.0f;
    for (size_t i = 0; i < kIqBlock; ++i) {
        weights[i] = weights[i] / largest;
        const float ratio = most > 0 ? importance[i] / most : 1.0f;
        importance[i] = ratio > kIqLeastImportance ? ratio : kIqLeastImportance;
    }
    return largest;
}

// Moves the signs of 8 columns from x to `negative`.
template <IqSigns signs>
LANES_INLINE void split_signs(F32* x, const F32* w, I32* negative) {
    I32 odd = splat(0), at = splat(0);
    F32 least = splat(3e38f);
    for (size_t j = 0; j < 8; ++j) {
        negative[j] = x[j] < splat(0.0f);
        x[j] = absolute(x[j]);
        odd = odd ^ negative[j];
        const F32 cost = w[j] * x[j] * x[j];
        const I32 better = cost < least;
        least = select(better, cost, least);
        at = select(better, splat(int32_t(j)), at);
    }
    if constexpr (signs == IqSigns::even)
        for (size_t j = 0; j < 8; ++j) {
            const I32 flip = odd & (at == splat(int32_t(j)));
            x[j] = select(flip, -x[j], x[j]);
            negative[j] = negative[j] ^ flip;
        }
}

// `weights` and `importance` of the tile's blocks, which are overwritten.
template <class Type>
LANES_INLINE void load_tile(float* weights, float* importance, IqTile<Type>& tile) {
    for (size_t b = 0; b < tile.kBlocks; ++b)
        tile.unit[b] = normalize(weights + b * kIqBlock, importance + b * kIqBlock);
    transpose<Type::kGroup>(weights, tile.x);
    transpose<Type::kGroup>(importance, tile.w);
    if constexpr (Type::kSigns != IqSigns::none)
        for (size_t i = 0; i < Type::kGroup; i += 8)
            split_signs<Type::kSigns>(tile.x + i, tile.w + i, tile.negative + i);
}

// Where one of 8 columns was made negative (its x is), another may be cheaper now that the points are known: the error
// grows by 4 · scale · w·|x|·g.
LANES_INLINE void move_flip(F32* x, const F32* w, const F32* point, I32* negative) {
    I32 flipped = splat(0), at = splat(0);
    F32 least = splat(3e38f);
    for (size_t j = 0; j < 8; ++j) {
        const I32 here = x[j] < splat(0.0f);
        flipped = flipped | here;
        x[j] = absolute(x[j]);
        negative[j] = negative[j] ^ here;
        const F32 cost = w[j] * x[j] * point[j];
        const I32 better = cost < least;
        least = select(better, cost, least);
        at = select(better, splat(int32_t(j)), at);
    }
    for (size_t j = 0; j < 8; ++j) {
        const I32 flip = flipped & (at == splat(int32_t(j)));
        x[j] = select(flip, -x[j], x[j]);
        negative[j] = negative[j] ^ flip;
    }
}

}  // namespace lowbit::LOWBIT_ISA
