"""Outlier columns of LLM.int8()."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibrate.linear import outlier_columns, outlier_note
from lowbit.numerics import grid_for
from lowbit.rounding.target import GridTarget
from lowbit.schemes import SCHEMES
from lowbit.tensors import LayerStats, RangeSearch

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


def test_the_note_counts_channels_and_what_they_carry():
    _, _, x = layer()
    energy = 100 * outlier_columns(stats_of(x)).energy
    assert outlier_note(stats_of(x)).startswith(f"2 of 64 input channels reach 6, with {energy:.1f} % of their squares")


def test_inputs_of_zeros_have_no_outliers():
    assert outlier_columns(stats_of(torch.zeros(300, 64))).energy == 0.0
