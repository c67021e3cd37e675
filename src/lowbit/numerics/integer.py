"""Integer grids of 2 to 8 bits.

    symmetric    x ≈ scale * codes                    codes in −2^(b−1) .. 2^(b−1)−1
    asymmetric   x ≈ scale * (codes − zero_point)     the same signed codes; zero_point is one of them

The scale that covers a symmetric range spreads all 2^b codes over it: absmax / ((2^b − 1) / 2), so for 4 bits the
largest weight sits at 7.5 and rounds to a code half a step away. (absmax / 7 would represent one weight exactly and
waste the code −8.) This is also what compressed-tensors' observer does.
An asymmetric range is widened to include zero, so that 0.0 is representable. A narrow grid has no code −2^(b−1) and the
scale absmax / (2^(b−1) − 1), as LLM.int8() has it. Where a file cannot store the lowest codes as zero points (GPTQ v1),
`lowest_zero_point` widens ranges that would need one downwards, by as many steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.numerics.grid import RangeSearch
from lowbit.numerics.range_search import fit_by_search
from lowbit.numerics.scales import storable_scale
from lowbit.tensors import GroupParams


@dataclass(frozen=True)
class IntGrid:
    bits: int
    symmetric: bool = True
    scale_format: str = "bfloat16"
    narrow: bool = False
    lowest_zero_point: int | None = None

    @property
    def name(self) -> str:
        return f"int{self.bits}" + ("" if self.symmetric else "_asym") + ("_narrow" if self.narrow else "")

    @property
    def qmin(self) -> int:
        return -self.qmax if self.narrow else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def columns_per_code(self) -> int:
        return 1

    def params_from_range(self, low: Tensor, high: Tensor, global_scale: float = 1.0) -> GroupParams:
        steps = self.qmax - self.qmin
        if self.symmetric:
            wanted = torch.maximum(-low, high) * (2.0 / steps)
            return GroupParams(storable_scale(wanted, self.scale_format, global_scale), global_scale=global_scale)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        lowest = self.qmin if self.lowest_zero_point is None else self.lowest_zero_point
        below = lowest - self.qmin  # steps that the range must reach below zero
        low = torch.minimum(low, -high * (below / (steps - below)))
        scale = storable_scale((high - low) / steps, self.scale_format, global_scale)
        zero_point = (self.qmin - torch.round(low / scale)).clamp(lowest, self.qmax)
        return GroupParams(scale, zero_point.to(torch.int32), global_scale)

    def fit(
        self,
        weight: Tensor,
        group_size: int,
        search: RangeSearch,
        importance: Tensor | None = None,
        global_scale: float = 1.0,
    ) -> GroupParams:
        return fit_by_search(self, weight, group_size, search, importance, global_scale)

    def clip_ratios(self, search: RangeSearch) -> list[float]:
        """What a search multiplies the range with: fine steps from 1 down."""
        step = (1.0 - search.smallest) / search.steps
        return [1.0 - step * index for index in range(1, search.steps + 1)]

    def round(self, weight: Tensor, params: GroupParams, group_size: int) -> Tensor:
        return kernels.round_int(weight, group_size, params.scale, params.zero_point, self.qmin, self.qmax)

    def decode(self, codes: Tensor, params: GroupParams, group_size: int) -> Tensor:
        return kernels.decode_int(codes, group_size, params.scale, params.zero_point)

    def error(
        self,
        weight: Tensor,
        params: GroupParams,
        group_size: int,
        importance: Tensor | None = None,
        by_magnitude: bool = False,
    ) -> Tensor:
        return kernels.error_int(
            weight, group_size, params.scale, params.zero_point, self.qmin, self.qmax, importance, by_magnitude
        )
