"""Codebook grids: a code is an index into a table of values, spread over a group by one scale.

    x ≈ scale * values[code]          values within −1 .. 1, both of which occur, so the scale of a group is its absmax

The tables (NF4, FP4) are in `codebook_tables.py`.

Rounding is bitsandbytes': w · (1 / scale), the reciprocal rounded to float32 first, then the nearest value; halfway
between two, the smaller one. FP4 has two zeros: −0.0026 .. 0 becomes code 0 and what lies just above 0 becomes code 8,
as bitsandbytes has it on the CPU; both decode to 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.numerics.codebook_tables import CODEBOOKS, Codebook
from lowbit.numerics.grid import RangeSearch
from lowbit.numerics.range_search import fit_by_search, ratios_down_from
from lowbit.numerics.scales import storable_scale
from lowbit.tensors import GroupParams

__all__ = ["CODEBOOKS", "Codebook", "CodebookGrid"]

# As for minifloats, a larger scale can be better too: it moves the largest weight to a value in a denser region.
_LARGEST_RATIO = 1.5


@dataclass(frozen=True)
class CodebookGrid:
    """See `lowbit.numerics.grid.Grid`. "nested" scales are fitted as float32; `nested.py` quantizes them afterwards."""

    format: Codebook
    scale_format: str = "float32"

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
        stored_as = "float32" if self.scale_format == "nested" else self.scale_format
        scale = storable_scale(torch.maximum(-low, high), stored_as, global_scale)
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
        """What a search multiplies the range with: from 1.5 down."""
        return ratios_down_from(_LARGEST_RATIO, search)

    def round(self, weight: Tensor, params: GroupParams, group_size: int) -> Tensor:
        return kernels.round_codebook(weight, group_size, params.scale, self.format)

    def decode(self, codes: Tensor, params: GroupParams, group_size: int) -> Tensor:
        return kernels.decode_codebook(codes, group_size, params.scale, self.format)

    def error(
        self,
        weight: Tensor,
        params: GroupParams,
        group_size: int,
        importance: Tensor | None = None,
        by_magnitude: bool = False,
    ) -> Tensor:
        return kernels.error_codebook(weight, group_size, params.scale, self.format, importance, by_magnitude)
