// The vector codebooks ("grids") of the i-quants, handed over once from Python, and an index for searching them.
//
// A grid is `entries` points of 8 or 4 columns whose coordinates come from a small alphabet: 3 levels in 8 columns
// (IQ1, IQ2), 8 levels in 4 columns (IQ3). A point is therefore two half points of 4 (2) columns, each one of 3^4 = 81
// (8^2 = 64) patterns, Σ level[i] · levels^i. The index lists, by the pattern of the first half, the patterns of second
// halves that complete it to a point.
//
// Plain code, compiled for every machine: the codecs of all instruction sets read the same tables.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

constexpr std::size_t kIqMostEntries = 2048;
constexpr std::size_t kIqMostPatterns = 81;

struct IqGrid {
    std::size_t entries, columns, levels, patterns;
    float level[8];                         // ascending
    float root_mean_square;                 // of all coordinates
    std::int8_t point[kIqMostEntries * 8];  // [entries, columns]
    // Patterns of first halves, those with most second halves first, and how many each has: a multiple of 4, the last
    // one repeats. `second` has those of each in turn, ascending, times 32.
    std::size_t firsts;
    std::uint8_t first[kIqMostPatterns];
    std::uint8_t count[kIqMostPatterns];
    std::uint16_t second[kIqMostEntries + 3 * kIqMostPatterns];
    std::int16_t entry[kIqMostPatterns * kIqMostPatterns];  // [patterns, patterns] → entry, −1 where there is none
    std::int32_t value[kIqMostPatterns];  // coordinates of a half point, a byte each, the first lowest
};

// The grid of a ggml type; throws std::runtime_error until it has been set.
const IqGrid& iq_grid(int type);

// Keeps `points` [entries, columns] as the grid of `type`, from then on for all threads. Setting the same again changes
// nothing. Throws std::invalid_argument where it is not a grid of this type (shape, size of the alphabet, points that
// repeat) or differs from the one that is set.
void set_iq_grid(int type, const std::int8_t* points, std::size_t entries, std::size_t columns);

}  // namespace lowbit
