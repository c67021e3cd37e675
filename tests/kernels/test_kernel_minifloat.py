"""Every code of every minifloat, and rounding to them."""

import math

import pytest
import torch

from lowbit import kernels
from lowbit.kernels.tables import E2M1, E2M3, E3M2, E4M3, E5M2, MINIFLOATS, values

ALL_FORMATS = pytest.mark.parametrize("fmt", MINIFLOATS.values(), ids=MINIFLOATS)
TORCH_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def decode_all(fmt):
    """The value of every code through the kernel, scale 1."""
    codes = torch.arange(1 << fmt.bits).to(torch.uint8)[None]
    return kernels.decode_table(codes, codes.shape[1], torch.ones(1, 1), fmt)[0]


def encode(fmt, numbers, scale=1.0):
    w = torch.as_tensor(numbers, dtype=torch.float32)[None]
    return kernels.round_minifloat(w, w.shape[1], torch.full((1, 1), scale), fmt)[0]


def test_the_value_table_of_e2m1():
    assert values(E2M1).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_the_value_tables_of_fp6():
    # fmt: off
    assert values(E3M2)[:32].tolist() == [
        0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75,
        2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]
    assert values(E2M3)[:32].tolist() == [
        0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
        2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5]
    # fmt: on


@pytest.mark.parametrize(
    ("fmt", "largest", "smallest"),
    [(E4M3, 448, 2**-9), (E5M2, 57344, 2**-16), (E2M1, 6, 0.5), (E3M2, 28, 2**-4), (E2M3, 7.5, 2**-3)],
    ids=lambda value: getattr(value, "name", value),
)
def test_extremes_of_each_format(fmt, largest, smallest):
    finite = values(fmt)[: fmt.finite_magnitudes]
    assert finite.max() == fmt.max_value == largest
    assert finite[1] == smallest
    assert torch.equal(finite, finite.sort().values)


@ALL_FORMATS
def test_decode_is_the_formula_for_every_code(isa, fmt):
    for code, value in enumerate(decode_all(fmt).tolist()):
        bit_string = f"{code:0{fmt.bits}b}"
        sign = -1 if bit_string[0] == "1" else 1
        exponent = int(bit_string[1 : 1 + fmt.exponent_bits], 2)
        mantissa = int(bit_string[1 + fmt.exponent_bits :], 2)
        if fmt is E5M2 and exponent == 31:
            expected = math.nan if mantissa else sign * math.inf
        elif fmt is E4M3 and (exponent, mantissa) == (15, 7):
            expected = math.nan
        elif exponent == 0:
            expected = sign * math.ldexp(mantissa, 1 - fmt.bias - fmt.mantissa_bits)
        else:
            significand = (1 << fmt.mantissa_bits) + mantissa
            expected = sign * math.ldexp(significand, exponent - fmt.bias - fmt.mantissa_bits)
        assert value == expected or (math.isnan(value) and math.isnan(expected)), bit_string
        assert math.copysign(1, value) == sign or math.isnan(value)


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_decode_is_torchs_for_every_code(isa, name):
    codes = torch.arange(256).to(torch.uint8)
    expected = codes.view(TORCH_DTYPES[name]).to(torch.float32)
    torch.testing.assert_close(decode_all(MINIFLOATS[name]), expected, rtol=0, atol=0, equal_nan=True)


@ALL_FORMATS
def test_encode_is_the_inverse_of_decode_for_every_finite_code(isa, fmt):
    finite = [code for code in range(1 << fmt.bits) if (code & (fmt.sign_bit - 1)) < fmt.finite_magnitudes]
    assert encode(fmt, decode_all(fmt)[finite]).tolist() == finite


@ALL_FORMATS
def test_ties_go_to_the_even_code_and_their_neighbours_to_the_nearer(isa, fmt):
    magnitudes = values(fmt)[: fmt.finite_magnitudes]
    ties = (magnitudes[1:] + magnitudes[:-1]) / 2
    lower = torch.arange(len(ties))
    assert encode(fmt, ties).tolist() == (lower + lower % 2).tolist()
    assert encode(fmt, torch.nextafter(ties, torch.tensor(0.0))).tolist() == lower.tolist()
    assert encode(fmt, torch.nextafter(ties, torch.tensor(1e9))).tolist() == (lower + 1).tolist()


@ALL_FORMATS
def test_encode_saturates_and_makes_no_non_finite_code(isa, fmt):
    largest = fmt.finite_magnitudes - 1
    beyond = [fmt.max_value * 1.04, fmt.max_value * 2, 1e30, 3e38, math.inf]
    assert encode(fmt, beyond).tolist() == [largest] * len(beyond)
    assert encode(fmt, [-x for x in beyond]).tolist() == [largest + fmt.sign_bit] * len(beyond)
    assert encode(fmt, [3e38], scale=1e-30).tolist() == [largest]  # w / scale overflows


@ALL_FORMATS
def test_encode_keeps_the_sign_of_what_rounds_to_zero(isa, fmt):
    assert encode(fmt, [0.0, -0.0, 1e-30, -1e-30, 1e-45, -1e-45]).tolist() == [0, fmt.sign_bit] * 3


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_encode_is_torchs_in_range(isa, name, random):
    fmt = MINIFLOATS[name]
    exponents = torch.empty(1 << 14).uniform_(-26, math.log2(fmt.max_value), generator=random)
    numbers = torch.exp2(exponents) * (torch.randint(0, 2, exponents.shape, generator=random) * 2 - 1)
    assert torch.equal(encode(fmt, numbers), numbers.to(TORCH_DTYPES[name]).view(torch.uint8))


@ALL_FORMATS
def test_encode_finds_the_nearest_value(isa, fmt, random):
    w = torch.randn(5, 333, generator=random)
    scale = w.abs().amax(dim=1, keepdim=True) / fmt.max_value
    decoded = kernels.decode_table(kernels.round_minifloat(w, 333, scale, fmt), 333, scale, fmt)
    finite = values(fmt)[values(fmt).isfinite()]
    nearest = (w[:, :, None] - scale[:, :, None] * finite).abs().amin(dim=2)
    assert ((w - decoded).abs() <= nearest + 1e-6).all()


@pytest.mark.interop
def test_e2m1_is_compressed_tensors_cast_to_fp4(isa, random):
    fp4_utils = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils")
    grid = torch.arange(-8, 8, 1 / 64)
    numbers = torch.cat([grid, torch.randn(2000, generator=random) * 3])
    ours = kernels.decode_table(encode(E2M1, numbers)[None], len(numbers), torch.ones(1, 1), E2M1)[0]
    assert torch.equal(ours, fp4_utils.cast_to_fp4(numbers.clone()))
