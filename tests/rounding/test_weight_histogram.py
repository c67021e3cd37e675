"""Histograms: what is counted is what is there, in any order of slabs, and only of the sampled rows."""

from __future__ import annotations

import base64
import itertools
import random

import numpy as np
import pytest
import torch

from lowbit.numerics import grid_for
from lowbit.rounding.histogram import BINS, WeightHistograms, rows_decoder, sampled_rows, weight_histogram
from lowbit.rounding.rtn import measure_range, round_to_nearest
from lowbit.schemes import SCHEMES
from lowbit.tensors import RangeSearch


def counts(histogram, which="source"):
    coded = np.frombuffer(base64.b64decode(getattr(histogram, which)), "<u2")
    return np.rint(coded * (histogram.largest / 65535)).astype(int)


def test_counts_are_those_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3000, generator=generator)
    made = weight_histogram(values, None, 3)
    expected = [0] * BINS
    for value in values.tolist():
        expected[min(max(int((value / made.reach + 1) / 2 * BINS), 0), BINS - 1)] += 1
    assert np.abs(counts(made) - expected).sum() <= 2  # values on an edge, in float32 and float64
    assert counts(made).sum() == made.values == 3000
    assert made.decoded is None


def test_what_lies_beyond_six_rms_is_in_the_outermost_bins():
    values = torch.full((10_000,), 0.01)
    values[::2] *= -1
    values[0], values[1], values[2] = 50.0, -50.0, 40.0
    made = weight_histogram(values, None, 1)
    assert made.reach == pytest.approx(6 * values.square().mean().sqrt().item(), rel=1e-4)
    assert (counts(made)[0], counts(made)[-1]) == (1, 2)


def test_zero_is_in_the_middle_bin_and_all_zeros_have_a_reach():
    made = weight_histogram(torch.zeros(64), torch.zeros(64), 1)
    assert made.reach == 1.0
    assert counts(made)[BINS // 2] == counts(made, "decoded")[BINS // 2] == 64


@pytest.mark.filterwarnings("error")
def test_subnormal_values_warn_of_nothing():
    made = weight_histogram(torch.full((64,), 1e-40), None, 1)
    assert counts(made).sum() == 64


@pytest.mark.parametrize("shape", [(1, 8), (3, 7), (4096, 4096), (49152, 576), (5, 1), (200_000, 2), (8, 100_000)])
def test_sampled_rows_are_in_order_inside_and_spread(shape):
    rows, columns = shape
    chosen = sampled_rows(rows, columns)
    assert len(chosen) == len(set(chosen)) > 0
    assert 0 <= chosen[0] <= chosen[-1] < rows
    assert len(chosen) * columns <= max(40_000, 4 * columns)
    assert chosen == sorted(chosen)
    steps = [later - earlier for earlier, later in itertools.pairwise(chosen)] or [1]
    assert max(steps) - min(steps) <= 1
    assert rows - chosen[-1] <= max(steps)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "NF4"])
def test_single_rows_decode_as_the_whole_does(scheme):
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * 0.05
    spec = SCHEMES[scheme].weight
    grid = grid_for(spec, "bfloat16", None)
    quantized = round_to_nearest(weight, spec, grid, RangeSearch("absmax"), measure_range(weight, spec))
    chosen = torch.tensor([0, 7, 130, 255])
    assert torch.equal(rows_decoder(quantized)(chosen), quantized.decode()[chosen])


def test_slabs_in_any_order_give_the_same_histogram():
    weight = torch.randn(1000, 64, generator=torch.Generator().manual_seed(2))
    decoded = weight.round()
    made = []
    for seed in range(2):
        slabs = [(first, min(first + 90, 1000)) for first in range(0, 1000, 90)]
        random.Random(seed).shuffle(slabs)
        histograms = WeightHistograms()
        for first, last in slabs:
            histograms.add("w", (1000, 64), first, last, lambda rows, at=first: weight[at + rows],
                           lambda rows, at=first: decoded[at + rows])  # fmt: skip
        made.append(histograms.done["w"])
    assert made[0] == made[1]
    chosen = list(sampled_rows(1000, 64))
    assert made[0].values == 64 * len(chosen)
    assert counts(made[0]).tolist() == counts(weight_histogram(weight[chosen].flatten(), None, 1)).tolist()


def test_integers_and_unfinished_tensors_have_none():
    histograms = WeightHistograms()
    histograms.add("ids", (4, 4), 0, 4, lambda rows: torch.zeros(len(rows), 4, dtype=torch.int64))
    histograms.add("half", (1000, 64), 0, 500, lambda rows: torch.ones(len(rows), 64))
    histograms.add("none", (0, 64), 0, 0, lambda rows: torch.ones(len(rows), 64))
    assert histograms.done == {}


def test_subnormal_weights_are_counted():
    values = torch.tensor([0.0, 1e-41, -1e-41, 1e-45])
    assert counts(weight_histogram(values, torch.zeros(4), 1)).sum() > 0
