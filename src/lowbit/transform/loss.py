"""What rounding costs at a scaling point, through the Gram matrix of its inputs; no block is run.

For scales s, H = Σ x xᵀ of the input *before* scaling, and Q the round-to-nearest of the linear's target:

    ΔW = Q(W · s) / s − W        error(s) = Σ over readers  tr(ΔW H ΔWᵀ) = Σ over tokens ‖ΔW x‖²

Where only the diagonal of H was measured, H = diag(Σ x²). The importance that Q weighs its squared errors with is that
of the scaled input: mean x² / s².

Searching on all rows would cost more than GPTQ; rows are rounded one by one, so some of them tell the same. A loss
takes `rows` of them, spread evenly over the readers in proportion to their size, and weighs each with what it stands
for. `SAMPLES` are disjoint: a choice that was searched on one is judged on another. Matrix products run in bfloat16
where the processor has that (float32 accumulation): a relative error of 2⁻⁸ in ΔW, of which the sum is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.calibrate.precision import fast_products
from lowbit.tensors import LayerStats
from lowbit.transform.block import BlockTensors, FakeQuantize

# No reader is judged by fewer rows, if it has them.
FEWEST_ROWS = 8


def quick_products() -> AbstractContextManager[None]:
    """Inside, float32 matrix products on the CPU may round their factors to bfloat16."""
    return fast_products(torch.bfloat16)


def gram(weight: Tensor, stats: LayerStats) -> float:
    """tr(W H Wᵀ), summed in float64; weight [N, K]."""
    if stats.hessian is None:
        return float((weight.square() * (stats.mean_sq * stats.tokens)).sum(dtype=torch.float64))
    return float(((weight @ stats.hessian.to(weight.dtype)) * weight).sum(dtype=torch.float64))


def unusable(stats: LayerStats) -> str | None:
    """Why nothing can be chosen by these statistics; None where they are sound."""
    if stats.tokens < 1:
        return "no token was seen"
    parts = {"absmax": stats.absmax, "mean x²": stats.mean_sq, "mean |x|": stats.mean_abs, "Hessian": stats.hessian}
    bad = [name for name, values in parts.items() if values is not None and not bool(torch.isfinite(values).all())]
    return f"{', '.join(bad)} of the input holds NaN or inf" if bad else None


@dataclass(frozen=True)
class _Sampled:
    """Some rows of one reader: weight [n, K], and what each stands for."""

    linear: Linear
    weight: Tensor
    stats: LayerStats
    share: float


class RoundingLoss:
    """The error of some linears of a block as a function of the scales of their input.

    rounded  those that are rounded at all and have statistics
    signal   Σ tr(W H Wᵀ) over them: errors divided by it are relative
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
        """Error with the input divided by scales [K]; None: as it is. NaN or inf where rounding fails."""
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
