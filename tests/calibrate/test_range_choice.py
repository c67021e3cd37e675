"""Ranges from a histogram against the values themselves, and the integrated error against sampled ones."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibrate.range_choice import BINS, bin_edges, histogram, mse_range, percentile_range
from lowbit.numerics.activations import quantize_activation
from lowbit.schemes import ActivationSpec


def test_bins_are_the_edges_of_the_docstring():
    edges = bin_edges()
    assert len(edges) == BINS + 1
    assert edges[BINS // 2].item() == 1.0
    inside = (edges[1:-1] * 1.001).float()
    expected = torch.ones(BINS, dtype=torch.int64)
    expected[0] = 0
    assert torch.equal(histogram(inside), expected)
    assert torch.equal(histogram(-edges[1:-1].float()), expected)  # an edge belongs to the bin above it


def test_zeros_and_the_far_ends_are_counted():
    counts = histogram(torch.tensor([0.0, 1e-30, 1e30, -1e30]))
    assert (counts[0].item(), counts[-1].item(), counts.sum().item()) == (2, 2, 4)


@pytest.mark.parametrize("percent", [50.5, 90.0, 99.9, 100.0])
def test_percentile_is_within_a_bin_of_the_sorted_values(percent):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 3
    found = percentile_range(histogram(x), x.abs().max().item(), percent)
    exact = torch.quantile(x[:16_000].abs().double(), percent / 100).item() if percent < 100 else x.abs().max().item()
    assert found == pytest.approx(exact, rel=0.08)
    assert found <= x.abs().max().item()


def error(x: torch.Tensor, spec: ActivationSpec, largest: float, chosen: float) -> float:
    return (quantize_activation(x, spec, chosen / largest) - x).square().mean().item()


@pytest.mark.parametrize(("number", "bits", "largest"), [("int", 8, 127.0), ("int", 4, 7.0), ("e4m3", 8, 448.0)])
def test_mse_finds_what_a_search_over_the_values_finds(number, bits, largest):
    """A heavy tail, where clipping pays: its error is that of the best of the same candidates, measured."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 512, generator=generator) * torch.rand(64, 1, generator=generator).pow(-1.0).clamp(max=60)
    spec = ActivationSpec(number, bits, "tensor", dynamic=False)
    absmax = x.abs().max().item()
    if number == "int" and bits == 4:  # codes of the simulation end at −8, those of the choice at ±7
        x = x.clamp(min=0)
    found = mse_range(histogram(x), absmax, number, bits)
    best = min(error(x, spec, largest, absmax * 2 ** (-step / 16)) for step in range(128))
    assert error(x, spec, largest, found) <= best * 1.03
    if number == "int":
        assert found < absmax
        assert error(x, spec, largest, found) < error(x, spec, largest, absmax)


def test_mse_keeps_the_whole_range_where_nothing_is_rounded():
    x = torch.arange(-127, 128).float()
    assert mse_range(histogram(x), 127.0, "int", 8) > 100
