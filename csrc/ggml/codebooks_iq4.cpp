// Encoders of IQ4_NL and IQ4_XS: the scale of 32 weights, and of eight such sub-blocks jointly.
//
// IQ4_NL: every scale that brings the weight of largest magnitude to one of a row of places, on either side because the
// values are not symmetric; each with the best scale for the codes it leads to; the best of them refined by rounding
// anew; then the half of least error near it.
//
// IQ4_XS: the same search for each sub-block alone. Then d: the sub-block of largest scale is given each of a row of
// integers (and fractions, which align the others differently), each d rounded to half, each sub-block's integer chosen
// by exact error among the three nearest its own best. The best d is refined: least squares of d given all codes and
// integers, and the choice of integers again.

#include "codebooks.hpp"

namespace lowbit::LOWBIT_ISA {
using namespace one_scale;

namespace {

constexpr size_t kBlock = 32;
constexpr size_t kSubBlocks = 8;

// Nearest of the 16 values. Places are in steps of 11, less than the least distance between two midpoints, so that at
// most one midpoint lies within half a step of an integer. Tables by integer modulo 32: that midpoint, and the values
// and codes below and above it.
struct Iq4Tables {
    float midpoint[32], below[32], above[32];
    int32_t code_below[32];
};

constexpr Iq4Tables make_tables() {
    Iq4Tables tables{};
    for (int place = -16; place < 16; ++place) {
        int code = 0;  // the one nearest to the low edge of the place
        const float edge = (float(place) - 0.5f) * 11.0f;
        while (code < 15 && float(kIq4Values[code] + kIq4Values[code + 1]) * 0.5f < edge) ++code;
        const int next = code < 15 ? code + 1 : 15;
        const int at = place & 31;
        tables.midpoint[at] = float(kIq4Values[code] + kIq4Values[next]) * 0.5f * (1.0f / 11.0f);
        tables.below[at] = kIq4Values[code];
        tables.above[at] = kIq4Values[next];
        tables.code_below[at] = code;
    }
    return tables;
}
constexpr Iq4Tables kTables = make_tables();

struct Iq4Grid {
    static constexpr float kPerStep = 1.0f / 11.0f;
    static constexpr bool kScanClamped = false;

    static LANES_INLINE F32 bounded(F32 place) { return limit(place, splat(-15.0f), splat(15.0f)); }
    // |place| < 15.5
    static LANES_INLINE F32 value(F32 place) {
        const I32 at = bits_of(place + splat(kLaneRounder));
        return select(place > lookup32(kTables.midpoint, at), lookup32(kTables.above, at), lookup32(kTables.below, at));
    }
    static LANES_INLINE I32 code(F32 place) {
        const I32 at = bits_of(place + splat(kLaneRounder));
        int32_t places[kLanes], codes[kLanes];
        store(at, places);
        for (size_t i = 0; i < kLanes; ++i) codes[i] = kTables.code_below[places[i] & 31];
        const I32 more = place > lookup32(kTables.midpoint, at);
        return larger(smaller(load(codes) - more, splat(15)), splat(0));
    }
};

// Places of the weight of largest magnitude, beyond the ends of the values too: a large weight may matter little.
constexpr float kEnds[] = {
    -170, -162, -155, -149, -144, -140, -136, -132, -128, -124, -120, -116, -112, -108, -104, -99, -94, -88, -82,
    -76,
    74, 80, 86, 92, 97, 102, 106, 110, 113, 116, 120, 124, 128, 132, 136, 141, 146, 152, 160,
};
constexpr size_t kEndCount = sizeof kEnds / sizeof kEnds[0];
constexpr int kSteps = 2;

template <bool weighted>
void encode_nl(const GgmlRows& rows, uint8_t* blocks) {
    const size_t count = rows.weights.rows * rows.weights.columns / kBlock;
    for (size_t first = 0; first < count; first += kLanes) {
        Tile<kBlock> tile;
        load_tile<kBlock, 1, weighted>(rows, first, count, &tile);
        const Fit fit = search_scale<Iq4Grid, kBlock, weighted>(tile, kEnds, kEndCount, kSteps);
        const I32 half = best_half<Iq4Grid, kBlock, weighted>(tile, fit.scale);
        I32 codes[kBlock];
        round_to_codes<Iq4Grid>(tile, float_of_half_bits(half) * tile.per_unit, codes);
        int32_t words[4][kLanes], halves[kLanes];
        pack_nibbles<kBlock>(codes, words);
        store(half, halves);
        for (size_t lane = 0; lane < kLanes && first + lane < count; ++lane) {
            uint8_t* block = blocks + (first + lane) * 18;
            const uint16_t d = uint16_t(halves[lane]);
            std::memcpy(block, &d, 2);
            for (size_t word = 0; word < 4; ++word) std::memcpy(block + 2 + 4 * word, &words[word][lane], 4);
        }
    }
}

// Places of the largest sub-block scale, in steps of d.
constexpr float kScalePlaces[] = {-33, -32.5f, -32, -31.5f, -31, -30.5f, -30, -29.5f,
                                  -29, -28.5f, -28, -27,    -26, -25,    -24, -22};
constexpr int kRefinements = 2;

// A choice of d and of the sub-blocks' integers: d as half bits, equal in the lanes of a super-block; the integer of
// each lane; the super-block's error.
struct Joint {
    I32 half, integer;
    F32 error;
};

template <bool weighted>
LANES_INLINE Joint choose_integers(const Tile<kBlock>& tile, F32 d_wanted, F32 scale) {
    const I32 half = half_bits(d_wanted * tile.unit);
    const F32 d = float_of_half_bits(half) * tile.per_unit;
    const F32 nearest_place = nearest(clamp(scale * inverse_or_zero(d), splat(-32.0f), splat(31.0f)));
    F32 integer = nearest_place, least = squared_error<Iq4Grid, kBlock, weighted>(tile, d * nearest_place);
    for (int step = -1; step <= 1; step += 2) {
        const F32 tried = clamp(nearest_place + splat(float(step)), splat(-32.0f), splat(31.0f));
        const F32 error = squared_error<Iq4Grid, kBlock, weighted>(tile, d * tried);
        const I32 better = error < least;
        integer = select(better, tried, integer);
        least = select(better, error, least);
    }
    return {half, nearest_int(integer), sum_of_runs<kSubBlocks>(least)};
}

LANES_INLINE void keep_better(const Joint& joint, Joint* best) {
    const I32 better = joint.error < best->error;
    best->half = select(better, joint.half, best->half);
    best->integer = select(better, joint.integer, best->integer);
    best->error = select(better, joint.error, best->error);
}

// Least squares of d given integers and the codes they lead to.
template <bool weighted>
LANES_INLINE F32 fit_super_scale(const Tile<kBlock>& tile, const Joint& joint) {
    const F32 integer = to_float(joint.integer);
    const F32 scale = float_of_half_bits(joint.half) * tile.per_unit * integer;
    const Fit fit = fit_scale<Iq4Grid, kBlock, weighted, true>(tile, inverse_or_zero(scale) * splat(Iq4Grid::kPerStep));
    const F32 xv = sum_of_runs<kSubBlocks>(fit.scale * fit.curvature * integer);
    const F32 vv = sum_of_runs<kSubBlocks>(fit.curvature * integer * integer);
    return xv * inverse_or_zero(vv);
}

// The scale of largest magnitude of each super-block's eight.
LANES_INLINE F32 largest_scale(F32 scale) {
    float lanes[kLanes];
    store(scale, lanes);
    for (size_t first = 0; first < kLanes; first += kSubBlocks) {
        float most = lanes[first];
        for (size_t i = 1; i < kSubBlocks; ++i)
            most = __builtin_fabsf(lanes[first + i]) > __builtin_fabsf(most) ? lanes[first + i] : most;
        for (size_t i = 0; i < kSubBlocks; ++i) lanes[first + i] = most;
    }
    return load(lanes);
}

template <bool weighted>
void encode_xs(const GgmlRows& rows, uint8_t* blocks) {
    const size_t count = rows.weights.rows * rows.weights.columns / kBlock;
    for (size_t first = 0; first < count; first += kLanes) {
        Tile<kBlock> tile;
        load_tile<kBlock, kSubBlocks, weighted>(rows, first, count, &tile);
        const F32 scale = search_scale<Iq4Grid, kBlock, weighted>(tile, kEnds, kEndCount, kSteps).scale;
        const F32 largest = largest_scale(scale);
        Joint best = choose_integers<weighted>(tile, largest * splat(1.0f / kScalePlaces[0]), scale);
        for (size_t c = 1; c < sizeof kScalePlaces / sizeof kScalePlaces[0]; ++c)
            keep_better(choose_integers<weighted>(tile, largest * splat(1.0f / kScalePlaces[c]), scale), &best);
        for (int step = 0; step < kRefinements; ++step)
            keep_better(choose_integers<weighted>(tile, fit_super_scale<weighted>(tile, best), scale), &best);

        I32 codes[kBlock];
        const F32 d = float_of_half_bits(best.half) * tile.per_unit;
        round_to_codes<Iq4Grid>(tile, d * to_float(best.integer), codes);
        int32_t words[4][kLanes], halves[kLanes], integers[kLanes];
        pack_nibbles<kBlock>(codes, words);
        store(best.half, halves);
        store(best.integer, integers);
        for (size_t from = 0; from < kLanes && first + from < count; from += kSubBlocks) {
            uint8_t* block = blocks + (first + from) / kSubBlocks * 136;
            const uint16_t half = uint16_t(halves[from]);
            uint16_t high = 0;
            uint8_t low[4] = {0, 0, 0, 0};
            for (size_t i = 0; i < kSubBlocks; ++i) {
                const int stored = integers[from + i] + 32;
                low[i / 2] = uint8_t(low[i / 2] | (stored & 15) << (4 * (i % 2)));
                high = uint16_t(high | (stored >> 4) << (2 * i));
                for (size_t word = 0; word < 4; ++word)
                    std::memcpy(block + 8 + 16 * i + 4 * word, &words[word][from + i], 4);
            }
            std::memcpy(block, &half, 2);
            std::memcpy(block + 2, &high, 2);
            std::memcpy(block + 4, low, 4);
        }
    }
}

}  // namespace

void encode_iq4_nl(const GgmlRows& rows, uint8_t* blocks) {
    rows.importance ? encode_nl<true>(rows, blocks) : encode_nl<false>(rows, blocks);
}
void encode_iq4_xs(const GgmlRows& rows, uint8_t* blocks) {
    rows.importance ? encode_xs<true>(rows, blocks) : encode_xs<false>(rows, blocks);
}

}  // namespace lowbit::LOWBIT_ISA
