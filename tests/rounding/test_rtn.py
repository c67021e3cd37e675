"""Round to nearest against a reference of a few lines, for every scheme."""

from __future__ import annotations

import pytest
import torch

from lowbit.numerics import grid_for
from lowbit.rounding.rtn import TensorRange, measure_range, needs_tensor_range, round_to_nearest
from lowbit.schemes import SCHEMES
from lowbit.tensors import Granularity, RangeSearch

SHAPE = (160, 256)


def weight(seed: int = 0) -> torch.Tensor:
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.05).to(torch.bfloat16)


def nearest_value_reference(w: torch.Tensor, quantized) -> torch.Tensor:
    """For every weight, the closest of all values its group can represent."""
    params = quantized.params()
    codes = torch.arange(1 << quantized.grid.bits)
    if quantized.zero_point is not None or quantized.grid.name.startswith("int"):
        codes = (codes - (1 << (quantized.grid.bits - 1))).to(torch.int8)
    else:
        codes = codes.to(torch.uint8)
    size = w.shape[1] // params.scale.shape[1]
    best = torch.full(w.shape, torch.inf)
    for code in codes:
        value = quantized.grid.decode(torch.full(w.shape, int(code), dtype=codes.dtype), params, size)
        best = torch.where((value - w).abs() < (best - w).abs(), value, best)
    return best


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.weight.bits <= 4 and s.name != "TERNARY"],
                         ids=lambda s: s.name)  # fmt: skip
def test_every_code_is_the_nearest_one(scheme):
    w = weight()
    quantized = round_to_nearest(w, scheme.weight, grid_for(scheme.weight, "bfloat16"), RangeSearch(), measure_range(w))
    reference = nearest_value_reference(w.float(), quantized)
    assert torch.allclose((quantized.decode() - w.float()).abs(), (reference - w.float()).abs(), atol=1e-7)


def test_w8a8_equals_ten_lines_of_torch():
    w = weight()
    scale = ((w.float().abs().amax(1, keepdim=True) * (2 / 255)).to(torch.bfloat16)).float()
    codes = (w.float() / scale).round().clamp(-128, 127).to(torch.int8)
    scheme = SCHEMES["W8A8"]
    quantized = round_to_nearest(w, scheme.weight, grid_for(scheme.weight, "bfloat16"), RangeSearch())
    assert torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.codes, codes)


def test_fp8_block_equals_ten_lines_of_torch():
    w = weight()
    scheme = SCHEMES["FP8_BLOCK"]
    quantized = round_to_nearest(w, scheme.weight, grid_for(scheme.weight, "bfloat16"), RangeSearch())
    for i in range(2):
        for j in range(2):
            block = w.float()[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            scale = (block.abs().max() / 448).to(torch.bfloat16).float()
            assert quantized.scale[i, j] == scale
            expected = (block / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
            assert torch.equal(quantized.decode()[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128], expected)


def test_nvfp4_scales_fit_the_second_level():
    w = weight()
    scheme = SCHEMES["NVFP4A16"]
    quantized = round_to_nearest(w, scheme.weight, grid_for(scheme.weight, "bfloat16"), RangeSearch(), measure_range(w))
    stored = quantized.scale / quantized.global_scale
    assert torch.equal(stored.to(torch.float8_e4m3fn).float(), stored)
    assert 224 < stored.max() <= 448


def test_whole_tensor_range_decides_the_global_scale():
    w, scheme = weight(), SCHEMES["NVFP4A16"]
    wide = round_to_nearest(w, scheme.weight, grid_for(scheme.weight, "bfloat16"), RangeSearch(), TensorRange(-64, 64))
    assert wide.global_scale == 2.0**-5  # 64 / 6 / 448, up to a power of two


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_rows_do_not_influence_each_other(scheme):
    """Any slab (of whole blocks) gets the same codes as in the whole weight."""
    w = weight()
    grid, search, known = grid_for(scheme.weight, "bfloat16"), RangeSearch(), measure_range(w, scheme.weight)
    whole = round_to_nearest(w, scheme.weight, grid, search, known)
    slab = round_to_nearest(w[128:], scheme.weight, grid, search, known)
    assert torch.equal(whole.codes[128:], slab.codes)


def test_schemes_with_one_scale_for_all_need_the_range():
    needing = {name for name, scheme in SCHEMES.items() if needs_tensor_range(scheme.weight)}
    assert needing == {"FP8", "NVFP4", "NVFP4A16", "TERNARY", "W8A8_TENSOR", "W4AFP8_STATIC"}
    scheme = SCHEMES["FP8"]
    with pytest.raises(AssertionError, match="range"):
        round_to_nearest(weight(), scheme.weight, grid_for(scheme.weight, "bfloat16"), RangeSearch())


def test_ragged_last_block():
    w = torch.randn(200, 192).to(torch.bfloat16)
    scheme = SCHEMES["FP8_BLOCK"]
    quantized = round_to_nearest(w, scheme.weight, grid_for(scheme.weight, "bfloat16"), RangeSearch())
    assert quantized.granularity is Granularity.BLOCK
    assert quantized.scale.shape == (2, 2)
    assert ((quantized.decode() - w.float()).square().sum() / w.float().square().sum()) < 1e-3
