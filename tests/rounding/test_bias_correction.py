"""Bias correction."""

from __future__ import annotations

import torch

from lowbit.rounding.bias_correction import corrected_bias, why_not_corrected
from lowbit.tensors import LayerStats


def stats_of(x: torch.Tensor, with_mean: bool = True) -> LayerStats:
    return LayerStats(
        len(x), x.abs().amax(0), x.square().mean(0), x.abs().mean(0), mean=x.mean(0) if with_mean else None
    )


def layer(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 32, generator=generator)
    x = torch.randn(500, 32, generator=generator) + torch.randn(32, generator=generator)
    return weight, (weight * 2).round() / 2, x, torch.randn(16, generator=generator)


def test_mean_of_the_output_is_that_of_the_float_linear():
    weight, decoded, x, bias = layer()
    new = corrected_bias(weight, decoded, stats_of(x), bias)
    assert new is not None
    exact, before, after = x @ weight.T + bias, x @ decoded.T + bias, x @ decoded.T + new
    assert torch.allclose(after.mean(0), exact.mean(0), atol=1e-4)
    assert (after - exact).square().sum() < 0.9 * (before - exact).square().sum()


def test_equals_the_formula_and_keeps_the_dtype():
    weight, decoded, x, bias = layer(1)
    new = corrected_bias(weight.bfloat16(), decoded, stats_of(x), bias.bfloat16())
    assert new is not None
    assert new.dtype == torch.bfloat16
    shift = torch.stack([(weight.bfloat16().float() - decoded)[:, k] * x.mean(0)[k] for k in range(32)]).sum(0)
    assert torch.allclose(new.float(), bias + shift, rtol=2**-7, atol=2**-7)


def test_exact_codes_and_centred_inputs_change_nothing():
    weight, decoded, x, bias = layer(2)
    assert torch.equal(corrected_bias(weight, weight, stats_of(x), bias), bias)
    centred = torch.cat([x, -x])
    assert torch.allclose(corrected_bias(weight, decoded, stats_of(centred), bias), bias, atol=1e-4)


def test_says_why_nothing_was_corrected():
    weight, decoded, x, bias = layer()
    none = LayerStats(0, *(torch.zeros(32) for _ in range(3)), mean=torch.zeros(32))
    cases = {"no bias": (stats_of(x), None), "no token": (none, bias), "not measured": (stats_of(x, False), bias)}
    for part, (stats, given) in cases.items():
        assert corrected_bias(weight, decoded, stats, given) is None
        assert part in (why_not_corrected(stats, given) or "")
    assert corrected_bias(weight, decoded, None, bias) is None
    assert why_not_corrected(stats_of(x), bias) is None
