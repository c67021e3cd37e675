"""Range search: the range that a group's scale is fitted to, before rounding.

    absmax      [min w, max w]
    percentile  the given percentile of |w| (symmetric) or of w at both ends (asymmetric), per group
    mse         argmin over ranges of  Σ importance · (w − decode(round(w)))²
    wmse        argmin over ranges of  Σ importance · |w| · (w − decode(round(w)))²

Written once against `Grid`: a candidate range gives params, `grid.error` judges them, the best of each group is kept.
On a symmetric grid the candidates shrink both ends together; on an asymmetric one they then move the low end alone and
the high end alone, from the best joint range. Ties keep the wider range. All-zero groups keep scale 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.numerics.grid import Grid, RangeSearch
from lowbit.tensors import GroupParams

# Candidates are judged together up to so many weights: enough for one call to be worth it, few enough for caches.
_CANDIDATE_WEIGHTS = 1 << 19


def fit_by_search(
    grid: Grid,
    weight: Tensor,
    group_size: int,
    search: RangeSearch,
    importance: Tensor | None,
    global_scale: float,
) -> GroupParams:
    """Params [N, G] of weight [N, K] by `search`; importance is float32 [K] or None for equal weights."""
    if search.method == "percentile":
        low, high = _percentile_range(weight, group_size, search.percentile, grid.symmetric)
        return grid.params_from_range(low, high, global_scale)
    low, high = kernels.group_range(weight, group_size)
    if search.method == "absmax":
        return grid.params_from_range(low, high, global_scale)
    best = _Best(grid, weight, group_size, importance, search.method == "wmse", global_scale, low, high)
    ratios = grid.clip_ratios(search)
    best.try_ratios([(ratio, ratio) for ratio in ratios])
    if not grid.symmetric:
        best.try_ratios([(ratio, 1.0) for ratio in ratios[::2]])
        best.try_ratios([(1.0, ratio) for ratio in ratios[::2]])
    return best.params


def ratios_down_from(largest: float, search: RangeSearch) -> list[float]:
    """Ratios in even steps, for grids on which a scale larger than the covering one can be better."""
    step = (largest - search.smallest) / search.steps
    return [largest - step * index for index in range(search.steps + 1)]


class _Best:
    """The best range of every group so far."""

    def __init__(
        self,
        grid: Grid,
        weight: Tensor,
        group_size: int,
        importance: Tensor | None,
        by_magnitude: bool,
        global_scale: float,
        low: Tensor,
        high: Tensor,
    ):
        self.grid, self.global_scale, self.weight = grid, global_scale, weight
        self.error_of = lambda rows, params: grid.error(rows, params, group_size, importance, by_magnitude)
        self.low, self.high = low, high
        self.params = grid.params_from_range(low, high, global_scale)
        self.error = self.error_of(weight, self.params)

    def try_ratios(self, ratios: list[tuple[float, float]]) -> None:
        """Try (low ratio, high ratio) pairs of the range that was best when this began."""
        base = (self.low, self.high)
        at_once = max(1, _CANDIDATE_WEIGHTS // max(1, self.weight.numel()))
        for first in range(0, len(ratios), at_once):
            self._try(base, ratios[first : first + at_once])

    def _try(self, base: tuple[Tensor, Tensor], ratios: list[tuple[float, float]]) -> None:
        """Several candidates in one pass: their rows stand below each other."""
        count, rows = len(ratios), self.low.shape[0]
        low = torch.cat([base[0] * ratio for ratio, _ in ratios])
        high = torch.cat([base[1] * ratio for _, ratio in ratios])
        params = self.grid.params_from_range(low, high, self.global_scale)
        error = self.error_of(self.weight.repeat(count, 1) if count > 1 else self.weight, params)
        error, chosen = error.reshape(count, rows, -1).min(dim=0)  # of equals the first, which is the widest
        better = error < self.error

        def merged(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(better, new.reshape(count, rows, -1).gather(0, chosen[None])[0], old)

        self.error = torch.where(better, error, self.error)
        self.low, self.high = merged(low, self.low), merged(high, self.high)
        zero_point = params.zero_point
        if zero_point is not None and self.params.zero_point is not None:
            zero_point = merged(zero_point, self.params.zero_point)
        self.params = GroupParams(merged(params.scale, self.params.scale), zero_point, self.global_scale)


def _percentile_range(weight: Tensor, group_size: int, percentile: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Low and high [N, G]."""
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    fraction = percentile / 100.0
    lows, highs = [], []
    for group in range(groups):
        values = weight[:, group * group_size : (group + 1) * group_size].to(torch.float32)
        if symmetric:
            high = torch.quantile(values.abs(), fraction, dim=1)
            low = -high
        else:
            low, high = torch.quantile(values, 1.0 - fraction, dim=1), torch.quantile(values, fraction, dim=1)
        lows.append(low)
        highs.append(high)
    return torch.stack(lows, dim=1).reshape(rows, groups), torch.stack(highs, dim=1).reshape(rows, groups)
