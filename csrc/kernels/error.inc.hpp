// Squared errors, without materialising codes: what range searches minimise and reports show.
//
// float32 within a chunk of at most 256 columns, float64 across chunks. The order of addition within a chunk is the
// vector width's, so sums agree between instruction sets to a relative 1e-5, not to the bit.

constexpr size_t kChunk = 256;

LOWBIT_INLINE float int_error(float w, const AffineGroup& p) { return w - p.scale * (shifted_code(w, p) - kRounder); }

LOWBIT_INLINE float minifloat_error(float w, const MinifloatGroup& p) {
    const float magnitude = smaller(as_float(uint32_t(as_int(w / p.scale)) & 0x7fffffff), p.max_value);
    const float rounder = as_float(uint32_t(exponent_bits_of(magnitude, p) + p.to_rounder));
    return as_float(uint32_t(as_int(w)) & 0x7fffffff) - p.scale * ((magnitude + rounder) - rounder);
}

LOWBIT_INLINE float magnitude_of(float w) { return as_float(uint32_t(as_int(w)) & 0x7fffffff); }

// Σ importance * |w| * error(w)² over n <= kChunk columns; |w| only if kByMagnitude; importance null means 1.
template <bool kByMagnitude, class W, class Error>
LOWBIT_INLINE float chunk_error(const W* w, size_t n, const float* importance, Error error) {
    float sum = 0;
    if (importance) {
#pragma omp simd reduction(+ : sum)
        for (size_t i = 0; i < n; ++i) {
            const float x = to_float(w[i]), e = error(x);
            sum += importance[i] * (kByMagnitude ? magnitude_of(x) * (e * e) : e * e);
        }
    } else {
#pragma omp simd reduction(+ : sum)
        for (size_t i = 0; i < n; ++i) {
            const float x = to_float(w[i]), e = error(x);
            sum += kByMagnitude ? magnitude_of(x) * (e * e) : e * e;
        }
    }
    return sum;
}

template <bool kByMagnitude, class W, class Error>
LOWBIT_INLINE float group_error(const W* w, size_t length, const float* importance, Error error) {
    float short_sum = 0;
    if (length <= kChunk) {
        with_constant_length(length,
                             [&](size_t n) { short_sum = chunk_error<kByMagnitude>(w, n, importance, error); });
        return short_sum;
    }
    double sum = 0;
    for (size_t begin = 0; begin < length; begin += kChunk)
        sum += chunk_error<kByMagnitude>(w + begin, smaller(kChunk, length - begin),
                                         importance ? importance + begin : nullptr, error);
    return float(sum);
}

// make_error(group) is the error function of that group.
template <class MakeError>
LOWBIT_INLINE void group_errors(const Weights& weights, const ErrorWeights& by, float* errors, MakeError make_error) {
    with_type(weights, [&](auto w) {
        for_each_group(weights.rows, weights.columns, weights.group, [&](size_t group, size_t begin, size_t length) {
            const float* importance = by.importance ? by.importance + begin % weights.columns : nullptr;
            const auto error = make_error(group);
            errors[group] = by.magnitude ? group_error<true>(w + begin, length, importance, error)
                                         : group_error<false>(w + begin, length, importance, error);
        });
    });
}

void error_int(const Weights& weights, const Affine& affine, const ErrorWeights& by, float* errors) {
    group_errors(weights, by, errors, [&](size_t group) {
        return [p = affine_group(affine, group)](float x) { return int_error(x, p); };
    });
}

void error_minifloat(const Weights& weights, const Minifloat& format, const ErrorWeights& by, float* errors) {
    group_errors(weights, by, errors, [&](size_t group) {
        return [p = minifloat_group(format, group)](float x) { return minifloat_error(x, p); };
    });
}

void error_codebook(const Weights& weights, const Codebook& book, const ErrorWeights& by, float* errors) {
    group_errors(weights, by, errors, [&](size_t group) {
        return [p = codebook_group<float>(book, book.values, group), scale = book.scale[group]](float x) {
            return x - scale * nearest_thing(x, p);
        };
    });
}

template <class W>
LOWBIT_INLINE void add_squared_error(const W* w, const float* decoded, size_t n, SquaredError& total) {
    float error_sum = 0, weight_sum = 0;
    int32_t largest = 0;  // bits of |error|: non-negative floats sort like their bits, NaN on top
#pragma omp simd reduction(+ : error_sum, weight_sum) reduction(max : largest)
    for (size_t i = 0; i < n; ++i) {
        const float weight = to_float(w[i]);
        const float error = weight - decoded[i];
        const int32_t magnitude = as_int(error) & 0x7fffffff;
        error_sum += error * error;
        weight_sum += weight * weight;
        largest = magnitude > largest ? magnitude : largest;
    }
    total.error += double(error_sum);
    total.weight += double(weight_sum);
    const double max_abs = double(as_float(uint32_t(largest)));
    // A NaN is taken, and then kept: nothing is greater than it.
    if (max_abs > total.max_abs_error || max_abs != max_abs) total.max_abs_error = max_abs;
}

// decode(group, first element, length, buffer) writes the decoded weights of part of a group. Groups follow each other
// in memory, also from row to row, so decoded weights are gathered into full chunks whatever the group size.
template <class Decode>
LOWBIT_INLINE SquaredError squared_error(const Weights& weights, Decode decode) {
    SquaredError total{0, 0, 0};
    with_type(weights, [&](auto w) {
        float decoded[kChunk];
        size_t filled = 0, chunk_begin = 0;
        for_each_group(weights.rows, weights.columns, weights.group, [&](size_t group, size_t begin, size_t length) {
            for (size_t done = 0, n; done < length; done += n) {
                n = smaller(kChunk - filled, length - done);
                decode(group, begin + done, n, decoded + filled);
                filled += n;
                if (filled == kChunk) {
                    add_squared_error(w + chunk_begin, decoded, kChunk, total);
                    chunk_begin += kChunk;
                    filled = 0;
                }
            }
        });
        add_squared_error(w + chunk_begin, decoded, filled, total);
    });
    return total;
}

SquaredError squared_error_int(const Weights& weights, const Codes& codes, const Affine& affine) {
    const int8_t* data = static_cast<const int8_t*>(codes.data);
    return squared_error(weights, [&](size_t group, size_t begin, size_t n, float* out) {
        const int32_t zero_point = affine.zero_point ? affine.zero_point[group] : 0;
        with_constant_length(n,
                             [&](size_t m) { decode_int_span(data + begin, m, affine.scale[group], zero_point, out); });
    });
}

SquaredError squared_error_table(const Weights& weights, const Codes& codes, const float* scale, const float* values) {
    const uint8_t* data = static_cast<const uint8_t*>(codes.data);
    return squared_error(weights, [&](size_t group, size_t begin, size_t n, float* out) {
        with_constant_length(n, [&](size_t m) { decode_table_span(data + begin, m, scale[group], values, out); });
    });
}
