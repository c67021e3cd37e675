"""The cost of rounding at a scaling point, from the Gram matrix of its inputs; no block runs.

For scales s, H = Σ x xᵀ of the input *before* scaling, and Q the round-to-nearest of the linear's target:

    ΔW = Q(W · s) / s − W        error(s) = Σ over readers  tr(ΔW H ΔWᵀ) = Σ over tokens ‖ΔW x‖²

If only the diagonal of H was measured, H = diag(Σ x²). Q weighs its squared errors with the importance of the scaled
input, mean x² / s².

A search on all rows would cost more than GPTQ, and rows round independently, so a sample is enough: `rows` rows, spread
evenly over the readers in proportion to their size, each weighted by the rows it stands for. Samples are disjoint: a
choice searched on one is judged on another. Matrix products run in bfloat16 if the processor supports it (float32
accumulation), a relative error of 2⁻⁸ in ΔW, averaged over the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.numerics.precision import fast_products
from lowbit.tensors import LayerStats
from lowbit.transform.block import BlockTensors, FakeQuantize
from lowbit.transform.facts import ScalingPoint

FEWEST_ROWS = 8  # of each reader


def quick_products() -> AbstractContextManager[None]:
    """Inside, float32 matrix products on the CPU may round their factors to bfloat16."""
    return fast_products(torch.bfloat16)


def gram(weight: Tensor, stats: LayerStats) -> float:
    """tr(W H Wᵀ), summed in float64; weight [N, K]."""
    if stats.hessian is None:
        return float((weight.square() * (stats.mean_sq * stats.tokens)).sum(dtype=torch.float64))
    return float(((weight @ stats.hessian.to(weight.dtype)) * weight).sum(dtype=torch.float64))


def not_searchable(block: BlockTensors, point: ScalingPoint) -> str | None:
    """The reason why the statistics do not allow a search at a point, or None."""
    known = [source for source in point.sources if source in block.stats]
    if not known:
        return "no token reached it, so nothing was measured"
    for source in known:
        stats = block.stats[source]
        if stats.tokens < 1:
            return f"{source}: no token was seen"
        parts = {"absmax": stats.absmax, "mean x²": stats.mean_sq, "mean |x|": stats.mean_abs, "Hessian": stats.hessian}
        bad = [name for name, part in parts.items() if part is not None and not bool(torch.isfinite(part).all())]
        if bad:
            return f"{source}: {', '.join(bad)} of the input holds NaN or inf"
    for reader in point.readers:
        if not bool(torch.isfinite(block.weight(reader)).all()):
            return f"{reader.name} holds NaN or inf"
    return None


@dataclass(frozen=True)
class _Sampled:
    """A sample of rows of one reader: weight [n, K]; share: rows that each stands for."""

    linear: Linear
    weight: Tensor
    stats: LayerStats
    share: float


class RoundingLoss:
    """The error of some linears of a block as a function of the scales of their input.

    rounded  the linears that are quantized and have statistics
    signal   Σ tr(W H Wᵀ) over them, the unit of relative errors
    """

    def __init__(
        self, block: BlockTensors, linears: Sequence[Linear], fake_quantize: FakeQuantize, rows: int, sample: int = 0
    ):
        self._fake_quantize = fake_quantize
        known = [linear for linear in linears if linear.reads in block.stats]
        total = sum(linear.shape[0] for linear in known)
        sampled = [_sampled(block, linear, rows * linear.shape[0] // max(total, 1), sample) for linear in known]
        self._sampled = [each for each in sampled if self._round(each, None) is not each.weight]
        self.rounded = [each.linear for each in self._sampled]
        self.signal = sum(each.share * gram(each.weight, each.stats) for each in self._sampled)

    def at(self, scales: Tensor | None) -> float:
        """Error with the input divided by scales [K]; None: unscaled. NaN or inf if rounding fails."""
        error = 0.0
        for each in self._sampled:
            delta = self._round(each, scales) - (each.weight if scales is None else each.weight * scales)
            error += each.share * gram(delta if scales is None else delta / scales, each.stats)
        return error

    def relative(self, error: float) -> float:
        return error / self.signal if self.signal > 0 else 0.0

    def _round(self, each: _Sampled, scales: Tensor | None) -> Tensor:
        if scales is None:
            return self._fake_quantize(each.linear, each.weight, each.stats.mean_sq)
        return self._fake_quantize(each.linear, each.weight * scales, each.stats.mean_sq / scales.square())


def _sampled(block: BlockTensors, linear: Linear, wanted: int, sample: int) -> _Sampled:
    """About `wanted` rows, evenly spread; samples of different numbers are disjoint unless all rows are taken."""
    weight = block.weight(linear)
    step = max(1, len(weight) // max(wanted, FEWEST_ROWS))
    rows = weight[sample % step :: step]
    return _Sampled(linear, rows, block.stats[linear.reads or ""], len(weight) / len(rows))
