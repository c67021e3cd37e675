"""Minifloat grids: FP8 E4M3 and E5M2, FP4 E2M1, with any scale format.

    x ≈ scale * value(codes)          codes are the format's bit patterns; ties to even; saturating, never inf

The scale that covers a range is absmax / max_value. With power-of-two scales (MX) that is rounded up, so nothing
saturates; the OCP specification's rule, 2^(floor(log2 absmax) − emax), is one power of two lower for some groups and
clips up to a quarter of their range: a search ("mse") tries both and keeps the better for each group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.numerics.grid import RangeSearch
from lowbit.numerics.minifloat_formats import MinifloatFormat
from lowbit.numerics.range_search import fit_by_search, ratios_down_from
from lowbit.numerics.scales import storable_scale
from lowbit.tensors import GroupParams

# On a minifloat grid a *larger* scale can be better too: mapping the largest weight of an E2M1 group to 4 instead of 6
# closes the wide gap between 4 and 6 (Cook et al. 2025, "Four Over Six").
_LARGEST_RATIO = 1.5


@dataclass(frozen=True)
class MinifloatGrid:
    format: MinifloatFormat
    scale_format: str = "bfloat16"

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def columns_per_code(self) -> int:
        return 1

    def params_from_range(self, low: Tensor, high: Tensor, global_scale: float = 1.0) -> GroupParams:
        wanted = torch.maximum(-low, high) / self.format.max_value
        scale = storable_scale(wanted, self.scale_format, global_scale)
        return GroupParams(scale, global_scale=global_scale)

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
        """What a search multiplies the range with. A power-of-two scale has one neighbour worth trying."""
        if self.scale_format == "e8m0":
            return [0.5]
        return ratios_down_from(_LARGEST_RATIO, search)

    def round(self, weight: Tensor, params: GroupParams, group_size: int) -> Tensor:
        return kernels.round_minifloat(weight, group_size, params.scale, self.format)

    def decode(self, codes: Tensor, params: GroupParams, group_size: int) -> Tensor:
        return kernels.decode_minifloat(codes, group_size, params.scale, self.format)

    def error(
        self,
        weight: Tensor,
        params: GroupParams,
        group_size: int,
        importance: Tensor | None = None,
        by_magnitude: bool = False,
    ) -> Tensor:
        return kernels.error_minifloat(weight, group_size, params.scale, self.format, importance, by_magnitude)
