// K-quants: super-blocks of 256 weights whose sub-blocks have integer scales (and minima) of their own.
//
//   Q2_K   uint8 scales[16]; uint8 qs[64]; half d, dmin                  x = d·s·q − dmin·m        2.625 bits per weight
//   Q3_K   uint8 hmask[32]; uint8 qs[64]; uint8 scales[12]; half d       x = d·(s − 32)·(q − 4)    3.4375
//   Q4_K   half d, dmin; uint8 scales[12]; uint8 qs[128]                 x = d·s·q − dmin·m        4.5
//   Q5_K   half d, dmin; uint8 scales[12]; uint8 qh[32]; uint8 qs[128]   x = d·s·q − dmin·m        5.5
//   Q6_K   uint8 ql[128]; uint8 qh[64]; int8 scales[16]; half d          x = d·s·(q − 32)          6.5625
//
// Sub-blocks have 16 weights in Q2_K, Q3_K and Q6_K and 32 in Q4_K and Q5_K. kquants_decode.cpp and kquants_pack.hpp say
// where each bit lies.
#pragma once

#include "families.hpp"

namespace lowbit::LOWBIT_ISA {

constexpr size_t kSuper = 256;
constexpr float kInfinity = __builtin_inff();

void decode_q2_k(const uint8_t* blocks, size_t count, float* weights);
void decode_q3_k(const uint8_t* blocks, size_t count, float* weights);
void decode_q4_k(const uint8_t* blocks, size_t count, float* weights);
void decode_q5_k(const uint8_t* blocks, size_t count, float* weights);
void decode_q6_k(const uint8_t* blocks, size_t count, float* weights);

void encode_q2_k(const GgmlRows& rows, uint8_t* blocks);
void encode_q3_k(const GgmlRows& rows, uint8_t* blocks);
void encode_q4_k(const GgmlRows& rows, uint8_t* blocks);
void encode_q5_k(const GgmlRows& rows, uint8_t* blocks);
void encode_q6_k(const GgmlRows& rows, uint8_t* blocks);

// Sixteen super-blocks, one per lane.
struct Tile {
    F32 x[kSuper];       // weights
    F32 weight[kSuper];  // of their squared errors
};

// Codes and parameters of sixteen super-blocks, one per lane. All codes and sub-scales are what is stored: not negative,
// except Q6_K's scales.
struct Packed {
    I32 codes[kSuper];
    I32 scales[16];
    I32 minima[16];
    I32 d, dmin;  // bits of halves
};

// Super-blocks `first` … of `rows`; lanes past the last one hold zeros. Errors are weighed with the importance relative to
// the super-block's mean; without importance, with sqrt(mean x² + x²).
void load_tile(const GgmlRows& rows, size_t first, size_t total, Tile& tile);

// Tiles of `rows`, encoded by encode_tile and written by pack.
template <size_t bytes, void (*encode_tile)(const Tile&, Packed&), void (*pack)(const Packed&, size_t, uint8_t*)>
void encode_rows(const GgmlRows& rows, uint8_t* blocks) {
    const size_t total = rows.weights.rows * rows.weights.columns / kSuper;
    Tile tile;
    Packed packed;
    for (size_t first = 0; first < total; first += kLanes) {
        load_tile(rows, first, total, tile);
        encode_tile(tile, packed);
        pack(packed, total - first < kLanes ? total - first : kLanes, blocks + first * bytes);
    }
}

// Half-precision numbers nearest to |v| ≤ 65504 (saturates), as bits, and their values.
LANES_INLINE I32 half_bits(F32 v) {
    float values[kLanes];
    int32_t bits[kLanes];
    store(limit(v, splat(-65504.0f), splat(65504.0f)), values);
    for (size_t i = 0; i < kLanes; ++i) bits[i] = half_of(values[i]);
    return load(bits);
}
LANES_INLINE F32 as_half(F32 v) { return through_half(limit(v, splat(-65504.0f), splat(65504.0f))); }

// A step as a half. Rounded away from 0 where rounding towards it would lose much (v is a few times 2^-24, the least
// half), so that the largest of its multiples does not fall short.
LANES_INLINE F32 step_as_half(F32 v) {
    const F32 half = as_half(v);
    const F32 more = v + select(v < splat(0.0f), splat(-0x1p-25f), splat(0x1p-25f));
    return select(absolute(half) < absolute(v) * splat(0.99609375f), as_half(more), half);
}

// 1 / v, or 0 where v is 0.
LANES_INLINE F32 inverse(F32 v) { return select(v == splat(0.0f), splat(0.0f), splat(1.0f) / v); }

}  // namespace lowbit::LOWBIT_ISA
