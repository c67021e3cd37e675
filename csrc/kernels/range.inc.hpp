// Least and greatest element of each group.
//
// Compared as integers: flipping the low bits of negative floats makes their bit patterns sort like their values, NaN
// with sign 0 above +inf and NaN with sign 1 below -inf. Integer minima vectorise; floating-point ones lose NaN.

template <class Int>
struct SortKey;
template <>
struct SortKey<int16_t> {
    static constexpr int16_t magnitude = 0x7fff;
};
template <>
struct SortKey<int32_t> {
    static constexpr int32_t magnitude = 0x7fffffff;
};

// Its own inverse.
template <class Int>
LOWBIT_INLINE Int sort_key(Int bits) {
    return Int(bits ^ ((bits >> (8 * sizeof(Int) - 1)) & SortKey<Int>::magnitude));
}

template <class Int>
LOWBIT_INLINE void key_range(const Int* bits, size_t n, Int& low, Int& high) {
    Int least = SortKey<Int>::magnitude, greatest = Int(~SortKey<Int>::magnitude);
#pragma omp simd reduction(min : least) reduction(max : greatest)
    for (size_t i = 0; i < n; ++i) {
        const Int key = sort_key(bits[i]);
        least = key < least ? key : least;
        greatest = key > greatest ? key : greatest;
    }
    low = sort_key(least);
    high = sort_key(greatest);
}

LOWBIT_INLINE void range_of(const float* w, size_t n, float& low, float& high) {
    int32_t least, greatest;
    key_range(reinterpret_cast<const int32_t*>(w), n, least, greatest);
    low = as_float(uint32_t(least));
    high = as_float(uint32_t(greatest));
}

template <class Half>
LOWBIT_INLINE void range_of(const Half* w, size_t n, float& low, float& high) {
    int16_t least, greatest;
    key_range(reinterpret_cast<const int16_t*>(w), n, least, greatest);
    low = to_float(Half{uint16_t(least)});
    high = to_float(Half{uint16_t(greatest)});
}

void group_range(const Weights& weights, float* lows, float* highs) {
    with_type(weights, [&](auto w) {
        for_each_group(weights.rows, weights.columns, weights.group, [&](size_t group, size_t begin, size_t length) {
            float low = 0, high = 0;
            with_constant_length(length, [&](size_t n) { range_of(w + begin, n, low, high); });
            // A NaN of either sign shows at both ends; + 0.0 turns -0.0 into 0.0.
            const bool has_nan = low != low || high != high;
            lows[group] = has_nan ? as_float(0x7fc00000) : low + 0.0f;
            highs[group] = has_nan ? as_float(0x7fc00000) : high + 0.0f;
        });
    });
}
