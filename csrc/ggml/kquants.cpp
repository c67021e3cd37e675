// The table of the K-quants, and what their encoders begin with: sixteen super-blocks side by side, weighed.

#include "kquants.hpp"

namespace lowbit::LOWBIT_ISA {
namespace {

constexpr GgmlCodec kCodecs[] = {
    {10, kSuper, 84, decode_q2_k, encode_q2_k},  {11, kSuper, 110, decode_q3_k, encode_q3_k},
    {12, kSuper, 144, decode_q4_k, encode_q4_k}, {13, kSuper, 176, decode_q5_k, encode_q5_k},
    {14, kSuper, 210, decode_q6_k, encode_q6_k},
};

// Decoded weights end at 65504·128·32 < 2^29; larger ones would only make the sums overflow. Smaller ones than these
// round to zero: the least positive half is 2^-24.
constexpr float kLargest = 3e8f, kSmallest = 1e-12f;
// What every column has of the mean importance at least, so that no sub-block weighs nothing.
constexpr float kFloor = 1e-5f;

F32 mean_of_super(const F32* v) {
    F32 total = splat(0.0f);
    for (size_t group = 0; group < 16; ++group) {
        F32 sum = v[16 * group];
        for (size_t j = 1; j < 16; ++j) sum = sum + v[16 * group + j];
        total = total + sum;
    }
    return total * splat(1.0f / float(kSuper));
}

}  // namespace

void load_tile(const GgmlRows& rows, size_t first, size_t total, Tile& tile) {
    float staged[kLanes][kSuper];
    const size_t lanes = total - first < kLanes ? total - first : kLanes;
    std::memset(staged, 0, sizeof staged);
    for (size_t lane = 0; lane < lanes; ++lane)
        load_weights(rows.weights, (first + lane) * kSuper, kSuper, staged[lane]);
    transpose_squares<kSuper>(staged[0], tile.x);
    for (size_t j = 0; j < kSuper; ++j) {
        const F32 x = limit(tile.x[j], splat(-kLargest), splat(kLargest));
        tile.x[j] = select(absolute(x) < splat(kSmallest), splat(0.0f), x);
    }
    if (!rows.importance) {
        for (size_t j = 0; j < kSuper; ++j) tile.weight[j] = tile.x[j] * tile.x[j];
        const F32 mean = mean_of_super(tile.weight);
        for (size_t j = 0; j < kSuper; ++j) tile.weight[j] = square_root(mean + tile.weight[j]);
        return;
    }
    const size_t per_row = rows.weights.columns / kSuper;
    for (size_t lane = 0; lane < lanes; ++lane)
        std::memcpy(staged[lane], rows.importance + (first + lane) % per_row * kSuper, sizeof staged[lane]);
    transpose_squares<kSuper>(staged[0], tile.weight);
    const F32 mean = mean_of_super(tile.weight);
    const I32 none = mean == splat(0.0f);
    for (size_t j = 0; j < kSuper; ++j)
        tile.weight[j] = select(none, splat(1.0f), tile.weight[j] / mean + splat(kFloor));
}

GgmlCodecs kquant_codecs() { return {kCodecs, sizeof kCodecs / sizeof kCodecs[0]}; }

}  // namespace lowbit::LOWBIT_ISA
