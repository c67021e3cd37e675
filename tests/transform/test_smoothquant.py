"""SmoothQuant: its formula, its model of activation rounding, and what both do to a layer."""

from __future__ import annotations

import pytest
import torch
from rewriting import stats_of
from test_awq_scales import FACTS, POINT, make_block, outputs

from lowbit.transform.smoothquant import (
    SmoothingLoss,
    SmoothQuantOptions,
    activation_error,
    apply,
    median_peak,
    smoothing_scales,
)


def round_rows(linear, weight, importance=None):
    """Symmetric 8-bit integers, one scale per row."""
    step = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / step).round() * step


def round_tokens(x: torch.Tensor) -> torch.Tensor:
    return round_rows(None, x)


def w8a8_error(block, x: torch.Tensor) -> float:
    """Squared error of the outputs with weights and activations rounded, relative."""
    inputs = x * block.tensors["norm.weight"]
    weights = [block.weight(linear) for linear in POINT.readers]
    exact = inputs @ torch.cat(weights).T
    rounded = round_tokens(inputs) @ torch.cat([round_rows(None, each) for each in weights]).T
    return ((rounded - exact).square().sum() / exact.square().sum()).item()


def test_scales_are_the_formula():
    block, x = make_block()
    weight = torch.cat([block.weight(linear) for linear in POINT.readers])
    expected = x.abs().amax(0) ** 0.7 / weight.abs().amax(0) ** 0.3
    torch.testing.assert_close(smoothing_scales(block, POINT, 0.7), expected)


@pytest.mark.parametrize("activation", ["token", "tensor"])
def test_a_smoothed_block_computes_the_same_and_rounds_better(activation):
    plain, x = make_block()
    block, _ = make_block()
    notes = apply(block, FACTS, round_rows, SmoothQuantOptions(activation=activation))
    assert [note.point for note in notes] == ["y", "norm"]
    assert notes[1].applied
    assert notes[1].error_after < notes[1].error_before
    torch.testing.assert_close(outputs(block, x, rounded=False), outputs(plain, x, rounded=False), rtol=1e-4, atol=1e-4)
    assert w8a8_error(block, x) < 0.5 * w8a8_error(plain, x)


def test_the_loss_predicts_the_error_of_a_layer():
    block, x = make_block()
    loss = SmoothingLoss(block, POINT, round_rows, SmoothQuantOptions(rows=1000))
    for alpha in (0.3, 0.5, 0.7):
        scales = smoothing_scales(block, POINT, alpha)
        other, _ = make_block()
        other.tensors = {name: values * scales for name, values in other.tensors.items()}
        other.tensors["norm.weight"] = 1 / scales
        assert loss.weights.relative(loss.at(scales)) == pytest.approx(w8a8_error(other, x), rel=0.35)


def test_static_activation_error_is_that_of_uniform_rounding():
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(2))
    step = x.abs().max() / 127
    measured = (((x / step).round() * step - x) @ weight.T).square().sum().item()
    predicted = activation_error(stats_of(x), weight.square().sum(0), None, SmoothQuantOptions(activation="tensor"))
    assert predicted == pytest.approx(measured, rel=0.02)


def test_median_peak_is_the_median_of_the_largest_channel():
    deviations = torch.cat([torch.full((200,), 1.0), torch.tensor([8.0, 20.0, 0.0])])
    x = torch.randn(20000, 203, generator=torch.Generator().manual_seed(3)) * deviations
    assert median_peak(deviations.square()) == pytest.approx(x.abs().amax(1).median().item(), rel=0.03)
    assert median_peak(torch.ones(1)) == pytest.approx(0.6745, abs=1e-3)
    assert median_peak(torch.zeros(5)) == 0.0


def test_fp8_activations_gain_nothing():
    block, _ = make_block()
    stats = block.stats["x"]
    options = SmoothQuantOptions(activation="float")
    assert activation_error(stats, torch.ones(32), torch.rand(32) + 0.1, options) == 0.0


def test_a_fixed_alpha_is_taken_where_it_helps_and_left_where_not():
    block, _ = make_block()
    assert apply(block, FACTS, round_rows, SmoothQuantOptions(alpha=0.5))[-1].detail.startswith("alpha 0.50")
    # One token is loud in eight channels, which smoothing would make wide at the cost of all others.
    block, x = make_block()
    x[:, [3, 20]] /= 30.0
    x[0, :8] = 30.0
    block.stats["x"] = stats_of(x)
    before = dict(block.tensors)
    note = apply(block, FACTS, round_rows, SmoothQuantOptions(alpha=0.9))[-1]
    assert not note.applied
    assert note.detail == "no scales are better than none"
    assert block.tensors == before


def test_silent_channels_keep_their_scale():
    block, x = make_block()
    x[:, 5] = 0.0
    block.stats["x"] = stats_of(x)
    for linear in POINT.readers:
        block.tensors[f"{linear.name}.weight"][:, 9] = 0.0
    assert apply(block, FACTS, round_rows)[-1].applied
    assert block.tensors["norm.weight"][[5, 9]].tolist() == [1.0, 1.0]


def test_absent_statistics_and_16_bit_readers_are_reported():
    block, _ = make_block()
    note = apply(block, FACTS, lambda linear, weight, importance: weight)[-1]
    assert not note.applied
    assert "16 bits" in note.detail
    block.stats.clear()
    note = apply(block, FACTS, round_rows)[-1]
    assert not note.applied
    assert "no token reached it" in note.detail
