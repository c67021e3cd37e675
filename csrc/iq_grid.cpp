#include "ggml/iq_grid.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <vector>

namespace lowbit {
namespace {

struct Shape {
    int type;
    std::size_t entries, columns, levels, patterns;
};

constexpr Shape kShapes[] = {
    {16, 256, 8, 3, 81},    // IQ2_XXS
    {17, 512, 8, 3, 81},    // IQ2_XS
    {22, 1024, 8, 3, 81},   // IQ2_S
    {18, 256, 4, 8, 64},    // IQ3_XXS
    {21, 512, 4, 8, 64},    // IQ3_S
    {19, 2048, 8, 3, 81},   // IQ1_S
    {29, 2048, 8, 3, 81},   // IQ1_M
};
constexpr std::size_t kTypes = sizeof kShapes / sizeof *kShapes;

std::atomic<const IqGrid*> grids[kTypes];
std::mutex setting;

std::size_t slot_of(int type) {
    for (std::size_t slot = 0; slot < kTypes; ++slot)
        if (kShapes[slot].type == type) return slot;
    throw std::invalid_argument("this ggml type has no grid");
}

// The number of the half point that starts at `half`.
std::size_t pattern_of(const IqGrid& grid, const std::int8_t* half) {
    std::size_t pattern = 0, unit = 1;
    for (std::size_t i = 0; i < grid.columns / 2; ++i, unit *= grid.levels)
        for (std::size_t level = 0; level < grid.levels; ++level)
            if (grid.level[level] == float(half[i])) pattern += unit * level;
    return pattern;
}

void index(IqGrid& grid) {
    std::fill(std::begin(grid.entry), std::end(grid.entry), std::int16_t(-1));
    for (std::size_t e = 0; e < grid.entries; ++e) {
        const std::int8_t* point = grid.point + e * grid.columns;
        std::int16_t& entry =
            grid.entry[pattern_of(grid, point) * grid.patterns + pattern_of(grid, point + grid.columns / 2)];
        if (entry >= 0) throw std::invalid_argument("a point of the grid repeats");
        entry = std::int16_t(e);
    }
    std::vector<std::vector<std::uint16_t>> seconds(grid.patterns);
    for (std::size_t a = 0; a < grid.patterns; ++a)
        for (std::size_t b = 0; b < grid.patterns; ++b)
            if (grid.entry[a * grid.patterns + b] >= 0) seconds[a].push_back(std::uint16_t(32 * b));
    std::vector<std::size_t> firsts(grid.patterns);
    std::iota(firsts.begin(), firsts.end(), 0);
    std::stable_sort(firsts.begin(), firsts.end(),
                     [&](std::size_t a, std::size_t b) { return seconds[a].size() > seconds[b].size(); });
    std::uint16_t* filled = grid.second;
    grid.firsts = 0;
    for (const std::size_t a : firsts) {
        std::vector<std::uint16_t>& of_first = seconds[a];
        if (of_first.empty()) continue;
        while (of_first.size() % 4) of_first.push_back(of_first.back());
        filled = std::copy(of_first.begin(), of_first.end(), filled);
        grid.first[grid.firsts] = std::uint8_t(a);
        grid.count[grid.firsts++] = std::uint8_t(of_first.size());
    }
    for (std::size_t pattern = 0; pattern < grid.patterns; ++pattern) {
        std::uint32_t packed = 0;
        std::size_t rest = pattern;
        for (std::size_t i = 0; i < grid.columns / 2; ++i, rest /= grid.levels)
            packed |= std::uint32_t(std::uint8_t(std::int8_t(grid.level[rest % grid.levels]))) << (8 * i);
        grid.value[pattern] = std::int32_t(packed);
    }
}

}  // namespace

const IqGrid& iq_grid(int type) {
    const IqGrid* grid = grids[slot_of(type)].load(std::memory_order_acquire);
    if (!grid) throw std::runtime_error("the grid of this ggml type has not been set (set_ggml_grid)");
    return *grid;
}

void set_iq_grid(int type, const std::int8_t* points, std::size_t entries, std::size_t columns) {
    const std::size_t slot = slot_of(type);
    const Shape& shape = kShapes[slot];
    if (entries != shape.entries || columns != shape.columns)
        throw std::invalid_argument("the grid of this ggml type has another shape");
    const std::lock_guard<std::mutex> lock(setting);
    if (const IqGrid* set = grids[slot].load(std::memory_order_acquire)) {
        if (!std::equal(points, points + entries * columns, set->point))
            throw std::invalid_argument("another grid of this ggml type is set");
        return;
    }
    const std::set<std::int8_t> alphabet(points, points + entries * columns);
    if (alphabet.size() != shape.levels) throw std::invalid_argument("the grid's alphabet has another size");
    auto grid = std::make_unique<IqGrid>();
    grid->entries = entries, grid->columns = columns, grid->levels = shape.levels, grid->patterns = shape.patterns;
    std::copy(alphabet.begin(), alphabet.end(), grid->level);
    std::copy(points, points + entries * columns, grid->point);
    double squares = 0;
    for (std::size_t i = 0; i < entries * columns; ++i) squares += double(points[i]) * points[i];
    grid->root_mean_square = float(std::sqrt(squares / double(entries * columns)));
    index(*grid);
    grids[slot].store(grid.release(), std::memory_order_release);
}

}  // namespace lowbit
