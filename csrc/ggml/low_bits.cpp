// Types of one and two bits with one scale per block, for models trained so.
//
//   Q1_0   half d; uint8 qs[16]   128 weights ±d         1.125 bits per weight; bit j % 8 of byte j / 8 is 1 for +d
//   Q2_0   half d; uint8 qs[16]   64 weights d·(q − 1)   2.25; q is bits 2·(j % 4), 2·(j % 4) + 1 of byte j / 4
//
// Encoders: the best d of given signs is the weighted mean of |x|. Q2_0 has values −d, 0, d, 2·d, d of either sign: the
// weight of largest magnitude is brought to each of a row of places, and the best of them is refined (one_scale.hpp).

#include "legacy.hpp"

namespace lowbit::LOWBIT_ISA {

using namespace one_scale;

namespace {

constexpr size_t kBlock1 = 128, kBlock2 = 64, kBytes = 18;

// Places of the weight of largest magnitude, in units of d.
constexpr float kEnds2[] = {
    -1.8f, -1.5f, -1.3f, -1.15f, -1, -0.9f, -0.8f, -0.7f, -0.6f,
    0.6f,  0.7f,  0.8f,  0.9f,   1,  1.15f, 1.3f,  1.49f, 1.6f, 1.7f, 1.8f, 1.9f, 2, 2.1f, 2.2f, 2.35f, 2.5f, 2.75f,
    3,     3.5f,
};
constexpr int kSteps = 2;

void store_half(I32 half, size_t first, size_t count, uint8_t* blocks) {
    int32_t halves[kLanes];
    store(half, halves);
    for (size_t lane = 0; lane < kLanes && first + lane < count; ++lane) {
        const uint16_t d = uint16_t(halves[lane]);
        std::memcpy(blocks + (first + lane) * kBytes, &d, 2);
    }
}

// Codes of `bits` bits, in order from the lowest bit of the first byte.
template <size_t n, int bits>
void store_codes(const I32* codes, size_t first, size_t count, uint8_t* blocks) {
    for (size_t word = 0; word < n * bits / 32; ++word) {
        I32 packed = splat(0);
        for (size_t i = 0; i < 32 / bits; ++i) packed = packed | (codes[word * (32 / bits) + i] << int(bits * i));
        int32_t words[kLanes];
        store(packed, words);
        for (size_t lane = 0; lane < kLanes && first + lane < count; ++lane)
            std::memcpy(blocks + (first + lane) * kBytes + 2 + 4 * word, &words[lane], 4);
    }
}

template <bool weighted>
void encode_q1(const GgmlRows& rows, uint8_t* blocks) {
    const size_t count = rows.weights.rows * rows.weights.columns / kBlock1;
    for (size_t first = 0; first < count; first += kLanes) {
        Tile<kBlock1> tile;
        load_tile<kBlock1, 1, weighted>(rows, first, count, &tile);
        F32 sum = splat(0.0f), total = splat(0.0f);
        I32 codes[kBlock1];
        for (size_t j = 0; j < kBlock1; ++j) {
            const F32 magnitude = absolute(tile.value[j]);
            sum = sum + (weighted ? tile.importance[j] * magnitude : magnitude);
            total = total + (weighted ? tile.importance[j] : splat(1.0f));
            codes[j] = (tile.value[j] >= splat(0.0f)) & splat(1);
        }
        store_half(half_bits(sum / total * tile.unit), first, count, blocks);
        store_codes<kBlock1, 1>(codes, first, count, blocks);
    }
}

template <bool weighted>
void encode_q2(const GgmlRows& rows, uint8_t* blocks) {
    using Grid = IntegerGrid<-1, 2>;
    const size_t count = rows.weights.rows * rows.weights.columns / kBlock2;
    for (size_t first = 0; first < count; first += kLanes) {
        Tile<kBlock2> tile;
        load_tile<kBlock2, 1, weighted>(rows, first, count, &tile);
        const size_t ends = sizeof kEnds2 / sizeof kEnds2[0];
        const F32 scale = search_scale<Grid, kBlock2, weighted>(tile, kEnds2, ends, kSteps).scale;
        const I32 half = best_half<Grid, kBlock2, weighted>(tile, scale);
        I32 codes[kBlock2];
        round_to_codes<Grid>(tile, float_of_half_bits(half) * tile.per_unit, codes);
        store_half(half, first, count, blocks);
        store_codes<kBlock2, 2>(codes, first, count, blocks);
    }
}

void encode_q1_0(const GgmlRows& rows, uint8_t* blocks) {
    rows.importance ? encode_q1<true>(rows, blocks) : encode_q1<false>(rows, blocks);
}
void encode_q2_0(const GgmlRows& rows, uint8_t* blocks) {
    rows.importance ? encode_q2<true>(rows, blocks) : encode_q2<false>(rows, blocks);
}

float scale_of(const uint8_t* block) {
    uint16_t half;
    std::memcpy(&half, block, 2);
    return float_of_half(half);
}

void decode_q1_0(const uint8_t* blocks, size_t count, float* weights) {
    for (size_t b = 0; b < count; ++b, blocks += kBytes, weights += kBlock1) {
        const float d = scale_of(blocks);
        for (size_t j = 0; j < kBlock1; ++j) weights[j] = (blocks[2 + j / 8] >> (j % 8)) & 1 ? d : -d;
    }
}

void decode_q2_0(const uint8_t* blocks, size_t count, float* weights) {
    for (size_t b = 0; b < count; ++b, blocks += kBytes, weights += kBlock2) {
        const float d = scale_of(blocks);
        for (size_t j = 0; j < kBlock2; ++j)
            weights[j] = d * float(((blocks[2 + j / 4] >> (2 * (j % 4))) & 3) - 1);
    }
}

constexpr GgmlCodec kCodecs[] = {
    {41, kBlock1, kBytes, decode_q1_0, encode_q1_0},
    {42, kBlock2, kBytes, decode_q2_0, encode_q2_0},
};

}  // namespace

GgmlCodecs low_bit_codecs() { return {kCodecs, sizeof kCodecs / sizeof kCodecs[0]}; }

}  // namespace lowbit::LOWBIT_ISA
