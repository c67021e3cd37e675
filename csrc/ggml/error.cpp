// What encoding cost: sums over rows of weights and the blocks made of them. Not a codec; it uses any.

#include "families.hpp"

namespace lowbit::LOWBIT_ISA {
namespace {

constexpr size_t kChunk = 1024;  // weights decoded at a time; blocks of every type divide it

struct LaneSums {
    F32 error, weight, largest;
};

LANES_INLINE void add_chunk(const float* original, const float* decoded, size_t count, LaneSums& sums) {
    for (size_t i = 0; i + kLanes <= count; i += kLanes) {
        const F32 x = load(original + i), difference = x - load(decoded + i);
        sums.error = sums.error + difference * difference;
        sums.weight = sums.weight + x * x;
        // written so that a NaN, which compares false, is kept
        sums.largest = select(absolute(difference) <= sums.largest, sums.largest, absolute(difference));
    }
}

double across(F32 v) {
    float lanes[kLanes];
    store(v, lanes);
    double sum = 0;
    for (size_t i = 0; i < kLanes; ++i) sum += double(lanes[i]);
    return sum;
}

}  // namespace

SquaredError ggml_error(const GgmlCodec& codec, const Weights& weights, const uint8_t* blocks) {
    SquaredError total{0, 0, 0};
    const size_t count = weights.rows * weights.columns;
    alignas(64) float original[kChunk + kLanes], decoded[kChunk + kLanes];
    for (size_t first = 0; first < count; first += kChunk) {
        const size_t length = count - first < kChunk ? count - first : kChunk;
        const size_t padded = (length + kLanes - 1) / kLanes * kLanes;
        load_weights(weights, first, length, original);
        codec.decode(blocks + first / codec.weights * codec.bytes, length / codec.weights, decoded);
        for (size_t i = length; i < padded; ++i) original[i] = decoded[i] = 0;
        LaneSums sums{splat(0.0f), splat(0.0f), splat(0.0f)};
        add_chunk(original, decoded, padded, sums);
        total.error += across(sums.error);
        total.weight += across(sums.weight);
        float lanes[kLanes];
        store(sums.largest, lanes);
        for (size_t i = 0; i < kLanes; ++i)
            if (!(double(lanes[i]) <= total.max_abs_error)) total.max_abs_error = double(lanes[i]);
    }
    return total;
}

}  // namespace lowbit::LOWBIT_ISA
