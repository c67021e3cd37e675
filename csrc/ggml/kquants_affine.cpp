// Encoders of Q2_K, Q4_K and Q5_K: x = d·s·q − dmin·m, least Σ weight · (x − x̂)² over a super-block.
//
// 1. Every sub-block by itself: codes for many ranges, their ends a little inside or outside the range of the weights.
//    Given codes, the best scale and minimum are a least-squares fit, whose error is known without rounding anything.
// 2. d, then dmin: near its best a sub-block's error is a quadratic of its scale, so many d are tried without looking at
//    a weight.
// 3. Neighbouring sub-scales and minima by the exact error; d and dmin by least squares given all else; neighbours
//    again; the best of the rounds is kept.
// numerics/ggml/kquants_search.py says the same in torch and makes the same bytes.

#include "kquants_pack.hpp"

namespace lowbit::LOWBIT_ISA {
namespace {

constexpr int kMost = 6;

// What a type fixes, and how far to search.
struct AffineKind {
    size_t groups;        // sub-blocks
    float codes, scales;  // the largest code; the largest sub-scale and sub-minimum
    int least_top;        // the largest sub-scale of a super-block is one of scales … least_top
    int rounds;           // of new d and dmin
    int ends;
    float end[kMost];  // where the least and the largest weight may lie, in codes from the ends of the codes
    int neighbours;
    int neighbour[kMost][2];  // of sub-scale and sub-minimum, to try
    constexpr size_t size() const { return kSuper / groups; }
};

// A sub-block as it would be with a scale and a minimum of its own, and how the error grows away from that:
//   error(scale, low) = least + curvature · (scale − best)² + weight · (low − (sum_x − scale · sum_q) / weight)²
//   curvature = sum_qq − sum_q² / weight
struct Fit {
    F32 scale, low;  // x ≈ scale · q + low, low ≤ 0
    F32 weight, per_weight, sum_x, sum_q, sum_qq;
};

// What a choice of codes q amounts to: Σ weight·q, Σ weight·q², Σ weight·q·x.
struct Sums {
    F32 q, qq, qx;
};

template <size_t n>
LANES_INLINE Sums sums_of_codes(const F32* x, const F32* weight, F32 factor, F32 shift, F32 most) {
    Sums s = {splat(0.0f), splat(0.0f), splat(0.0f)};
    for (size_t j = 0; j < n; ++j) {
        const F32 q = nearest(limit(x[j] * factor + shift, splat(0.0f), most));
        const F32 wq = weight[j] * q;
        s.q = s.q + wq;
        s.qq = s.qq + wq * q;
        s.qx = s.qx + wq * x[j];
    }
    return s;
}

// The best scale and low for given codes, taken if better than `gain`.
LANES_INLINE void improve(Fit& fit, F32& gain, const Sums& s) {
    const F32 zero = splat(0.0f);
    const F32 determinant = fit.weight * s.qq - s.q * s.q;
    const I32 regular = determinant > splat(1e-5f) * (fit.weight * s.qq);
    F32 scale = (fit.weight * s.qx - fit.sum_x * s.q) / determinant;
    F32 low = (fit.sum_x - scale * s.q) * fit.per_weight;
    const I32 free = regular & (low <= zero);
    scale = select(free, scale, s.qx / s.qq);
    low = select(free, low, zero);
    const F32 now = scale * s.qx + low * fit.sum_x;
    const I32 better = (now > gain) & (scale > zero);
    gain = select(better, now, gain);
    fit.scale = select(better, scale, fit.scale);
    fit.low = select(better, low, fit.low);
    fit.sum_q = select(better, s.q, fit.sum_q);
    fit.sum_qq = select(better, s.qq, fit.sum_qq);
}

template <AffineKind kind>
LANES_INLINE Fit fit_group(const F32* x, const F32* weight) {
    const F32 zero = splat(0.0f), most = splat(kind.codes);
    F32 low = x[0], high = x[0];
    Fit fit = {zero, zero, zero, zero, zero, zero, zero};
    for (size_t j = 0; j < kind.size(); ++j) {
        low = smaller(low, x[j]);
        high = larger(high, x[j]);
        fit.weight = fit.weight + weight[j];
        fit.sum_x = fit.sum_x + weight[j] * x[j];
    }
    low = smaller(low, zero);
    fit.per_weight = inverse(fit.weight);
    fit.low = smaller(fit.sum_x * fit.per_weight, zero);
    F32 gain = fit.low * fit.sum_x;
    const F32 per_range = inverse(high - low);
    for (int first = 0; first < kind.ends; ++first)
        for (int last = 0; last < kind.ends; ++last) {
            const F32 factor = splat(kind.codes - kind.end[last] - kind.end[first]) * per_range;
            const F32 shift = splat(kind.end[first]) - low * factor;
            improve(fit, gain, sums_of_codes<kind.size()>(x, weight, factor, shift, most));
        }
    const F32 factor = inverse(fit.scale);
    improve(fit, gain, sums_of_codes<kind.size()>(x, weight, factor, zero - fit.low * factor, most));
    return fit;
}

// The step whose multiples 0 … top lie nearest to the values ≥ 0: least Σ weight · (value − step · integer)², tried with
// the largest value at top, top − 1, … least_top steps.
template <size_t groups>
LANES_INLINE F32 best_step(const F32* values, const F32* weights, float top, int least_top) {
    F32 largest = values[0];
    for (size_t g = 1; g < groups; ++g) largest = larger(largest, values[g]);
    const F32 scaled = inverse(largest);
    F32 least = splat(kInfinity), best = splat(0.0f);
    for (int steps = int(top); steps >= least_top; --steps) {
        const F32 factor = scaled * splat(float(steps)), step = largest / splat(float(steps));
        F32 error = splat(0.0f);
        for (size_t g = 0; g < groups; ++g) {
            const F32 off = values[g] - nearest(values[g] * factor) * step;
            error = error + weights[g] * off * off;
        }
        const I32 better = error < least;
        least = select(better, error, least);
        best = select(better, step, best);
    }
    return step_as_half(best);
}

// Error of a sub-block rounded to scale · q − minimum.
template <size_t n>
LANES_INLINE F32 rounding_error(const F32* x, const F32* weight, F32 scale, F32 minimum, F32 most) {
    const F32 factor = inverse(scale);
    F32 error = splat(0.0f);
    for (size_t j = 0; j < n; ++j) {
        const F32 above = x[j] + minimum;
        const F32 q = nearest(limit(above * factor, splat(0.0f), most));
        const F32 off = q * scale - above;
        error = error + weight[j] * off * off;
    }
    return error;
}

struct Choice {
    F32 d, dmin, error;
    F32 scales[16], minima[16];
};

template <AffineKind kind>
void choose_group(const F32* x, const F32* weight, F32 d, F32 dmin, F32& scale, F32& minimum, F32& error) {
    const F32 zero = splat(0.0f), most = splat(kind.codes), top = splat(kind.scales);
    const F32 s = scale, m = minimum;
    error = rounding_error<kind.size()>(x, weight, d * s, dmin * m, most);
    for (int k = 0; k < kind.neighbours; ++k) {
        const F32 near_s = limit(s + splat(float(kind.neighbour[k][0])), zero, top);
        const F32 near_m = limit(m + splat(float(kind.neighbour[k][1])), zero, top);
        const F32 now = rounding_error<kind.size()>(x, weight, d * near_s, dmin * near_m, most);
        const I32 better = now < error;
        error = select(better, now, error);
        scale = select(better, near_s, scale);
        minimum = select(better, near_m, minimum);
    }
}

template <AffineKind kind>
void encode_tile(const Tile& tile, Packed& packed) {
    constexpr size_t n = kind.size(), groups = kind.groups;
    const F32 zero = splat(0.0f), most = splat(kind.codes), top = splat(kind.scales);
    F32 values[groups], weights[groups];
    Fit fits[groups];
    for (size_t g = 0; g < groups; ++g) {
        fits[g] = fit_group<kind>(tile.x + g * n, tile.weight + g * n);
        values[g] = fits[g].scale;
        weights[g] = fits[g].sum_qq - fits[g].sum_q * fits[g].sum_q * fits[g].per_weight;
    }
    Choice now;
    now.d = best_step<groups>(values, weights, kind.scales, kind.least_top);
    for (size_t g = 0; g < groups; ++g) {
        const Fit& fit = fits[g];
        now.scales[g] = nearest(smaller(fit.scale * inverse(now.d), top));
        const F32 low = (fit.sum_x - now.d * now.scales[g] * fit.sum_q) * fit.per_weight;
        values[g] = select(low < zero, zero - low, zero);
        weights[g] = fit.weight;
    }
    now.dmin = best_step<groups>(values, weights, kind.scales, kind.least_top);
    for (size_t g = 0; g < groups; ++g) now.minima[g] = nearest(smaller(values[g] * inverse(now.dmin), top));

    Choice best{};
    best.error = splat(kInfinity);
    for (int round = 0;; ++round) {
        F32 error = zero;
        for (size_t g = 0; g < groups; ++g) {
            F32 group_error;
            choose_group<kind>(tile.x + g * n, tile.weight + g * n, now.d, now.dmin, now.scales[g], now.minima[g],
                               group_error);
            error = error + group_error;
        }
        const I32 better = error < best.error;
        best.error = select(better, error, best.error);
        best.d = select(better, now.d, best.d);
        best.dmin = select(better, now.dmin, best.dmin);
        for (size_t g = 0; g < groups; ++g) {
            best.scales[g] = select(better, now.scales[g], best.scales[g]);
            best.minima[g] = select(better, now.minima[g], best.minima[g]);
        }
        if (round == kind.rounds) break;
        // Least squares for d and dmin: Σ weight·(d·s·q − dmin·m − x)²
        F32 ss = zero, sm = zero, mm = zero, sx = zero, mx = zero;
        for (size_t g = 0; g < groups; ++g) {
            const F32 scale = now.d * now.scales[g], minimum = now.dmin * now.minima[g], factor = inverse(scale);
            const Sums sums = sums_of_codes<n>(tile.x + g * n, tile.weight + g * n, factor, minimum * factor, most);
            const F32 s = now.scales[g], m = now.minima[g];
            ss = ss + s * s * sums.qq;
            sm = sm + s * m * sums.q;
            mm = mm + m * m * fits[g].weight;
            sx = sx + s * sums.qx;
            mx = mx + m * fits[g].sum_x;
        }
        const F32 determinant = ss * mm - sm * sm;
        const I32 regular = determinant > splat(1e-5f) * (ss * mm);
        const F32 d = select(regular, (mm * sx - sm * mx) / determinant, sx * inverse(ss));
        const F32 dmin = select(regular, (sm * sx - ss * mx) / determinant, now.dmin);
        now.d = as_half(select(d > zero, d, now.d));
        now.dmin = as_half(select(dmin > zero, dmin, now.dmin));
    }
    for (size_t g = 0; g < groups; ++g) {
        const F32 scale = best.d * best.scales[g], minimum = best.dmin * best.minima[g], factor = inverse(scale);
        for (size_t j = 0; j < n; ++j)
            packed.codes[g * n + j] =
                nearest_int(limit((tile.x[g * n + j] + minimum) * factor, zero, most));
        packed.scales[g] = nearest_int(best.scales[g]);
        packed.minima[g] = nearest_int(best.minima[g]);
    }
    packed.d = half_bits(best.d);
    packed.dmin = half_bits(best.dmin);
}

constexpr AffineKind kQ2 = {
    16, 3.0f, 15.0f, 8, 2, 4, {0.1f, -0.15f, -0.4f, -0.7f},
    6, {{1, 1}, {-1, -1}, {0, 1}, {0, -1}, {1, 0}, {-1, 0}},
};
constexpr AffineKind kQ4 = {
    8, 15.0f, 63.0f, 24, 1, 6, {-1.0f, -0.6f, -0.2f, 0.2f, 0.6f, 1.0f}, 4, {{1, 1}, {-1, -1}, {0, 1}, {0, -1}},
};
constexpr AffineKind kQ5 = {
    8, 31.0f, 63.0f, 24, 1, 6, {-0.55f, -0.3f, -0.05f, 0.2f, 0.45f, 0.7f}, 4, {{1, 1}, {-1, -1}, {0, 1}, {0, -1}},
};

}  // namespace

void encode_q2_k(const GgmlRows& rows, uint8_t* blocks) { encode_rows<84, encode_tile<kQ2>, pack_q2_k>(rows, blocks); }
void encode_q4_k(const GgmlRows& rows, uint8_t* blocks) { encode_rows<144, encode_tile<kQ4>, pack_q4_k>(rows, blocks); }
void encode_q5_k(const GgmlRows& rows, uint8_t* blocks) { encode_rows<176, encode_tile<kQ5>, pack_q5_k>(rows, blocks); }

}  // namespace lowbit::LOWBIT_ISA
