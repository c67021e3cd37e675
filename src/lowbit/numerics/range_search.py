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
        self.grid, self.global_scale = grid, global_scale
        self.error_of = lambda params: grid.error(weight, params, group_size, importance, by_magnitude)
        self.low, self.high = low, high
        self.params = grid.params_from_range(low, high, global_scale)
        self.error = self.error_of(self.params)

    def try_ratios(self, ratios: list[tuple[float, float]]) -> None:
        """Try (low ratio, high ratio) pairs of the range that was best when this began."""
        base_low, base_high = self.low, self.high
        for low_ratio, high_ratio in ratios:
            low, high = base_low * low_ratio, base_high * high_ratio
            params = self.grid.params_from_range(low, high, self.global_scale)
            error = self.error_of(params)
            better = error < self.error
            self.error = torch.where(better, error, self.error)
            self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)
            zero_point = params.zero_point
            if zero_point is not None and self.params.zero_point is not None:
                zero_point = torch.where(better, zero_point, self.params.zero_point)
            scale = torch.where(better, params.scale, self.params.scale)
            self.params = GroupParams(scale, zero_point, self.global_scale)


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
