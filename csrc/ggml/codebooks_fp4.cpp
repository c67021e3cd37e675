// Encoders of MXFP4 and NVFP4: values of E2M1 with an 8-bit float as scale, chosen by exact error among neighbours.
//
//   MXFP4   the exponent with which the largest magnitude lies in [4, 8), one less (more is clipped at 6), two more
//   NVFP4   the scale with which the largest magnitude is 6, and the E4M3 numbers around it

#include "codebooks.hpp"

namespace lowbit::LOWBIT_ISA {
using namespace one_scale;

namespace {

// Twice E2M1: 0, 1, 2, 3, 4, 6, 8, 12. Ties go to the even code.
struct Fp4Grid {
    static constexpr float kPerStep = 1.0f;

    static LANES_INLINE F32 bounded(F32 v) { return limit(v, splat(-12.0f), splat(12.0f)); }
    // Adding 1.5 · 2^23 · spacing leaves multiples of the spacing, which is 1, 2 and 4.
    static LANES_INLINE F32 value(F32 v) {
        const F32 magnitude = absolute(v);
        const F32 rounder = select(magnitude < splat(4.0f), splat(kLaneRounder),
                                   select(magnitude < splat(8.0f), splat(2 * kLaneRounder), splat(4 * kLaneRounder)));
        return (v + rounder) - rounder;
    }
    // A zero has code 0, whatever its sign.
    static LANES_INLINE I32 code(F32 v) {
        const I32 doubled = nearest_int(value(v));
        const I32 magnitude = larger(doubled, splat(0) - doubled);
        // 0 to 4 are their own codes; 6, 8, 12 are 5, 6, 7
        const I32 coarse = splat(5) - (magnitude > splat(6)) - (magnitude > splat(8));
        return select(magnitude > splat(4), coarse, magnitude) | ((doubled < splat(0)) & splat(8));
    }
};

template <size_t n>
LANES_INLINE void store_words(const int32_t words[][kLanes], size_t lane, uint8_t* to) {
    for (size_t word = 0; word < n / 8; ++word) std::memcpy(to + 4 * word, &words[word][lane], 4);
}

// Scales of codes, in units of a tile.
template <float (*decode)(uint8_t)>
LANES_INLINE F32 scales_of(I32 codes, F32 per_unit) {
    int32_t lanes[kLanes];
    float scales[kLanes];
    store(codes, lanes);
    for (size_t i = 0; i < kLanes; ++i) scales[i] = decode(uint8_t(lanes[i]));
    return load(scales) * per_unit;
}

// The code of least error among middle + low … middle + high, within 0 … top.
template <float (*decode)(uint8_t), size_t n, bool weighted>
LANES_INLINE I32 best_code(const Tile<n>& tile, I32 middle, int low, int high, int top) {
    I32 best = smaller(larger(middle, splat(0)), splat(top));
    F32 least = squared_error<Fp4Grid, n, weighted>(tile, scales_of<decode>(best, tile.per_unit));
    for (int step = low; step <= high; ++step) {
        if (step == 0) continue;
        const I32 code = smaller(larger(middle + splat(step), splat(0)), splat(top));
        const F32 error = squared_error<Fp4Grid, n, weighted>(tile, scales_of<decode>(code, tile.per_unit));
        const I32 better = error < least;
        best = select(better, code, best);
        least = select(better, error, least);
    }
    return best;
}

float e8m0_half(uint8_t e) { return float_of_e8m0_half(e); }
float ue4m3_half(uint8_t code) { return float_of_ue4m3_half(code); }

template <bool weighted>
void encode_mx(const GgmlRows& rows, uint8_t* blocks) {
    constexpr size_t n = 32;
    constexpr int kTop = 252;  // 12 · 2^(e − 128) is finite
    const size_t count = rows.weights.rows * rows.weights.columns / n;
    for (size_t first = 0; first < count; first += kLanes) {
        Tile<n> tile;
        load_tile<n, 1, weighted>(rows, first, count, &tile);
        // exponent of the largest magnitude − 2 + 127, from the float's biased exponents of its parts
        const I32 unit_field = bits_of(tile.unit) >> 23, field = bits_of(absolute(extreme(tile))) >> 23;
        const I32 zero = field == splat(0);
        const I32 middle = select(zero, splat(0), field + unit_field - splat(127 + 2));
        const I32 e = select(zero, splat(0), best_code<e8m0_half, n, weighted>(tile, middle, -1, 2, kTop));
        I32 codes[n];
        round_to_codes<Fp4Grid>(tile, scales_of<e8m0_half>(e, tile.per_unit), codes);
        int32_t words[n / 8][kLanes], exponents[kLanes];
        pack_nibbles<n>(codes, words);
        store(e, exponents);
        for (size_t lane = 0; lane < kLanes && first + lane < count; ++lane) {
            uint8_t* block = blocks + (first + lane) * 17;
            block[0] = uint8_t(exponents[lane]);
            store_words<n>(words, lane, block + 1);
        }
    }
}

// The code of an E4M3 next to v ≥ 0.
LANES_INLINE I32 ue4m3_near(F32 v) {
    // a normal's code is its exponent and three bits of mantissa; a subnormal counts 2^−9
    const I32 normal = (bits_of(v) >> 20) - splat((127 - 7) << 3);
    const I32 subnormal = nearest_int(smaller(v, splat(1.0f)) * splat(512.0f));
    return select(v < splat(0x1p-6f), subnormal, smaller(normal, splat(0x7e)));
}

template <bool weighted>
void encode_nv(const GgmlRows& rows, uint8_t* blocks) {
    constexpr size_t n = 16, kSubBlocks = 4;
    const size_t count = rows.weights.rows * rows.weights.columns / n;
    for (size_t first = 0; first < count; first += kLanes) {
        Tile<n> tile;
        load_tile<n, 1, weighted>(rows, first, count, &tile);
        const F32 largest = absolute(extreme(tile)) * tile.unit;
        const I32 middle = ue4m3_near(largest * splat(1.0f / 6.0f));
        const I32 scale = select(largest == splat(0.0f), splat(0),
                                 best_code<ue4m3_half, n, weighted>(tile, middle, -6, 6, 0x7e));
        I32 codes[n];
        round_to_codes<Fp4Grid>(tile, scales_of<ue4m3_half>(scale, tile.per_unit), codes);
        int32_t words[n / 8][kLanes], scales[kLanes];
        pack_nibbles<n>(codes, words);
        store(scale, scales);
        for (size_t lane = 0; lane < kLanes && first + lane < count; ++lane) {
            const size_t sub = (first + lane) % kSubBlocks;
            uint8_t* block = blocks + (first + lane) / kSubBlocks * 36;
            block[sub] = uint8_t(scales[lane]);
            store_words<n>(words, lane, block + 4 + 8 * sub);
        }
    }
}

}  // namespace

void encode_mxfp4(const GgmlRows& rows, uint8_t* blocks) {
    rows.importance ? encode_mx<true>(rows, blocks) : encode_mx<false>(rows, blocks);
}
void encode_nvfp4(const GgmlRows& rows, uint8_t* blocks) {
    rows.importance ? encode_nv<true>(rows, blocks) : encode_nv<false>(rows, blocks);
}

}  // namespace lowbit::LOWBIT_ISA
