// Rounding column by column with error feedback, and the product that spreads a block's changes over other columns.
//
// Rows do not depend on each other. Within a block, 32 rows lie side by side, one per lane; outside, lanes are columns.
// Every weight sees the same operations in the same order either way: a block's changes are summed up from left to
// right, from 0, each product rounded, and the sum is subtracted. So the codes are the same bits on every instruction
// set, whatever rows a call is given.

#if defined(__AVX512F__)
constexpr size_t kFeedbackVectorBytes = 64, kProductRows = 6, kProductVectors = 4;
#elif defined(__AVX2__)
constexpr size_t kFeedbackVectorBytes = 32, kProductRows = 4, kProductVectors = 2;
#else
constexpr size_t kFeedbackVectorBytes = 16, kProductRows = 4, kProductVectors = 2;
#endif
typedef float FeedbackVector __attribute__((vector_size(kFeedbackVectorBytes)));
constexpr size_t kPanel = kProductVectors * kFeedbackVectorBytes / sizeof(float);  // columns of a panel of `spread`
constexpr size_t kTile = 32;                                                        // rows side by side

// Aligned memory; std::vector's functions could be shared with code for other instruction sets.
template <class T>
struct Buffer {
    T* data;
    explicit Buffer(size_t count) : data(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64)))) {}
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
};

// w [kRows, width] -= change [kRows, depth] @ panel [depth, kPanel]
template <size_t kRows>
LOWBIT_INLINE void subtract_tile(float* w, size_t stride, const float* change, size_t change_stride,
                                 const FeedbackVector* panel, size_t depth, size_t width) {
    FeedbackVector sum[kRows][kProductVectors] = {};
    for (size_t i = 0; i < depth; ++i)
        for (size_t r = 0; r < kRows; ++r)
            for (size_t v = 0; v < kProductVectors; ++v)
                sum[r][v] += change[r * change_stride + i] * panel[i * kProductVectors + v];
    for (size_t r = 0; r < kRows; ++r) {
        float* const out = w + r * stride;
        float sums[kPanel];
        __builtin_memcpy(sums, sum[r], sizeof sums);
        if (width == kPanel)
            for (size_t k = 0; k < kPanel; ++k) out[k] -= sums[k];
        else
            for (size_t k = 0; k < width; ++k) out[k] -= sums[k];
    }
}

// w[:, begin:end] -= change [rows, depth] @ spread[:depth, begin:end]; w and spread have rows of `columns`.
void subtract_product_of(float* w, const float* change, size_t change_stride, const float* spread, size_t rows,
                         size_t columns, size_t depth, size_t begin, size_t end) {
    const Buffer<float> panel(depth * kPanel);
    for (size_t k = begin; k < end; k += kPanel) {
        const size_t width = smaller(kPanel, end - k);
        for (size_t i = 0; i < depth; ++i) {
            for (size_t c = 0; c < width; ++c) panel.data[i * kPanel + c] = spread[i * columns + k + c];
            for (size_t c = width; c < kPanel; ++c) panel.data[i * kPanel + c] = 0;
        }
        const FeedbackVector* const vectors = reinterpret_cast<const FeedbackVector*>(panel.data);
        size_t r = 0;
        for (; r + kProductRows <= rows; r += kProductRows)
            subtract_tile<kProductRows>(w + r * columns + k, columns, change + r * change_stride, change_stride,
                                        vectors, depth, width);
        for (; r < rows; ++r)
            subtract_tile<1>(w + r * columns + k, columns, change + r * change_stride, change_stride, vectors, depth,
                             width);
    }
}

void subtract_product(const Product& p) {
    subtract_product_of(p.w, p.change, p.depth, p.spread, p.rows, p.columns, p.depth, p.begin, p.end);
}

// Parameters of one column of a tile, [kTile], a lane per row; lanes beyond the last row have scale 1.
struct TileColumn {
    const float* scale;
    const float* offset;
    const int32_t* zero_point;
};
struct TileRounded {
    float value[kTile];
    int32_t code[kTile];
};

struct NearestInt {
    float low, high;
    LOWBIT_INLINE void operator()(const float* x, const TileColumn& p, TileRounded& out) const {
#pragma omp simd
        for (size_t l = 0; l < kTile; ++l) {
            const float zero_point = float(p.zero_point[l]);
            const float quotient = (x[l] - p.offset[l]) / p.scale[l];
            const float steps = p.scale[l] == 0 ? 0.0f : quotient;
            const float shifted = larger(smaller(steps, high - zero_point), low - zero_point) + kRounder;
            out.value[l] = p.scale[l] * (shifted - kRounder) + p.offset[l];
            out.code[l] = as_int(shifted) - as_int(kRounder) + p.zero_point[l];
        }
    }
};

struct NearestMinifloat {
    MinifloatGroup format;
    LOWBIT_INLINE void operator()(const float* x, const TileColumn& p, TileRounded& out) const {
        const MinifloatGroup f = format;
#pragma omp simd
        for (size_t l = 0; l < kTile; ++l) {
            const uint32_t bits = uint32_t(as_int(x[l] / p.scale[l]));
            const uint32_t sign = bits & 0x80000000u;
            const float magnitude = smaller(as_float(bits & 0x7fffffff), f.max_value);
            const int32_t exponent = exponent_bits_of(magnitude, f);
            const int32_t rounder = exponent + f.to_rounder;
            const float sum = magnitude + as_float(uint32_t(rounder));
            const float value = sum - as_float(uint32_t(rounder));
            const int32_t code = as_int(sum) - rounder + ((exponent - f.least_exponent) >> f.mantissa_shift);
            out.value[l] = p.scale[l] * as_float(uint32_t(as_int(value)) | sign);
            out.code[l] = int32_t(uint32_t(code) | (sign >> f.sign_shift));
        }
    }
};

struct NearestCodebook {
    float midpoints[kValues - 1], values[kValues];
    int32_t codes[kValues];
    LOWBIT_INLINE void operator()(const float* x, const TileColumn& p, TileRounded& out) const {
#pragma omp simd
        for (size_t l = 0; l < kTile; ++l) {
            const float reciprocal = 1.0f / p.scale[l];
            const float place = x[l] * (magnitude_of(p.scale[l]) >= 0x1p-126f ? reciprocal : 0.0f);
            float value = values[0];
            int32_t code = codes[0];
            for (size_t i = 0; i + 1 < kValues; ++i) {
                value = place > midpoints[i] ? values[i + 1] : value;
                code = place > midpoints[i] ? codes[i + 1] : code;
            }
            out.value[l] = p.scale[l] * value;
            out.code[l] = code;
        }
    }
};

// What a tile of rows needs of one block, [block][kTile].
struct TileMemory {
    Buffer<float> x, decoded, change, scale, offset;
    Buffer<int32_t> zero_point;
    Buffer<uint8_t> codes;
    explicit TileMemory(size_t block)
        : x(block * kTile), decoded(block * kTile), change(block * kTile), scale(block * kTile),
          offset(block * kTile), zero_point(block * kTile), codes(block * kTile) {}
    TileColumn column(size_t c) const {
        return {scale.data + c * kTile, offset.data + c * kTile, zero_point.data + c * kTile};
    }
};

// to [length][kTile] = from [kTile, columns], rows beyond `count` all `missing`; a null `from` is all `missing`.
template <class T>
LOWBIT_INLINE void load_lanes(const T* from, size_t columns, size_t count, size_t length, T missing, T* to) {
    for (size_t c = 0; c < length; ++c)
        for (size_t l = from ? count : 0; l < kTile; ++l) to[c * kTile + l] = missing;
    if (!from) return;
    // Eight columns at a time: whole cache lines are read, and few are written at once.
    for (size_t c = 0; c < length; c += 8)
        for (size_t l = 0; l < count; ++l)
            for (size_t i = c; i < smaller(c + 8, length); ++i) to[i * kTile + l] = from[l * columns + i];
}

template <class T>
LOWBIT_INLINE void store_lanes(const T* from, size_t count, size_t length, T* to, size_t columns) {
    for (size_t c = 0; c < length; c += 8)
        for (size_t l = 0; l < count; ++l)
            for (size_t i = c; i < smaller(c + 8, length); ++i) to[l * columns + i] = from[i * kTile + l];
}

LOWBIT_INLINE void load_tile(const Feedback& f, size_t first, size_t count, size_t start, size_t length,
                             const TileMemory& tile) {
    const size_t at = first * f.columns + start;
    load_lanes(f.w + at, f.columns, count, length, 0.0f, tile.x.data);
    load_lanes(f.scale + at, f.columns, count, length, 1.0f, tile.scale.data);
    load_lanes<float>(f.offset ? f.offset + at : nullptr, f.columns, count, length, 0.0f, tile.offset.data);
    load_lanes<int32_t>(f.zero_point ? f.zero_point + at : nullptr, f.columns, count, length, 0, tile.zero_point.data);
    load_lanes<float>(f.descend ? f.decoded + at : nullptr, f.columns, count, length, 0.0f, tile.decoded.data);
}

LOWBIT_INLINE void store_tile(const Feedback& f, size_t first, size_t count, size_t start, size_t length,
                              const TileMemory& tile, float* change) {
    const size_t at = first * f.columns + start;
    store_lanes(tile.x.data, count, length, f.w + at, f.columns);
    store_lanes(tile.decoded.data, count, length, f.decoded + at, f.columns);
    store_lanes(tile.codes.data, count, length, f.codes + at, f.columns);
    store_lanes(tile.change.data, count, length, change + first * f.block, f.block);
}

// Rounds the columns of a block for `count` rows from `first` on; change [rows, block].
template <class Nearest>
LOWBIT_INLINE void round_tile(const Feedback& f, const Nearest& nearest, size_t first, size_t count, size_t start,
                              size_t length, const TileMemory& tile, float* change) {
    load_tile(f, first, count, start, length, tile);
    for (size_t c = 0; c < length; ++c) {
        float* const x = tile.x.data + c * kTile;
        float* const decoded = tile.decoded.data + c * kTile;
        TileRounded rounded;
        nearest(x, tile.column(c), rounded);
        float delta[kTile];
        for (size_t l = 0; l < kTile; ++l) {
            delta[l] = f.descend ? rounded.value[l] - decoded[l] : x[l] - rounded.value[l];
            decoded[l] = rounded.value[l];
            tile.change.data[c * kTile + l] = delta[l];
            tile.codes.data[c * kTile + l] = uint8_t(rounded.code[l]);
        }
        const float* const spread = f.spread + (start + c) * f.columns + start;
        for (size_t k = f.descend ? 0 : c + 1; k < length; ++k) {
            const float share = spread[k];
            float* const other = tile.x.data + k * kTile;
#pragma omp simd
            for (size_t l = 0; l < kTile; ++l) other[l] -= delta[l] * share;
        }
    }
    store_tile(f, first, count, start, length, tile, change);
}

template <class Nearest>
LOWBIT_INLINE void feedback(const Feedback& f, const Nearest& nearest) {
    const Buffer<float> change(f.rows * f.block);
    const TileMemory tile(f.block);
    for (size_t start = f.begin; start < f.end; start += f.block) {
        const size_t stop = smaller(start + f.block, f.end);
        for (size_t first = 0; first < f.rows; first += kTile)
            round_tile(f, nearest, first, smaller(kTile, f.rows - first), start, stop - start, tile, change.data);
        const float* const spread = f.spread + start * f.columns;
        if (f.descend)
            subtract_product_of(f.w, change.data, f.block, spread, f.rows, f.columns, stop - start, 0, start);
        subtract_product_of(f.w, change.data, f.block, spread, f.rows, f.columns, stop - start, stop, f.columns);
    }
}

void feedback_int(const Feedback& f, int qmin, int qmax) { feedback(f, NearestInt{float(qmin), float(qmax)}); }

void feedback_minifloat(const Feedback& f, const Minifloat& format) {
    const float one = 1.0f;
    Minifloat unscaled = format;
    unscaled.scale = &one;
    feedback(f, NearestMinifloat{minifloat_group(unscaled, 0)});
}

void feedback_codebook(const Feedback& f, const Codebook& book) {
    NearestCodebook nearest;
    for (size_t i = 0; i + 1 < kValues; ++i) nearest.midpoints[i] = book.midpoints[i];
    for (size_t i = 0; i < kValues; ++i) {
        nearest.values[i] = book.values[i];
        nearest.codes[i] = book.codes[i];
    }
    feedback(f, nearest);
}
