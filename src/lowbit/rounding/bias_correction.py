"""Bias correction (Data-Free Quantization: Nagel et al. 2019, arXiv 1906.04721, section 4.2).

    E[W x] − E[Ŵ x] = (W − Ŵ) · E[x]          b̂ = b + (W − Ŵ) · E[x]

Rounding shifts the mean of a linear's outputs if the mean of its inputs is not zero; the bias shifts it back, at no
cost in bytes. Calibration measures E[x]; the paper derives it from batch norms. A linear without a bias cannot be
corrected: files and engines have no tensor for it.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.tensors import LayerStats


def why_not_corrected(stats: LayerStats | None, bias: Tensor | None) -> str | None:
    """The reason why this linear's bias cannot be corrected, for the report, or None."""
    if bias is None:
        return "no bias correction: the linear has no bias"
    if stats is None or stats.tokens == 0:
        return "no bias correction: no token reached the linear in calibration"
    if stats.mean is None:
        return "no bias correction: the mean of the inputs was not measured"
    return None


def corrected_bias(weight: Tensor, decoded: Tensor, stats: LayerStats | None, bias: Tensor | None) -> Tensor | None:
    """The bias [N], in its own dtype, that restores the mean output of the float linear; None if `why_not_corrected`.

    weight, decoded  [N, K] before and after rounding; computed in float32
    """
    if why_not_corrected(stats, bias) is not None:
        return None
    assert stats is not None
    assert stats.mean is not None
    assert bias is not None
    shift = (weight.float() - decoded.float()) @ stats.mean.to(weight.device)
    return (bias.float() + shift).to(bias.dtype)
