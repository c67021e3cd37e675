// Encoding of the i-quants, sixteen sub-blocks side by side; the points of a scale are found exactly (iq_search.hpp).
//
//  1. A free scale for each sub-block. With the points of one scale, Σ w x g / Σ w g² is the best scale, and what it
//     saves is (Σ w x g)² / Σ w g². IQ2, IQ3: kept are the points that save most, of a few scales: kGuesses times what
//     maps the largest magnitude on the largest level, then the best scale so far. IQ1, whose points are a third of all
//     patterns: the points at one scale, that of kGuesses times the ratio of root mean squares, and with the shifts, at
//     which rounding to levels, point or not, costs least.
//  2. d for the block, of 32 around (largest scale) / (largest odd number), so that the scales are nearest to odd
//     multiples of it, weighed with Σ w g². It is rounded to a half (from the smallest to the largest there is).
//  3. The points again at the nearest of the scales that now can be stored, or the better of the two nearest
//     (kNeighbours).
//  4. Signs that had to be flipped move to where that costs least, d is fitted to points and sub-scales by least
//     squares and rounded to a half.
#pragma once

#include "iq_search.hpp"
#include "iq_tile.hpp"

namespace lowbit::LOWBIT_ISA {

constexpr float kLargestHalf = 65504.0f;
constexpr float kIqNothing = 1e-9f;  // blocks of smaller weights become zeros

// The half that stands for a step d between scales of weights divided by `unit`, and the step that it makes.
template <class Type>
LANES_INLINE uint16_t half_of_step(float d, float unit) {
    const float value = d * unit * (1.0f / Type::kUnit);
    return half_of(value < kLargestHalf ? value : kLargestHalf);
}
template <class Type>
LANES_INLINE float step_of_half(uint16_t half, float unit) {
    return float_of_half(half) * Type::kUnit / unit;
}

// Points of all sub-blocks, as the patterns of both halves, and what they sum to.
template <class Type>
struct IqPoints {
    I32 first[IqTile<Type>::kPoints], second[IqTile<Type>::kPoints];
    I32 down[IqTile<Type>::kPoints];  // IQ1: −1 where points are shifted down
    F32 sxg, sgg;                     // Σ w x g, Σ w g²
};

// lane → table[index of the lane]
LANES_INLINE I32 look_up(const int32_t* table, I32 index) {
    int32_t from[kLanes], to[kLanes];
    store(index, from);
    for (size_t lane = 0; lane < kLanes; ++lane) to[lane] = table[from[lane]];
    return load(to);
}

LANES_INLINE F32 shift_of(I32 down) { return select(down, splat(-kIqShift), splat(kIqShift)); }

// Coordinates of point v, shifted.
template <class Type>
LANES_INLINE void coordinates(const IqGrid& grid, const IqPoints<Type>& points, size_t v, F32* to) {
    constexpr size_t half = Type::kColumns / 2;
    const I32 halves[2] = {look_up(grid.value, points.first[v]), look_up(grid.value, points.second[v])};
    for (size_t j = 0; j < Type::kColumns; ++j) {
        to[j] = to_float((halves[j / half] << int(24 - 8 * (j % half))) >> 24);
        if constexpr (Type::kSigns == IqSigns::none) to[j] = to[j] + shift_of(points.down[v]);
    }
}

// The points of least error at `scale` (IQ1: with the shifts that `points` has).
template <class Type>
__attribute__((noinline)) void find_points(const IqGrid& grid, const IqTile<Type>& tile, F32 scale,
                                           IqPoints<Type>& points) {
    constexpr size_t columns = Type::kColumns, half = columns / 2, patterns = half == 4 ? 81 : 64;
    for (size_t u = 0; u < tile.kPoints * kParts; u += 2) {
        const size_t v = u / kParts, part = u % kParts, next = (u + 1) / kParts, next_part = (u + 1) % kParts;
        Pair x[columns], w[columns], scaled[Type::kLevels], p[patterns], q[patterns];
        for (size_t j = 0; j < columns; ++j) {
            x[j] = {tile.x[v * columns + j].part[part], tile.x[next * columns + j].part[next_part]};
            w[j] = {tile.w[v * columns + j].part[part], tile.w[next * columns + j].part[next_part]};
        }
        for (size_t l = 0; l < Type::kLevels; ++l) {
            Pair level = {native(grid.level[l]), native(grid.level[l])};
            if constexpr (Type::kSigns == IqSigns::none)
                level = level + Pair{shift_of(points.down[v]).part[part], shift_of(points.down[next]).part[next_part]};
            scaled[l] = {scale.part[part] * level.a, scale.part[next_part] * level.b};
        }
        pattern_costs<half, Type::kLevels>(x, w, scaled, p);
        pattern_costs<half, Type::kLevels>(x + half, w + half, scaled, q);
        const IqFound found = search<patterns>(grid, p, q);
        points.first[v].part[part] = found.first.a, points.first[next].part[next_part] = found.first.b;
        points.second[v].part[part] = found.second.a, points.second[next].part[next_part] = found.second.b;
    }
}

template <class Type>
LANES_INLINE void add_up(const IqGrid& grid, const IqTile<Type>& tile, IqPoints<Type>& points) {
    points.sxg = points.sgg = splat(0.0f);
    for (size_t v = 0; v < tile.kPoints; ++v) {
        F32 g[Type::kColumns];
        coordinates<Type>(grid, points, v, g);
        for (size_t j = 0; j < Type::kColumns; ++j) {
            const F32 wg = tile.w[v * Type::kColumns + j] * g[j];
            points.sxg = points.sxg + wg * tile.x[v * Type::kColumns + j];
            points.sgg = points.sgg + wg * g[j];
        }
    }
}

template <class Type>
LANES_INLINE void keep(I32 better, const IqPoints<Type>& from, IqPoints<Type>& to) {
    for (size_t v = 0; v < IqTile<Type>::kPoints; ++v) {
        to.first[v] = select(better, from.first[v], to.first[v]);
        to.second[v] = select(better, from.second[v], to.second[v]);
        if constexpr (Type::kSigns == IqSigns::none) to.down[v] = select(better, from.down[v], to.down[v]);
    }
    to.sxg = select(better, from.sxg, to.sxg);
    to.sgg = select(better, from.sgg, to.sgg);
}

// IQ1: what rounding 8 columns to the nearest levels, point or not, costs.
template <class Type>
LANES_INLINE F32 rough_cost(const F32* x, const F32* w, const F32* scaled) {
    F32 total = splat(0.0f);
    for (size_t j = 0; j < Type::kColumns; ++j) {
        F32 least = absolute(x[j] - scaled[0]);
        for (size_t l = 1; l < Type::kLevels; ++l) least = smaller(least, absolute(x[j] - scaled[l]));
        total = total + least * least * w[j];
    }
    return total;
}

// The same for whole sub-blocks, columns that share a shift with the better one, which goes to `down`.
template <class Type>
LANES_INLINE F32 rough_cost(const IqGrid& grid, const IqTile<Type>& tile, F32 scale, I32* down) {
    constexpr size_t share = Type::kShiftColumns / Type::kColumns;
    F32 scaled_up[Type::kLevels], scaled_down[Type::kLevels], total = splat(0.0f);
    for (size_t l = 0; l < Type::kLevels; ++l) {
        scaled_up[l] = scale * splat(grid.level[l] + kIqShift);
        scaled_down[l] = scale * splat(grid.level[l] - kIqShift);
    }
    for (size_t v = 0; v < tile.kPoints; v += share) {
        F32 up_cost = splat(0.0f), down_cost = splat(0.0f);
        for (size_t m = v * Type::kColumns; m < (v + share) * Type::kColumns; m += Type::kColumns) {
            up_cost = up_cost + rough_cost<Type>(tile.x + m, tile.w + m, scaled_up);
            down_cost = down_cost + rough_cost<Type>(tile.x + m, tile.w + m, scaled_down);
        }
        const I32 better = down_cost < up_cost;
        for (size_t m = v; m < v + share; ++m) down[m] = better;
        total = total + smaller(down_cost, up_cost);
    }
    return total;
}

// What the first guesses are multiples of.
template <class Type>
LANES_INLINE F32 first_scale(const IqGrid& grid, const IqTile<Type>& tile) {
    if constexpr (Type::kSigns == IqSigns::none) {
        F32 squares = splat(0.0f), total = splat(0.0f);
        for (size_t j = 0; j < Type::kGroup; ++j) {
            squares = squares + tile.w[j] * tile.x[j] * tile.x[j];
            total = total + tile.w[j];
        }
        return square_root(squares / total) * splat(1.0f / grid.root_mean_square);
    } else {
        F32 largest = splat(0.0f);
        for (size_t j = 0; j < Type::kGroup; ++j) largest = larger(largest, absolute(tile.x[j]));
        return largest * splat(1.0f / grid.level[Type::kLevels - 1]);
    }
}

// Step 1 of IQ1. Returns the scales.
template <class Type>
LANES_INLINE F32 free_scales_of_shifted(const IqGrid& grid, const IqTile<Type>& tile, IqPoints<Type>& points) {
    const F32 first = first_scale<Type>(grid, tile);
    F32 scale = first, least = splat(3e38f);
    for (const float guess : Type::kGuesses) {
        I32 down[IqTile<Type>::kPoints];
        const F32 candidate = first * splat(guess), rough = rough_cost<Type>(grid, tile, candidate, down);
        const I32 better = rough < least;
        least = select(better, rough, least);
        scale = select(better, candidate, scale);
        for (size_t v = 0; v < tile.kPoints; ++v) points.down[v] = select(better, down[v], points.down[v]);
    }
    find_points<Type>(grid, tile, scale, points);
    add_up<Type>(grid, tile, points);
    return points.sxg / points.sgg;
}

// Step 1 of IQ2 and IQ3. Returns the scales.
template <class Type>
LANES_INLINE F32 free_scales(const IqGrid& grid, const IqTile<Type>& tile, IqPoints<Type>& best) {
    constexpr size_t guesses = sizeof Type::kGuesses / sizeof(float);
    const F32 first = first_scale<Type>(grid, tile);
    F32 scale = splat(0.0f), saved = splat(-1.0f);
    IqPoints<Type> points{};
    for (size_t c = 0; c <= guesses; ++c) {
        find_points<Type>(grid, tile, c < guesses ? first * splat(Type::kGuesses[c]) : scale, points);
        add_up<Type>(grid, tile, points);
        const F32 fitted = points.sxg / points.sgg, saves = points.sxg * fitted;
        const I32 better = saves > saved;
        keep<Type>(better, points, best);
        scale = select(better, fitted, scale);
        saved = select(better, saves, saved);
    }
    return scale;
}

// Step 2, for the sub-blocks of one block.
template <class Type>
LANES_INLINE float fit_step(const float* scale, const float* weight, float unit) {
    constexpr size_t count = IqTile<Type>::kSubBlocks;
    float largest = 0;
    for (size_t k = 0; k < count; ++k) largest = scale[k] > largest ? scale[k] : largest;
    const float smallest_step = largest / float(2 * Type::kScales - 1);
    float best = smallest_step, least = 3e38f;
    for (size_t batch = 0; batch < 2; ++batch) {
        float steps[kLanes], errors[kLanes];
        for (size_t i = 0; i < kLanes; ++i)
            steps[i] = smallest_step * (0.85f + 0.011f * float(batch * kLanes + i));
        const F32 d = load(steps), half_inverse = splat(0.5f) / d;
        F32 error = splat(0.0f);
        for (size_t k = 0; k < count; ++k) {
            const F32 s = clamp(nearest(splat(scale[k]) * half_inverse - splat(0.5f)), splat(0.0f),
                                splat(float(Type::kScales - 1)));
            const F32 off = splat(scale[k]) - d * (s + s + splat(1.0f));
            error = error + splat(weight[k]) * off * off;
        }
        store(error, errors);
        for (size_t i = 0; i < kLanes; ++i)
            if (errors[i] < least) least = errors[i], best = steps[i];
    }
    uint16_t half = half_of_step<Type>(best, unit);
    if (half == 0 && largest > 0 && unit > kIqNothing) half = 1;
    return step_of_half<Type>(half, unit);
}

// Step 3: points and sub-scales, as floats, where scales are odd multiples of `d`; `scale` are the free ones.
template <class Type>
LANES_INLINE F32 stored_scales(const IqGrid& grid, const IqTile<Type>& tile, F32 scale, F32 d, IqPoints<Type>& best) {
    const F32 top = splat(float(Type::kScales - 1)), zero = splat(0.0f);
    const F32 wish = scale * (splat(0.5f) / d) - splat(0.5f);
    const F32 near = clamp(nearest(wish), zero, top);
    const F32 far = clamp(near + select(wish < near, splat(-1.0f), splat(1.0f)), zero, top);
    F32 chosen = near, least = splat(0.0f);
    IqPoints<Type> points{};
    for (size_t v = 0; v < tile.kPoints; ++v) points.down[v] = best.down[v];
    for (size_t c = 0; c < Type::kNeighbours; ++c) {
        const F32 candidate = c ? far : near;
        const F32 effective = d * (candidate + candidate + splat(1.0f));
        find_points<Type>(grid, tile, effective, points);
        add_up<Type>(grid, tile, points);
        const F32 error = effective * (effective * points.sgg - points.sxg - points.sxg);
        const I32 better = c ? error < least : splat(-1);
        keep<Type>(better, points, best);
        chosen = select(better, candidate, chosen);
        least = select(better, error, least);
    }
    return chosen;
}

// Step 4: the d, as a half, of each block of the tile.
template <class Type>
LANES_INLINE void fit_halves(const IqTile<Type>& tile, F32 s, const IqPoints<Type>& points, uint16_t* halves) {
    float odd[kLanes], sxg[kLanes], sgg[kLanes];
    store(s + s + splat(1.0f), odd);
    store(points.sxg, sxg);
    store(points.sgg, sgg);
    for (size_t b = 0; b < tile.kBlocks; ++b) {
        float above = 0, below = 0;
        for (size_t k = b * tile.kSubBlocks; k < (b + 1) * tile.kSubBlocks; ++k) {
            above += odd[k] * sxg[k];
            below += odd[k] * odd[k] * sgg[k];
        }
        halves[b] = half_of_step<Type>(above > 0 ? above / below : 0.0f, tile.unit[b]);
    }
}

template <class Type>
void write_blocks(const IqGrid& grid, const IqTile<Type>& tile, const IqPoints<Type>& points, F32 s,
                  const uint16_t* halves, size_t count, uint8_t* to) {
    int32_t entry[IqTile<Type>::kPoints][kLanes], down[IqTile<Type>::kPoints][kLanes], sign[Type::kGroup / 8][kLanes];
    float scale[kLanes];
    store(s, scale);
    for (size_t v = 0; v < tile.kPoints; ++v) {
        store(points.first[v] * splat(int32_t(grid.patterns)) + points.second[v], entry[v]);
        store(points.down[v], down[v]);
    }
    if constexpr (Type::kSigns != IqSigns::none)
        for (size_t i = 0; i < Type::kGroup / 8; ++i) {
            I32 bits = splat(0);
            for (size_t j = 0; j < 8; ++j) bits = bits | (tile.negative[8 * i + j] & splat(1 << j));
            store(bits, sign[i]);
        }
    for (size_t b = 0; b < count; ++b, to += Type::kBytes) {
        IqBlock block;
        block.d = halves[b];
        for (size_t k = 0; k < tile.kSubBlocks; ++k) {
            const size_t lane = b * tile.kSubBlocks + k;
            block.scale[k] = uint8_t(scale[lane]);
            for (size_t v = 0; v < tile.kPoints; ++v)
                block.point[k * tile.kPoints + v] = uint16_t(grid.entry[entry[v][lane]]);
            for (size_t i = 0; i < Type::kGroup / 8; ++i)
                block.sign[k * Type::kGroup / 8 + i] =
                    Type::kSigns == IqSigns::none ? uint8_t(down[i][lane] & 1) : uint8_t(sign[i][lane]);
        }
        Type::pack(block, to);
    }
}

template <class Type>
void encode_tile(const IqGrid& grid, float* weights, float* importance, size_t count, uint8_t* blocks) {
    IqTile<Type> tile;
    load_tile<Type>(weights, importance, tile);
    IqPoints<Type> points{};
    F32 free;
    if constexpr (Type::kSigns == IqSigns::none)
        free = free_scales_of_shifted<Type>(grid, tile, points);
    else
        free = free_scales<Type>(grid, tile, points);
    float scale[kLanes], weight[kLanes], step[kLanes];
    store(free, scale);
    store(points.sgg, weight);
    for (size_t b = 0; b < tile.kBlocks; ++b) {
        const float d = fit_step<Type>(scale + b * tile.kSubBlocks, weight + b * tile.kSubBlocks, tile.unit[b]);
        for (size_t k = 0; k < tile.kSubBlocks; ++k) step[b * tile.kSubBlocks + k] = d;
    }
    const F32 s = stored_scales<Type>(grid, tile, free, load(step), points);
    if constexpr (Type::kSigns == IqSigns::even) {
        for (size_t i = 0; i < Type::kGroup; i += 8) {
            F32 point[8];
            for (size_t j = 0; j < 8; j += Type::kColumns)
                coordinates<Type>(grid, points, (i + j) / Type::kColumns, point + j);
            move_flip(tile.x + i, tile.w + i, point, tile.negative + i);
        }
        add_up<Type>(grid, tile, points);
    }
    uint16_t halves[IqTile<Type>::kBlocks];
    fit_halves<Type>(tile, s, points, halves);
    write_blocks<Type>(grid, tile, points, s, halves, count, blocks);
}

template <class Type>
void iq_encode(const GgmlRows& rows, uint8_t* blocks) {
    const IqGrid& grid = iq_grid(Type::kType);
    constexpr size_t at_once = IqTile<Type>::kBlocks;
    const size_t in_row = rows.weights.columns / kIqBlock, count = rows.weights.rows * in_row;
    for (size_t first = 0; first < count; first += at_once, blocks += at_once * Type::kBytes) {
        float weights[at_once * kIqBlock] = {}, importance[at_once * kIqBlock];
        const size_t here = count - first < at_once ? count - first : at_once;
        load_weights(rows.weights, first * kIqBlock, here * kIqBlock, weights);
        for (size_t i = 0; i < at_once * kIqBlock; ++i) importance[i] = 1.0f;
        if (rows.importance)
            for (size_t b = 0; b < here; ++b)
                std::memcpy(importance + b * kIqBlock, rows.importance + (first + b) % in_row * kIqBlock,
                            kIqBlock * sizeof(float));
        encode_tile<Type>(grid, weights, importance, here, blocks);
    }
}

}  // namespace lowbit::LOWBIT_ISA
