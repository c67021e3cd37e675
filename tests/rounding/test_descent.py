"""Refinement from given codes: coordinate descent, scales in closed form, and what a file can store of both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.numerics import ggml, grid_for
from lowbit.numerics.ggml.grid import GgmlGrid
from lowbit.numerics.ggml.types import TYPES
from lowbit.rounding.descent import Descent, RefineOptions, refine
from lowbit.rounding.held import effective, hold, joined
from lowbit.rounding.hessian import InputData, prepare
from lowbit.rounding.target import GgmlTarget, GridTarget
from lowbit.schemes import SCHEMES
from lowbit.tensors import LayerStats, QuantizedTensor, RangeSearch

K, N = 256, 24
CODED = [name for name, kind in TYPES.items() if kind.family != "plain"]
GRIDS = ("W4A16", "W4A16_ASYM", "W3A16", "W8A16", "NVFP4A16", "MXFP4A16", "FP8_DYNAMIC", "FP8_BLOCK", "NF4")


def correlated(columns: int = K, tokens: int = 2048) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    return torch.randn(tokens, columns, generator=generator) @ mixed


def stats_of(x: torch.Tensor) -> LayerStats:
    return LayerStats(len(x), x.abs().amax(0), x.square().mean(0), x.abs().mean(0), x.T @ x)


STATS = stats_of(correlated())
WEIGHT = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.05
PLAIN = RefineOptions(correction=0, anew=False, sweeps=2)


def target_of(name: str):
    if name in TYPES:
        return GgmlTarget(name)
    scheme = SCHEMES[name]
    scheme = scheme.with_group_size(32) if scheme.weight.group_size_is_free else scheme
    scales = "bfloat16" if scheme.weight.scale_format == "model" else scheme.weight.scale_format
    return GridTarget(scheme.weight, grid_for(scheme.weight, scales), RangeSearch("absmax")).with_range([WEIGHT])


def error(decoded: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """J of each row, float64, damped as refinement damps it."""
    hessian = STATS.hessian.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(K)
    off = (decoded - WEIGHT).double()
    return ((off @ hessian) * off).sum(dim=1)


def test_codes_are_those_of_a_ten_line_coordinate_descent():
    columns, x = 16, correlated(16, 200).double()
    hessian = x.T @ x
    weight = WEIGHT[:4, :columns]
    curvature = prepare(stats_of(x.float()), 0.0).curvature()
    target = GridTarget(SCHEMES["W4A16"].with_group_size(8).weight, grid_for(SCHEMES["W4A16"].weight, "float32"),
                        RangeSearch("absmax"))  # fmt: skip
    start = target.nearest(weight).stored
    descent = Descent(hold(target, start, slice(None)), weight, curvature, 4)
    descent.descend()
    codes, scale = start.codes.double(), start.scale.double().repeat_interleave(8, dim=1)
    for column in range(columns):
        off = weight.double() - codes * scale
        residual = (off @ hessian)[:, column] / hessian[column, column]
        best = codes[:, column] * scale[:, column] + residual
        codes[:, column] = (best / scale[:, column]).round().clamp(-8, 7)
    assert torch.equal(descent.held.codes.double(), codes)
    assert not torch.equal(start.codes.double(), codes)


def test_a_scale_is_the_least_squares_solution_of_its_group():
    """s* = (qᵀ H w) / (qᵀ H q), with everything else fixed."""
    target = GridTarget(SCHEMES["W4A16"].weight, grid_for(SCHEMES["W4A16"].weight, "float32"), RangeSearch("absmax"))
    start = target.nearest(WEIGHT).stored
    curvature = prepare(STATS, 0.01).curvature()
    held = hold(target, start, slice(None))
    descent = Descent(held, WEIGHT, curvature, 128)
    descent._refit(next(iter(held.parts())))
    group = slice(0, 128)
    hessian = STATS.hessian.double() + 0.01 * STATS.hessian.diagonal().double().mean() * torch.eye(K)
    others = start.decode().double()
    others[:, group] = 0
    wanted, q = WEIGHT.double() - others, torch.zeros(N, K).double()
    q[:, group] = start.codes[:, group].double()
    solution = ((q @ hessian) * wanted).sum(1) / ((q @ hessian) * q).sum(1)
    assert torch.allclose(held.scale[:, 0].double(), solution, rtol=1e-3)
    assert torch.equal(held.scale[:, 1], start.scale[:, 1])


@pytest.mark.parametrize("name", [*CODED, *GRIDS])
def test_no_row_gets_worse_and_what_is_stored_decodes_to_what_is_promised(name):
    target = target_of(name)
    start = target.nearest(WEIGHT, STATS.mean_sq if target.is_ggml else None)
    refined = refine(WEIGHT, target, InputData(STATS), PLAIN, start.stored)
    before, after = error(start.decoded), error(refined.decoded)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert after.sum() < 0.8 * before.sum()
    if isinstance(refined.stored, QuantizedTensor):
        assert refined.stored.codes.shape == start.stored.codes.shape
        assert refined.stored.codes.dtype == start.stored.codes.dtype
        assert refined.stored.scale.shape == start.stored.scale.shape
        assert torch.equal(refined.stored.decode(), refined.decoded)
    else:
        assert refined.stored.shape == start.stored.shape
        assert torch.equal(ggml.decode(name, refined.stored), refined.decoded)


@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S", "W4A16_ASYM"])
def test_rows_go_on_from_gptqs_codes_where_these_are_better(name):
    target = target_of(name)
    start = target.nearest(WEIGHT).stored
    alone = error(refine(WEIGHT, target, InputData(STATS), PLAIN, start).decoded)
    both = refine(WEIGHT, target, InputData(STATS), replace(PLAIN, anew=True), start)
    assert error(both.decoded).sum() < alone.sum()
    assert bool((error(both.decoded) <= error(target.reader(start)(torch.arange(N))) * (1 + 1e-5)).all())
    assert both.notes == ("rows rounded anew, by GPTQ, where that is better",)


@pytest.mark.parametrize("name", CODED)
def test_effective_scales_are_the_decoders(name):
    blocks = ggml.encode(name, WEIGHT, None)
    params = GgmlGrid(name).unpack(blocks)[1]
    scale, offset = effective(name, params.stored)
    assert torch.equal(scale, params.scale)
    assert offset is None if params.offset is None else torch.equal(offset, params.offset)


@pytest.mark.parametrize("name", [*CODED, "W4A16_ASYM", "NF4"])
def test_holding_and_joining_changes_no_byte(name):
    target = target_of(name)
    start = target.nearest(WEIGHT).stored
    again = joined([hold(target, start, slice(0, 7)), hold(target, start, slice(7, N))])
    if isinstance(start, QuantizedTensor):
        assert torch.equal(again.codes, start.codes)
        assert torch.equal(again.scale, start.scale)
    else:
        assert torch.equal(again, start)


def test_the_number_of_threads_changes_nothing():
    weight = torch.randn(256, K, generator=torch.Generator().manual_seed(2))
    target, results = target_of("Q4_K"), []
    start = target.nearest(weight).stored
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(refine(weight, target, InputData(STATS), replace(PLAIN, sweeps=1), start).stored)
    torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_groups_of_scattered_columns_stay_scattered():
    """GPTQ with activation order: g_idx says which group a column is of."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed(3))
    target = target_of("W4A16")
    plain = target.nearest(WEIGHT[:, order]).stored
    back, g_idx = order.argsort(), (torch.arange(K) // 32)[order.argsort()].to(torch.int32)
    start = replace(plain, codes=plain.codes[:, back].contiguous(), g_idx=g_idx)
    refined = refine(WEIGHT, target, InputData(STATS), replace(PLAIN, anew=True), start)
    assert torch.equal(refined.stored.g_idx, g_idx)
    assert not torch.equal(refined.stored.scale, start.scale)
    assert error(refined.decoded).sum() < 0.8 * error(start.decode()).sum()
    assert torch.equal(refined.stored.decode(), refined.decoded)


@pytest.mark.parametrize("name", ["Q2_K", "IQ2_XS", "W3A16", "NF4", "FP8_DYNAMIC"])
def test_error_feedback_on_present_scales_finds_better_codes(name):
    """From its own codes alone, descent stops in a minimum that rerounding leaves."""
    target = target_of(name)
    start = target.nearest(WEIGHT).stored
    options = replace(PLAIN, sweeps=1)
    once = refine(WEIGHT, target, InputData(STATS), replace(options, reround=False), start)
    again = refine(WEIGHT, target, InputData(STATS), options, start)
    assert error(again.decoded).sum() < 0.97 * error(once.decoded).sum()


def test_scales_that_rows_share_stay():
    target = target_of("FP8_BLOCK")
    start = target.nearest(WEIGHT).stored
    refined = refine(WEIGHT, target, InputData(STATS), PLAIN, start)
    assert torch.equal(refined.stored.scale, start.scale)
    assert not torch.equal(refined.stored.codes, start.codes)


def test_zero_blocks_and_dead_columns_stay_finite():
    weight, x = WEIGHT.clone(), correlated()
    weight[3] = 0
    weight[5, :64] = 0
    x[:, 10:20] = 0
    for name in ("Q4_K", "Q6_K", "IQ2_S", "Q4_0", "NVFP4", "W4A16_ASYM"):
        target = target_of(name)
        start = target.nearest(weight).stored
        refined = refine(weight, target, InputData(stats_of(x)), replace(PLAIN, anew=True), start)
        assert bool(refined.decoded.isfinite().all())
        assert bool((refined.decoded[3] == 0).all())


def test_types_without_codes_are_kept():
    target = GgmlTarget("F16")
    start = target.nearest(WEIGHT).stored
    refined = refine(WEIGHT, target, InputData(STATS), PLAIN, start)
    assert refined.fell_back
    assert torch.equal(refined.stored, start)


def test_rows_with_a_hessian_of_their_own_are_refined_by_it():
    """As with --hessian guided:2: the two halves of a weight are what each would be alone."""
    halves, parts = (slice(0, 12), slice(12, N)), (STATS, stats_of(correlated().flip(1)))
    target = target_of("W4A16")
    data = InputData(parts[0], tuple(InputData(each) for each in parts))
    both = refine(WEIGHT, target, data, PLAIN, target.nearest(WEIGHT).stored)
    for rows, stats in zip(halves, parts, strict=True):
        alone = refine(WEIGHT[rows], target, InputData(stats), PLAIN, target.nearest(WEIGHT[rows]).stored)
        assert torch.equal(both.decoded[rows], alone.decoded)
