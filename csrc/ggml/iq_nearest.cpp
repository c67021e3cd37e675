// The nearest points of an i-quant's grid to many vectors, each with a scale of its own: what error feedback rounds with.

#include "iq_search.hpp"

namespace lowbit::LOWBIT_ISA {

namespace {

// Vectors searched at once, one per lane of two native vectors.
constexpr size_t kVectors = 2 * kNativeLanes;

// from [count, width] → to[column], a lane per row; lanes beyond `count` repeat the first.
template <size_t width>
LANES_INLINE void load_columns(const float* from, size_t count, Pair* to) {
    float lanes[width][kVectors];
    for (size_t l = 0; l < kVectors; ++l)
        for (size_t j = 0; j < width; ++j) lanes[j][l] = from[(l < count ? l : 0) * width + j];
    std::memcpy(to, lanes, sizeof lanes);
}

template <size_t columns, size_t levels>
void nearest_points(const IqGrid& grid, const IqVectors& vectors, int32_t* entry, float* cost) {
    constexpr size_t half = columns / 2, patterns = half == 4 ? 81 : 64;
    for (size_t v = 0; v < vectors.count; v += kVectors) {
        const size_t count = vectors.count - v < kVectors ? vectors.count - v : kVectors;
        Pair x[columns], w[columns], scaled[levels], p[patterns], q[patterns];
        load_columns<columns>(vectors.x + v * columns, count, x);
        load_columns<columns>(vectors.w + v * columns, count, w);
        load_columns<levels>(vectors.scaled + v * levels, count, scaled);
        pattern_costs<half, levels>(x, w, scaled, p);
        pattern_costs<half, levels>(x + half, w + half, scaled, q);
        const IqFound found = search<patterns>(grid, p, q);
        int32_t first[kVectors], second[kVectors];
        float costs[kVectors];
        std::memcpy(first, &found.first, sizeof first);
        std::memcpy(second, &found.second, sizeof second);
        std::memcpy(costs, &found.cost, sizeof costs);
        for (size_t l = 0; l < count; ++l) {
            entry[v + l] = grid.entry[size_t(first[l]) * patterns + size_t(second[l])];
            cost[v + l] = costs[l];
        }
    }
}

// Patterns of the nearest points of a code (one, or the two of IQ3_XXS), and what they cost together.
template <size_t points>
struct Nearest {
    IntPair first[points], second[points];
    Pair cost;
};

template <class Type, size_t points>
LANES_INLINE Nearest<points> nearest_of(const IqGrid& grid, const Pair* x, const Pair* w, const Pair* scaled) {
    constexpr size_t columns = Type::kColumns, half = columns / 2, patterns = half == 4 ? 81 : 64;
    Nearest<points> nearest;
    for (size_t v = 0; v < points; ++v) {
        Pair p[patterns], q[patterns];
        pattern_costs<half, Type::kLevels>(x + v * columns, w + v * columns, scaled, p);
        pattern_costs<half, Type::kLevels>(x + v * columns + half, w + v * columns + half, scaled, q);
        const IqFound found = search<patterns>(grid, p, q);
        nearest.first[v] = found.first, nearest.second[v] = found.second;
        nearest.cost = v ? nearest.cost + found.cost : found.cost;
    }
    return nearest;
}

LANES_INLINE IntPair choose(IntPair which, IntPair yes, IntPair no) {
    return {which.a ? yes.a : no.a, which.b ? yes.b : no.b};
}

// Codes of kVectors vectors with signs: points, lowest bits first, then sign bits. Where an even number of signs has to
// be negative and is not, each flip is tried.
template <class Type, size_t points>
void round_tile(const IqGrid& grid, const IqVectors& vectors, size_t v, size_t count, int point_bits, int sign_bits,
                int32_t* codes) {
    constexpr size_t columns = points * Type::kColumns, patterns = Type::kColumns == 8 ? 81 : 64;
    Pair x[columns], w[columns], scale[1], scaled[Type::kLevels];
    load_columns<columns>(vectors.x + v * columns, count, x);
    load_columns<columns>(vectors.w + v * columns, count, w);
    load_columns<1>(vectors.scaled + v, count, scale);
    const NativeF32 zero = native(0.0f);
    const IntPair turned = {scale[0].a < zero, scale[0].b < zero};
    scale[0] = {turned.a ? -scale[0].a : scale[0].a, turned.b ? -scale[0].b : scale[0].b};
    for (size_t l = 0; l < Type::kLevels; ++l) {
        const NativeF32 level = native(grid.level[l]);
        scaled[l] = {scale[0].a * level, scale[0].b * level};
    }
    IntPair negative[columns], odd = {native(0), native(0)};
    for (size_t j = 0; j < columns; ++j) {
        x[j] = {turned.a ? -x[j].a : x[j].a, turned.b ? -x[j].b : x[j].b};
        negative[j] = {x[j].a < zero, x[j].b < zero};
        x[j] = {negative[j].a ? -x[j].a : x[j].a, negative[j].b ? -x[j].b : x[j].b};
        odd = {odd.a ^ negative[j].a, odd.b ^ negative[j].b};
    }
    Nearest<points> best = nearest_of<Type, points>(grid, x, w, scaled);
    if constexpr (Type::kSigns == IqSigns::even) {
        IntPair flipped = {native(-1), native(-1)};
        Pair least = {native(3e38f), native(3e38f)};
        for (size_t j = 0; j < columns; ++j) {
            x[j] = {-x[j].a, -x[j].b};
            const Nearest<points> tried = nearest_of<Type, points>(grid, x, w, scaled);
            x[j] = {-x[j].a, -x[j].b};
            const IntPair better = {odd.a & (tried.cost.a < least.a), odd.b & (tried.cost.b < least.b)};
            least = {better.a ? tried.cost.a : least.a, better.b ? tried.cost.b : least.b};
            const IntPair here = {native(int32_t(j)), native(int32_t(j))};
            flipped = choose(better, here, flipped);
            for (size_t p = 0; p < points; ++p) {
                best.first[p] = choose(better, tried.first[p], best.first[p]);
                best.second[p] = choose(better, tried.second[p], best.second[p]);
            }
        }
        for (size_t j = 0; j < columns; ++j) {
            const NativeI32 here = native(int32_t(j));
            negative[j] = {negative[j].a ^ (flipped.a == here), negative[j].b ^ (flipped.b == here)};
        }
    }
    int32_t first[points][kVectors], second[points][kVectors], sign[columns][kVectors];
    std::memcpy(first, best.first, sizeof first);
    std::memcpy(second, best.second, sizeof second);
    std::memcpy(sign, negative, sizeof sign);
    for (size_t l = 0; l < count; ++l) {
        uint32_t code = 0, signs = 0;
        for (size_t p = 0; p < points; ++p) {
            const int16_t entry = grid.entry[size_t(first[p][l]) * patterns + size_t(second[p][l])];
            code |= uint32_t(entry) << (size_t(point_bits) * p);
        }
        for (size_t j = 0; j < columns; ++j) signs |= uint32_t(sign[j][l] & 1) << j;
        signs &= (1u << sign_bits) - 1;
        codes[v + l] = int32_t(code | signs << (size_t(point_bits) * points));
    }
}

template <class Type, size_t points>
void round_vectors(const IqVectors& vectors, int point_bits, int sign_bits, int32_t* codes) {
    const IqGrid& grid = iq_grid(Type::kType);
    for (size_t v = 0; v < vectors.count; v += kVectors) {
        const size_t count = vectors.count - v < kVectors ? vectors.count - v : kVectors;
        round_tile<Type, points>(grid, vectors, v, count, point_bits, sign_bits, codes);
    }
}

}  // namespace

bool iq_round(int type, const IqVectors& vectors, int32_t* codes) {
    switch (type) {
        case Iq2Xxs::kType:
            return round_vectors<Iq2Xxs, 1>(vectors, 8, 7, codes), true;
        case Iq2Xs::kType:
            return round_vectors<Iq2Xs, 1>(vectors, 9, 7, codes), true;
        case Iq2S::kType:
            return round_vectors<Iq2S, 1>(vectors, 10, 8, codes), true;
        case Iq3Xxs::kType:
            return round_vectors<Iq3Xxs, 2>(vectors, 8, 7, codes), true;
        case Iq3S::kType:
            return round_vectors<Iq3S, 1>(vectors, 9, 4, codes), true;
        default:
            return false;
    }
}

void iq_nearest(int type, const IqVectors& vectors, int32_t* entry, float* cost) {
    const IqGrid& grid = iq_grid(type);
    if (grid.columns == 8)
        nearest_points<8, 3>(grid, vectors, entry, cost);
    else
        nearest_points<4, 8>(grid, vectors, entry, cost);
}

}  // namespace lowbit::LOWBIT_ISA
