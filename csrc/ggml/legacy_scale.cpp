// Encoders of Q4_0 and Q5_0: one scale of either sign, x ≈ d · q with q in −8 … 7 or −16 … 15.
//
// The weight of largest magnitude is brought to each of a row of places; each leads to codes, and these to their best
// scale. The best of them is refined by rounding anew, and the half of least error near it is kept. Q4_0 without
// importance, which is to run at the speed of memory, tries a few places and does not refine.

#include "legacy.hpp"

namespace lowbit::LOWBIT_ISA {

using namespace one_scale;

namespace {

constexpr size_t kBlock = kLegacyBlock;

// Places of the weight of largest magnitude.
constexpr float kEnds4[] = {
    -10, -9.5f, -9.1f, -8.8f, -8.55f, -8.35f, -8.2f, -8.1f, -8, -7.9f, -7.8f, -7.7f, -7.6f, -7.5f, -7.4f, -7.25f,
    -7.1f, -7, -6.75f, -6.5f, -6, -5.5f, -5,
    5, 5.5f, 6, 6.3f, 6.55f, 6.75f, 6.9f, 7, 7.1f, 7.2f, 7.3f, 7.4f, 7.5f, 7.6f, 7.8f, 8, 8.3f, 8.7f, 9.2f,
};
constexpr float kEnds5[] = {
    -19, -18.25f, -17.6f, -17.1f, -16.7f, -16.4f, -16.2f, -16, -15.8f, -15.6f, -15.4f, -15.2f, -15, -14.7f,
    -14.4f, -14, -13.5f, -13, -12, -11, -10,
    10, 11, 12, 12.8f, 13.4f, 13.9f, 14.3f, 14.65f, 15, 15.2f, 15.4f, 15.6f, 15.8f, 16, 16.4f, 16.9f, 17.5f,
    18.25f,
};
constexpr float kQuickEnds4[] = {-8.8f, -8.3f, -7.9f, -7.5f, 7.6f, 7.1f};
constexpr int kSteps = 2;

template <int bits>
LANES_INLINE void store_blocks(const I32* codes, I32 half, size_t first, size_t count, uint8_t* blocks) {
    constexpr size_t kBytes = bits == 4 ? 18 : 22;
    PackedCodes packed;
    int32_t halves[kLanes];
    pack_codes<bits>(codes, &packed);
    store(half, halves);
    for (size_t lane = 0; lane < kLanes && first + lane < count; ++lane) {
        uint8_t* block = blocks + (first + lane) * kBytes;
        const uint16_t d = uint16_t(halves[lane]);
        std::memcpy(block, &d, 2);
        store_codes<bits>(packed, lane, block + 2);
    }
}

template <int bits, bool weighted, size_t ends>
LANES_INLINE void encode(const GgmlRows& rows, const float (&places)[ends], bool quick, uint8_t* blocks) {
    using Grid = IntegerGrid<-(1 << (bits - 1)), (1 << (bits - 1)) - 1>;
    const size_t count = rows.weights.rows * rows.weights.columns / kBlock;
    for (size_t first = 0; first < count; first += kLanes) {
        Tile<kBlock> tile;
        load_tile<kBlock, 1, weighted>(rows, first, count, &tile);
        const F32 scale = search_scale<Grid, kBlock, weighted>(tile, places, ends, quick ? 0 : kSteps).scale;
        const I32 half = quick ? half_bits(scale * tile.unit) : best_half<Grid, kBlock, weighted>(tile, scale);
        I32 codes[kBlock];
        round_to_codes<Grid>(tile, float_of_half_bits(half) * tile.per_unit, codes);
        store_blocks<bits>(codes, half, first, count, blocks);
    }
}

}  // namespace

void encode_q4_0(const GgmlRows& rows, uint8_t* blocks) {
    rows.importance ? encode<4, true>(rows, kEnds4, false, blocks) : encode<4, false>(rows, kQuickEnds4, true, blocks);
}
void encode_q5_0(const GgmlRows& rows, uint8_t* blocks) {
    rows.importance ? encode<5, true>(rows, kEnds5, false, blocks) : encode<5, false>(rows, kEnds5, false, blocks);
}

}  // namespace lowbit::LOWBIT_ISA
