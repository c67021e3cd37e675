// Where each i-quant keeps what: blocks of 256 weights to and from one common form, `IqBlock`.
//
//     half d; uint8 qs[…]; …     as below, little-endian; v counts points, k sub-blocks, i groups of 8 weights
//     IQ1_S    d, qs[32], qh u16[8]                          1.5625 bits per weight
//              point v: qs[v] + 256 · bits 3m…3m+2 of qh[k], m = v % 4; scale: bits 12-14 of it, shift: bit 15
//     IQ1_M    qs[32], qh[16], scales u16[4]                 1.75
//              point v: qs[v] + 256 · bits 0-2 of nibble v of qh; shift bit 3 of it; d: top nibbles of scales
//              scale k: 3 bits of scales[k / 4] from 3 · (k % 4)
//     IQ2_XXS  d, {uint8 q[4]; u32 s}[8]                     2.0625
//              point v = q; signs of its 8 weights: bits 7m…7m+6 of s; scale: bits 28-31
//     IQ2_XS   d, u16 qs[32], scales[8]                      2.3125
//              point v: bits 0-8; signs bits 9-15; scale k: nibble k
//     IQ2_S    d, qs[32], signs[32], qh[8], scales[8]        2.5625
//              point v: qs[v] + 256 · bits 2m, 2m + 1 of qh[v / 4]; scale k: nibble k
//     IQ3_XXS  d, qs[64], u32 s[8]                           3.0625
//              point v = qs[v]; signs and scale as in IQ2_XXS
//     IQ3_S    d, qs[64], qh[8], signs[32], scales[4]        3.4375
//              point v: qs[v] + 256 · bit v % 8 of qh[v / 8]; scale k: nibble k
//
// Signs are a bit per weight, set where negative. Where seven bits are kept the eighth makes their number even.
#pragma once

#include "iq_grid.hpp"
#include "lanes.hpp"

namespace lowbit::LOWBIT_ISA {

constexpr size_t kIqBlock = 256;

struct IqBlock {
    uint16_t d;          // half
    uint8_t scale[16];   // of a sub-block
    uint16_t point[64];  // entry of the grid
    uint8_t sign[32];    // of 8 weights; IQ1: 1 where the shift is negative
};

template <class To>
LANES_INLINE To read(const uint8_t* from) {
    To value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class From>
LANES_INLINE void write(From value, uint8_t* to) {
    std::memcpy(to, &value, sizeof value);
}

LANES_INLINE uint8_t with_even_sign(uint32_t seven) {
    return uint8_t((seven & 127) | (uint32_t(__builtin_popcount(seven & 127)) & 1) << 7);
}

enum class IqSigns { free, even, none };

// What the types differ in. The effective scale is d · kUnit · (2 · scale + 1); kGuesses and kNeighbours belong to the
// search, see iq_encode.hpp.
struct Iq1S {
    static constexpr int kType = 19;
    static constexpr size_t kBytes = 50, kGroup = 32, kColumns = 8, kLevels = 3, kScales = 8, kShiftColumns = 32;
    static constexpr float kUnit = 1.0f;
    static constexpr IqSigns kSigns = IqSigns::none;
    static constexpr float kGuesses[] = {0.7f, 0.85f, 1.0f, 1.15f, 1.3f, 1.5f};
    static constexpr size_t kNeighbours = 1;

    static void unpack(const uint8_t* from, IqBlock& block) {
        block.d = read<uint16_t>(from);
        for (size_t k = 0; k < 8; ++k) {
            const uint32_t high = read<uint16_t>(from + 34 + 2 * k);
            block.scale[k] = high >> 12 & 7;
            for (size_t m = 0; m < 4; ++m) {
                block.point[4 * k + m] = uint16_t(from[2 + 4 * k + m] | (high >> (3 * m) & 7) << 8);
                block.sign[4 * k + m] = uint8_t(high >> 15);
            }
        }
    }
    static void pack(const IqBlock& block, uint8_t* to) {
        write(block.d, to);
        for (size_t k = 0; k < 8; ++k) {
            uint32_t high = uint32_t(block.scale[k]) << 12 | uint32_t(block.sign[4 * k]) << 15;
            for (size_t m = 0; m < 4; ++m) {
                to[2 + 4 * k + m] = uint8_t(block.point[4 * k + m]);
                high |= uint32_t(block.point[4 * k + m] >> 8) << (3 * m);
            }
            write(uint16_t(high), to + 34 + 2 * k);
        }
    }
};

struct Iq1M {
    static constexpr int kType = 29;
    static constexpr size_t kBytes = 56, kGroup = 16, kColumns = 8, kLevels = 3, kScales = 8, kShiftColumns = 8;
    static constexpr float kUnit = 1.0f;
    static constexpr IqSigns kSigns = IqSigns::none;
    static constexpr float kGuesses[] = {0.7f, 0.85f, 1.0f, 1.15f, 1.3f, 1.5f};
    static constexpr size_t kNeighbours = 1;

    static void unpack(const uint8_t* from, IqBlock& block) {
        uint32_t d = 0;
        for (size_t k = 0; k < 16; ++k) {
            const uint32_t scales = read<uint16_t>(from + 48 + k / 4 * 2);
            block.scale[k] = scales >> (3 * (k % 4)) & 7;
            d |= (scales >> 12) << (k / 4 * 4);
        }
        block.d = uint16_t(d);
        for (size_t v = 0; v < 32; ++v) {
            const uint32_t high = from[32 + v / 2] >> (v % 2 * 4);
            block.point[v] = uint16_t(from[v] | (high & 7) << 8);
            block.sign[v] = high >> 3 & 1;
        }
    }
    static void pack(const IqBlock& block, uint8_t* to) {
        for (size_t q = 0; q < 4; ++q) {
            uint32_t scales = uint32_t(block.d >> (4 * q) & 15) << 12;
            for (size_t m = 0; m < 4; ++m) scales |= uint32_t(block.scale[4 * q + m]) << (3 * m);
            write(uint16_t(scales), to + 48 + 2 * q);
        }
        for (size_t v = 0; v < 32; ++v) to[v] = uint8_t(block.point[v]);
        for (size_t i = 0; i < 16; ++i)
            to[32 + i] = uint8_t((block.point[2 * i] >> 8 | block.sign[2 * i] << 3) |
                                 (block.point[2 * i + 1] >> 8 | block.sign[2 * i + 1] << 3) << 4);
    }
};

struct Iq2Xxs {
    static constexpr int kType = 16;
    static constexpr size_t kBytes = 66, kGroup = 32, kColumns = 8, kLevels = 3, kScales = 16, kShiftColumns = 0;
    static constexpr float kUnit = 0.125f;
    static constexpr IqSigns kSigns = IqSigns::even;
    static constexpr float kGuesses[] = {0.6f, 0.75f, 0.9f, 1.1f};
    static constexpr size_t kNeighbours = 2;

    static void unpack(const uint8_t* from, IqBlock& block) {
        block.d = read<uint16_t>(from);
        for (size_t k = 0; k < 8; ++k) {
            const uint32_t signs = read<uint32_t>(from + 6 + 8 * k);
            block.scale[k] = uint8_t(signs >> 28);
            for (size_t m = 0; m < 4; ++m) {
                block.point[4 * k + m] = from[2 + 8 * k + m];
                block.sign[4 * k + m] = with_even_sign(signs >> (7 * m));
            }
        }
    }
    static void pack(const IqBlock& block, uint8_t* to) {
        write(block.d, to);
        for (size_t k = 0; k < 8; ++k) {
            uint32_t signs = uint32_t(block.scale[k]) << 28;
            for (size_t m = 0; m < 4; ++m) {
                to[2 + 8 * k + m] = uint8_t(block.point[4 * k + m]);
                signs |= uint32_t(block.sign[4 * k + m] & 127) << (7 * m);
            }
            write(signs, to + 6 + 8 * k);
        }
    }
};

struct Iq2Xs {
    static constexpr int kType = 17;
    static constexpr size_t kBytes = 74, kGroup = 16, kColumns = 8, kLevels = 3, kScales = 16, kShiftColumns = 0;
    static constexpr float kUnit = 0.125f;
    static constexpr IqSigns kSigns = IqSigns::even;
    static constexpr float kGuesses[] = {0.6f, 0.7f, 0.8f, 0.95f, 1.1f};
    static constexpr size_t kNeighbours = 2;

    static void unpack(const uint8_t* from, IqBlock& block) {
        block.d = read<uint16_t>(from);
        for (size_t k = 0; k < 16; ++k) block.scale[k] = from[66 + k / 2] >> (k % 2 * 4) & 15;
        for (size_t v = 0; v < 32; ++v) {
            const uint32_t q = read<uint16_t>(from + 2 + 2 * v);
            block.point[v] = q & 511;
            block.sign[v] = with_even_sign(q >> 9);
        }
    }
    static void pack(const IqBlock& block, uint8_t* to) {
        write(block.d, to);
        for (size_t v = 0; v < 32; ++v)
            write(uint16_t(block.point[v] | (block.sign[v] & 127) << 9), to + 2 + 2 * v);
        for (size_t i = 0; i < 8; ++i) to[66 + i] = uint8_t(block.scale[2 * i] | block.scale[2 * i + 1] << 4);
    }
};

struct Iq2S {
    static constexpr int kType = 22;
    static constexpr size_t kBytes = 82, kGroup = 16, kColumns = 8, kLevels = 3, kScales = 16, kShiftColumns = 0;
    static constexpr float kUnit = 0.125f;
    static constexpr IqSigns kSigns = IqSigns::free;
    static constexpr float kGuesses[] = {0.75f, 1.0f};
    static constexpr size_t kNeighbours = 1;

    static void unpack(const uint8_t* from, IqBlock& block) {
        block.d = read<uint16_t>(from);
        for (size_t k = 0; k < 16; ++k) block.scale[k] = from[74 + k / 2] >> (k % 2 * 4) & 15;
        for (size_t v = 0; v < 32; ++v) {
            block.point[v] = uint16_t(from[2 + v] | (from[66 + v / 4] >> (v % 4 * 2) & 3) << 8);
            block.sign[v] = from[34 + v];
        }
    }
    static void pack(const IqBlock& block, uint8_t* to) {
        write(block.d, to);
        for (size_t i = 0; i < 8; ++i) {
            uint32_t high = 0;
            for (size_t m = 0; m < 4; ++m) high |= uint32_t(block.point[4 * i + m] >> 8) << (2 * m);
            to[66 + i] = uint8_t(high);
            to[74 + i] = uint8_t(block.scale[2 * i] | block.scale[2 * i + 1] << 4);
        }
        for (size_t v = 0; v < 32; ++v) to[2 + v] = uint8_t(block.point[v]), to[34 + v] = block.sign[v];
    }
};

struct Iq3Xxs {
    static constexpr int kType = 18;
    static constexpr size_t kBytes = 98, kGroup = 32, kColumns = 4, kLevels = 8, kScales = 16, kShiftColumns = 0;
    static constexpr float kUnit = 0.25f;
    static constexpr IqSigns kSigns = IqSigns::even;
    static constexpr float kGuesses[] = {0.8f, 1.0f, 1.2f};
    static constexpr size_t kNeighbours = 2;

    static void unpack(const uint8_t* from, IqBlock& block) {
        block.d = read<uint16_t>(from);
        for (size_t v = 0; v < 64; ++v) block.point[v] = from[2 + v];
        for (size_t k = 0; k < 8; ++k) {
            const uint32_t signs = read<uint32_t>(from + 66 + 4 * k);
            block.scale[k] = uint8_t(signs >> 28);
            for (size_t m = 0; m < 4; ++m) block.sign[4 * k + m] = with_even_sign(signs >> (7 * m));
        }
    }
    static void pack(const IqBlock& block, uint8_t* to) {
        write(block.d, to);
        for (size_t v = 0; v < 64; ++v) to[2 + v] = uint8_t(block.point[v]);
        for (size_t k = 0; k < 8; ++k) {
            uint32_t signs = uint32_t(block.scale[k]) << 28;
            for (size_t m = 0; m < 4; ++m) signs |= uint32_t(block.sign[4 * k + m] & 127) << (7 * m);
            write(signs, to + 66 + 4 * k);
        }
    }
};

struct Iq3S {
    static constexpr int kType = 21;
    static constexpr size_t kBytes = 110, kGroup = 32, kColumns = 4, kLevels = 8, kScales = 16, kShiftColumns = 0;
    static constexpr float kUnit = 1.0f;
    static constexpr IqSigns kSigns = IqSigns::free;
    static constexpr float kGuesses[] = {0.85f, 1.0f, 1.15f};
    static constexpr size_t kNeighbours = 2;

    static void unpack(const uint8_t* from, IqBlock& block) {
        block.d = read<uint16_t>(from);
        for (size_t k = 0; k < 8; ++k) block.scale[k] = from[106 + k / 2] >> (k % 2 * 4) & 15;
        for (size_t v = 0; v < 64; ++v)
            block.point[v] = uint16_t(from[2 + v] | (from[66 + v / 8] >> (v % 8) & 1) << 8);
        std::memcpy(block.sign, from + 74, 32);
    }
    static void pack(const IqBlock& block, uint8_t* to) {
        write(block.d, to);
        for (size_t i = 0; i < 8; ++i) {
            uint32_t high = 0;
            for (size_t m = 0; m < 8; ++m) {
                to[2 + 8 * i + m] = uint8_t(block.point[8 * i + m]);
                high |= uint32_t(block.point[8 * i + m] >> 8) << m;
            }
            to[66 + i] = uint8_t(high);
        }
        std::memcpy(to + 74, block.sign, 32);
        for (size_t i = 0; i < 4; ++i) to[106 + i] = uint8_t(block.scale[2 * i] | block.scale[2 * i + 1] << 4);
    }
};

}  // namespace lowbit::LOWBIT_ISA
