// Minifloat grids (FP8, FP6, FP4): the nearest representable value of w / scale, ties to even, saturating.
//
// Around |x| in [2^e, 2^(e+1)) representable values are 2^(e - m) apart, below 2^(1 - bias) they are 2^(1 - bias - m)
// apart. Adding 2^(e + 23 - m) to |x| makes that spacing the last bit of a float32, so the addition does the rounding
// and leaves |x| / spacing in the mantissa; each binade above the first adds 2^m codes to it.

struct MinifloatGroup {
    float scale, max_value;
    int32_t least_exponent;  // bits of 2^(1 - bias), the smallest normal
    int32_t to_rounder;      // added to the bits of 2^e: the bits of 2^(e + 23 - m)
    int mantissa_shift;      // 23 - m
    int sign_shift;          // from bit 31 to the code's top bit
};

LOWBIT_INLINE MinifloatGroup minifloat_group(const Minifloat& format, size_t group) {
    const int m = format.mantissa_bits;
    return {format.scale[group], format.max_value, (128 - format.bias) << 23,
            (23 - m) << 23,      23 - m,           31 - (format.exponent_bits + m)};
}

// bits of 2^e, where the spacing at x is 2^(e - m)
LOWBIT_INLINE int32_t exponent_bits_of(float magnitude, const MinifloatGroup& p) {
    const int32_t exponent = as_int(magnitude) & 0x7f800000;
    return exponent > p.least_exponent ? exponent : p.least_exponent;
}

template <class W>
LOWBIT_INLINE void round_minifloat_span(const W* w, size_t n, MinifloatGroup p, uint8_t* codes) {
#pragma omp simd
    for (size_t i = 0; i < n; ++i) {
        const uint32_t bits = uint32_t(as_int(to_float(w[i]) / p.scale));
        const float magnitude = smaller(as_float(bits & 0x7fffffff), p.max_value);
        const int32_t exponent = exponent_bits_of(magnitude, p);
        const int32_t rounder = exponent + p.to_rounder;
        const int32_t steps = as_int(magnitude + as_float(uint32_t(rounder))) - rounder;
        const uint32_t code = uint32_t(steps + ((exponent - p.least_exponent) >> p.mantissa_shift));
        codes[i] = uint8_t(code | ((bits & 0x80000000u) >> p.sign_shift));
    }
}

void round_minifloat(const Weights& weights, const Minifloat& format, uint8_t* codes) {
    with_type(weights, [&](auto w) {
        for_each_group(weights.rows, weights.columns, weights.group, [&](size_t group, size_t begin, size_t length) {
            const MinifloatGroup p = minifloat_group(format, group);
            with_constant_length(length, [&](size_t n) { round_minifloat_span(w + begin, n, p, codes + begin); });
        });
    });
}

LOWBIT_INLINE void decode_table_span(const uint8_t* codes, size_t n, float scale, const float* values, float* out) {
#pragma omp simd
    for (size_t i = 0; i < n; ++i) out[i] = scale * values[codes[i]];
}

void decode_table(const Codes& codes, const float* scale, const float* values, float* out) {
    const uint8_t* data = static_cast<const uint8_t*>(codes.data);
    for_each_group(codes.rows, codes.columns, codes.group, [&](size_t group, size_t begin, size_t length) {
        with_constant_length(length,
                             [&](size_t n) { decode_table_span(data + begin, n, scale[group], values, out + begin); });
    });
}
