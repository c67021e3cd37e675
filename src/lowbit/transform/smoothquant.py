"""SmoothQuant: move outliers from activations into weights (Xiao et al., arXiv 2211.10438).

    s_j = max |x_j|^α / max |W_:j|^(1−α)        x' = x / s,  W' = W · s

α is searched at every point (0.30, 0.35, … 0.90), or given. The loss adds the squared errors of the output, over all
tokens, from rounding both sides:

    weights       tr(ΔW H ΔWᵀ),  ΔW = Q(W · s) / s − W                   (lowbit.transform.loss)
    activations   tokens · step² / 12 · Σ_j ‖W_:j s_j‖²,  step = peak / (2^(bits−1) − 1)

The second assumes that rounding an activation leaves an error uniform in ± step / 2, independent between channels, so
that each adds its variance step² / 12 times the squared norm of its column. The peak that sets the step:

    "tensor"  static: the largest measured, max_j absmax_j / s_j
    "token"   dynamic: the median over tokens of max_j |x'_j|. Only the variances v_j = mean x²_j / s_j² are known; with
              channels as independent normal variables it is the p with
              Σ_j log erf(p / sqrt(2 v_j)) = log ½, bounded by the peak of "tensor"
    "float"   FP8 (E4M3): the error is relative to each activation, and Σ_j (x_j / s_j)² ‖W_:j s_j‖² does not depend
              on s, so the weights alone decide

A point stays unchanged if no α beats s = 1. As in the paper, only points after norms are scaled, unless
`behind_linears`. Channels that are never active, or that no weight reads, keep s = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.tensors import LayerStats
from lowbit.transform.block import BlockTensors, FakeQuantize, TransformNote
from lowbit.transform.facts import ModelFacts, ScalingPoint
from lowbit.transform.fold import fold
from lowbit.transform.loss import RoundingLoss, not_searchable, quick_products

ALPHAS = tuple(step / 20 for step in range(6, 19))


@dataclass(frozen=True)
class SmoothQuantOptions:
    """
    alpha        None: searched over `ALPHAS`; a number: used wherever it beats s = 1
    activation   rounding of activations: one scale per token, a static one, or FP8
    bits         of an integer activation
    behind_linears  also move scales through v → o and up → down
    rows         sampled rows per point, for the search and again for the verdict
    """

    alpha: float | None = None
    activation: Literal["token", "tensor", "float"] = "token"
    bits: int = 8
    behind_linears: bool = False
    rows: int = 256


def apply(
    block: BlockTensors, facts: ModelFacts, fake_quantize: FakeQuantize, options: SmoothQuantOptions | None = None
) -> list[TransformNote]:
    """Search and fold scales at the scaling points of a block; one note for each."""
    options = options or SmoothQuantOptions()
    points, left_out = facts.points(block.linears[0].block or 0)
    notes = [TransformNote(source, "smoothquant", None, None, False, why) for source, why in left_out.items()]
    with quick_products():
        for point in points:
            if point.kind == "norm" or options.behind_linears:
                notes.append(_at_point(block, point, fake_quantize, options))
    return notes


class SmoothingLoss:
    """Both rounding errors of a point as a function of its scales."""

    def __init__(
        self, block: BlockTensors, point: ScalingPoint, fake_quantize: FakeQuantize, options: SmoothQuantOptions,
        sample: int = 0,
    ):  # fmt: skip
        self.weights = RoundingLoss(block, point.readers, fake_quantize, options.rows, sample)
        self._options = options
        norms: dict[str, Tensor] = {}
        for linear in self.weights.rounded:
            columns = block.weight(linear).square().sum(0)
            norms[linear.reads or ""] = norms.get(linear.reads or "", 0) + columns
        self._inputs = [(block.stats[source], columns) for source, columns in norms.items()]

    def at(self, scales: Tensor | None) -> float:
        return self.weights.at(scales) + sum(
            activation_error(stats, columns, scales, self._options) for stats, columns in self._inputs
        )


def activation_error(stats: LayerStats, columns: Tensor, scales: Tensor | None, options: SmoothQuantOptions) -> float:
    """Σ over tokens of the squared output error from rounding x / scales; columns [K] = Σ over rows W²."""
    if options.activation == "float":
        return 0.0
    scales = torch.ones_like(columns) if scales is None else scales
    peak = float((stats.absmax / scales).max())
    if options.activation == "token":
        peak = min(peak, median_peak(stats.mean_sq / scales.square()))
    step = peak / (2 ** (options.bits - 1) - 1)
    return stats.tokens * step * step / 12.0 * float((columns * scales.square()).sum(dtype=torch.float64))


def median_peak(variances: Tensor) -> float:
    """Median of max_j |x_j|, x_j independent and normal with mean 0 and variances [K]; by bisection, to 1e-6."""
    deviations = variances.double().sqrt()
    deviations = deviations[deviations > 0]
    if not len(deviations):
        return 0.0
    # The median lies between that of the widest channel alone and that of K channels as wide as it.
    low, high = 0.0, float(deviations.max()) * math.sqrt(2.0 * math.log(4.0 * len(deviations)))
    for _ in range(40):
        middle = (low + high) / 2
        below = torch.erf(middle / (deviations * math.sqrt(2.0))).log().sum()
        low, high = (middle, high) if below < math.log(0.5) else (low, middle)
    return high


def _at_point(
    block: BlockTensors, point: ScalingPoint, fake_quantize: FakeQuantize, options: SmoothQuantOptions
) -> TransformNote:
    def unchanged(why: str, before: float | None = None) -> TransformNote:
        return TransformNote(point.feeder, "smoothquant", before, before, False, why)

    why = not_searchable(block, point)
    if why is not None:
        return unchanged(why)
    loss = SmoothingLoss(block, point, fake_quantize, options)
    if not loss.weights.rounded:
        return unchanged("everything that reads it stays in 16 bits")
    alphas = ALPHAS if options.alpha is None else (options.alpha,)
    losses = {alpha: loss.at(smoothing_scales(block, point, alpha)) for alpha in alphas}
    best = min(losses, key=lambda alpha: losses[alpha] if math.isfinite(losses[alpha]) else math.inf)
    scales = smoothing_scales(block, point, best)
    judge = SmoothingLoss(block, point, fake_quantize, options, sample=1)
    before, after = judge.weights.relative(judge.at(None)), judge.weights.relative(judge.at(scales))
    if not (losses[best] < loss.at(None) and after < before):
        return unchanged("no scales are better than none", before)
    folded = fold(block, point, scales)
    spread = f"{float(folded.min()):.3g} to {float(folded.max()):.3g}"
    return TransformNote(point.feeder, "smoothquant", before, after, True, f"alpha {best:.2f}, scales {spread}")


def smoothing_scales(block: BlockTensors, point: ScalingPoint, alpha: float) -> Tensor:
    """s [K], columns of one channel alike."""
    known = [block.stats[source].absmax for source in point.sources if source in block.stats]
    activation = torch.stack(known).amax(0)
    weight = torch.stack([block.weight(reader).abs().amax(0) for reader in point.readers]).amax(0)
    if point.channel is not None:
        activation, weight = point.share(activation), point.share(weight)
    alive = (activation > 0) & (weight > 0)
    scales = (alpha * activation.log() - (1.0 - alpha) * weight.log()).exp()
    return torch.where(alive & torch.isfinite(scales), scales, torch.ones_like(scales)).clamp(1e-5, 1e5)
