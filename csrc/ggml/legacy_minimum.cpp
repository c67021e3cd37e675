// Encoders of Q4_1 and Q5_1: a scale and a minimum, x ≈ d · q + m with q in 0 … 15 or 0 … 31 and d ≥ 0.
//
// Ranges are tried that begin and end somewhat within or beyond the smallest and the largest weight. Each leads to
// codes; for codes q the best d and m are the weighted least-squares line, from sums about the weighted mean c:
//
//   d = (W·Σ w·q·y − Σ w·q · Σ w·y) / (W·Σ w·q·q − (Σ w·q)²),  m = (Σ w·y − d·Σ w·q) / W,  y = x − c, W = Σ w
//
// The best is refined by rounding anew. Then d is rounded to half, three ways, each with the m that is best for it.

#include "legacy.hpp"

namespace lowbit::LOWBIT_ISA {

using namespace one_scale;

namespace {

constexpr size_t kBlock = kLegacyBlock;

// Where the ranges begin and end, as parts of (largest − smallest) within them.
constexpr float kTrims4[] = {-0.06f, -0.03f, 0, 0.03f, 0.06f, 0.09f, 0.13f, 0.18f, 0.25f};
constexpr float kTrims5[] = {-0.06f, -0.045f, -0.03f, -0.015f, 0, 0.01f, 0.025f, 0.045f, 0.08f};
constexpr int kSteps = 2;

// A line in units of the tile, about the mean, and what it explains of Σ w·y·y.
struct Line {
    F32 scale, minimum, gain;
};

// What does not depend on codes.
struct Moments {
    F32 weight, per_weight, first;  // Σ w, its inverse, Σ w·y
};

template <int highest>
using Grid = IntegerGrid<0, highest>;

template <int highest, bool weighted>
LANES_INLINE Line fit_line(const Tile<kBlock>& tile, const Moments& moments, F32 minimum, F32 inverse) {
    F32 q1 = splat(0.0f), q2 = splat(0.0f), qy = splat(0.0f);
    for (size_t j = 0; j < kBlock; ++j) {
        const F32 q = nearest(Grid<highest>::bounded((tile.value[j] - minimum) * inverse));
        const F32 wq = weighted ? tile.importance[j] * q : q;
        q1 = q1 + wq;
        q2 = q2 + wq * q;
        qy = qy + wq * tile.value[j];
    }
    const F32 slope = qy - q1 * moments.per_weight * moments.first;
    const F32 spread = q2 - q1 * moments.per_weight * q1;
    // a spread that is nothing but rounding (all codes equal) has no slope
    const F32 scale = select(spread > q2 * splat(1e-5f), slope * inverse_or_zero(spread), splat(0.0f));
    return {scale, (moments.first - scale * q1) * moments.per_weight, scale * slope};
}

LANES_INLINE void keep_better(const Line& line, Line* best) {
    const I32 better = line.gain > best->gain;
    best->scale = select(better, line.scale, best->scale);
    best->minimum = select(better, line.minimum, best->minimum);
    best->gain = select(better, line.gain, best->gain);
}

// Halves of scale and minimum, and the error with them.
struct Stored {
    I32 scale, minimum;
    F32 error;
};

// A scale given as half: the minimum best for the codes it leads to, as half, and the error of the codes these lead to.
template <int highest, bool weighted>
LANES_INLINE Stored with_half_scale(const Tile<kBlock>& tile, const Moments& moments, F32 center, I32 half,
                                    F32 minimum) {
    const F32 scale = float_of_half_bits(half) * tile.per_unit, inverse = inverse_or_zero(scale);
    F32 rest = splat(0.0f);
    for (size_t j = 0; j < kBlock; ++j) {
        const F32 q = nearest(Grid<highest>::bounded((tile.value[j] - minimum) * inverse));
        const F32 off = tile.value[j] - scale * q;
        rest = rest + (weighted ? tile.importance[j] * off : off);
    }
    const I32 minimum_half = half_bits((rest * moments.per_weight + center) * tile.unit);
    const F32 kept = float_of_half_bits(minimum_half) * tile.per_unit - center;
    F32 error = splat(0.0f);
    for (size_t j = 0; j < kBlock; ++j) {
        const F32 above = tile.value[j] - kept;
        const F32 off = above - scale * nearest(Grid<highest>::bounded(above * inverse));
        error = error + (weighted ? tile.importance[j] * off : off) * off;
    }
    return {half, minimum_half, error};
}

// Takes the weighted mean off the weights and returns it.
template <bool weighted>
LANES_INLINE F32 center_tile(Tile<kBlock>* tile, Moments* moments) {
    F32 weight = splat(0.0f), sum = splat(0.0f), first = splat(0.0f);
    for (size_t j = 0; j < kBlock; ++j) {
        weight = weight + (weighted ? tile->importance[j] : splat(1.0f));
        sum = sum + (weighted ? tile->importance[j] * tile->value[j] : tile->value[j]);
    }
    const F32 per_weight = splat(1.0f) / weight, center = sum * per_weight;
    for (size_t j = 0; j < kBlock; ++j) {
        tile->value[j] = tile->value[j] - center;
        first = first + (weighted ? tile->importance[j] * tile->value[j] : tile->value[j]);
    }
    *moments = {weight, per_weight, first};
    return center;
}

template <int bits, bool weighted, size_t trims>
LANES_INLINE void encode(const GgmlRows& rows, const float (&parts)[trims], uint8_t* blocks) {
    constexpr int highest = (1 << bits) - 1;
    constexpr size_t kBytes = bits == 4 ? 20 : 24;
    const size_t count = rows.weights.rows * rows.weights.columns / kBlock;
    for (size_t first = 0; first < count; first += kLanes) {
        Tile<kBlock> tile;
        load_tile<kBlock, 1, weighted>(rows, first, count, &tile);
        Moments moments;
        const F32 center = center_tile<weighted>(&tile, &moments);
        F32 low = tile.value[0], high = tile.value[0];
        for (size_t j = 1; j < kBlock; ++j) {
            low = smaller(low, tile.value[j]);
            high = larger(high, tile.value[j]);
        }
        const F32 range = high - low, per_range = inverse_or_zero(range) * splat(float(highest));
        Line best{splat(0.0f), low, splat(0.0f)};
        for (size_t a = 0; a < trims; ++a)
            for (size_t b = 0; b < trims; ++b)
                keep_better(fit_line<highest, weighted>(tile, moments, low + range * splat(parts[a]),
                                                        per_range * splat(1.0f / (1.0f - parts[a] - parts[b]))),
                            &best);
        for (int step = 0; step < kSteps; ++step)
            keep_better(fit_line<highest, weighted>(tile, moments, best.minimum, inverse_or_zero(best.scale)), &best);

        const I32 middle = half_bits(best.scale * tile.unit);
        Stored stored = with_half_scale<highest, weighted>(tile, moments, center, middle, best.minimum);
        for (int32_t step = -1; step <= 1; step += 2) {
            const I32 half = smaller(larger(middle + splat(step), splat(0)), splat(0x7bff));
            const Stored other = with_half_scale<highest, weighted>(tile, moments, center, half, best.minimum);
            const I32 better = other.error < stored.error;
            stored.scale = select(better, other.scale, stored.scale);
            stored.minimum = select(better, other.minimum, stored.minimum);
            stored.error = select(better, other.error, stored.error);
        }

        const F32 inverse = inverse_or_zero(float_of_half_bits(stored.scale) * tile.per_unit);
        const F32 kept = float_of_half_bits(stored.minimum) * tile.per_unit - center;
        I32 codes[kBlock];
        for (size_t j = 0; j < kBlock; ++j)
            codes[j] = nearest_int(Grid<highest>::bounded((tile.value[j] - kept) * inverse));
        PackedCodes packed;
        int32_t scales[kLanes], minimums[kLanes];
        pack_codes<bits>(codes, &packed);
        store(stored.scale, scales);
        store(stored.minimum, minimums);
        for (size_t lane = 0; lane < kLanes && first + lane < count; ++lane) {
            uint8_t* block = blocks + (first + lane) * kBytes;
            const uint16_t params[2] = {uint16_t(scales[lane]), uint16_t(minimums[lane])};
            std::memcpy(block, params, 4);
            store_codes<bits>(packed, lane, block + 4);
        }
    }
}

}  // namespace

void encode_q4_1(const GgmlRows& rows, uint8_t* blocks) {
    rows.importance ? encode<4, true>(rows, kTrims4, blocks) : encode<4, false>(rows, kTrims4, blocks);
}
void encode_q5_1(const GgmlRows& rows, uint8_t* blocks) {
    rows.importance ? encode<5, true>(rows, kTrims5, blocks) : encode<5, false>(rows, kTrims5, blocks);
}

}  // namespace lowbit::LOWBIT_ISA
