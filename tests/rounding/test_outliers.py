"""Outlier columns of LLM.int8()."""

from __future__ import annotations

import pytest
import torch

from lowbit.numerics import grid_for
from lowbit.numerics.grid import RangeSearch
from lowbit.rounding.outliers import mixed_error, mixed_product_error, outlier_columns
from lowbit.rounding.target import GridTarget
from lowbit.schemes import SCHEMES
from lowbit.tensors import LayerStats

SPEC = SCHEMES["INT8"].weight


def layer(seed: int = 0):
    """x with two channels far above the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 64, generator=generator).clamp(-4, 4)
    x[:, 5] *= 30
    x[:, 40] += 20
    weight = torch.randn(32, 64, generator=generator) * 0.05
    return weight, GridTarget(SPEC, grid_for(SPEC, "float32"), RangeSearch()).nearest(weight).decoded, x


def stats_of(x: torch.Tensor, full: bool = True) -> LayerStats:
    return LayerStats(len(x), x.abs().amax(0), x.square().mean(0), x.abs().mean(0), x.T @ x if full else None)


def test_columns_share_and_energy():
    _, _, x = layer()
    found = outlier_columns(stats_of(x))
    assert found.columns.tolist() == [5, 40]
    assert found.share == 2 / 64
    assert found.energy == pytest.approx((x[:, [5, 40]].square().sum() / x.square().sum()).item(), rel=1e-5)
    assert found.energy > 0.9


def test_threshold_is_reached_at_equality():
    stats = LayerStats(1, torch.tensor([5.9, 6.0, 7.0]), torch.ones(3), torch.ones(3))
    assert outlier_columns(stats).columns.tolist() == [1, 2]
    assert outlier_columns(stats, threshold=7.5).columns.tolist() == []
    assert outlier_columns(stats, threshold=7.5).energy == 0.0


def test_weight_error_equals_the_outputs():
    weight, decoded, x = layer()
    columns = outlier_columns(stats_of(x)).columns
    found = mixed_error(weight, decoded, stats_of(x), columns)
    mixed = decoded.clone()
    mixed[:, columns] = weight[:, columns]
    total = (x @ weight.T).square().sum()
    assert found.all_int8 == pytest.approx((((weight - decoded) @ x.T).square().sum() / total).item(), rel=1e-3)
    assert found.mixed == pytest.approx((((weight - mixed) @ x.T).square().sum() / total).item(), rel=1e-3)
    assert found.mixed < 0.2 * found.all_int8


def test_diagonal_stands_for_the_hessian():
    weight, decoded, x = layer()
    found = mixed_error(weight, decoded, stats_of(x, full=False), torch.tensor([5, 40]))
    h = x.square().mean(0)
    assert found.all_int8 == pytest.approx(
        (((weight - decoded) ** 2 * h).sum() / (weight**2 * h).sum()).item(), rel=1e-4
    )


def test_product_with_int8_activations():
    weight, decoded, x = layer()
    found = mixed_product_error(weight, decoded, x, torch.tensor([5, 40]))
    scale = x.abs().amax(1, keepdim=True) / 127
    plain = ((x / scale).round() * scale) @ decoded.T
    exact = x @ weight.T
    assert found.all_int8 == pytest.approx(((exact - plain).square().sum() / exact.square().sum()).item(), rel=1e-4)
    assert found.mixed < 0.1 * found.all_int8
    none = mixed_product_error(weight, decoded, x, torch.tensor([], dtype=torch.long))
    assert none.mixed == pytest.approx(none.all_int8)


def test_inputs_and_weights_of_zeros():
    weight, decoded, x = layer()
    zeros = torch.zeros_like(x)
    assert outlier_columns(stats_of(zeros)).energy == 0.0
    assert mixed_error(weight, decoded, stats_of(zeros), torch.tensor([1])).all_int8 == 0.0
    assert mixed_product_error(weight, decoded, zeros, torch.tensor([1])).mixed == 0.0
    x[0] = 0.0
    assert mixed_product_error(weight, decoded, x, torch.tensor([5])).mixed > 0
