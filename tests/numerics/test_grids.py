"""Grids: fitting, rounding, decoding, and the searches, against short references and stated bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.kernels.tables import MINIFLOATS
from lowbit.numerics import grid_for
from lowbit.numerics.scalar_grids import IntGrid, MinifloatGrid
from lowbit.numerics.scales import e8m0_codes, e8m0_values, global_scale_for, storable_scale
from lowbit.schemes import SCHEMES
from lowbit.tensors import Granularity, GroupParams, QuantizedTensor, RangeSearch

GRIDS = [
    *(IntGrid(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)),
    *(MinifloatGrid(MINIFLOATS[name], scale) for name in ("e4m3", "e5m2", "e2m1") for scale in ("bfloat16", "e8m0")),
]
ids = [f"{grid.name}-{grid.scale_format}" for grid in GRIDS]


def weights(rows: int = 24, columns: int = 96, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.05


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_codes_decode_near_the_weights(grid):
    weight = weights()
    for method in ("absmax", "mse", "wmse", "percentile"):
        params = grid.fit(weight, 32, RangeSearch(method))
        decoded = grid.decode(grid.round(weight, params, 32), params, 32)
        relative = ((decoded - weight).square().sum() / weight.square().sum()).item()
        assert relative < {2: 0.5, 3: 0.06, 4: 0.03}.get(grid.bits, 0.02), method


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_mse_search_never_loses_to_absmax(grid):
    weight = weights(seed=1)
    error = {}
    for method in ("absmax", "mse"):
        params = grid.fit(weight, 32, RangeSearch(method))
        error[method] = (grid.decode(grid.round(weight, params, 32), params, 32) - weight).square().reshape(24, 3, 32)
    assert (error["mse"].sum(-1) <= error["absmax"].sum(-1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_search_equals_a_plain_loop(symmetric):
    """The joint scan of one group, written out."""
    grid = IntGrid(4, symmetric, "float32")
    group = weights(1, 32, seed=2)
    search = RangeSearch("mse", steps=20)
    low, high = group.min(), group.max()
    best = math.inf
    for ratio in [1.0, *grid.clip_ratios(search)]:
        params = grid.params_from_range((low * ratio).reshape(1, 1), (high * ratio).reshape(1, 1))
        error = (grid.decode(grid.round(group, params, 32), params, 32) - group).square().sum().item()
        best = min(best, error)
    params = grid.fit(group, 32, search)
    found = (grid.decode(grid.round(group, params, 32), params, 32) - group).square().sum().item()
    assert found <= best * (1 + 1e-5)
    if symmetric:
        assert found == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("grid", [IntGrid(4), IntGrid(4, False), IntGrid(3)], ids=lambda grid: grid.name)
def test_weighted_search_keeps_the_large_weights_that_a_plain_one_clips(grid):
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(4))
    error = {}
    for method in ("mse", "wmse"):
        params = grid.fit(weight, 64, RangeSearch(method))
        error[method] = (grid.decode(grid.round(weight, params, 64), params, 64) - weight).square()
    large = weight.abs() > 2
    assert error["wmse"][large].sum() < 0.8 * error["mse"][large].sum()
    assert (error["wmse"] * weight.abs()).sum() < (error["mse"] * weight.abs()).sum()


def test_importance_moves_the_range_to_the_columns_that_matter():
    grid = IntGrid(3, True, "float32")
    weight = weights(64, 32, seed=3)
    weight[:, 0] *= 8
    importance = torch.ones(32)
    importance[0] = 0.0
    plain = grid.fit(weight, 32, RangeSearch("mse"))
    aware = grid.fit(weight, 32, RangeSearch("mse"), importance)

    def error(params: GroupParams) -> float:
        decoded = grid.decode(grid.round(weight, params, 32), params, 32)
        return ((decoded - weight).square() * importance).sum().item()

    assert error(aware) < error(plain)


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_all_zero_group_has_scale_one_and_decodes_to_zero(grid):
    weight = weights()
    weight[3] = 0.0
    for method in ("absmax", "mse"):
        params = grid.fit(weight, 32, RangeSearch(method))
        decoded = grid.decode(grid.round(weight, params, 32), params, 32)
        assert (params.scale[3] == 1.0).all()
        assert (decoded[3] == 0.0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_bad_weight_shows_as_nan_scale(grid):
    for bad in (math.nan, math.inf, -math.inf):
        weight = weights()
        weight[2, 40] = bad
        params = grid.fit(weight, 32, RangeSearch("absmax"))
        assert params.scale[2, 1].isnan()
        assert params.scale.isnan().sum() == 1


@given(st.integers(2, 8), st.lists(st.floats(-4, 4, width=32), min_size=4, max_size=40))
def test_zero_is_representable_on_asymmetric_grids(bits, values):
    grid = IntGrid(bits, symmetric=False, scale_format="float32")
    weight = torch.tensor([values])
    params = grid.fit(weight, 8, RangeSearch("absmax"))
    zero = grid.decode(grid.round(torch.zeros_like(weight), params, 8), params, 8)
    assert (zero == 0.0).all()


@given(st.integers(2, 8), st.booleans(), st.lists(st.floats(-4, 4, width=32), min_size=4, max_size=40))
def test_error_is_at_most_half_a_step_in_range(bits, symmetric, values):
    grid = IntGrid(bits, symmetric, "float32")
    weight = torch.tensor([values])
    params = grid.fit(weight, 8, RangeSearch("absmax"))
    decoded = grid.decode(grid.round(weight, params, 8), params, 8)
    scale = params.scale.repeat_interleave(8, 1)[:, : weight.shape[1]]
    # asymmetric: zero point and scale are rounded too, which moves an end by up to another half step
    steps = 0.5 if symmetric else 1.0
    assert ((decoded - weight).abs() <= scale * steps * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("scale_format", ["bfloat16", "float16", "float32"])
def test_model_dtype_scales_survive_their_dtype(scale_format):
    wanted = torch.rand(100) * 1e-2 + 1e-9
    scale = storable_scale(wanted, scale_format)
    assert torch.equal(scale.to(getattr(torch, scale_format)).float(), scale)
    assert (scale > 0).all()


def test_scales_for_float16_files_of_bfloat16_models_survive_both():
    wanted = torch.logspace(-6, 4, 2000)
    scale = storable_scale(wanted, "bfloat16_in_float16")
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)
    assert torch.equal(scale.to(torch.float16).float(), scale)
    inside = wanted > 2.0**-16
    assert ((scale - wanted).abs() <= wanted * 2.0**-8)[inside].all()
    assert storable_scale(torch.tensor([1e9, 1e-30]), "bfloat16_in_float16").tolist() == [65280.0, 2.0**-17]


def test_a_narrow_grid_has_no_lowest_code_and_holds_the_largest_weight():
    grid = IntGrid(8, scale_format="float32", narrow=True)
    weight = torch.tensor([[-3.0, 1.0, 3.0, 0.5]])
    params = grid.fit(weight, 4, RangeSearch())
    codes = grid.round(weight, params, 4)
    assert codes.tolist() == [[-127, 42, 127, 21]]
    assert grid.decode(codes, params, 4)[0, 0].item() == pytest.approx(-3.0, rel=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_lowest_zero_point_is_kept_and_the_range_still_covered(bits):
    grid = IntGrid(bits, symmetric=False, scale_format="float32", lowest_zero_point=1 - (1 << (bits - 1)))
    weight = torch.rand(50, 32) + torch.linspace(-1.0, 1.0, 50)[:, None]
    for search in (RangeSearch("absmax"), RangeSearch("wmse")):
        params = grid.fit(weight, 32, search)
        assert params.zero_point.min() >= grid.lowest_zero_point
    params = grid.fit(weight, 32, RangeSearch("absmax"))
    decoded = grid.decode(grid.round(weight, params, 32), params, 32)
    assert ((decoded - weight).abs() <= params.scale * 1.001).all()


def test_e8m0_scales_are_powers_of_two_that_cover():
    wanted = torch.rand(1000) * 10 + 1e-6
    scale = storable_scale(wanted, "e8m0")
    assert torch.equal(torch.exp2(torch.log2(scale).round()), scale)
    assert (scale >= wanted).all()
    assert (scale < 2 * wanted).all()


def test_e8m0_codes_are_bijective():
    codes = torch.arange(1, 255, dtype=torch.uint8)
    assert torch.equal(e8m0_codes(e8m0_values(codes)), codes)
    assert e8m0_values(torch.tensor([255], dtype=torch.uint8)).isnan().all()


def test_e4m3_scales_survive_two_levels():
    wanted = torch.rand(1000) * 0.1
    global_scale = global_scale_for(wanted.max().item())
    scale = storable_scale(wanted, "e4m3", global_scale)
    assert torch.equal((scale / global_scale).to(torch.float8_e4m3fn).float() * global_scale, scale)
    assert (scale > 0).all()


@given(st.floats(1e-20, 1e20))
def test_global_scale_is_an_exact_power_of_two_that_covers(largest):
    scale = global_scale_for(largest)
    assert math.frexp(scale)[0] == 0.5
    assert largest / scale <= 448.0
    assert 1.0 / (1.0 / scale) == scale


def test_every_scheme_has_a_grid():
    for name, scheme in SCHEMES.items():
        grid = grid_for(scheme.weight, "bfloat16")
        assert grid.bits == scheme.weight.bits, name
        assert grid.symmetric == scheme.weight.symmetric, name
        assert grid == grid_for(scheme.weight, "bfloat16")


@pytest.mark.parametrize("granularity", list(Granularity))
def test_quantized_tensor_expands_its_scales(granularity):
    """decode() against scale · (codes − zero_point), written out per weight, on a ragged shape."""
    rows, columns, group = 40, 80, 32
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    scale = torch.rand(granularity.scale_shape(rows, columns, group)) + 0.5
    size = columns if granularity in (Granularity.TENSOR, Granularity.CHANNEL) else group
    quantized = QuantizedTensor(codes, scale, IntGrid(4), granularity, size)
    row = torch.arange(rows)[:, None].expand(rows, columns)
    column = torch.arange(columns)[None].expand(rows, columns)
    across = column // group if granularity in (Granularity.GROUP, Granularity.BLOCK) else 0 * column
    down = {Granularity.TENSOR: 0 * row, Granularity.BLOCK: row // group}.get(granularity, row)
    assert torch.equal(quantized.decode(), scale[down, across] * codes)


def test_columns_in_activation_order_decode_with_the_group_they_name():
    codes = torch.randint(-8, 8, (5, 12), dtype=torch.int8)
    scale, zero_point = torch.rand(5, 3) + 0.5, torch.randint(-8, 8, (5, 3), dtype=torch.int32)
    g_idx = torch.randperm(12).int() % 3
    quantized = QuantizedTensor(codes, scale, IntGrid(4, False), Granularity.GROUP, 4, zero_point, g_idx=g_idx)
    wanted = torch.empty(5, 12)
    for column, group in enumerate(g_idx.tolist()):
        wanted[:, column] = scale[:, group] * (codes[:, column] - zero_point[:, group])
    assert torch.equal(quantized.decode(), wanted)
