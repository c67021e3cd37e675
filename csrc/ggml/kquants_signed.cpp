// Encoders of Q3_K and Q6_K: x = d·s·q, q and s signed, least Σ weight · (x − x̂)² over a super-block.
//
// As kquants_affine.cpp, without minima: scales of either sign for every sub-block, d by the quadratics of the errors,
// neighbouring sub-scales by the exact error, d by least squares, neighbours again. There are as many codes and scales
// below zero as there are from zero on, so which end the largest weight is given to matters: both are tried.

#include "kquants_pack.hpp"

namespace lowbit::LOWBIT_ISA {
namespace {

constexpr size_t kGroups = 16, kSize = 16;
constexpr int kRounds = 1;  // of new d

// What a type fixes (codes −codes … codes − 1, sub-scales −scales … scales − 1) and how far to search.
struct SignedKind {
    float codes, scales;
    int least_top;       // the largest sub-scale of a super-block is one of scales … least_top
    int overhangs;       // how many of these
    float overhang[12];  // where the weight of largest magnitude may lie, in codes beyond the last code
};

// Σ weight·q², Σ weight·q·x
struct Sums {
    F32 qq, qx;
};

template <SignedKind kind>
LANES_INLINE F32 code(F32 x, F32 factor) {
    return nearest(limit(x * factor, splat(-kind.codes), splat(kind.codes - 1.0f)));
}

template <SignedKind kind>
LANES_INLINE Sums sums_of_codes(const F32* x, const F32* weight, F32 factor) {
    Sums s = {splat(0.0f), splat(0.0f)};
    for (size_t j = 0; j < kSize; ++j) {
        const F32 q = code<kind>(x[j], factor), wq = weight[j] * q;
        s.qq = s.qq + wq * q;
        s.qx = s.qx + wq * x[j];
    }
    return s;
}

struct Fit {
    F32 scale, curvature;
};

template <SignedKind kind>
LANES_INLINE void improve(Fit& fit, F32& gain, const F32* x, const F32* weight, F32 factor) {
    const Sums s = sums_of_codes<kind>(x, weight, factor);
    const F32 scale = s.qx / s.qq, now = scale * s.qx;  // a NaN of 0 / 0 is not better
    const I32 better = now > gain;
    gain = select(better, now, gain);
    fit.scale = select(better, scale, fit.scale);
    fit.curvature = select(better, s.qq, fit.curvature);
}

template <SignedKind kind>
LANES_INLINE Fit fit_group(const F32* x, const F32* weight) {
    F32 extreme = x[0];
    for (size_t j = 1; j < kSize; ++j) extreme = select(absolute(x[j]) > absolute(extreme), x[j], extreme);
    const F32 per_extreme = inverse(extreme);
    Fit fit = {splat(0.0f), splat(0.0f)};
    F32 gain = splat(0.0f);
    for (int k = 0; k < kind.overhangs; ++k)
        improve<kind>(fit, gain, x, weight, per_extreme * splat(-kind.codes - kind.overhang[k]));
    for (int k = 0; k < kind.overhangs; ++k)
        improve<kind>(fit, gain, x, weight, per_extreme * splat(kind.codes - 1.0f + kind.overhang[k]));
    improve<kind>(fit, gain, x, weight, inverse(fit.scale));
    return fit;
}

// The step whose multiples −top … top − 1 lie nearest to the scales, tried with the largest scale at −top … −least_top
// and least_top … top − 1 steps.
template <SignedKind kind>
LANES_INLINE F32 best_step(const Fit* fits) {
    F32 extreme = fits[0].scale;
    for (size_t g = 1; g < kGroups; ++g)
        extreme = select(absolute(fits[g].scale) > absolute(extreme), fits[g].scale, extreme);
    const F32 scaled = inverse(extreme);
    F32 least = splat(kInfinity), best = splat(0.0f);
    const int top = int(kind.scales);
    for (int k = 0; k < 2 * (top - kind.least_top) + 1; ++k) {
        const int steps = k % 2 ? top - (k + 1) / 2 : k / 2 - top;
        const F32 factor = scaled * splat(float(steps)), step = extreme / splat(float(steps));
        F32 error = splat(0.0f);
        for (size_t g = 0; g < kGroups; ++g) {
            const F32 s = nearest(limit(fits[g].scale * factor, splat(-kind.scales), splat(kind.scales - 1.0f)));
            const F32 off = fits[g].scale - s * step;
            error = error + fits[g].curvature * off * off;
        }
        const I32 better = error < least;
        least = select(better, error, least);
        best = select(better, step, best);
    }
    return step_as_half(best);
}

template <SignedKind kind>
LANES_INLINE F32 rounding_error(const F32* x, const F32* weight, F32 scale) {
    const F32 factor = inverse(scale);
    F32 error = splat(0.0f);
    for (size_t j = 0; j < kSize; ++j) {
        const F32 off = code<kind>(x[j], factor) * scale - x[j];
        error = error + weight[j] * off * off;
    }
    return error;
}

struct Choice {
    F32 d, error;
    F32 scales[kGroups];
};

template <SignedKind kind>
void choose_group(const F32* x, const F32* weight, F32 d, F32& scale, F32& error) {
    const F32 s = scale, lowest = splat(-kind.scales), highest = splat(kind.scales - 1.0f);
    error = rounding_error<kind>(x, weight, d * s);
    for (int step = -1; step <= 1; step += 2) {
        const F32 near = limit(s + splat(float(step)), lowest, highest);
        const F32 now = rounding_error<kind>(x, weight, d * near);
        const I32 better = now < error;
        error = select(better, now, error);
        scale = select(better, near, scale);
    }
}

template <SignedKind kind>
void encode_tile(const Tile& tile, Packed& packed) {
    const F32 zero = splat(0.0f);
    Fit fits[kGroups];
    for (size_t g = 0; g < kGroups; ++g) fits[g] = fit_group<kind>(tile.x + g * kSize, tile.weight + g * kSize);
    Choice now, best{};
    best.error = splat(kInfinity);
    now.d = best_step<kind>(fits);
    for (size_t g = 0; g < kGroups; ++g)
        now.scales[g] = nearest(limit(fits[g].scale * inverse(now.d), splat(-kind.scales), splat(kind.scales - 1.0f)));
    for (int round = 0;; ++round) {
        F32 error = zero;
        for (size_t g = 0; g < kGroups; ++g) {
            F32 group_error;
            choose_group<kind>(tile.x + g * kSize, tile.weight + g * kSize, now.d, now.scales[g], group_error);
            error = error + group_error;
        }
        const I32 better = error < best.error;
        best.error = select(better, error, best.error);
        best.d = select(better, now.d, best.d);
        for (size_t g = 0; g < kGroups; ++g) best.scales[g] = select(better, now.scales[g], best.scales[g]);
        if (round == kRounds) break;
        F32 ss = zero, sx = zero;
        for (size_t g = 0; g < kGroups; ++g) {
            const F32 s = now.scales[g];
            const Sums sums = sums_of_codes<kind>(tile.x + g * kSize, tile.weight + g * kSize, inverse(now.d * s));
            ss = ss + s * s * sums.qq;
            sx = sx + s * sums.qx;
        }
        now.d = as_half(select(ss > zero, sx / ss, now.d));
    }
    for (size_t g = 0; g < kGroups; ++g) {
        const F32 factor = inverse(best.d * best.scales[g]);
        for (size_t j = 0; j < kSize; ++j)
            packed.codes[g * kSize + j] =
                nearest_int(code<kind>(tile.x[g * kSize + j], factor) + splat(kind.codes));
        packed.scales[g] = nearest_int(best.scales[g]);
        if (kind.scales < 128.0f) packed.scales[g] = packed.scales[g] + splat(int32_t(kind.scales));
    }
    packed.d = half_bits(best.d);
}

constexpr SignedKind kQ3 = {
    4.0f, 32.0f, 16, 9, {-0.6f, -0.1f, 0.4f, 0.9f, 1.4f, 2.0f, 2.7f, 3.5f, 4.6f},
};
constexpr SignedKind kQ6 = {
    32.0f, 128.0f, 108, 6, {-0.7f, -0.3f, 0.1f, 0.5f, 1.0f, 2.0f},
};

}  // namespace

void encode_q3_k(const GgmlRows& rows, uint8_t* blocks) { encode_rows<110, encode_tile<kQ3>, pack_q3_k>(rows, blocks); }
void encode_q6_k(const GgmlRows& rows, uint8_t* blocks) { encode_rows<210, encode_tile<kQ6>, pack_q6_k>(rows, blocks); }

}  // namespace lowbit::LOWBIT_ISA
