"""AWQ: channels that meet large activations are scaled up before rounding (Lin et al., arXiv 2306.00978).

At every scaling point (lowbit.transform.facts), for an input with channels j and the readers W [N, K]:

    x_j = mean |x_j|                               over tokens
    w_j = mean over rows of |W_nj| / max |W_n,group(j)|     how much of its group's range a column uses
    s_j = x_j^α / w_j^(1−α)   or   s_j = x_j^α     α = 0, 0.05, … 1 (AutoAWQ's duo_scaling, and without)
    s   = s / sqrt(max s · min s)
    s*  = argmin Σ over readers tr(ΔW H ΔWᵀ),  ΔW = Q(W · s) / s − W

The loss uses the Gram matrix (lowbit.transform.loss), on 256 sampled rows. Each of the two forms is searched coarsely
(every fifth α), then around the best; `exhaustive` tries all. The result is judged on another sample of rows, and
folded only if it beats s = 1 there. Routers and linears that stay in 16 bits are rescaled, but not counted. Channels
that are never active, or that no weight reads, keep s = 1.

Composes with GPTQ (`awq+gptq`): the Hessian is rescaled with the weights.

AWQ's clip search is left to the range search (lowbit.numerics.scalar_grids: "mse" and "wmse" with importance mean x²),
which minimises the same error, in the fake quantizer during the search and again when the weights are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.transform.block import BlockTensors, FakeQuantize, TransformNote
from lowbit.transform.facts import ModelFacts, ScalingPoint
from lowbit.transform.fold import fold
from lowbit.transform.loss import RoundingLoss, not_searchable, quick_products


@dataclass(frozen=True)
class AwqOptions:
    """
    rows        sampled rows per point, for the search and again for the verdict; a quarter inside an expert
    steps       α is a multiple of 1 / steps
    exhaustive  try every α instead of the best neighbourhood
    group_size  of the targets, for w_j; -1: whole rows
    """

    rows: int = 256
    steps: int = 20
    exhaustive: bool = False
    group_size: int = 128


def apply(
    block: BlockTensors, facts: ModelFacts, fake_quantize: FakeQuantize, options: AwqOptions | None = None
) -> list[TransformNote]:
    """Search and fold scales at every scaling point of a block, in its own order; one note for each."""
    points, left_out = facts.points(block.linears[0].block or 0)
    notes = [TransformNote(source, "awq", None, None, False, why) for source, why in left_out.items()]
    with quick_products():
        return notes + [_at_point(block, point, fake_quantize, options or AwqOptions()) for point in points]


def _at_point(
    block: BlockTensors, point: ScalingPoint, fake_quantize: FakeQuantize, options: AwqOptions
) -> TransformNote:
    def unchanged(why: str, before: float | None = None, after: float | None = None) -> TransformNote:
        return TransformNote(point.feeder, "awq", before, after, False, why)

    why = not_searchable(block, point)
    if why is not None:
        return unchanged(why)
    # A block has many experts, each with a point of its own.
    rows = options.rows // 4 if point.kind == "linear" and point.readers[0].expert is not None else options.rows
    loss = RoundingLoss(block, point.readers, fake_quantize, rows)
    if not loss.rounded:
        return unchanged("everything that reads it stays in 16 bits")
    scales_of = _scales(block, point, options)
    found = search(lambda alpha, duo: loss.at(scales_of(alpha, duo)), loss.at(None), options)
    judge = RoundingLoss(block, point.readers, fake_quantize, rows, sample=1)
    before = judge.relative(judge.at(None))
    if found is None:
        return unchanged("no scales are better than none", before, before)
    scales = scales_of(*found)
    after = judge.relative(judge.at(scales))
    if not after < before:
        return unchanged("the best scales do not help on other rows", before, before)
    folded = fold(block, point, scales)
    form = "with" if found[1] else "without"
    spread = f"{float(folded.min()):.3g} to {float(folded.max()):.3g}"
    return TransformNote(
        point.feeder, "awq", before, after, True, f"alpha {found[0]:.2f} {form} weights, scales {spread}"
    )


def search(loss: Callable[[float, bool], float], least: float, options: AwqOptions) -> tuple[float, bool] | None:
    """(α, with weights) of the smallest finite loss below `least`, or None. Ties keep the first."""
    tried: dict[tuple[int, bool], float] = {}

    def best_of(tries: list[tuple[int, bool]]) -> tuple[int, bool]:
        for step, duo in tries:
            if 0 <= step <= options.steps and (step, duo) not in tried:
                value = loss(step / options.steps, duo)
                tried[step, duo] = value if math.isfinite(value) else math.inf
        return min(tried, key=lambda key: tried[key])

    coarse = 1 if options.exhaustive else max(1, options.steps // 4)
    # Without weights, α = 0 is s = 1.
    step, duo = best_of([
        (step, duo) for duo in (False, True) for step in range(0 if duo else coarse, options.steps + 1, coarse)
    ])  # fmt: skip
    for near in (2, 1) if coarse > 1 else ():
        step, duo = best_of([(step - near, duo), (step + near, duo)])
    return (step / options.steps, duo) if tried[step, duo] < least else None


def _scales(block: BlockTensors, point: ScalingPoint, options: AwqOptions) -> Callable[[float, bool], Tensor]:
    """(α, with weights) → s [K]."""
    active, used = mean_activation(block, point), column_use(block, point, options.group_size)
    alive = (active > 0) & (used > 0)

    def scales(alpha: float, duo: bool) -> Tensor:
        logarithm = alpha * active.log() - ((1.0 - alpha) * used.log() if duo else 0.0)
        chosen = logarithm[alive]
        if not len(chosen):
            return torch.ones_like(active)
        centred = logarithm - (chosen.max() + chosen.min()) / 2
        return torch.where(alive, centred.exp(), torch.ones_like(active)).clamp(1e-4, 1e4)

    return scales


def mean_activation(block: BlockTensors, point: ScalingPoint) -> Tensor:
    """mean |x_j| over the tokens of all inputs of a point, columns of one channel alike; float32 [K]."""
    known = [block.stats[source] for source in point.sources if source in block.stats]
    total = sum(stats.tokens for stats in known)
    return point.share(torch.stack([stats.mean_abs * (stats.tokens / total) for stats in known]).sum(0))


def column_use(block: BlockTensors, point: ScalingPoint, group_size: int) -> Tensor:
    """mean over the rows of all readers of |W_nj| / max of its group, columns of one channel alike; float32 [K]."""
    columns = point.columns
    group = columns if group_size < 1 else min(group_size, columns)
    total = torch.zeros(columns)
    for reader in point.readers:
        magnitude = functional.pad(block.weight(reader).abs().float(), (0, -columns % group))
        grouped = magnitude.reshape(len(magnitude), -1, group)
        shares = grouped / grouped.amax(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total = total.to(shares.device) + shares.flatten(1)[:, :columns].sum(0)
    return point.share(total / sum(reader.shape[0] for reader in point.readers))
