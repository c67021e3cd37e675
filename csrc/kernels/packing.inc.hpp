// Dense bit streams: element i of a row at bits [i * B, (i + 1) * B), least significant bit first, rows padded with
// zero bits to whole 32-bit words.
//
//   B = 4    word 0, bit 31 -> 0:   u7   u6  u5  u4  u3  u2  u1  u0
//   B = 3    word 0, bit 31 -> 0:   ..a  u9  u8  u7  u6  u5  u4  u3  u2  u1  u0
//            word 1, bit 31 -> 0:   ... u12  u11  b       u10 = b a: its low two bits, then its top bit
//
// Eight codes fill exactly B bytes, so a row is a loop over eight codes: one 64-bit integer with a code in each byte is
// squeezed to 8 * B bits, by halves. Bytes in memory order are the stream, hence little-endian hosts only.

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the packed stream is written through native words");

constexpr uint64_t kEveryByte = 0x0101010101010101u;

// Bytewise a + b and a - b, without carries between bytes.
LOWBIT_INLINE uint64_t add_bytes(uint64_t a, uint64_t b) {
    const uint64_t top = 0x80 * kEveryByte;
    return ((a & ~top) + (b & ~top)) ^ ((a ^ b) & top);
}

LOWBIT_INLINE uint64_t subtract_bytes(uint64_t a, uint64_t b) {
    const uint64_t top = 0x80 * kEveryByte;
    return ((a | top) - (b & ~top)) ^ ((a ^ ~b) & top);
}

// Eight B-bit codes, one per byte -> 8 * B bits.
template <int B>
LOWBIT_INLINE uint64_t squeeze(uint64_t x) {
    constexpr uint64_t in16 = 0x00ff00ff00ff00ffu, in32 = 0x0000ffff0000ffffu, in64 = 0x00000000ffffffffu;
    x = (x & in16) | ((x >> (8 - B)) & (in16 << B));
    x = (x & in32) | ((x >> (16 - 2 * B)) & (in32 << (2 * B)));
    return (x & in64) | ((x >> (32 - 4 * B)) & (in64 << (4 * B)));
}

// The inverse; bits above 8 * B are ignored.
template <int B>
LOWBIT_INLINE uint64_t spread(uint64_t x) {
    constexpr uint64_t four = (uint64_t(1) << (4 * B)) - 1;
    constexpr uint64_t two = ((uint64_t(1) << (2 * B)) - 1) * 0x0000000100000001u;
    constexpr uint64_t one = ((uint64_t(1) << B) - 1) * 0x0001000100010001u;
    x = (x & four) | ((x & (four << (4 * B))) << (32 - 4 * B));
    x = (x & two) | ((x & (two << (2 * B))) << (16 - 2 * B));
    return (x & one) | ((x & (one << B)) << (8 - B));
}

LOWBIT_INLINE uint64_t load(const uint8_t* from, size_t bytes) {
    uint64_t value = 0;
    __builtin_memcpy(&value, from, bytes);
    return value;
}

LOWBIT_INLINE void store(uint8_t* to, uint64_t value, size_t bytes) { __builtin_memcpy(to, &value, bytes); }

template <int B>
bool pack_rows(const Codes& codes, uint64_t offset, uint8_t* out) {
    const size_t row_bytes = (codes.columns * B + 31) / 32 * 4, octets = codes.columns / 8, tail = codes.columns % 8;
    constexpr uint64_t outside = (0xff & ~((1 << B) - 1)) * kEveryByte;
    uint64_t stray = 0;
    for (size_t row = 0; row < codes.rows; ++row) {
        const uint8_t* in = static_cast<const uint8_t*>(codes.data) + row * codes.columns;
        uint8_t* row_out = out + row * row_bytes;
#pragma omp simd reduction(| : stray)
        for (size_t i = 0; i < octets; ++i) {
            const uint64_t unsigned_codes = add_bytes(load(in + 8 * i, 8), offset);
            stray |= unsigned_codes & outside;
            store(row_out + B * i, squeeze<B>(unsigned_codes), B);
        }
        for (size_t i = octets * B; i < row_bytes; ++i) row_out[i] = 0;
        if (tail) {
            const uint64_t used = (uint64_t(1) << (8 * tail)) - 1;
            const uint64_t unsigned_codes = add_bytes(load(in + 8 * octets, tail), offset) & used;
            stray |= unsigned_codes & outside;
            store(row_out + B * octets, squeeze<B>(unsigned_codes), (tail * B + 7) / 8);
        }
    }
    return stray == 0;
}

template <int B>
void unpack_rows(const uint8_t* in, size_t rows, size_t columns, uint64_t offset, uint8_t* out) {
    const size_t row_bytes = (columns * B + 31) / 32 * 4, octets = columns / 8, tail = columns % 8;
    // Bits above 8 * B are ignored, so for odd widths one 8-byte load is faster than B bytes, where the row has them.
    constexpr bool is_native_width = (B & (B - 1)) == 0;
    const size_t wide = is_native_width || row_bytes < 8 ? 0 : smaller(octets, (row_bytes - 8) / B + 1);
    for (size_t row = 0; row < rows; ++row) {
        const uint8_t* row_in = in + row * row_bytes;
        uint8_t* row_out = out + row * columns;
        for (size_t i = 0; i < wide; ++i)
            store(row_out + 8 * i, subtract_bytes(spread<B>(load(row_in + B * i, 8)), offset), 8);
#pragma omp simd
        for (size_t i = wide; i < octets; ++i)
            store(row_out + 8 * i, subtract_bytes(spread<B>(load(row_in + B * i, B)), offset), 8);
        if (tail) {
            const uint64_t packed = load(row_in + B * octets, (tail * B + 7) / 8);
            store(row_out + 8 * octets, subtract_bytes(spread<B>(packed), offset), tail);
        }
    }
}

bool pack_dense(const Codes& codes, int bits, int offset, uint32_t* words) {
    uint8_t* out = reinterpret_cast<uint8_t*>(words);
    const uint64_t everywhere = uint64_t(uint8_t(offset)) * kEveryByte;
    switch (bits) {
        case 1:
            return pack_rows<1>(codes, everywhere, out);
        case 2:
            return pack_rows<2>(codes, everywhere, out);
        case 3:
            return pack_rows<3>(codes, everywhere, out);
        case 4:
            return pack_rows<4>(codes, everywhere, out);
        case 5:
            return pack_rows<5>(codes, everywhere, out);
        case 6:
            return pack_rows<6>(codes, everywhere, out);
        case 7:
            return pack_rows<7>(codes, everywhere, out);
        default:
            return pack_rows<8>(codes, everywhere, out);
    }
}

void unpack_dense(const uint32_t* words, size_t rows, size_t columns, int bits, int offset, uint8_t* codes) {
    const uint8_t* in = reinterpret_cast<const uint8_t*>(words);
    const uint64_t everywhere = uint64_t(uint8_t(offset)) * kEveryByte;
    switch (bits) {
        case 1:
            return unpack_rows<1>(in, rows, columns, everywhere, codes);
        case 2:
            return unpack_rows<2>(in, rows, columns, everywhere, codes);
        case 3:
            return unpack_rows<3>(in, rows, columns, everywhere, codes);
        case 4:
            return unpack_rows<4>(in, rows, columns, everywhere, codes);
        case 5:
            return unpack_rows<5>(in, rows, columns, everywhere, codes);
        case 6:
            return unpack_rows<6>(in, rows, columns, everywhere, codes);
        case 7:
            return unpack_rows<7>(in, rows, columns, everywhere, codes);
        default:
            return unpack_rows<8>(in, rows, columns, everywhere, codes);
    }
}
