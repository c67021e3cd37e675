"""Bias correction (Data-Free Quantization: Nagel et al. 2019, arXiv 1906.04721, section 4.2).

    E[W x] − E[Ŵ x] = (W − Ŵ) · E[x]          b̂ = b + (W − Ŵ) · E[x]

Rounding moves the mean of a linear's outputs where its inputs have a mean that is not zero; the bias moves it back, at
no cost in bytes. E[x] is measured by calibration here; the paper derives it from batch norms.

A linear without a bias has no place for it: files and engines would need a tensor that the model does not have.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.tensors import LayerStats


def why_not_corrected(stats: LayerStats | None, bias: Tensor | None) -> str | None:
    """Why this linear's bias cannot be corrected, for the report; None where it can."""
    if bias is None:
        return "no bias correction: the linear has no bias"
    if stats is None or stats.tokens == 0:
        return "no bias correction: no token reached the linear in calibration"
    if stats.mean is None:
        return "no bias correction: the mean of the inputs was not measured"
    return None


def corrected_bias(weight: Tensor, decoded: Tensor, stats: LayerStats | None, bias: Tensor | None) -> Tensor | None:
    """The bias [N], in its own dtype, with which the mean output is that of the float linear.

    weight, decoded  [N, K] before and after rounding
    returns          None where `why_not_corrected` says why; computed in float32
    """
    if why_not_corrected(stats, bias) is not None:
        return None
    assert stats is not None
    assert stats.mean is not None
    assert bias is not None
    shift = (weight.float() - decoded.float()) @ stats.mean.to(weight.device)
    return (bias.float() + shift).to(bias.dtype)
