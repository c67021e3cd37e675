// Sixteen lanes of K-quant codes, sub-scales and halves → the bytes of sixteen super-blocks.
//
// Bytes are put together in lanes, four to a 32-bit word, so that only whole words have to change places.
#pragma once

#include "kquants.hpp"

namespace lowbit::LOWBIT_ISA {

// byte(k), k = 0 … 4·words − 1, lane-wise → `words` words of each lane's block, `stride` bytes apart.
template <size_t words, class Byte>
LANES_INLINE void put_bytes(uint8_t* to, size_t stride, size_t lanes, Byte byte) {
    for (size_t k = 0; k < words; ++k) {
        const I32 word = byte(4 * k) | byte(4 * k + 1) << 8 | byte(4 * k + 2) << 16 | byte(4 * k + 3) << 24;
        int32_t values[kLanes];
        store(word, values);
        for (size_t lane = 0; lane < lanes; ++lane) std::memcpy(to + lane * stride + 4 * k, values + lane, 4);
    }
}

LANES_INLINE void put_half(uint8_t* to, size_t stride, size_t lanes, I32 bits) {
    int32_t values[kLanes];
    store(bits, values);
    for (size_t lane = 0; lane < lanes; ++lane) {
        const uint16_t half = uint16_t(values[lane]);
        std::memcpy(to + lane * stride, &half, 2);
    }
}

LANES_INLINE I32 low_bits(I32 v, int32_t mask) { return v & splat(mask); }

// Two low bits of four weights, 32 apart: see decode_q2_k.
LANES_INLINE I32 four_pairs(const I32* codes, size_t k) {
    const I32* q = codes + 128 * (k / 32) + k % 32;
    return low_bits(q[0], 3) | low_bits(q[32], 3) << 2 | low_bits(q[64], 3) << 4 | low_bits(q[96], 3) << 6;
}

// One bit of eight weights, 32 apart: see decode_q3_k and decode_q5_k.
LANES_INLINE I32 eight_bits(const I32* codes, size_t k, int bit) {
    I32 byte = splat(int32_t(0));
    for (int n = 0; n < 8; ++n) byte = byte | low_bits(codes[32 * size_t(n) + k] >> bit, 1) << n;
    return byte;
}

// Low nibbles of weights 32 apart: see decode_q4_k.
LANES_INLINE I32 two_nibbles(const I32* codes, size_t k) {
    const I32* q = codes + 64 * (k / 32) + k % 32;
    return low_bits(q[0], 15) | low_bits(q[32], 15) << 4;
}

// See scales_and_minima of kquants_decode.cpp.
LANES_INLINE I32 six_bit_scales(const Packed& p, size_t k) {
    const size_t i = k % 4;
    if (k < 4) return p.scales[i] | (p.scales[4 + i] >> 4) << 6;
    if (k < 8) return p.minima[i] | (p.minima[4 + i] >> 4) << 6;
    return low_bits(p.scales[4 + i], 15) | low_bits(p.minima[4 + i], 15) << 4;
}

inline void pack_q2_k(const Packed& p, size_t lanes, uint8_t* to) {
    put_bytes<4>(to, 84, lanes, [&](size_t k) { return p.scales[k] | p.minima[k] << 4; });
    put_bytes<16>(to + 16, 84, lanes, [&](size_t k) { return four_pairs(p.codes, k); });
    put_half(to + 80, 84, lanes, p.d);
    put_half(to + 82, 84, lanes, p.dmin);
}

inline void pack_q3_k(const Packed& p, size_t lanes, uint8_t* to) {
    put_bytes<8>(to, 110, lanes, [&](size_t k) { return eight_bits(p.codes, k, 2); });
    put_bytes<16>(to + 32, 110, lanes, [&](size_t k) { return four_pairs(p.codes, k); });
    put_bytes<3>(to + 96, 110, lanes, [&](size_t k) {
        if (k < 8) return low_bits(p.scales[k], 15) | low_bits(p.scales[8 + k], 15) << 4;
        const I32* s = p.scales + k % 4;
        return s[0] >> 4 | (s[4] >> 4) << 2 | (s[8] >> 4) << 4 | (s[12] >> 4) << 6;
    });
    put_half(to + 108, 110, lanes, p.d);
}

inline void pack_q4_k(const Packed& p, size_t lanes, uint8_t* to) {
    put_half(to, 144, lanes, p.d);
    put_half(to + 2, 144, lanes, p.dmin);
    put_bytes<3>(to + 4, 144, lanes, [&](size_t k) { return six_bit_scales(p, k); });
    put_bytes<32>(to + 16, 144, lanes, [&](size_t k) { return two_nibbles(p.codes, k); });
}

inline void pack_q5_k(const Packed& p, size_t lanes, uint8_t* to) {
    put_half(to, 176, lanes, p.d);
    put_half(to + 2, 176, lanes, p.dmin);
    put_bytes<3>(to + 4, 176, lanes, [&](size_t k) { return six_bit_scales(p, k); });
    put_bytes<8>(to + 16, 176, lanes, [&](size_t k) { return eight_bits(p.codes, k, 4); });
    put_bytes<32>(to + 48, 176, lanes, [&](size_t k) { return two_nibbles(p.codes, k); });
}

inline void pack_q6_k(const Packed& p, size_t lanes, uint8_t* to) {
    put_bytes<32>(to, 210, lanes, [&](size_t k) {
        const I32* q = p.codes + 128 * (k / 64) + k % 64;
        return low_bits(q[0], 15) | low_bits(q[64], 15) << 4;
    });
    put_bytes<16>(to + 128, 210, lanes, [&](size_t k) {
        const I32* q = p.codes + 128 * (k / 32) + k % 32;
        return q[0] >> 4 | (q[32] >> 4) << 2 | (q[64] >> 4) << 4 | (q[96] >> 4) << 6;
    });
    put_bytes<4>(to + 192, 210, lanes, [&](size_t k) { return low_bits(p.scales[k], 255); });
    put_half(to + 208, 210, lanes, p.d);
}

}  // namespace lowbit::LOWBIT_ISA
