"""Dense bit streams and nibbles: golden bytes, round trips, and compressed-tensors' own packer."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import kernels

WIDTHS = range(1, 9)
SHAPES = [(1, 1), (128, 33), (3, 257), (2, 32), (5, 8), (4, 7), (1, 0), (0, 9), (17, 64)]


def random_codes(bits, shape, generator):
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, generator=generator).to(torch.int8)


def hexadecimal(words):
    return [f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist()]


def test_golden_words_of_4_bits(isa):
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1, 0, 7]], dtype=torch.int8)
    assert hexadecimal(kernels.pack_dense(codes, 4)) == ["76543210", "000000f8"]


def test_golden_words_of_3_bits_straddle_the_word_boundary(isa):
    # u = 0 1 2 3 4 5 6 7 0 1 | 6: the two low bits of u[10] = 110 end word 0, its top bit begins word 1.
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 6, 5]], dtype=torch.uint8)
    assert hexadecimal(kernels.pack_dense(codes, 3, offset=0)) == ["88fac688", "0000000b"]


def test_golden_words_of_2_bits_per_row(isa):
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    assert hexadecimal(kernels.pack_dense(codes, 2, offset=0)) == ["000000e4", "0000001b"]


def test_golden_words_of_symmetric_zeros():
    # What GPTQ files carry as zero points: 7 in each nibble, 0x7f in each byte.
    assert hexadecimal(kernels.pack_dense(torch.full((1, 8), 7), 4, offset=0)) == ["77777777"]
    assert hexadecimal(kernels.pack_dense(torch.full((1, 4), -1), 8)) == ["7f7f7f7f"]


def test_golden_words_down_the_columns(isa):
    zero_points = torch.tensor([[-8, 0], [-7, 1], [-6, 2]], dtype=torch.int32)
    assert hexadecimal(kernels.pack_dense_columns(zero_points, 4)) == ["00000210", "00000a98"]


def test_golden_nibbles(isa):
    codes = torch.tensor([[1, 2, 3, 15, 0, 8]], dtype=torch.uint8)
    assert kernels.pack_nibbles(codes).tolist() == [[0x21, 0xF3, 0x80]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_is_the_reference_and_unpack_its_inverse(isa, shape, random):
    for bits in WIDTHS:
        codes = random_codes(bits, shape, random)
        words = kernels.pack_dense(codes, bits)
        assert words.shape == (shape[0], -(-shape[1] * bits // 32))
        assert torch.equal(words, kernels.reference.pack_dense(codes, bits))
        assert torch.equal(kernels.unpack_dense(words, bits, shape[1]), codes)
        assert torch.equal(kernels.reference.unpack_dense(words, bits, shape[1]), codes)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 140), st.integers(0, 2**31))
def test_unpack_after_pack_is_identity(bits, rows, columns, seed):
    codes = random_codes(bits, (rows, columns), torch.Generator().manual_seed(seed))
    for isa in kernels.available_isas():
        with kernels.use_isa(isa):
            assert torch.equal(kernels.unpack_dense(kernels.pack_dense(codes, bits), bits, columns), codes)


def test_unsigned_codes_round_trip_with_offset_0(isa, random):
    for bits in WIDTHS:
        codes = torch.randint(0, 1 << bits, (3, 45), generator=random).to(torch.uint8)
        unpacked = kernels.unpack_dense(kernels.pack_dense(codes, bits, offset=0), bits, 45, offset=0)
        assert unpacked.dtype == torch.uint8
        assert torch.equal(unpacked, codes)


def test_columns_round_trip(isa, random):
    for bits in WIDTHS:
        codes = random_codes(bits, (37, 5), random)
        words = kernels.pack_dense_columns(codes, bits)
        assert words.shape == (-(-37 * bits // 32), 5)
        assert torch.equal(kernels.unpack_dense_columns(words, bits, 37), codes)


def test_nibbles_round_trip(isa, random):
    for columns in (2, 6, 8, 14, 16, 258):
        codes = torch.randint(0, 16, (3, columns), generator=random).to(torch.uint8)
        packed = kernels.pack_nibbles(codes)
        assert torch.equal(packed, codes[:, 0::2] | (codes[:, 1::2] << 4))
        assert torch.equal(kernels.unpack_nibbles(packed), codes)


def test_an_odd_number_of_nibbles_is_refused():
    with pytest.raises(ValueError, match="pairs"):
        kernels.pack_nibbles(torch.zeros(1, 3, dtype=torch.uint8))


def test_a_code_that_does_not_fit_is_refused_wherever_it_is(isa):
    for bits, column in itertools.product(range(1, 8), (0, 7, 8, 12)):
        codes = torch.zeros(2, 13, dtype=torch.int8)
        codes[1, column] = 1 << (bits - 1)
        with pytest.raises(ValueError, match="does not fit"):
            kernels.pack_dense(codes, bits)


def test_wide_integers_and_bytes_that_would_wrap_around_are_refused(isa):
    for codes, offset in (
        (torch.tensor([[128, 0]]), None),
        (torch.tensor([[300, 0]]), None),
        (torch.tensor([[-129, 0]]), None),
        (torch.tensor([[-1, 0]], dtype=torch.int8), 0),
        (torch.tensor([[200, 0]], dtype=torch.uint8), 128),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            kernels.pack_dense(codes, 8, offset)


@pytest.mark.interop
def test_packing_is_compressed_tensors(random):
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for bits, shape in itertools.product(WIDTHS, ((128, 33), (1, 1), (3, 257), (16, 64))):
        codes = random_codes(bits, shape, random)
        words = kernels.pack_dense(codes, bits)
        assert torch.equal(words, theirs.pack_to_int32(codes, bits))
        assert torch.equal(theirs.unpack_from_int32(words, bits, torch.Size(shape)), codes)
        down = kernels.pack_dense_columns(codes, bits)
        assert torch.equal(down, theirs.pack_to_int32(codes, bits, packed_dim=0))


@pytest.mark.interop
def test_nibbles_are_compressed_tensors(random):
    theirs = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    from lowbit.kernels.tables import E2M1, values

    codes = torch.randint(0, 16, (4, 32), generator=random).to(torch.uint8)
    assert torch.equal(kernels.pack_nibbles(codes), theirs.pack_fp4_to_uint8(values(E2M1)[codes.long()]))
