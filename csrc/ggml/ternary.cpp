// Ternary types: 256 weights of −d, 0 or d. x = d · (q − 1), q in {0, 1, 2}.
//
//   TQ1_0   uint8 qs[48]; uint8 qh[4]; half d    1.6875 bits per weight
//           a byte is ceil(256 / 243 · Σ q · 3^(4−n)), n = 0…4 (0…3 in qh): q n is (uint8(byte · 3^n) · 3) >> 8.
//           qs[m] holds weights m + 32·n, qs[32 + m] holds 160 + m + 16·n, qh[m] holds 240 + m + 4·n.
//   TQ2_0   uint8 qs[64]; half d                 2.0625 bits per weight
//           bits 2n, 2n + 1 of qs[32·h + m] are the q of weight 128·h + 32·n + m. 3 decodes to 2 · d and is not made.
//
// The encoder finds the d of least Σ importance · (x − d·(q − 1))². At the optimum q − 1 is not zero for the m largest
// |x|, for some m, and d is their weighted mean; the m is the one of largest Σ importance·|x| · mean. So: sort by |x|
// (sixteen blocks side by side, a bitonic network), try all 256 m, round d to a half, and round the weights to that d.
// Weights of three values −a, 0, a, a a half, come back exactly.

#include "families.hpp"

namespace lowbit::LOWBIT_ISA {
namespace {

constexpr size_t kBlock = 256;
constexpr float kLargestHalf = 65504.0f;

// [position][lane]
struct Tile {
    F32 magnitude[kBlock];
    F32 importance[kBlock];
};

// Largest magnitude first.
template <bool weighted>
void sort_tile(Tile& tile) {
    for (size_t run = 2; run <= kBlock; run *= 2)
        for (size_t step = run / 2; step > 0; step /= 2)
            for (size_t i = 0; i < kBlock; ++i) {
                if (i & step) continue;
                const bool ascending = i & run;
                F32& first = tile.magnitude[ascending ? i + step : i];
                F32& second = tile.magnitude[ascending ? i : i + step];
                const F32 a = first, b = second;
                const I32 swap = a < b;
                first = larger(a, b);
                second = smaller(a, b);
                if constexpr (weighted) {
                    F32& first_importance = tile.importance[ascending ? i + step : i];
                    F32& second_importance = tile.importance[ascending ? i : i + step];
                    const F32 v = first_importance, w = second_importance;
                    first_importance = select(swap, w, v);
                    second_importance = select(swap, v, w);
                }
            }
}

// Sorted tile → the mean of least error, of the magnitudes that are not rounded to zero.
template <bool weighted>
F32 best_mean(const Tile& tile) {
    F32 sum = splat(0.0f), total = splat(0.0f), best_gain = splat(0.0f), best = splat(0.0f);
    for (size_t i = 0; i < kBlock; ++i) {
        if constexpr (weighted) {
            sum = sum + tile.importance[i] * tile.magnitude[i];
            total = total + tile.importance[i];
        } else {
            sum = sum + tile.magnitude[i];
            total = total + splat(1.0f);
        }
        const F32 mean = sum / total;  // 0 / 0 is a NaN, which is not better
        const F32 gain = sum * mean;
        const I32 better = gain > best_gain;
        best_gain = select(better, gain, best_gain);
        best = select(better, mean, best);
    }
    return best;
}

// Largest magnitude of each lane; 1 where all are zero.
F32 largest(const F32* values) {
    F32 most = splat(0.0f);
    for (size_t i = 0; i < kBlock; ++i) most = larger(absolute(values[i]), most);
    return select(most > splat(0.0f), most, splat(1.0f));
}

// Magnitudes and importance are divided by their largest, so that sums and products neither overflow nor vanish.
// A block whose importance is all zero weighs its columns alike. Returns what magnitudes were divided by.
F32 fill_tile(const float* x, const float* const* importance, Tile& tile) {
    transpose<kBlock>(x, tile.magnitude);
    const F32 most = largest(tile.magnitude);
    for (size_t i = 0; i < kBlock; ++i) tile.magnitude[i] = absolute(tile.magnitude[i]) / most;
    if (!importance) return most;
    F32 heaviest = splat(0.0f);
    for (size_t i = 0; i < kBlock; ++i) {
        float column[kLanes];
        for (size_t lane = 0; lane < kLanes; ++lane) column[lane] = importance[lane][i];
        tile.importance[i] = load(column);
        heaviest = larger(tile.importance[i], heaviest);
    }
    const I32 alike = heaviest == splat(0.0f);
    const F32 divisor = select(alike, splat(1.0f), heaviest);
    for (size_t i = 0; i < kBlock; ++i)
        tile.importance[i] = select(alike, splat(1.0f), tile.importance[i] / divisor);
    return most;
}

uint16_t half_scale(float mean, float scale) {
    const float d = mean * scale;
    return half_of(d < kLargestHalf ? d : kLargestHalf);
}

void codes_of(const float* x, float d, uint8_t* q) {
    const float border = d > 0.0f ? 0.5f * d : __builtin_inff();
    for (size_t i = 0; i < kBlock; ++i) q[i] = uint8_t(1 + (x[i] > border) - (x[i] < -border));
}

void pack_tq1(const uint8_t* q, uint16_t d, uint8_t* block) {
    const auto pack = [](const uint8_t* from, size_t width, size_t digits, uint8_t* to) {
        for (size_t m = 0; m < width; ++m) {
            uint32_t value = 0;
            for (size_t n = 0; n < 5; ++n) value = 3 * value + (n < digits ? from[m + n * width] : 0);
            to[m] = uint8_t((value * 256 + 242) / 243);
        }
    };
    pack(q, 32, 5, block);
    pack(q + 160, 16, 5, block + 32);
    pack(q + 240, 4, 4, block + 48);
    std::memcpy(block + 52, &d, 2);
}

void pack_tq2(const uint8_t* q, uint16_t d, uint8_t* block) {
    for (size_t half = 0; half < 2; ++half)
        for (size_t m = 0; m < 32; ++m) {
            const uint8_t* from = q + half * 128 + m;
            block[half * 32 + m] = uint8_t(from[0] | from[32] << 2 | from[64] << 4 | from[96] << 6);
        }
    std::memcpy(block + 64, &d, 2);
}

template <size_t bytes, void (*pack)(const uint8_t*, uint16_t, uint8_t*)>
void encode(const GgmlRows& rows, uint8_t* blocks) {
    const size_t blocks_per_row = rows.weights.columns / kBlock;
    const size_t count = rows.weights.rows * blocks_per_row;
    Tile tile;
    for (size_t first = 0; first < count; first += kLanes) {
        const size_t filled = count - first < kLanes ? count - first : kLanes;
        float x[kLanes * kBlock] = {};
        load_weights(rows.weights, first * kBlock, filled * kBlock, x);
        const float* importance[kLanes];
        if (rows.importance)
            for (size_t lane = 0; lane < kLanes; ++lane)
                importance[lane] = rows.importance + (first + lane) % blocks_per_row * kBlock;
        float scale[kLanes], mean[kLanes];
        store(fill_tile(x, rows.importance ? importance : nullptr, tile), scale);
        if (rows.importance) {
            sort_tile<true>(tile);
            store(best_mean<true>(tile), mean);
        } else {
            sort_tile<false>(tile);
            store(best_mean<false>(tile), mean);
        }
        for (size_t lane = 0; lane < filled; ++lane) {
            const uint16_t d = half_scale(mean[lane], scale[lane]);
            uint8_t q[kBlock];
            codes_of(x + lane * kBlock, float_of_half(d), q);
            pack(q, d, blocks + (first + lane) * bytes);
        }
    }
}

void decode_tq1(const uint8_t* blocks, size_t count, float* weights) {
    constexpr uint8_t kPowers[] = {1, 3, 9, 27, 81};
    const auto unpack = [&](const uint8_t* from, size_t width, size_t digits, float d, float* to) {
        for (size_t n = 0; n < digits; ++n)
            for (size_t m = 0; m < width; ++m) {
                const uint8_t shifted = uint8_t(from[m] * kPowers[n]);
                to[n * width + m] = d * float(((shifted * 3) >> 8) - 1);
            }
    };
    for (size_t b = 0; b < count; ++b, blocks += 54, weights += kBlock) {
        uint16_t half;
        std::memcpy(&half, blocks + 52, 2);
        const float d = float_of_half(half);
        unpack(blocks, 32, 5, d, weights);
        unpack(blocks + 32, 16, 5, d, weights + 160);
        unpack(blocks + 48, 4, 4, d, weights + 240);
    }
}

void decode_tq2(const uint8_t* blocks, size_t count, float* weights) {
    for (size_t b = 0; b < count; ++b, blocks += 66, weights += kBlock) {
        uint16_t half;
        std::memcpy(&half, blocks + 64, 2);
        const float d = float_of_half(half);
        for (size_t part = 0; part < 8; ++part)
            for (size_t m = 0; m < 32; ++m)
                weights[part * 32 + m] = d * float(((blocks[part / 4 * 32 + m] >> (part % 4 * 2)) & 3) - 1);
    }
}

constexpr GgmlCodec kCodecs[] = {
    {34, kBlock, 54, decode_tq1, encode<54, pack_tq1>},
    {35, kBlock, 66, decode_tq2, encode<66, pack_tq2>},
};

}  // namespace

GgmlCodecs ternary_codecs() { return {kCodecs, sizeof kCodecs / sizeof kCodecs[0]}; }

}  // namespace lowbit::LOWBIT_ISA
