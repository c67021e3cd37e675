"""Feedback between rows: against the definition, which rounds one weight after another in the Hessian G ⊗ H."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lowbit.numerics import ggml
from lowbit.rounding import row_feedback
from lowbit.rounding.gptq import GPTQOptions, gptq
from lowbit.rounding.hessian import InputData, prepared
from lowbit.rounding.row_feedback import curvature_of, parts_of
from lowbit.rounding.target import GgmlTarget
from rounding.gptq_cases import problem, target_of

PLAIN = GPTQOptions(refine=0, correction=0.0, shrinkage=0.0, scales="static")


def curvature(rows: int, seed: int = 3) -> Tensor:
    """A G whose outputs go together in many ways."""
    mixed = torch.randn(rows, rows, generator=torch.Generator().manual_seed(seed))
    return mixed @ torch.diag(torch.linspace(0.05, 2.0, rows)) @ mixed.T


def error(weight: Tensor, decoded: Tensor, g: Tensor, data: InputData) -> float:
    change = weight - decoded
    return ((g @ change) * (change @ data.stats.hessian)).sum().item()


def by_definition(weight: Tensor, g: Tensor, h: Tensor, scale: Tensor) -> Tensor:
    """W [N, K] on the grid of 4-bit codes with a scale [N, 1]; rows and columns in the order given."""
    root = torch.linalg.inv(torch.kron(g, h).double())
    upper = torch.linalg.cholesky(root, upper=True)
    w, found, scales = weight.double().flatten(), [], scale.expand_as(weight).flatten()
    for place in range(len(w)):
        found.append((w[place] / scales[place]).round().clamp(-8, 7) * scales[place])
        w[place:] -= (w[place] - found[-1]) * upper[place, place:] / upper[place, place]
    return torch.stack(found).reshape(weight.shape).float()


def test_rows_are_rounded_as_one_vector_in_the_product_of_both_hessians(monkeypatch):
    monkeypatch.setattr(row_feedback, "ROWS", 1)
    (weight, stats), g = problem(6, 16), curvature(6)
    data, target = InputData(stats), target_of("W4A16", weight, 16)
    rounded = gptq(weight, target, replace(data, rows=(g,)), PLAIN)
    shrunk = prepared(g, row_feedback.DAMPING, row_feedback.SHRINKAGE)
    rows, h = shrunk.diagonal.argsort(descending=True), data.hessian(PLAIN.damping)
    columns = h.factor(16, 1).order
    g = g * (1 - row_feedback.SHRINKAGE) + torch.diag(g.diagonal()) * row_feedback.SHRINKAGE
    g, h = g + torch.eye(6) * row_feedback.DAMPING * shrunk.mean, h.hessian + torch.eye(16) * h.damping * h.mean
    expected = by_definition(weight[rows][:, columns], g[rows][:, rows], h[columns][:, columns],
                             rounded.stored.scale[rows])  # fmt: skip
    assert_close(rounded.decoded[rows][:, columns], expected, rtol=1e-5, atol=1e-6)
    assert_close(rounded.stored.decode(), rounded.decoded)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W2A16", "W8A8", "NVFP4", "MXFP4", "NF4"])
def test_the_error_in_both_hessians_falls(scheme):
    (weight, stats), g = problem(), curvature(40)
    data, target = InputData(stats), target_of(scheme, weight)
    apart = gptq(weight, target, data)
    fed = gptq(weight, target, replace(data, rows=(g,)))
    assert error(weight, fed.decoded, g, data) < 0.9 * error(weight, apart.decoded, g, data)
    assert_close(fed.stored.decode(), fed.decoded)


@pytest.mark.parametrize("type_name", ["Q4_K", "Q4_0", "IQ2_XS"])
def test_rows_of_ggml_types_come_back_in_their_order(type_name):
    weight, stats = problem(24, 256)
    data, target, g = InputData(stats), GgmlTarget(type_name), curvature(24)
    fed = gptq(weight, target, replace(data, rows=(g,)))
    assert error(weight, fed.decoded, g, data) < error(weight, gptq(weight, target, data).decoded, g, data)
    assert_close(ggml.decode(type_name, fed.stored), fed.decoded)


def test_without_pairs_of_outputs_rows_stay_apart():
    weight, stats = problem()
    target = target_of("W4A16", weight)
    alone = gptq(weight, target, InputData(stats, rows=(torch.diag(torch.arange(1.0, 41.0)),)))
    assert_close(alone.decoded, gptq(weight, target, InputData(stats)).decoded)


def test_a_part_knows_nothing_of_the_others(monkeypatch):
    monkeypatch.setattr(row_feedback, "LARGEST_PART", 16)
    weight, stats = problem()
    target, g = target_of("W4A16", weight), curvature(40)
    assert [part.stop - part.start for part in parts_of(40)] == [13, 13, 14]
    together = gptq(weight, target, InputData(stats, rows=tuple(g[part, part] for part in parts_of(40))))
    for part in parts_of(40):
        monkeypatch.setattr(row_feedback, "LARGEST_PART", 2048)
        alone = gptq(weight[part], target, InputData(stats, rows=(g[part, part],)))
        assert_close(together.decoded[part], alone.decoded)


@pytest.mark.parametrize(
    ("scheme", "why"), [("FP8", "they share scales"), ("KMEANS4", "tables are fitted to all rows at once")]
)
def test_rows_that_cannot_wait_for_others_stay_apart_and_say_so(scheme, why):
    weight, stats = problem()
    target = target_of(scheme, weight)
    rounded = gptq(weight, target, InputData(stats, rows=(curvature(40),)))
    assert rounded.notes == (f"errors of rows are not fed to other rows: {why}",)
    assert_close(rounded.decoded, gptq(weight, target, InputData(stats)).decoded)


def test_outputs_that_the_loss_does_not_depend_on_take_no_part():
    (weight, stats), g = problem(), curvature(40)
    target = target_of("W4A16", weight)
    g[5], g[:, 5] = 0, 0
    fed = gptq(weight, target, InputData(stats, rows=(g,)))
    assert_close(fed.decoded[5], gptq(weight, target, InputData(stats)).decoded[5])


def test_curvature_counts_a_token_by_the_size_of_its_gradient():
    gradient = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    expected = sum(torch.outer(g, g) / g.square().mean().sqrt() for g in gradient)
    assert_close(curvature_of(gradient, 0.5), expected)
    assert_close(curvature_of(torch.zeros(3, 4), 0.5), torch.zeros(4, 4))


def test_any_number_of_threads_gives_the_same_bits():
    (weight, stats), g = problem(), curvature(40)
    target, found = target_of("W4A16", weight), []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(gptq(weight, target, InputData(stats, rows=(g,))).decoded)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*found)
