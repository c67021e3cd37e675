// The encoders of the legacy types, one file per kind of search.
#pragma once

#include "one_scale.hpp"

namespace lowbit::LOWBIT_ISA {

constexpr size_t kLegacyBlock = 32;

// Integers lowest … highest; code 0 is the lowest.
template <int lowest, int highest>
struct IntegerGrid {
    static constexpr float kPerStep = 1.0f;
    static constexpr bool kScanClamped = true;

    static LANES_INLINE F32 bounded(F32 v) { return limit(v, splat(float(lowest)), splat(float(highest))); }
    static LANES_INLINE F32 value(F32 v) { return nearest(v); }
    static LANES_INLINE I32 code(F32 v) { return nearest_int(v) - splat(lowest); }
};

// The codes of a tile as a block keeps them: nibbles, byte j with codes j and j + 16, and of 5-bit codes bit 4 of code
// j at bit j of a word of its own.
struct PackedCodes {
    int32_t nibbles[4][kLanes], fifth[kLanes];
};

template <int bits>
LANES_INLINE void pack_codes(const I32* codes, PackedCodes* packed) {
    if constexpr (bits == 4) {
        one_scale::pack_nibbles<kLegacyBlock>(codes, packed->nibbles);
    } else {
        I32 low[kLegacyBlock], fifth = splat(0);
        for (size_t j = 0; j < kLegacyBlock; ++j) {
            low[j] = codes[j] & splat(15);
            fifth = fifth | ((codes[j] >> 4) << int(j));
        }
        one_scale::pack_nibbles<kLegacyBlock>(low, packed->nibbles);
        store(fifth, packed->fifth);
    }
}

// Writes what follows the scales of one block.
template <int bits>
LANES_INLINE void store_codes(const PackedCodes& packed, size_t lane, uint8_t* to) {
    if constexpr (bits == 5) {
        std::memcpy(to, &packed.fifth[lane], 4);
        to += 4;
    }
    for (size_t word = 0; word < 4; ++word) std::memcpy(to + 4 * word, &packed.nibbles[word][lane], 4);
}

void encode_q4_0(const GgmlRows& rows, uint8_t* blocks);
void encode_q4_1(const GgmlRows& rows, uint8_t* blocks);
void encode_q5_0(const GgmlRows& rows, uint8_t* blocks);
void encode_q5_1(const GgmlRows& rows, uint8_t* blocks);
void encode_q8_0(const GgmlRows& rows, uint8_t* blocks);

}  // namespace lowbit::LOWBIT_ISA
