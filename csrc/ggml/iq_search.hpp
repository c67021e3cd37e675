// The nearest point of a grid, exactly, for many vectors side by side.
//
// Given a scale, scaled[l] is what level l decodes to, and its cost in column i is w_i (x_i − scaled[l])². The costs
// of all patterns of a half point are sums of those: tables P (first half) and Q (second half); the cost of a point is
// P[a] + Q[b]. For each a the least Q[b] of the b that complete it takes one minimum per point: Q is positive, so
// floats compare like their bits, and its last 7 bits are replaced by b, by which the minimum says whose it is (this
// changes a cost by 2^-16 of itself at most). Ties go to the smaller b and to the a that is earlier in IqGrid::first.
//
// Lanes do not meet, so native vectors are searched two at a time, whichever they are.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "iq_layout.hpp"

namespace lowbit::LOWBIT_ISA {

constexpr float kIqShift = 0.125f;  // IQ1: points are shifted by this much, up or down
constexpr int32_t kIqPatternMask = 127;
constexpr float kIqLeastCost = 1e-30f;  // keeps Q above the denormals

struct Pair {
    NativeF32 a, b;
};
struct IntPair {
    NativeI32 a, b;
};

// The smaller of two positive floats, given as their bits.
LANES_INLINE NativeI32 least_positive(NativeI32 a, NativeI32 b) {
#if defined(__SSE2__) && !defined(__SSE4_1__)
    return NativeI32(_mm_min_ps(__m128(a), __m128(b)));  // has no minimum of integers
#else
    return a < b ? a : b;
#endif
}

LANES_INLINE NativeF32 native(float value) { return NativeF32{} + value; }
LANES_INLINE NativeI32 native(int32_t value) { return NativeI32{} + value; }

LANES_INLINE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
// w (x − level)²
LANES_INLINE Pair cost_of(Pair x, Pair w, Pair level) {
    const NativeF32 a = x.a - level.a, b = x.b - level.b;
    return {a * a * w.a, b * b * w.b};
}

// Costs of all patterns of `columns` columns, [levels^columns].
template <size_t columns, size_t levels>
LANES_INLINE void pattern_costs(const Pair* x, const Pair* w, const Pair* scaled, Pair* costs) {
    if constexpr (columns == 2) {
        Pair low[levels];
        for (size_t l = 0; l < levels; ++l)
            low[l] = cost_of(x[0], w[0], scaled[l]) + Pair{native(kIqLeastCost), native(kIqLeastCost)};
        for (size_t h = 0; h < levels; ++h) {
            const Pair high = cost_of(x[1], w[1], scaled[h]);
            for (size_t l = 0; l < levels; ++l) costs[h * levels + l] = low[l] + high;
        }
    } else {
        constexpr size_t squared = levels * levels;
        Pair low[squared], high[squared];
        pattern_costs<2, levels>(x, w, scaled, low);
        pattern_costs<2, levels>(x + 2, w + 2, scaled, high);
        for (size_t h = 0; h < squared; ++h)
            for (size_t l = 0; l < squared; ++l) costs[h * squared + l] = low[l] + high[h];
    }
}

struct IqFound {
    IntPair first, second;  // patterns of the halves
    Pair cost;
};

// The least P[a] + Q[b] over the points of the grid.
template <size_t patterns>
LANES_INLINE IqFound search(const IqGrid& grid, const Pair* p, const Pair* q) {
    IntPair keys[patterns];
    for (size_t b = 0; b < patterns; ++b) {
        const NativeI32 number = native(int32_t(b)), mask = native(~kIqPatternMask);
        keys[b] = {(NativeI32(q[b].a) & mask) | number, (NativeI32(q[b].b) & mask) | number};
    }
    IqFound found{};
    IntPair best = {native(int32_t(0x7f7fffff)), native(int32_t(0x7f7fffff))};
    constexpr size_t scale = sizeof(IntPair) / 32;
    const auto key = [&keys](uint16_t at) {
        return reinterpret_cast<const IntPair*>(reinterpret_cast<const uint8_t*>(keys) + at * scale);
    };
    const uint16_t* second = grid.second;
    for (size_t i = 0; i < grid.firsts; ++i) {
        const size_t first = grid.first[i];
        const uint16_t* const end = second + grid.count[i];
        IntPair least = *key(*second);
        do {
            for (size_t m = 0; m < 4; ++m) {
                least.a = least_positive(least.a, key(second[m])->a);
                least.b = least_positive(least.b, key(second[m])->b);
            }
            second += 4;
        } while (second != end);
        const NativeI32 cost_a = NativeI32(p[first].a + NativeF32(least.a));
        const NativeI32 cost_b = NativeI32(p[first].b + NativeF32(least.b));
        const NativeI32 better_a = best.a > cost_a, better_b = best.b > cost_b;
        const NativeI32 number = native(int32_t(first));
        best = {least_positive(best.a, cost_a), least_positive(best.b, cost_b)};
        found.first = {better_a ? number : found.first.a, better_b ? number : found.first.b};
        found.second = {better_a ? least.a : found.second.a, better_b ? least.b : found.second.b};
    }
    found.cost = {NativeF32(best.a), NativeF32(best.b)};
    const NativeI32 mask = native(kIqPatternMask);
    found.second = {found.second.a & mask, found.second.b & mask};
    return found;
}

}  // namespace lowbit::LOWBIT_ISA
