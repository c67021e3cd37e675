// Sixteen lanes that compute alike on every instruction set.
//
// A kernel that puts sixteen sub-blocks side by side, one per lane, needs no sums across lanes: every lane does the
// same float operations in the same order whatever the width of the machine's registers, so the codes that come out are
// the same bits everywhere. `F32` and `I32` are therefore always 16 wide and made of as many native vectors as that
// takes. Contraction is off (see CMakeLists.txt): a * b + c is rounded twice.
//
// Everything is inside namespace lowbit::LOWBIT_ISA, which differs per set of compiler flags, so nothing compiled
// with these flags can be linked into code that other machines run. For the same reason: no std:: algorithms here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "ggml.hpp"

#define LANES_INLINE inline __attribute__((always_inline))

namespace lowbit::LOWBIT_ISA {

using std::int16_t, std::int32_t, std::int8_t, std::uint16_t, std::uint32_t, std::uint64_t, std::uint8_t, std::size_t;

constexpr size_t kLanes = 16;

#if defined(__AVX512F__)
constexpr size_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr size_t kVectorBytes = 32;
#else
constexpr size_t kVectorBytes = 16;
#endif

typedef float NativeF32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t NativeI32 __attribute__((vector_size(kVectorBytes)));
constexpr size_t kParts = 64 / kVectorBytes;
constexpr size_t kNativeLanes = kVectorBytes / 4;

struct I32 {
    NativeI32 part[kParts];
};
struct F32 {
    NativeF32 part[kParts];
};

#define LANES_EACH for (size_t p = 0; p < kParts; ++p)

LANES_INLINE F32 splat(float value) {
    F32 r;
    LANES_EACH r.part[p] = NativeF32{} + value;
    return r;
}
LANES_INLINE I32 splat(int32_t value) {
    I32 r;
    LANES_EACH r.part[p] = NativeI32{} + value;
    return r;
}

LANES_INLINE F32 load(const float* from) {
    F32 r;
    std::memcpy(&r, from, sizeof r);
    return r;
}
LANES_INLINE I32 load(const int32_t* from) {
    I32 r;
    std::memcpy(&r, from, sizeof r);
    return r;
}
LANES_INLINE void store(F32 v, float* to) { std::memcpy(to, &v, sizeof v); }
LANES_INLINE void store(I32 v, int32_t* to) { std::memcpy(to, &v, sizeof v); }

#define LANES_BINARY(V, op)                               \
    LANES_INLINE V operator op(V a, V b) {                \
        V r;                                              \
        LANES_EACH r.part[p] = a.part[p] op b.part[p];    \
        return r;                                         \
    }
LANES_BINARY(F32, +)
LANES_BINARY(F32, -)
LANES_BINARY(F32, *)
LANES_BINARY(F32, /)
LANES_BINARY(I32, +)
LANES_BINARY(I32, -)
LANES_BINARY(I32, *)
LANES_BINARY(I32, &)
LANES_BINARY(I32, |)
LANES_BINARY(I32, ^)
#undef LANES_BINARY

// −1 where true, 0 where false
#define LANES_COMPARE(V, op)                                        \
    LANES_INLINE I32 operator op(V a, V b) {                        \
        I32 r;                                                      \
        LANES_EACH r.part[p] = NativeI32(a.part[p] op b.part[p]);   \
        return r;                                                   \
    }
LANES_COMPARE(F32, <)
LANES_COMPARE(F32, <=)
LANES_COMPARE(F32, >)
LANES_COMPARE(F32, >=)
LANES_COMPARE(F32, ==)
LANES_COMPARE(I32, <)
LANES_COMPARE(I32, >)
LANES_COMPARE(I32, ==)
#undef LANES_COMPARE

LANES_INLINE I32 operator<<(I32 a, int n) {
    I32 r;
    LANES_EACH r.part[p] = a.part[p] << n;
    return r;
}
// Arithmetic: keeps the sign.
LANES_INLINE I32 operator>>(I32 a, int n) {
    I32 r;
    LANES_EACH r.part[p] = a.part[p] >> n;
    return r;
}
LANES_INLINE F32 operator-(F32 a) { return splat(0.0f) - a; }

LANES_INLINE F32 select(I32 mask, F32 yes, F32 no) {
    F32 r;
    LANES_EACH r.part[p] = mask.part[p] ? yes.part[p] : no.part[p];
    return r;
}
LANES_INLINE I32 select(I32 mask, I32 yes, I32 no) {
    I32 r;
    LANES_EACH r.part[p] = mask.part[p] ? yes.part[p] : no.part[p];
    return r;
}

LANES_INLINE F32 smaller(F32 a, F32 b) { return select(a < b, a, b); }
LANES_INLINE F32 larger(F32 a, F32 b) { return select(a > b, a, b); }
LANES_INLINE I32 smaller(I32 a, I32 b) { return select(a < b, a, b); }
LANES_INLINE I32 larger(I32 a, I32 b) { return select(a > b, a, b); }
LANES_INLINE F32 clamp(F32 v, F32 low, F32 high) { return smaller(larger(v, low), high); }

LANES_INLINE I32 bits_of(F32 v) { return __builtin_bit_cast(I32, v); }
LANES_INLINE F32 float_of_bits(I32 v) { return __builtin_bit_cast(F32, v); }
LANES_INLINE F32 absolute(F32 v) { return float_of_bits(bits_of(v) & splat(int32_t(0x7fffffff))); }

LANES_INLINE F32 to_float(I32 v) {
    F32 r;
    LANES_EACH r.part[p] = __builtin_convertvector(v.part[p], NativeF32);
    return r;
}

// Nearest integer, ties to even, for |v| ≤ 2^22: adding 1.5 · 2^23 leaves no fraction bits.
constexpr float kLaneRounder = 12582912.0f;
LANES_INLINE F32 nearest(F32 v) { return (v + splat(kLaneRounder)) - splat(kLaneRounder); }
// The same as an integer, for |v| < 2^21, without a conversion.
LANES_INLINE I32 nearest_int(F32 v) { return bits_of(v + splat(kLaneRounder)) - splat(int32_t(0x4b400000)); }

// IEEE half precision, ties to even, in integers. Overflow becomes inf, subnormals are kept.
LANES_INLINE uint16_t half_of(float value) {
    uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x47800000) return uint16_t(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (bits < 0x38800000) {  // subnormal: 0.5 has the spacing that halves have there
        const float shifted = __builtin_bit_cast(float, bits) + 0.5f;
        return uint16_t(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000));
    }
    return uint16_t(sign | ((bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13));
}
LANES_INLINE float float_of_half(uint16_t half) {
    const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
    uint32_t bits = magnitude + (112u << 23);
    if (magnitude >= (31u << 23))
        bits = magnitude | 0x7f800000u;
    else if (magnitude < (1u << 23))
        bits = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude + (113u << 23)) -
                                                __builtin_bit_cast(float, 113u << 23));
    return __builtin_bit_cast(float, bits | (uint32_t(half & 0x8000) << 16));
}
// Lane-wise: the float that a half would hold of it.
LANES_INLINE F32 through_half(F32 v) {
    float values[kLanes];
    store(v, values);
    for (size_t i = 0; i < kLanes; ++i) values[i] = float_of_half(half_of(values[i]));
    return load(values);
}

// `count` ≤ n weights from `first` on, as float32; any element type.
LANES_INLINE void load_weights(const Weights& w, size_t first, size_t count, float* to) {
    switch (w.type) {
        case FloatType::float32:
            std::memcpy(to, static_cast<const float*>(w.data) + first, count * sizeof(float));
            return;
        case FloatType::bfloat16: {
            const uint16_t* from = static_cast<const uint16_t*>(w.data) + first;
            for (size_t i = 0; i < count; ++i) {
                const uint32_t bits = uint32_t(from[i]) << 16;
                std::memcpy(to + i, &bits, 4);
            }
            return;
        }
        case FloatType::float16: {
            const uint16_t* from = static_cast<const uint16_t*>(w.data) + first;
            for (size_t i = 0; i < count; ++i) to[i] = float_of_half(from[i]);
            return;
        }
    }
}

// from[lane · n + j] → to[j] lane: sixteen sub-blocks of n consecutive weights, one per lane.
template <size_t n>
LANES_INLINE void transpose(const float* from, F32* to) {
    float column[kLanes];
    for (size_t j = 0; j < n; ++j) {
        for (size_t lane = 0; lane < kLanes; ++lane) column[lane] = from[lane * n + j];
        to[j] = load(column);
    }
}

// table[index & 15] and table[index & 31], lane by lane.
LANES_INLINE F32 lookup16(const float* table, I32 index) {
    F32 r;
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX2__)
    F32 all;
    std::memcpy(&all, table, sizeof all);
#if defined(__AVX512F__)
    r.part[0] = __builtin_shuffle(all.part[0], index.part[0]);
#else
    LANES_EACH r.part[p] = __builtin_shuffle(all.part[0], all.part[1], index.part[p]);
#endif
#else
    int32_t at[kLanes];
    float values[kLanes];
    store(index, at);
    for (size_t i = 0; i < kLanes; ++i) values[i] = table[at[i] & 15];
    r = load(values);
#endif
    return r;
}
LANES_INLINE F32 lookup32(const float* table, I32 index) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__)
    F32 r, low = load(table), high = load(table + 16);
    r.part[0] = __builtin_shuffle(low.part[0], high.part[0], index.part[0]);
    return r;
#elif defined(__GNUC__) && !defined(__clang__) && defined(__AVX2__)
    return select(index << 27 < splat(0), lookup16(table + 16, index), lookup16(table, index));
#else
    int32_t at[kLanes];
    float values[kLanes];
    store(index, at);
    for (size_t i = 0; i < kLanes; ++i) values[i] = table[at[i] & 31];
    return load(values);
#endif
}

LANES_INLINE F32 square_root(F32 v) {
    float values[kLanes];
    store(v, values);
    for (size_t i = 0; i < kLanes; ++i) values[i] = __builtin_sqrtf(values[i]);
    return load(values);
}

// The same as `transpose`, within registers, for n that divides by 16. Element (r, c) of a square of L native vectors
// has the address bits r c; interleaving the upper with the lower half of the rows rotates them by one, and after
// log2 L rotations they are c r.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LANES_HAVE_SHUFFLE 1
#endif
#endif
#ifdef LANES_HAVE_SHUFFLE
LANES_INLINE void interleave(NativeF32 a, NativeF32 b, NativeF32* low, NativeF32* high) {
#if defined(__AVX512F__)
    *low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
    *low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    *high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    *low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    *high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}
template <size_t n>
LANES_INLINE void transpose_squares(const float* from, F32* to) {
    constexpr size_t side = kNativeLanes;
    static_assert(n % side == 0);
    LANES_EACH for (size_t first = 0; first < n; first += side) {
        NativeF32 rows[side], turned[side];
        for (size_t r = 0; r < side; ++r) std::memcpy(&rows[r], from + (p * side + r) * n + first, sizeof rows[r]);
        for (size_t bits = side; bits > 1; bits /= 2) {
            for (size_t r = 0; r < side / 2; ++r)
                interleave(rows[r], rows[r + side / 2], &turned[2 * r], &turned[2 * r + 1]);
            for (size_t r = 0; r < side; ++r) rows[r] = turned[r];
        }
        for (size_t r = 0; r < side; ++r) to[first + r].part[p] = rows[r];
    }
}
#else
template <size_t n>
LANES_INLINE void transpose_squares(const float* from, F32* to) {
    transpose<n>(from, to);
}
#endif

// `clamp` in two instructions where the machine's minimum is a < b ? a : b, which compilers do not see in `smaller`.
LANES_INLINE F32 limit(F32 v, F32 low, F32 high) {
#if defined(__AVX512F__)
    F32 r;
    // the masked forms with a full mask: GCC warns of the plain ones
    const __m512 raised = _mm512_maskz_max_ps(0xffff, (__m512)v.part[0], (__m512)low.part[0]);
    r.part[0] = (NativeF32)_mm512_maskz_min_ps(0xffff, raised, (__m512)high.part[0]);
    return r;
#elif defined(__AVX2__)
    F32 r;
    LANES_EACH r.part[p] =
        (NativeF32)_mm256_min_ps(_mm256_max_ps((__m256)v.part[p], (__m256)low.part[p]), (__m256)high.part[p]);
    return r;
#elif defined(__SSE2__)
    F32 r;
    LANES_EACH r.part[p] =
        (NativeF32)_mm_min_ps(_mm_max_ps((__m128)v.part[p], (__m128)low.part[p]), (__m128)high.part[p]);
    return r;
#else
    return clamp(v, low, high);
#endif
}

}  // namespace lowbit::LOWBIT_ISA
