"""Codes of fitted tables: GPTQ against a reference of ten lines, SqueezeLLM's weights, outliers, the store of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gptq_cases import problem, target_of, with_hessian
from torch import Tensor

from lowbit.calibrate.store import _put_together, _taken_apart
from lowbit.errors import UsageError
from lowbit.numerics import grid_for
from lowbit.rounding.error import squared_error
from lowbit.rounding.gptq import GPTQOptions, gptq
from lowbit.rounding.hessian import InputData
from lowbit.rounding.histogram import rows_decoder
from lowbit.rounding.learnable import learnable
from lowbit.rounding.squeezellm import sensitivity, squeezellm
from lowbit.rounding.target import GridTarget
from lowbit.schemes import SCHEMES, find_scheme
from lowbit.settings import make_settings
from lowbit.tensors import RangeSearch

FITTED = [name for name, scheme in SCHEMES.items() if scheme.weight.is_fitted]


def with_outliers(percent: float, scheme: str = "KMEANS3") -> GridTarget:
    spec = replace(SCHEMES[scheme].weight, outliers=percent)
    return GridTarget(spec, grid_for(spec, "float16"), RangeSearch("absmax"))


def output_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    return ((weight - decoded) @ hessian * (weight - decoded)).sum().item()


def gptq_by_the_book(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """OBS, column by column, the inverse updated by elimination; values [N, L] of each row."""
    w, inverse = weight.double().clone(), hessian.double().inverse()
    for column in range(w.shape[1]):
        nearest = (w[:, column, None] - values).abs().argmin(dim=1, keepdim=True)
        change = (w[:, column] - values.gather(1, nearest)[:, 0]) / inverse[column, column]
        w[:, column:] -= change[:, None] * inverse[column, column:]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
    return w


def test_gptq_with_a_table_of_the_row_is_that_of_the_book():
    weight, stats = problem(12, 32)
    hessian = stats.hessian + 0.1 * stats.hessian.diagonal().mean() * torch.eye(32)
    target = with_outliers(0)
    options = GPTQOptions(damping=1e-9, shrinkage=0, act_order=False, refine=0, correction=0, weighting="none", block=8)
    rounded = gptq(weight, target, InputData(with_hessian(hessian)), options)
    wanted = gptq_by_the_book(weight, rounded.stored.table[:, 0].double(), hessian)
    torch.testing.assert_close(rounded.decoded.double(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(rounded.stored.decode(), rounded.decoded)


@pytest.mark.parametrize("scheme", FITTED)
def test_gptq_beats_rounding_to_nearest_and_sweeps_never_lose(scheme):
    weight, stats = problem()
    target, data = target_of(scheme, weight), InputData(stats)
    errors = [output_error(weight, gptq(weight, target, data, GPTQOptions(refine=sweeps)).decoded, stats.hessian)
              for sweeps in (0, 1)]  # fmt: skip
    assert errors[1] <= errors[0] < 0.7 * output_error(weight, target.nearest(weight).decoded, stats.hessian)


def test_gptq_of_a_diagonal_hessian_is_rounding_to_nearest():
    weight, _ = problem()
    data = InputData(with_hessian(torch.eye(128)))
    for scheme in FITTED:
        target = target_of(scheme, weight)
        assert torch.equal(gptq(weight, target, data).stored.codes, target.nearest(weight).stored.codes)


def test_gptq_keeps_outliers_in_16_bits_and_moves_the_rest():
    weight, stats = problem()
    rounded = gptq(weight, with_outliers(2), InputData(stats))
    kept = rounded.stored.outliers
    assert kept.columns.shape == (40, 3)  # 2 % of 128 columns: 2.56
    assert torch.equal(rounded.decoded.gather(1, kept.columns), kept.values)
    assert torch.equal(kept.values.half().float(), kept.values)
    assert torch.equal(rounded.stored.decode(), rounded.decoded)
    without = gptq(weight, with_outliers(0), InputData(stats))
    assert output_error(weight, rounded.decoded, stats.hessian) < output_error(weight, without.decoded, stats.hessian)


def test_outliers_are_the_weights_of_largest_sensitivity_times_square():
    weight, importance = problem()[0].clone(), torch.ones(128)
    weight[0, 5], weight[1, 7], importance[9] = 3.0, -2.0, 1e6
    stored = with_outliers(1.6).nearest(weight, importance).stored
    assert stored.outliers.columns[:2].tolist() == [[5, 9], [7, 9]]
    assert stored.outliers.values[0, 0] == 3.0
    assert stored.table.abs().max() < 0.3  # no table saw them
    assert torch.equal(stored.decode().gather(1, stored.outliers.columns), stored.outliers.values)


def test_squeezellm_minimises_the_error_that_the_diagonal_weighs():
    weight, stats = problem()
    data, target = InputData(stats), with_outliers(0)
    weights = sensitivity(data)
    assert weights.mean().item() == pytest.approx(1)

    def loss(decoded: Tensor) -> float:
        return ((weight - decoded).square() * weights).sum().item()

    assert loss(squeezellm(weight, target, data).decoded) < 0.95 * loss(target.nearest(weight).decoded)


def test_squeezellm_weighs_each_group_of_rows_by_its_own_fisher_information():
    weight, stats = problem()
    turned = replace(stats, hessian=stats.hessian.flip(0, 1))
    data, target = InputData(stats, (InputData(stats), InputData(turned))), with_outliers(1)
    whole = squeezellm(weight, target, data)
    halves = [squeezellm(part, target, each).decoded for part, each in zip(weight.chunk(2), data.parts, strict=True)]
    assert torch.equal(whole.decoded, torch.cat(halves))
    assert torch.equal(whole.stored.decode(), whole.decoded)


def test_a_text_that_says_nothing_weighs_all_channels_alike():
    weight, _ = problem()
    data, target = InputData(with_hessian(torch.zeros(128, 128))), with_outliers(0)
    assert torch.equal(squeezellm(weight, target, data).decoded, target.nearest(weight).decoded)


@pytest.mark.parametrize("scheme", FITTED)
def test_what_a_run_stores_comes_back(scheme):
    weight, _ = problem()
    target = with_outliers(2, scheme) if scheme.startswith("KMEANS") else target_of(scheme, weight)
    stored = target.nearest(weight).stored
    again = _put_together(*_taken_apart(stored), target.spec, target.grid, 128, 8, 24)
    assert torch.equal(again.decode(), stored.decode()[8:24])
    chosen = torch.tensor([3, 30])
    assert torch.equal(rows_decoder(stored)(chosen), stored.decode()[chosen])
    lost = (weight - stored.decode()).square().sum().item()
    assert squared_error(weight, stored)[0] == pytest.approx(lost)


def test_distillation_moves_the_scales_of_logarithmic_codes_and_nothing_of_k_means():
    weight, _ = problem()
    for target, names in ((with_outliers(2), set()), (target_of("LOG4", weight), {"scale"})):
        stored = target.nearest(weight).stored
        form = learnable(target, stored)
        assert set(form.shapes) == names
        assert torch.equal(form.decoded(form.start()), stored.decode())
        assert torch.equal(form.stored(form.start()).decode(), stored.decode())


def test_outliers_are_of_rows_with_one_table():
    with pytest.raises(UsageError, match="not for groups"):
        make_settings(None, scheme="KMEANS4", outliers=0.5, group_size=64).base_scheme()
    with pytest.raises(UsageError, match="LOG4 keeps no outliers"):
        make_settings(None, scheme="LOG4", outliers=0.5).base_scheme()


@pytest.mark.parametrize("percent", [0, -1, 6])
def test_a_senseless_share_of_outliers_is_refused(percent):
    with pytest.raises(UsageError, match="outliers"):
        make_settings(None, scheme="KMEANS4", outliers=percent)


def test_groups_of_a_table_are_an_option():
    assert find_scheme("KMEANS3").with_group_size(64).weight.group_size == 64
