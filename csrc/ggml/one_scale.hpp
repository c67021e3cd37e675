// What the encoders of blocks with one scale share: sixteen sub-blocks side by side, and the search of their scale.
//
//   x ≈ d · v,  v of a grid;  for codes v the best d is Σ w·x·v / Σ w·v·v and explains (Σ w·x·v)² / Σ w·v·v of Σ w·x·x
//
// A sub-block is brought into [−2, 2] by a power of two, which is exact, and its importance likewise; so neither the
// smallest nor the largest floats leave the range in which sums of squares are finite.
#pragma once

#include "families.hpp"

namespace lowbit::LOWBIT_ISA::one_scale {

// Importance below this part of the largest in its block counts as this much. A block of no importance at all is
// thereby weighed alike, and one sub-block of none beside others that matter still gets a sensible scale.
constexpr float kLeastImportance = 0x1p-20f;

// Sixteen sub-blocks of n weights, one per lane. The weights are value · unit, unit a power of two.
template <size_t n>
struct Tile {
    F32 value[n];
    F32 importance[n];  // read only where the search is weighted
    F32 unit, per_unit;
};

// 2^−e of the largest magnitude's exponent, and 2^e; e within ±126.
LANES_INLINE F32 power_below(I32 largest_bits, F32* inverse) {
    const I32 field = smaller(larger(largest_bits >> 23, splat(1)), splat(253));
    *inverse = float_of_bits((splat(254) - field) << 23);
    return float_of_bits(field << 23);
}

// The largest of each run of `run` lanes, in all lanes of the run.
template <size_t run>
LANES_INLINE I32 largest_of_runs(I32 v) {
    if constexpr (run == 1) return v;
    int32_t lanes[kLanes];
    store(v, lanes);
    for (size_t first = 0; first < kLanes; first += run) {
        int32_t most = lanes[first];
        for (size_t i = 1; i < run; ++i) most = lanes[first + i] > most ? lanes[first + i] : most;
        for (size_t i = 0; i < run; ++i) lanes[first + i] = most;
    }
    return load(lanes);
}

// The sum of each run of `run` lanes, added in order, in all lanes of the run.
template <size_t run>
LANES_INLINE F32 sum_of_runs(F32 v) {
    float lanes[kLanes];
    store(v, lanes);
    for (size_t first = 0; first < kLanes; first += run) {
        float sum = lanes[first];
        for (size_t i = 1; i < run; ++i) sum += lanes[first + i];
        for (size_t i = 0; i < run; ++i) lanes[first + i] = sum;
    }
    return load(lanes);
}

// Divides by the power of two of the largest magnitude among n values of each run of lanes.
template <size_t n, size_t run>
LANES_INLINE F32 normalize(F32* values, F32* per_unit) {
    I32 largest = splat(0);
    for (size_t j = 0; j < n; ++j) largest = larger(largest, bits_of(absolute(values[j])));
    const F32 unit = power_below(largest_of_runs<run>(largest), per_unit);
    for (size_t j = 0; j < n; ++j) values[j] = values[j] * *per_unit;
    return unit;
}

// Sub-blocks first, first + 1, … of the rows taken as one run; lanes past the `count` that there are hold zeros. `run`
// lanes share a unit.
template <size_t n, size_t run, bool weighted>
LANES_INLINE void load_tile(const GgmlRows& rows, size_t first, size_t count, Tile<n>* tile) {
    float line[n * kLanes];
    const size_t lanes = count - first < kLanes ? count - first : kLanes;
    if (rows.weights.type == FloatType::float32 && lanes == kLanes) {
        transpose_squares<n>(static_cast<const float*>(rows.weights.data) + first * n, tile->value);
    } else {
        load_weights(rows.weights, first * n, lanes * n, line);
        for (size_t i = lanes * n; i < n * kLanes; ++i) line[i] = 0.0f;
        transpose_squares<n>(line, tile->value);
    }
    tile->unit = normalize<n, run>(tile->value, &tile->per_unit);
    if constexpr (weighted) {
        const size_t columns = rows.weights.columns;
        size_t column = first * n % columns;
        for (size_t lane = 0; lane < kLanes; ++lane) {
            std::memcpy(line + lane * n, rows.importance + column, n * sizeof(float));
            column = column + n == columns ? 0 : column + n;
        }
        transpose_squares<n>(line, tile->importance);
        F32 ignored;
        normalize<n, run>(tile->importance, &ignored);
        for (size_t j = 0; j < n; ++j) tile->importance[j] = larger(tile->importance[j], splat(kLeastImportance));
    }
}

// The value of largest magnitude of each lane, the first of several.
template <size_t n>
LANES_INLINE F32 extreme(const Tile<n>& tile) {
    F32 most = splat(0.0f), at = splat(0.0f);
    for (size_t j = 0; j < n; ++j) {
        const F32 magnitude = absolute(tile.value[j]);
        const I32 more = magnitude > most;
        most = select(more, magnitude, most);
        at = select(more, tile.value[j], at);
    }
    return at;
}

// 1 / v, and 0 of what is so small that its inverse might not be finite.
LANES_INLINE F32 inverse_or_zero(F32 v) {
    return select(absolute(v) < splat(0x1p-120f), splat(0.0f), splat(1.0f) / v);
}

// A scale, in units of the tile, and how much of Σ w·x·x it explains.
struct Fit {
    F32 scale, gain, curvature;  // curvature: Σ w·v·v
};

// The best scale for the codes that an inverse scale leads to. `clamped` where x · inverse may leave the grid's range
// by more than Grid::value takes.
template <class Grid, size_t n, bool weighted, bool clamped>
LANES_INLINE Fit fit_scale(const Tile<n>& tile, F32 inverse) {
    F32 xv = splat(0.0f), vv = splat(0.0f);
    for (size_t j = 0; j < n; ++j) {
        const F32 at = tile.value[j] * inverse;
        const F32 v = Grid::value(clamped ? Grid::bounded(at) : at);
        const F32 wv = weighted ? tile.importance[j] * v : v;
        xv = xv + wv * tile.value[j];
        vv = vv + wv * v;
    }
    const F32 scale = xv * inverse_or_zero(vv);
    return {scale, scale * xv, vv};
}

LANES_INLINE void keep_better(const Fit& fit, Fit* best) {
    const I32 better = fit.gain > best->gain;
    best->scale = select(better, fit.scale, best->scale);
    best->gain = select(better, fit.gain, best->gain);
    best->curvature = select(better, fit.curvature, best->curvature);
}

// The best of the scales that bring the value of largest magnitude to each of `ends`, bettered `steps` times by
// rounding anew with the fitted scale.
template <class Grid, size_t n, bool weighted>
LANES_INLINE Fit search_scale(const Tile<n>& tile, const float* ends, size_t count, int steps) {
    const F32 inverse = inverse_or_zero(extreme(tile));
    Fit best{splat(0.0f), splat(0.0f), splat(0.0f)};
    for (size_t c = 0; c < count; ++c)
        keep_better(fit_scale<Grid, n, weighted, Grid::kScanClamped>(tile, inverse * splat(ends[c] * Grid::kPerStep)),
                    &best);
    for (int step = 0; step < steps; ++step) {
        const F32 anew = inverse_or_zero(best.scale) * splat(Grid::kPerStep);
        keep_better(fit_scale<Grid, n, weighted, true>(tile, anew), &best);
    }
    return best;
}

// Σ w·(x − scale · v)² of the values nearest to x / scale.
template <class Grid, size_t n, bool weighted>
LANES_INLINE F32 squared_error(const Tile<n>& tile, F32 scale) {
    const F32 inverse = inverse_or_zero(scale) * splat(Grid::kPerStep);
    F32 error = splat(0.0f);
    for (size_t j = 0; j < n; ++j) {
        const F32 off = tile.value[j] - scale * Grid::value(Grid::bounded(tile.value[j] * inverse));
        error = error + (weighted ? tile.importance[j] * off : off) * off;
    }
    return error;
}

// Half-precision bits, ties to even, saturated.
LANES_INLINE I32 half_bits(F32 v) {
    const I32 bits = bits_of(v), magnitude = bits & splat(0x7fffffff);
    const I32 odd = (magnitude >> 13) & splat(1);
    const I32 normal = smaller((magnitude + odd + splat(0xfff - 0x38000000)) >> 13, splat(0x7bff));
    // 0.5 has the spacing that subnormal halves have
    const I32 subnormal = bits_of(float_of_bits(magnitude) + splat(0.5f)) - splat(0x3f000000);
    return select(magnitude < splat(0x38800000), subnormal, normal) | ((bits >> 16) & splat(0x8000));
}
// Of finite halves.
LANES_INLINE F32 float_of_half_bits(I32 half) {
    const I32 magnitude = half & splat(0x7fff);
    const I32 normal = (magnitude << 13) + splat(112 << 23);
    const F32 subnormal = to_float(magnitude) * splat(0x1p-24f);
    const I32 bits = select(magnitude < splat(0x400), bits_of(subnormal), normal);
    return float_of_bits(bits | ((half & splat(0x8000)) << 16));
}

// The half of least error among the one nearest to a scale and its two neighbours.
template <class Grid, size_t n, bool weighted>
LANES_INLINE I32 best_half(const Tile<n>& tile, F32 scale) {
    const I32 middle = half_bits(scale * tile.unit);
    I32 best = middle;
    F32 least = squared_error<Grid, n, weighted>(tile, float_of_half_bits(middle) * tile.per_unit);
    for (int32_t step = -1; step <= 1; step += 2) {
        const I32 magnitude = smaller(larger((middle & splat(0x7fff)) + splat(step), splat(0)), splat(0x7bff));
        const I32 half = magnitude | (middle & splat(0x8000));
        const F32 error = squared_error<Grid, n, weighted>(tile, float_of_half_bits(half) * tile.per_unit);
        const I32 better = error < least;
        best = select(better, half, best);
        least = select(better, error, least);
    }
    return best;
}

// Codes of the weights, given the scale in units of the tile.
template <class Grid, size_t n>
LANES_INLINE void round_to_codes(const Tile<n>& tile, F32 scale, I32* codes) {
    const F32 inverse = inverse_or_zero(scale) * splat(Grid::kPerStep);
    for (size_t j = 0; j < n; ++j) codes[j] = Grid::code(Grid::bounded(tile.value[j] * inverse));
}

// Codes of 4 bits → n / 8 words per lane, little-endian: byte j is codes j (low) and j + n / 2 (high).
template <size_t n>
LANES_INLINE void pack_nibbles(const I32* codes, int32_t words[][kLanes]) {
    for (size_t word = 0; word < n / 8; ++word) {
        I32 packed = splat(0);
        for (size_t i = 0; i < 4; ++i) {
            const I32 byte = codes[4 * word + i] | (codes[4 * word + i + n / 2] << 4);
            packed = packed | (byte << int(8 * i));
        }
        store(packed, words[word]);
    }
}

}  // namespace lowbit::LOWBIT_ISA::one_scale
