// Integer grids: codes = clamp(rint(w / scale) + zero_point, qmin, qmax), true division, ties to even.
//
// Clamping before rounding gives the same code, because the bounds are integers, and keeps rint within kRounder's
// reach.

struct AffineGroup {
    float scale, low, high;  // bounds of code - zero_point
    int32_t zero_point;
};

LOWBIT_INLINE AffineGroup affine_group(const Affine& affine, size_t group) {
    const int32_t zero_point = affine.zero_point ? affine.zero_point[group] : 0;
    return {affine.scale[group], float(affine.qmin - zero_point), float(affine.qmax - zero_point), zero_point};
}

// (code - zero_point) + kRounder
LOWBIT_INLINE float shifted_code(float w, const AffineGroup& p) {
    return larger(smaller(w / p.scale, p.high), p.low) + kRounder;
}

template <class W>
LOWBIT_INLINE void round_int_span(const W* w, size_t n, AffineGroup p, int8_t* codes) {
    const int32_t bias = as_int(kRounder) - p.zero_point;
#pragma omp simd
    for (size_t i = 0; i < n; ++i) codes[i] = int8_t(as_int(shifted_code(to_float(w[i]), p)) - bias);
}

void round_int(const Weights& weights, const Affine& affine, int8_t* codes) {
    with_type(weights, [&](auto w) {
        for_each_group(weights.rows, weights.columns, weights.group, [&](size_t group, size_t begin, size_t length) {
            const AffineGroup p = affine_group(affine, group);
            with_constant_length(length, [&](size_t n) { round_int_span(w + begin, n, p, codes + begin); });
        });
    });
}

LOWBIT_INLINE void decode_int_span(const int8_t* codes, size_t n, float scale, int32_t zero_point, float* out) {
#pragma omp simd
    for (size_t i = 0; i < n; ++i) out[i] = scale * float(int32_t(codes[i]) - zero_point);
}

void decode_int(const Codes& codes, const Affine& affine, float* out) {
    const int8_t* data = static_cast<const int8_t*>(codes.data);
    for_each_group(codes.rows, codes.columns, codes.group, [&](size_t group, size_t begin, size_t length) {
        const float scale = affine.scale[group];
        const int32_t zero_point = affine.zero_point ? affine.zero_point[group] : 0;
        with_constant_length(length,
                             [&](size_t n) { decode_int_span(data + begin, n, scale, zero_point, out + begin); });
    });
}
