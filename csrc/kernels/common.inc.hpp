// Element types, bit casts and the loop over groups. Included once per instruction set, inside an unnamed namespace.
//
// Every kernel is a loop that the compiler vectorises; `omp simd` lets it reorder the named reductions and nothing
// else. All arithmetic is IEEE float32 with contraction off, so every instruction set yields the same bits except in
// sums.

#define LOWBIT_INLINE inline __attribute__((always_inline))

using std::int16_t, std::int32_t, std::int8_t, std::uint16_t, std::uint32_t, std::uint64_t, std::uint8_t, std::size_t;

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

LOWBIT_INLINE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
LOWBIT_INLINE int32_t as_int(float value) { return __builtin_bit_cast(int32_t, value); }

LOWBIT_INLINE float to_float(float value) { return value; }

LOWBIT_INLINE float to_float(BFloat16 value) { return as_float(uint32_t(value.bits) << 16); }

// In integers, because without F16C the compiler would call a library function per element.
LOWBIT_INLINE float to_float(Float16 value) {
    const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
    const uint32_t normal = magnitude + (112u << 23);
    const uint32_t non_finite = magnitude | 0x7f800000u;
    // 2^-14 + subnormal has the subnormal's bits in its mantissa.
    const uint32_t subnormal = uint32_t(as_int(as_float(magnitude + (113u << 23)) - as_float(113u << 23)));
    uint32_t bits = magnitude < (1u << 23) ? subnormal : normal;
    bits = magnitude >= (31u << 23) ? non_finite : bits;
    return as_float(bits | (uint32_t(value.bits & 0x8000) << 16));
}

LOWBIT_INLINE float smaller(float a, float b) { return a < b ? a : b; }
LOWBIT_INLINE float larger(float a, float b) { return a > b ? a : b; }
LOWBIT_INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// Adding 1.5 * 2^23 leaves no fraction bits: the sum is rounded to an integer, ties to even, for |x| <= 2^22.
constexpr float kRounder = 12582912.0f;

// Call f(n) with n a constant for the usual group sizes, so that their loops have no remainder.
template <class F>
LOWBIT_INLINE void with_constant_length(size_t n, F f) {
    switch (n) {
        case 16:
            return f(size_t(16));
        case 32:
            return f(size_t(32));
        case 64:
            return f(size_t(64));
        case 128:
            return f(size_t(128));
        default:
            return f(n);
    }
}

// Call f(index of the group in [N, G], its first element in [N, K], its length) for every group.
template <class F>
LOWBIT_INLINE void for_each_group(size_t rows, size_t columns, size_t group, F f) {
    const size_t groups = (columns + group - 1) / group;
    for (size_t row = 0; row < rows; ++row)
        for (size_t index = 0; index < groups; ++index) {
            const size_t begin = index * group;
            f(row * groups + index, row * columns + begin, smaller(group, columns - begin));
        }
}

// Call f(typed pointer) for the element type of the weights.
template <class F>
LOWBIT_INLINE void with_type(const Weights& w, F f) {
    switch (w.type) {
        case FloatType::float32:
            return f(static_cast<const float*>(w.data));
        case FloatType::bfloat16:
            return f(static_cast<const BFloat16*>(w.data));
        case FloatType::float16:
            return f(static_cast<const Float16*>(w.data));
    }
}
