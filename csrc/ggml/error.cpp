// Encoding with what it cost: sums over rows of weights and the blocks made of them. Not a codec; it uses any.
//
// A slab is encoded in runs of rows that stay in the cache, so that looking for NaN, encoding and measuring read memory
// once.

#include "families.hpp"

namespace lowbit::LOWBIT_ISA {

SquaredError ggml_error(const GgmlCodec& codec, const Weights& weights, const uint8_t* blocks);

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

constexpr size_t kRun = 32768;  // weights; with their blocks they fit in the second-level cache

size_t bytes_per_weight(FloatType type) { return type == FloatType::float32 ? 4 : 2; }

// Exponent bits all set mean inf or NaN.
template <class Bits>
LANES_INLINE bool all_finite(const Bits* bits, size_t count, Bits exponent) {
    Bits found = 0;
    for (size_t i = 0; i < count; ++i) found |= Bits(-Bits((bits[i] & exponent) == exponent));
    return found == 0;
}

bool is_finite(const Weights& w) {
    const size_t count = w.rows * w.columns;
    switch (w.type) {
        case FloatType::float32:
            return all_finite<uint32_t>(static_cast<const uint32_t*>(w.data), count, 0x7f800000u);
        case FloatType::bfloat16:
            return all_finite<uint16_t>(static_cast<const uint16_t*>(w.data), count, 0x7f80);
        case FloatType::float16:
            return all_finite<uint16_t>(static_cast<const uint16_t*>(w.data), count, 0x7c00);
    }
    return false;
}

}  // namespace

SquaredError ggml_encode(const GgmlCodec& codec, const GgmlRows& rows, uint8_t* blocks) {
    SquaredError total{0, 0, 0};
    const size_t columns = rows.weights.columns, row_bytes = columns / codec.weights * codec.bytes;
    const size_t at_once = columns < kRun ? kRun / columns : 1;
    for (size_t first = 0; first < rows.weights.rows; first += at_once) {
        GgmlRows run = rows;
        const size_t left = rows.weights.rows - first;
        run.weights.rows = left < at_once ? left : at_once;
        run.weights.data =
            static_cast<const uint8_t*>(rows.weights.data) + first * columns * bytes_per_weight(rows.weights.type);
        if (!is_finite(run.weights)) return {__builtin_nan(""), __builtin_nan(""), __builtin_nan("")};
        codec.encode(run, blocks + first * row_bytes);
        const SquaredError sums = ggml_error(codec, run.weights, blocks + first * row_bytes);
        total.error += sums.error;
        total.weight += sums.weight;
        if (!(sums.max_abs_error <= total.max_abs_error)) total.max_abs_error = sums.max_abs_error;
    }
    return total;
}

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
