"""Codebooks (NF4, FP4) and double-quantized scales: whole tables, ties, golden codes, bitsandbytes as the oracle."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import kernels
from lowbit.kernels.tables import CODEBOOKS, steps, values
from lowbit.numerics import grid_for
from lowbit.numerics.scalar_grids import CodebookGrid
from lowbit.numerics.scales import NESTED_BLOCK, decode_scales, dynamic_map, quantize_scales
from lowbit.rounding.rtn import measure_range, needs_tensor_range, round_to_nearest
from lowbit.schemes import SCHEMES, WeightSpec
from lowbit.tensors import Granularity, GroupParams, RangeSearch

BOOKS = list(CODEBOOKS.values())
NESTED = WeightSpec("nf4", 4, Granularity.GROUP, 64, scale_format="nested")
names = [book.name for book in BOOKS]


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def one_group(book, numbers: list[float], scale: float = 1.0) -> list[int]:
    weight = torch.tensor([numbers])
    return CodebookGrid(book).round(weight, GroupParams(torch.tensor([[scale]])), len(numbers))[0].tolist()


@pytest.mark.parametrize("book", BOOKS, ids=names)
def test_every_code_decodes_to_its_value_and_back(book):
    grid = CodebookGrid(book)
    codes = torch.arange(16, dtype=torch.uint8)[None]
    params = GroupParams(torch.tensor([[0.5]]))
    decoded = grid.decode(codes, params, 16)
    assert torch.equal(decoded[0], values(book) * 0.5)
    assert torch.equal(grid.decode(grid.round(decoded, params, 16), params, 16), decoded)
    assert grid.bits == 4
    assert values(book).abs().max() == 1.0


def test_nf4_is_ascending_with_an_exact_zero_and_fp4_is_a_float():
    assert values(CODEBOOKS["nf4"]).diff().min() > 0
    assert values(CODEBOOKS["nf4"])[7] == 0.0
    fp4 = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert torch.allclose(values(CODEBOOKS["fp4"]) * 12, torch.tensor([*fp4, *(-value for value in fp4)]))


def test_golden_codes():
    """Nearest values by hand: 0.5 lies between 0.4407 (12) and 0.5626 (13), whose midpoint is 0.5017."""
    assert one_group(CODEBOOKS["nf4"], [-1.0, -0.5, 0.0, 0.04, 0.5, 0.502, 0.9, 7.0]) == [0, 2, 7, 8, 12, 13, 15, 15]
    assert one_group(CODEBOOKS["fp4"], [1.0, 0.5, 0.26, 0.01, 0.0, -0.01, -0.6, -9.0]) == [3, 5, 7, 1, 0, 9, 10, 11]


@pytest.mark.parametrize("book", BOOKS, ids=names)
def test_ties_take_the_smaller_value(book):
    midpoints, code_of = steps(book)
    assert one_group(book, midpoints.tolist()) == code_of[:-1].tolist()
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    assert one_group(book, above.tolist()) == code_of[1:].tolist()


def test_fp4_zeros():
    """Both decode to 0; 0 and -0 have code 0, a little more than 0 has code 8."""
    assert one_group(CODEBOOKS["fp4"], [0.0, -0.0, -0.002, 0.002]) == [0, 0, 0, 8]


def test_the_reciprocal_is_rounded_before_it_multiplies():
    """As bitsandbytes computes, not w / scale: found by search, a weight where the two differ."""
    book, generator = CODEBOOKS["nf4"], torch.Generator().manual_seed(0)
    scale = torch.rand(2000, 1, generator=generator) + 0.5
    weight = steps(book)[0][None] * scale
    by_division = torch.bucketize(weight / scale, steps(book)[0])
    by_reciprocal = torch.bucketize(weight * (1.0 / scale), steps(book)[0])
    assert not torch.equal(by_division, by_reciprocal)
    assert torch.equal(CodebookGrid(book).round(weight, GroupParams(scale), 15).long(), by_reciprocal)


@pytest.mark.parametrize("book", BOOKS, ids=names)
def test_every_isa_equals_the_reference(book):
    for columns in (0, 1, 15, 16, 17, 63, 64, 65, 200):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_every_isa(book, weights(5, columns, seed=columns).to(dtype))


def check_every_isa(book, weight):
    columns = weight.shape[1]
    grid, group_size = CodebookGrid(book), 64
    params = GroupParams(torch.rand(5, math.ceil(columns / group_size)) * 0.1 + 0.01)
    importance = torch.rand(columns)
    results = {}
    for name in kernels.available_isas():
        with kernels.use_isa(name):
            codes = grid.round(weight, params, group_size)
            error = grid.error(weight, params, group_size, importance, by_magnitude=True)
            sums = kernels.squared_error(weight, codes, group_size, params.scale, None, book)
            results[name] = codes, grid.decode(codes, params, group_size), error, torch.tensor(sums)
    for codes, decoded, error, sums in results.values():
        assert torch.equal(codes, results["reference"][0])
        assert torch.equal(decoded, results["reference"][1])
        assert torch.allclose(error, results["reference"][2], rtol=1e-5, atol=0)
        assert torch.allclose(sums, results["reference"][3], rtol=1e-5, atol=0)


@given(st.sampled_from(names), st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=40))
def test_error_is_at_most_half_the_widest_gap(name, numbers):
    grid, weight = CodebookGrid(CODEBOOKS[name]), torch.tensor([numbers])
    params = grid.fit(weight, 8, RangeSearch("absmax"))
    decoded = grid.decode(grid.round(weight, params, 8), params, 8)
    widest = values(grid.format).sort().values.diff().max()
    scale = params.scale.repeat_interleave(8, 1)[:, : len(numbers)]
    assert ((decoded - weight).abs() <= scale * widest * 0.5001).all()


@pytest.mark.parametrize("book", BOOKS, ids=names)
def test_zero_groups_have_scale_one_and_decode_to_zero(book):
    grid, weight = CodebookGrid(book), weights(3, 128)
    weight[1] = 0.0
    for method in ("absmax", "mse"):
        params = grid.fit(weight, 64, RangeSearch(method))
        assert (params.scale[1] == 1.0).all()
        assert (grid.decode(grid.round(weight, params, 64), params, 64)[1] == 0.0).all()


@pytest.mark.parametrize("book", BOOKS, ids=names)
@pytest.mark.parametrize("method", ["mse", "wmse"])
def test_search_improves_on_absmax_in_what_it_minimises(book, method):
    grid, weight = CodebookGrid(book), weights(64, 256)
    total = {}
    for tried in ("absmax", method):
        params = grid.fit(weight, 64, RangeSearch(tried))
        error = (grid.decode(grid.round(weight, params, 64), params, 64) - weight).square()
        total[tried] = (error * weight.abs() if method == "wmse" else error).reshape(64, 4, 64).sum(-1)
    assert (total[method] <= total["absmax"] * (1 + 1e-5)).all()
    assert total[method].sum() < 0.97 * total["absmax"].sum()


@pytest.mark.interop
@pytest.mark.parametrize("book", BOOKS, ids=names)
def test_codes_scales_and_weights_are_those_of_bitsandbytes(book):
    functional = pytest.importorskip("bitsandbytes").functional
    shapes, dtypes = ((1, 64), (64, 64), (37, 192), (96, 576)), (torch.float32, torch.bfloat16, torch.float16)
    for shape, dtype in itertools.product(shapes, dtypes):
        compare_with_bitsandbytes(functional, book, shape, dtype)


def compare_with_bitsandbytes(functional, book, shape, dtype):
    weight = weights(*shape, seed=3).to(dtype)
    weight[0, :32] = torch.cat([torch.zeros(16), -torch.zeros(16)]).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=book.name)
    grid = CodebookGrid(book)
    params = grid.fit(weight, 64, RangeSearch("absmax"))
    codes = grid.round(weight, params, 64).reshape(-1)
    assert torch.equal(codes[0::2] << 4 | codes[1::2], packed.reshape(-1))
    assert torch.equal(params.scale.reshape(-1), state.absmax)
    assert torch.equal(values(book), state.code)
    decoded = grid.decode(codes.reshape(shape), params, 64)
    assert torch.equal(decoded.to(dtype), functional.dequantize_4bit(packed, state))


def test_dynamic_map_is_ascending_and_nearly_symmetric():
    table = dynamic_map()
    assert table.shape == (256,)
    assert table.diff().min() > 0
    assert table[255] == 1.0
    assert table[127] == 0.0
    assert torch.equal(table[:127], -table[128:255].flip(0))


def test_golden_scale_codes():
    """Scales 1, 2, 3 around 2: −1 and 1 are the ends of the table, but −0.993 is the least of it; 0 is code 127."""
    nested = quantize_scales(torch.tensor([[1.0, 2.0, 3.0]]), 2.0)
    assert nested.codes.tolist() == [[0, 127, 255]]
    assert nested.absmax.tolist() == [1.0]
    assert decode_scales(nested).tolist() == [[pytest.approx(2 - 0.99296874), 2.0, 3.0]]


def test_blocks_of_scales_cross_rows_and_the_last_is_short():
    scale = torch.rand(7, 100) + 0.5
    nested = quantize_scales(scale, 1.0)
    assert nested.absmax.shape == (3,)
    flat = scale.reshape(-1)
    for block in range(3):
        part = flat[block * NESTED_BLOCK : (block + 1) * NESTED_BLOCK]
        alone = quantize_scales(part[None], 1.0)
        assert torch.equal(
            alone.codes.reshape(-1), nested.codes.reshape(-1)[block * NESTED_BLOCK : (block + 1) * NESTED_BLOCK]
        )
        assert torch.equal(alone.absmax, nested.absmax[block : block + 1])
    assert ((decode_scales(nested) - scale).abs() <= 0.01 * nested.absmax.max()).all()


def test_no_scale_becomes_zero_or_negative():
    """Rounded to the nearest, 0.0001 would decode to −0.02: the table is coarse where scales are far below the mean."""
    scale = torch.tensor([[0.0001, 0.02, 0.05, 4.0, 1.0]])
    decoded = decode_scales(quantize_scales(scale, 1.0))
    assert (decoded > 0).all()
    assert decoded[0, 0] < 0.05


def test_equal_scales_decode_to_themselves():
    nested = quantize_scales(torch.full((4, 64), 0.25), 0.25)
    assert (nested.codes == 127).all()
    assert (decode_scales(nested) == 0.25).all()


@pytest.mark.interop
def test_scale_codes_are_those_of_bitsandbytes():
    """Of its op for float64 input, which compares with every table entry.

    Its C routine for float32 looks codes up in a table of 65536 steps: there the two may differ, and ours is nearer.
    """
    functional = pytest.importorskip("bitsandbytes").functional
    table = dynamic_map()
    assert torch.equal(table, functional.create_dynamic_map())
    for seed in range(20):
        scale = weights(100, 64 * 7, seed).reshape(100, 7, 64).abs().amax(2)
        offset = scale.mean().item()
        nested = quantize_scales(scale, offset)
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise((scale - offset).double(), table, NESTED_BLOCK)
        assert torch.equal(nested.absmax, absmax)
        assert torch.equal(nested.codes, codes)
        coarse, state = functional.quantize_blockwise(scale - offset, blocksize=NESTED_BLOCK)
        relative = ((scale - offset).reshape(-1) / absmax.repeat_interleave(NESTED_BLOCK)[: scale.numel()]).reshape(
            100, 7
        )
        ours, theirs = ((table[found.long()] - relative).abs() for found in (nested.codes, coarse))
        assert (ours <= theirs).all()
        assert (theirs - ours).max() < 2 / 65536
        decoded = functional.dequantize_blockwise(nested.codes, state) + torch.tensor(offset)
        assert torch.equal(decode_scales(nested), decoded)


@pytest.mark.parametrize("method", ["absmax", "mse"])
def test_codes_are_chosen_for_the_scales_that_are_stored(method):
    weight = weights(32, 512)
    grid = grid_for(NESTED, "float32")
    quantized = round_to_nearest(weight, NESTED, grid, RangeSearch(method), measure_range(weight, NESTED))
    assert quantized.nested is not None
    assert torch.equal(quantized.scale, decode_scales(quantized.nested))
    assert torch.equal(quantized.codes, grid.round(weight, GroupParams(quantized.scale), 64))


def test_slabs_joined_have_the_scales_of_the_whole():
    weight = weights(96, 512, seed=5)
    weight[3, :128] = 0.0
    grid, search = grid_for(NESTED, "float32"), RangeSearch("absmax")
    whole_range = measure_range(weight, NESTED)
    joined = measure_range(weight[:32], NESTED).joined(measure_range(weight[32:], NESTED))
    assert joined.mean_absmax == pytest.approx(whole_range.mean_absmax, rel=1e-12)
    assert (joined.low, joined.high) == (whole_range.low, whole_range.high)
    expected = weight.reshape(96, 8, 64).abs().amax(2)
    assert whole_range.mean_absmax == pytest.approx(expected[expected > 0].mean().item(), rel=1e-6)
    whole = round_to_nearest(weight, NESTED, grid, search, whole_range)
    slab = round_to_nearest(weight[32:64], NESTED, grid, search, whole_range)
    assert torch.equal(slab.codes, whole.codes[32:64])
    assert torch.equal(slab.scale, whole.scale[32:64])


def test_a_zero_group_does_not_stretch_the_range_of_its_block():
    weight = weights(8, 256)
    weight[2, 64:128] = 0.0
    quantized = round_to_nearest(
        weight, NESTED, grid_for(NESTED, "float32"), RangeSearch(), measure_range(weight, NESTED)
    )
    assert quantized.nested is not None
    assert quantized.nested.absmax.max() < 0.2
    assert (quantized.decode()[2, 64:128] == 0.0).all()


def test_double_quantization_costs_little():
    weight = weights(128, 512)
    plain, error = SCHEMES["NF4"].weight, {}
    for spec in (plain, NESTED):
        known = measure_range(weight, spec)
        quantized = round_to_nearest(weight, spec, grid_for(spec, "float32"), RangeSearch(), known)
        error[spec.scale_format] = (quantized.decode() - weight).square().sum().item()
    assert error["nested"] < 1.01 * error["model"]


def test_a_tensor_of_zeros_is_legal():
    weight = torch.zeros(4, 128)
    known = measure_range(weight, NESTED)
    quantized = round_to_nearest(weight, NESTED, grid_for(NESTED, "float32"), RangeSearch(), known)
    assert (quantized.decode() == 0.0).all()
    assert (quantized.scale > 0).all()


def test_double_quantization_needs_the_whole_tensor_first():
    assert needs_tensor_range(NESTED)
    assert not needs_tensor_range(SCHEMES["NF4"].weight)
    with pytest.raises(AssertionError, match="range"):
        round_to_nearest(weights(4, 64), NESTED, grid_for(NESTED, "float32"), RangeSearch())
    known = measure_range(weights(4, 64))
    with pytest.raises(AssertionError, match="measured for it"):
        round_to_nearest(weights(4, 64), NESTED, grid_for(NESTED, "float32"), RangeSearch(), known)
