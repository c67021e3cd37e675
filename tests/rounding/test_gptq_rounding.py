"""GPTQ on the grids of folders: against ten lines of numpy, against rounding to nearest, and on bad inputs."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from gptq_cases import GRIDS, problem, stats_of, target_of, with_hessian

from lowbit import kernels
from lowbit.errors import NonFiniteError
from lowbit.rounding.error import layer_error
from lowbit.rounding.gptq import GPTQOptions, gptq
from lowbit.rounding.hessian import InputData, prepare
from lowbit.tensors import GroupParams

# Unshrunk, so that the references below are a few lines.
STATIC = GPTQOptions(scales="static", refine=0, shrinkage=0)
COMPENSATED = GPTQOptions(scales="compensated", refine=0, shrinkage=0)


def classic(weight, hessian, order, quantize, damping=0.01):
    """The column loop of the paper, in float64; quantize(column of w, its number) → decoded."""
    h = hessian.double().numpy()[np.ix_(order, order)]
    h = h + damping * np.diag(h).mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    w, out = weight.double().numpy()[:, order], np.zeros(weight.shape)
    for j, column in enumerate(order):
        out[:, column] = quantize(w[:, j], column)
        w[:, j:] -= np.outer((w[:, j] - out[:, column]) / upper[j, j], upper[j, j:])
    return torch.tensor(out, dtype=torch.float32)


def orders(stats, group, act_order, scales):
    diagonal = stats.hessian.diagonal().double().numpy()
    if not act_order:
        return list(range(len(diagonal)))
    if scales == "static":
        return list(np.argsort(-diagonal, kind="stable"))
    groups = np.argsort(-diagonal.reshape(-1, group).sum(axis=1), kind="stable")
    return [g * group + j for g in groups for j in np.argsort(-diagonal[g * group : (g + 1) * group], kind="stable")]


@pytest.mark.parametrize("scales", ["static", "compensated"])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W3A16", "NVFP4", "MXFP4", "NF4"])
def test_it_is_the_classic_column_loop(scheme, act_order, scales):
    weight, stats = problem(columns=64)
    target = target_of(scheme, weight)
    group = target.spec.columns_per_scale(64)
    found = gptq(weight, target, InputData(stats), replace(STATIC, act_order=act_order, scales=scales, block=24))
    params, each = found.stored.grouped()

    def quantize(column, number):
        at = number // each
        zero_point = None if params.zero_point is None else params.zero_point[:, at : at + 1].contiguous()
        here = GroupParams(params.scale[:, at : at + 1].contiguous(), zero_point)
        one = torch.tensor(column, dtype=torch.float32)[:, None]
        return target.grid.decode(target.grid.round(one, here, 1), here, 1)[:, 0].double().numpy()

    expected = classic(weight, stats.hessian, orders(stats, group, act_order, scales), quantize)
    differing = (found.decoded != expected).float().mean()
    # float32 against float64: a weight at a tie may go the other way, and takes the rest of its row along.
    assert differing < 0.02


@pytest.mark.parametrize(
    "options", [STATIC, COMPENSATED, replace(STATIC, act_order=False)], ids=["static", "comp", "in order"]
)
@pytest.mark.parametrize("scheme", GRIDS)
def test_it_beats_rounding_to_nearest_on_correlated_inputs(scheme, options):
    weight, stats = problem()
    target = target_of(scheme, weight)
    plain = layer_error(weight, target.nearest(weight, stats.mean_sq).decoded, stats.hessian)
    found = gptq(weight, target, InputData(stats), options)
    assert layer_error(weight, found.decoded, stats.hessian) < 0.6 * plain
    assert torch.equal(found.decoded, found.stored.decode())
    assert found.stored.g_idx is None
    assert not found.notes


@pytest.mark.parametrize("scheme", GRIDS)
def test_without_correlations_it_is_rounding_to_nearest(scheme):
    weight, stats = problem()
    target = target_of(scheme, weight)
    importance = stats.hessian.diagonal()
    for options in (STATIC, COMPENSATED, replace(STATIC, refine=2)):
        found = gptq(weight, target, InputData(with_hessian(importance.diag())), replace(options, weighting="diagonal"))
        plain = target.nearest(weight, importance).stored
        assert torch.equal(found.stored.scale, plain.scale)
        assert torch.equal(found.stored.codes, plain.codes)


def test_double_quantized_scales_are_those_that_codes_were_chosen_for():
    weight, stats = problem()
    target = target_of("NF4", weight, nested=True)
    found = gptq(weight, target, InputData(stats), COMPENSATED)
    assert found.stored.nested is not None
    assert torch.equal(found.decoded, found.stored.decode())
    plain = target.nearest(weight, stats.mean_sq)
    assert layer_error(weight, found.decoded, stats.hessian) < 0.6 * layer_error(weight, plain.decoded, stats.hessian)


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16", "W4A16_ASYM", "NVFP4", "MXFP4", "NF4", "FP8"])
def test_refining_never_raises_the_error(scheme):
    weight, stats = problem()
    target = target_of(scheme, weight)
    data = InputData(stats)
    damped = stats.hessian + 0.01 * stats.hessian.diagonal().mean() * torch.eye(128)
    errors = [
        layer_error(weight, gptq(weight, target, data, replace(STATIC, refine=sweeps)).decoded, damped)
        for sweeps in range(4)
    ]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    assert errors[1] < errors[0]


def test_the_correction_is_the_least_squares_weight():
    weight, _ = problem(rows=6, columns=32)
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(400, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    x = x0 + torch.randn(400, 32, generator=generator)
    stats = stats_of(x, x0, ridge=0.0)
    hessian = prepare(stats, damping=0.0)
    wanted = hessian.corrected(weight, 1.0)
    expected = torch.linalg.lstsq(x.double(), x0.double() @ weight.double().T).solution.T
    torch.testing.assert_close(wanted.double(), expected, rtol=1e-3, atol=1e-4)
    half = hessian.corrected(weight, 0.5)
    torch.testing.assert_close(half, (weight + wanted) / 2)
    assert hessian.corrected(weight, 0.0) is weight


def test_with_correction_the_output_is_nearer_to_the_unquantized_models():
    weight, _ = problem(rows=24, columns=64)
    generator = torch.Generator().manual_seed(2)
    x0 = torch.randn(600, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    x = x0 + 2 * torch.randn(600, 64, generator=generator)
    target = target_of("W4A16", weight)

    def error(correction):
        found = gptq(weight, target, InputData(stats_of(x, x0)), replace(STATIC, correction=correction))
        return (x @ found.decoded.T - x0 @ weight.T).square().sum()

    assert error(1.0) < error(0.5) < error(0.0)


def test_prepared_hessians_are_shared_and_factored_once():
    weight, stats = problem()
    target = target_of("W4A16", weight)
    data = InputData(stats)
    first = gptq(weight, target, data, STATIC)
    assert data.hessian(0.01).factor() is data.hessian(0.01).factor()
    assert torch.equal(first.stored.codes, gptq(weight, target, InputData(stats), STATIC).stored.codes)


@pytest.mark.parametrize("scales", ["static", "compensated"])
def test_threads_do_not_change_anything(scales):
    weight, stats = problem(rows=200)
    target, before = target_of("W4A16", weight), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gptq(weight, target, InputData(stats), GPTQOptions(scales=scales, refine=1)).stored)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.codes, found[0].codes)
        assert torch.equal(other.scale, found[0].scale)


@pytest.mark.parametrize("isa", kernels.available_isas())
def test_every_instruction_set_chooses_the_same_codes(isa):
    weight, stats = problem()
    for scheme in ("W4A16_ASYM", "NF4", "MXFP8"):
        target = target_of(scheme, weight)
        data = InputData(stats)
        with kernels.use_isa(kernels.available_isas()[0]):
            best = gptq(weight, target, data, STATIC)
        with kernels.use_isa(isa):
            assert torch.equal(gptq(weight, target, data, STATIC).stored.codes, best.stored.codes)


def test_dead_columns_are_rounded_by_themselves_and_change_nothing():
    weight, stats = problem()
    weight = weight.clone()
    weight[:, 40:45] = 0.02  # not the largest of any row, which scales depend on
    hessian = stats.hessian.clone()
    hessian[40:45] = 0
    hessian[:, 40:45] = 0
    target = target_of("W8A8", weight)
    for options in (STATIC, replace(STATIC, correction=1.0)):
        found = gptq(weight, target, InputData(with_hessian(hessian)), options)
        params, each = found.stored.grouped()
        nearest = target.grid.round(weight, params, each)
        assert torch.equal(found.stored.codes[:, 40:45], nearest[:, 40:45])
        changed = weight.clone()
        changed[:, 40:45] = 0.01
        again = gptq(changed, target, InputData(with_hessian(hessian)), options)
        assert torch.equal(again.stored.codes[:, 50:], found.stored.codes[:, 50:])


def test_a_group_of_dead_columns():
    weight, stats = problem()
    hessian = stats.hessian.clone()
    hessian[32:64], hessian[:, 32:64] = 0, 0
    for scheme in GRIDS:
        found = gptq(weight, target_of(scheme, weight), InputData(with_hessian(hessian)), COMPENSATED)
        assert found.decoded.isfinite().all()
        assert (found.decoded - weight)[:, 32:64].abs().max() < 0.2


def test_damping_raises_itself_and_says_so():
    weight, _ = problem(columns=32)
    # Indefinite: an eigenvalue of −0.05 of the diagonal's mean.
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0]
    values = torch.linspace(0.5, 1.5, 32)
    values[0] = -0.05
    stats = with_hessian((basis * values) @ basis.T)
    found = gptq(weight, target_of("W4A16", weight), InputData(stats), STATIC)
    assert found.notes == ("damping raised to 0.1",)
    assert torch.equal(found.decoded, found.stored.decode())


def test_a_hessian_without_inverse_is_rounded_to_nearest_and_says_so():
    weight, _ = problem(columns=32)
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 100.0
    target = target_of("W4A16", weight)
    found = gptq(weight, target, InputData(with_hessian(hessian)), STATIC)
    assert found.notes == ("rounded to nearest: the Hessian has no inverse at any damping",)
    assert torch.equal(found.stored.codes, target.nearest(weight, hessian.diagonal()).stored.codes)


def test_one_token_is_enough():
    weight, _ = problem()
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(4))
    for options in (STATIC, COMPENSATED):
        found = gptq(weight, target_of("W4A16", weight), InputData(stats_of(x)), options)
        plain = target_of("W4A16", weight).nearest(weight)
        assert layer_error(weight, found.decoded, x.T @ x) < layer_error(weight, plain.decoded, x.T @ x)


def test_nan_in_the_hessian_is_an_error():
    weight, stats = problem()
    hessian = stats.hessian.clone()
    hessian[3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="128 columns"):
        gptq(weight, target_of("W4A16", weight), InputData(with_hessian(hessian)), STATIC)


def test_odd_shapes():
    _, stats = problem()
    for rows, columns, group in ((1, 128, 32), (3, 100, 32), (2, 7, 16), (5, 1, 16)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        here = with_hessian(stats.hessian[:columns, :columns].clone())
        for scheme in ("W4A16", "W4A16_ASYM", "NF4", "NVFP4"):
            for options in (STATIC, COMPENSATED, replace(COMPENSATED, act_order=False, refine=1)):
                found = gptq(weight, target_of(scheme, weight, group), InputData(here), options)
                assert found.stored.shape == (rows, columns)
                assert torch.equal(found.decoded, found.stored.decode())
                assert (found.decoded - weight).abs().max() < 2


def test_rows_of_zeros_stay_zeros():
    weight, stats = problem()
    weight = weight.clone()
    weight[3] = 0
    for scheme in GRIDS:
        assert not gptq(weight, target_of(scheme, weight), InputData(stats), COMPENSATED).decoded[3].any()


def test_no_weight_is_changed():
    weight, stats = problem()
    before, hessian = weight.clone(), stats.hessian.clone()
    gptq(weight, target_of("W4A16", weight), InputData(stats), replace(COMPENSATED, refine=1))
    assert torch.equal(weight, before)
    assert torch.equal(stats.hessian, hessian)
