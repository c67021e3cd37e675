"""AWQ against a ten-line reference; the loss through the Gram matrix against running the layer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import stats_of

from lowbit.architecture.structure import Linear
from lowbit.methods import TRANSFORMS
from lowbit.registry import load
from lowbit.transform.awq import AwqOptions, apply, column_use, mean_activation, search
from lowbit.transform.block import BlockTensors
from lowbit.transform.facts import ModelFacts, ScalingPoint
from lowbit.transform.loss import RoundingLoss, quick_products

GROUP = 16
GATE = Linear("gate", "gate_proj", (48, 32), 0, "x", fed_by="norm")
UP = Linear("up", "up_proj", (24, 32), 0, "x", fed_by="norm")
POINT = ScalingPoint("norm", "norm", ("x",), (GATE, UP))


def fake_quantize(linear, weight, importance=None):
    """Symmetric 4-bit integers, groups of 16, absmax."""
    groups = weight.reshape(len(weight), -1, GROUP)
    step = groups.abs().amax(2, keepdim=True).clamp(min=1e-30) / 7
    return ((groups / step).round() * step).reshape(weight.shape)


class Facts(ModelFacts):
    """The one point of a block that no model has."""

    def points(self, block: int):
        return [POINT], {"y": "an activation stands between"}


FACTS = Facts(None, 1)  # type: ignore[arg-type]


def make_block(seed: int = 0) -> tuple[BlockTensors, torch.Tensor]:
    """A block whose input has a few loud channels, and the input [tokens, 32]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 32, generator=generator)
    x[:, [3, 20]] *= 30.0
    tensors = {
        f"{linear.name}.weight": torch.randn(linear.shape, generator=generator) * 0.1 for linear in POINT.readers
    }
    return BlockTensors(POINT.readers, {**tensors, "norm.weight": torch.ones(32)}, {"x": stats_of(x)}), x


def outputs(block: BlockTensors, x: torch.Tensor, rounded: bool) -> torch.Tensor:
    x = x * block.tensors["norm.weight"]
    weights = [block.weight(linear) for linear in POINT.readers]
    weights = [fake_quantize(linear, each) for linear, each in zip(POINT.readers, weights, strict=True)] \
        if rounded else weights  # fmt: skip
    return x @ torch.cat(weights).T


def reference_awq(x, weights, steps=20):
    """AutoAWQ's search (quantize/quantizer.py, _compute_best_scale), on outputs."""
    whole = torch.cat(weights)
    grouped = whole.abs().reshape(-1, GROUP)
    used = (grouped / grouped.amax(1, keepdim=True)).reshape(whole.shape).mean(0)
    best = (float("inf"), None)
    for duo in (False, True):
        for alpha in (step / steps for step in range(steps + 1)):
            s = x.abs().mean(0).pow(alpha) / (used.pow(1 - alpha) if duo else 1.0)
            s = s / (s.max() * s.min()).sqrt()
            error = sum(((fake_quantize(None, w * s) / s - w) @ x.T).square().sum().item() for w in weights)
            best = min(best, (error, s), key=lambda pair: pair[0])
    return best


def test_exhaustive_search_finds_what_the_reference_finds():
    block, x = make_block()
    error, scales = reference_awq(x, [block.weight(linear) for linear in POINT.readers])
    note = apply(block, FACTS, fake_quantize, AwqOptions(exhaustive=True, group_size=GROUP, rows=1000))[-1]
    assert note.applied
    torch.testing.assert_close(1.0 / block.tensors["norm.weight"], scales, rtol=1e-4, atol=0)
    total = outputs(make_block()[0], x, rounded=False).square().sum().item()
    assert note.error_after == pytest.approx(error / total, rel=0.02)  # products in bfloat16


def test_the_rewritten_block_computes_the_same_and_rounds_better():
    for seed in range(3):
        plain, x = make_block(seed)
        block, _ = make_block(seed)
        notes = apply(block, FACTS, fake_quantize, AwqOptions(group_size=GROUP))
        expected = outputs(plain, x, rounded=False)
        torch.testing.assert_close(outputs(block, x, rounded=False), expected, rtol=1e-4, atol=1e-4)
        before = (outputs(plain, x, rounded=True) - expected).square().sum() / expected.square().sum()
        after = (outputs(block, x, rounded=True) - expected).square().sum() / expected.square().sum()
        assert after < 0.7 * before
        assert notes[0].point == "y"
        assert not notes[0].applied
        assert notes[1].error_before == pytest.approx(before.item(), rel=0.05)
        assert notes[1].error_after == pytest.approx(after.item(), rel=0.05)


def test_coarse_search_is_close_to_the_exhaustive_one():
    block, _ = make_block(1)
    errors = []
    for exhaustive in (False, True):
        options = AwqOptions(exhaustive=exhaustive, group_size=GROUP)
        errors.append(apply(make_block(1)[0], FACTS, fake_quantize, options)[-1].error_after)
    assert errors[0] < 1.1 * errors[1]
    assert block.tensors["norm.weight"].eq(1).all()


def test_the_loss_is_the_squared_error_of_the_output():
    block, x = make_block(2)
    scales = torch.rand(32) + 0.5
    expected = sum(
        ((fake_quantize(linear, block.weight(linear) * scales) / scales - block.weight(linear)) @ x.T).square().sum()
        for linear in POINT.readers
    )
    loss = RoundingLoss(block, POINT.readers, fake_quantize, rows=1000)
    assert loss.at(scales) == pytest.approx(expected.item(), rel=1e-3)
    with quick_products():
        assert loss.at(scales) == pytest.approx(expected.item(), rel=0.02)
    assert loss.signal == pytest.approx(outputs(block, x, rounded=False).square().sum().item(), rel=1e-3)


def test_without_a_hessian_the_diagonal_stands_in():
    block, _ = make_block()
    block.stats["x"] = replace(block.stats["x"], hessian=None)
    delta = fake_quantize(GATE, block.weight(GATE)) - block.weight(GATE)
    expected = (delta.square() * block.stats["x"].mean_sq).sum() * 200
    assert RoundingLoss(block, [GATE], fake_quantize, 1000).at(None) == pytest.approx(expected.item(), rel=1e-5)
    assert apply(block, FACTS, fake_quantize, AwqOptions(group_size=GROUP))[-1].applied


def test_samples_are_disjoint_and_weigh_what_they_stand_for():
    seen = []

    def watch(linear, weight, importance):
        seen.append(set(weight[:, 0].tolist()))
        return fake_quantize(linear, weight)

    block, _ = make_block()
    halves = [RoundingLoss(block, [GATE], watch, rows=24, sample=sample) for sample in (0, 1)]
    assert len(seen[0]) == len(seen[1]) == 24
    assert not seen[0] & seen[1]
    whole = RoundingLoss(block, [GATE], fake_quantize, rows=48)
    assert (halves[0].at(None) + halves[1].at(None)) / 2 == pytest.approx(whole.at(None), rel=1e-5)


def test_importance_follows_the_scales():
    block, _ = make_block()
    given_importance = []

    def watch(linear, weight, importance):
        given_importance.append(importance)
        return fake_quantize(linear, weight)

    scales = torch.rand(32) + 0.5
    RoundingLoss(block, [GATE], watch, rows=48).at(scales)
    torch.testing.assert_close(given_importance[-1], block.stats["x"].mean_sq / scales**2)


def test_weights_that_are_on_the_grid_already_are_left_alone():
    block, _ = make_block()
    for linear in POINT.readers:
        block.tensors[f"{linear.name}.weight"] = fake_quantize(linear, block.weight(linear))
    before, stats = dict(block.tensors), dict(block.stats)
    note = apply(block, FACTS, fake_quantize, AwqOptions(group_size=GROUP))[-1]
    assert not note.applied
    assert note.detail == "no scales are better than none"
    assert block.tensors == before
    assert block.stats == stats


def test_readers_in_16_bits_are_rescaled_and_not_counted():
    block, x = make_block()
    plain = outputs(block, x, rounded=False)

    def only_up(linear, weight, importance=None):
        return fake_quantize(linear, weight) if linear is UP else weight

    note = apply(block, FACTS, only_up, AwqOptions(group_size=GROUP))[-1]
    assert note.applied
    torch.testing.assert_close(outputs(block, x, rounded=False), plain, rtol=1e-4, atol=1e-4)
    note = apply(make_block()[0], FACTS, lambda linear, weight, importance: weight)[-1]
    assert not note.applied
    assert note.detail == "everything that reads it stays in 16 bits"


def test_absent_statistics_are_reported():
    block, _ = make_block()
    block.stats.clear()
    note = apply(block, FACTS, fake_quantize)[-1]
    assert not note.applied
    assert "no token reached it" in note.detail
    assert note.error_before is None


@pytest.mark.parametrize("part", ["absmax", "mean_sq", "mean_abs", "hessian"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_reported(part, value):
    block, _ = make_block()
    bad = getattr(block.stats["x"], part).clone()
    bad.flatten()[5] = value
    block.stats["x"] = replace(block.stats["x"], **{part: bad})
    before = dict(block.tensors)
    note = apply(block, FACTS, fake_quantize)[-1]
    assert not note.applied
    assert "NaN or inf" in note.detail
    assert block.tensors == before


def test_weights_that_are_not_finite_are_reported():
    block, _ = make_block()
    block.tensors["up.weight"] = block.weight(UP).clone().fill_(float("inf"))
    note = apply(block, FACTS, fake_quantize)[-1]
    assert not note.applied
    assert note.detail == "up holds NaN or inf"


def test_rounding_that_fails_is_never_chosen():
    def fails_when_scaled(linear, weight, importance=None):
        plain = {len(each): each for each in (block.weight(GATE), block.weight(UP))}
        return fake_quantize(linear, weight) if torch.equal(weight, plain[len(weight)]) else weight * float("nan")

    block, _ = make_block()
    note = apply(block, FACTS, fails_when_scaled, AwqOptions(group_size=GROUP, rows=1000))[-1]
    assert not note.applied


def test_silent_channels_keep_their_scale():
    block, x = make_block()
    x[:, 5] = 0.0
    block.stats["x"] = stats_of(x)
    for linear in POINT.readers:
        block.tensors[f"{linear.name}.weight"][:, 9] = 0.0
    assert apply(block, FACTS, fake_quantize, AwqOptions(group_size=GROUP))[-1].applied
    assert block.tensors["norm.weight"][[5, 9]].tolist() == [1.0, 1.0]


def test_an_input_that_is_all_zeros_is_left_alone():
    block, x = make_block()
    block.stats["x"] = stats_of(torch.zeros_like(x))
    note = apply(block, FACTS, fake_quantize, AwqOptions(group_size=GROUP))[-1]
    assert not note.applied
    assert note.error_before == 0.0


def test_column_use_and_mean_activation():
    block, x = make_block()
    whole = torch.cat([block.weight(linear) for linear in POINT.readers]).abs()
    grouped = whole.reshape(-1, GROUP)
    expected = (grouped / grouped.amax(1, keepdim=True)).reshape(whole.shape).mean(0)
    torch.testing.assert_close(column_use(block, POINT, GROUP), expected)
    torch.testing.assert_close(mean_activation(block, POINT), x.abs().mean(0))


@settings(max_examples=50)
@given(least=st.floats(0.1, 2), centre=st.integers(0, 20), duo=st.booleans(), exhaustive=st.booleans())
def test_search_finds_the_bottom_of_a_valley(least, centre, duo, exhaustive):
    def loss(alpha: float, with_weights: bool) -> float:
        return 0.5 + abs(alpha - centre / 20) + (with_weights != duo) if alpha < 0.99 else math.nan

    found = search(loss, least, AwqOptions(exhaustive=exhaustive))
    if least <= 0.5:
        assert found is None
    elif found is not None:
        assert found[1] == duo
        assert abs(found[0] - min(centre, 19) / 20) <= 0.1001
        assert loss(*found) < least


def test_every_transform_of_the_table_can_be_called():
    for row in TRANSFORMS.values():
        assert callable(load(row.online or row.function))
        assert row.stream is None or callable(load(row.stream))
