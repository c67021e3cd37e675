// Codebooks of 16 values (NF4, FP4): the value nearest to w * (1 / scale), halfway between two the smaller one.
//
// The place among the sorted values is the number of midpoints below. Counting with 15 selects needs no gather, so it
// vectorises on every instruction set, and can select codes and values alike.

constexpr size_t kValues = 16;

// Of one group; midpoints and the things at hand are in ascending order of the values.
template <class T>
struct CodebookGroup {
    float reciprocal;
    float midpoints[kValues - 1];
    T things[kValues];
};

template <class T, class Source>
LOWBIT_INLINE CodebookGroup<T> codebook_group(const Codebook& book, const Source* things, size_t group) {
    CodebookGroup<T> p;
    p.reciprocal = 1.0f / book.scale[group];
    for (size_t i = 0; i + 1 < kValues; ++i) p.midpoints[i] = book.midpoints[i];
    for (size_t i = 0; i < kValues; ++i) p.things[i] = T(things[i]);
    return p;
}

template <class T>
LOWBIT_INLINE T nearest_thing(float w, const CodebookGroup<T>& p) {
    const float x = w * p.reciprocal;
    T found = p.things[0];
    for (size_t i = 0; i + 1 < kValues; ++i) found = x > p.midpoints[i] ? p.things[i + 1] : found;
    return found;
}

template <class W>
LOWBIT_INLINE void round_codebook_span(const W* w, size_t n, CodebookGroup<int32_t> p, uint8_t* codes) {
#pragma omp simd
    for (size_t i = 0; i < n; ++i) codes[i] = uint8_t(nearest_thing(to_float(w[i]), p));
}

void round_codebook(const Weights& weights, const Codebook& book, uint8_t* codes) {
    with_type(weights, [&](auto w) {
        for_each_group(weights.rows, weights.columns, weights.group, [&](size_t group, size_t begin, size_t length) {
            const auto p = codebook_group<int32_t>(book, book.codes, group);
            with_constant_length(length, [&](size_t n) { round_codebook_span(w + begin, n, p, codes + begin); });
        });
    });
}
