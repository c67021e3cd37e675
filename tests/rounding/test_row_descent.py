"""Descent on all rows together: against the definition, the Hessian G ⊗ H of the whole weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lowbit.numerics import ggml
from lowbit.rounding import row_descent
from lowbit.rounding.descent import ANEW, RefineOptions, refine
from lowbit.rounding.gptq import GPTQOptions, gptq
from lowbit.rounding.hessian import InputData, prepared
from lowbit.rounding.row_descent import RowDescent, joined_rows
from lowbit.rounding.row_feedback import DAMPING, SHRINKAGE, damped
from lowbit.rounding.target import GgmlTarget
from rounding.gptq_cases import problem, target_of
from rounding.test_row_feedback import curvature

EXACT = RefineOptions(correction=0.0, shrinkage=0.0)


def whole(weight: Tensor, decoded: Tensor, g: Tensor, data: InputData) -> float:
    """eᵀ (G ⊗ H) e, both damped and G shrunk, e the error of all weights as one vector."""
    error, h = (decoded - weight).double().flatten(), data.hessian(EXACT.damping)
    shrunk = prepared(g, DAMPING, SHRINKAGE)
    g = g * (1 - SHRINKAGE) + torch.diag(g.diagonal()) * SHRINKAGE + torch.eye(len(g)) * DAMPING * shrunk.mean
    h = h.hessian + torch.eye(len(h.hessian)) * h.damping * h.mean
    return (error @ torch.kron(g, h).double() @ error).item()


@pytest.mark.parametrize("rows_of_a_step", [1, 4, 16])
def test_no_sweep_raises_the_error_of_the_whole_weight(monkeypatch, rows_of_a_step):
    monkeypatch.setattr(row_descent, "ROWS", rows_of_a_step)
    (weight, stats), g = problem(12, 32), curvature(12)
    data, target = InputData(stats), target_of("W2A16", weight, 16)
    start = gptq(weight, target, data, GPTQOptions(correction=0.0, shrinkage=0.0))
    inputs = data.hessian(EXACT.damping).curvature()
    descent, errors = RowDescent(start.stored, target, slice(0, 12), weight, damped(g), inputs), []
    for _ in range(4):
        rounded = joined_rows([descent])
        errors.append(whole(weight, rounded.decoded, g, data))
        assert descent.error() == pytest.approx(errors[-1], rel=1e-4)
        assert_close(rounded.stored.decode(), rounded.decoded)
        descent.sweep()
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_a_step_heads_for_the_best_errors_of_its_rows(monkeypatch):
    """By definition those that minimise (G ⊗ H) with the errors of all other rows as they are."""
    (weight, stats), g = problem(12, 16), curvature(12)
    data, target, aims = InputData(stats), target_of("W4A16", weight, 16), []

    class Noted(row_descent.Descent):
        def __init__(self, held, wanted, inputs, block):
            aims.append(wanted)
            super().__init__(held, wanted, inputs, block)

    monkeypatch.setattr(row_descent, "Descent", Noted)
    descent = RowDescent(target.nearest(weight).stored, target, slice(0, 12), weight, damped(g),
                         data.hessian(EXACT.damping).curvature())  # fmt: skip
    errors, rows = descent.errors.clone(), descent.places[0]
    assert rows.tolist() == [0, 8], "far apart"
    descent._step(descent.held[0], rows)
    tuned = weight + errors
    tuned[rows] = aims[0]
    least = whole(weight, tuned, g, data)
    for shift in torch.randn(20, 2, 16, generator=torch.Generator().manual_seed(1)) * 1e-2:
        other = tuned.clone()
        other[rows] += shift
        assert whole(weight, other, g, data) > least


@pytest.mark.parametrize("type_name", ["Q2_K", "Q4_0", "IQ2_XS", "IQ3_S"])
def test_files_of_ggml_types_are_refined_with_their_rows_in_order(type_name):
    (weight, stats), g = problem(24, 256), curvature(24)
    data, target = InputData(stats), GgmlTarget(type_name)
    start = target.nearest(weight, data.importance)
    refined = refine(weight, target, replace(data, rows=(g,)), EXACT, start.stored)
    assert_close(ggml.decode(type_name, refined.stored), refined.decoded)
    assert refined.notes == (ANEW,)
    apart = refine(weight, target, data, EXACT, start.stored)
    together, alone, before = (whole(weight, each.decoded, g, data) for each in (refined, apart, start))
    assert together < 1.03 * alone  # on random weights
    assert together < 0.8 * before


def test_a_file_that_nothing_betters_keeps_its_bytes():
    (weight, stats), g = problem(24, 32), curvature(24)
    data, target = replace(InputData(stats), rows=(g,)), target_of("W4A16", weight, 16)
    first = refine(weight, target, data, replace(EXACT, sweeps=40), target.nearest(weight).stored)
    again = refine(first.decoded, target, data, EXACT, first.stored)  # the weight is what the file holds
    assert torch.equal(again.stored.codes, first.stored.codes)
    assert torch.equal(again.stored.scale, first.stored.scale)


def test_any_number_of_threads_gives_the_same_bits():
    (weight, stats), g = problem(64, 128), curvature(64)
    data, target = replace(InputData(stats), rows=(g,)), target_of("W4A16", weight, 32)
    start, threads, found = target.nearest(weight).stored, torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(refine(weight, target, data, EXACT, start))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].decoded, found[1].decoded)
