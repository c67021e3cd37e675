"""llama.cpp's cache blocks against its own `quantize_row_*_ref`, and by hand."""

import ctypes

import pytest
import torch

from lowbit.kv import blocks
from lowbit.numerics.ggml import TYPES

NAMES = tuple(blocks.BITS)


def rows(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(64, 64, generator=generator) * torch.randn(64, 1, generator=generator).exp()
    values[0] = 0
    values[1, :32] = 1.0
    values[2, 5], values[2, 9] = 3.5, -3.5  # two of the largest magnitude: the first counts
    values[3] = values[3].round() / 2  # ties
    values[4] *= 1e-6
    return values


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_llama_cpps_bit_for_bit(name):
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("xllamacpp")
    values = rows()
    encode = getattr(llama_cpp.ggml(), f"quantize_row_{name}_ref")
    encode.restype = None
    made = torch.empty(values.numel() // 32 * TYPES[name.upper()].size, dtype=torch.uint8)
    encode(*(ctypes.c_void_p(each.data_ptr()) for each in (values, made)), ctypes.c_int64(values.numel()))
    assert torch.equal(blocks.round_trip(name, values), llama_cpp.dequantized(name, made.reshape(64, -1), 64))


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_the_file_format(name):
    assert blocks.BITS[name] == TYPES[name.upper()].bits_per_weight


def test_q8_0_and_q4_0_by_hand():
    x = torch.zeros(32)
    x[:4] = torch.tensor([-8.0, 4.0, 1.0, 0.4])
    # q4_0: d = −8 / −8 = 1; codes trunc(x + 8.5) − 8
    assert blocks.round_trip("q4_0", x)[:4].tolist() == [-8.0, 4.0, 1.0, 0.0]
    # q8_0: d = half(8 / 127); codes round(x · 127 / 8)
    d = torch.tensor(8 / 127).half().float()
    assert torch.equal(blocks.round_trip("q8_0", x)[:4], d * torch.tensor([-127.0, 64.0, 16.0, 6.0]))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_stay_and_blocks_do_not_see_each_other(name):
    values = rows(1).reshape(2, 4, 8, 64)
    whole = blocks.round_trip(name, values)
    assert whole.shape == values.shape
    assert torch.equal(whole[1, 2, 3, 32:], blocks.round_trip(name, values[1, 2, 3, 32:]))
