"""Grids whose table of values is fitted to the weights of each row or group: k-means and logarithmic codes.

    KMeansGrid   x ≈ table[code]             2^b values of a row or group by weighted k-means (SqueezeLLM, 2306.07629);
                                             ascending, each a float16; no scale
    LogGrid      x ≈ scale · table[code]     0 and ±base^(e − E), e = 1 .. E = 2^(b−1) − 1 (Miyashita et al. 2016,
                                             arXiv 1603.01025; its logarithms of base 2 and √2 are two of the bases)

    code of LogGrid, bit b−1 → 0:   S e…    sign, then e; e = 0 is 0 whatever the sign
    base = 2^(step / 8), step 2 .. 8

A step of 8, base 2, spans six octaves with four bits; a step of 4, base √2, three, twice as finely. Each group takes
the base and the scale of the least squared error. FP4 of one sign and three exponent bits is the base 2 alone.

Rounding takes the nearest of the values scale · table, float32; halfway between two the smaller one. Tables and scales
are rounded to what a file stores before codes are chosen. An all-zero group gets the scale 1 and codes of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.kernels.tables import Codebook
from lowbit.numerics.kmeans import fit_tables
from lowbit.numerics.scalar_grids import CodebookGrid, DecodedError, grouped
from lowbit.tensors import GroupParams, RangeSearch

STEPS = tuple(range(2, 9))
_FLOAT16_MAX = 65504.0


class _FittedGrid(DecodedError):
    """What both share: codes uint8 [N, K], indices of `GroupParams.table` [N, G, 2^b]."""

    bits: int
    symmetric = True
    signs = (1.0,)

    @property
    def columns_per_code(self) -> int:
        return 1

    def round(self, weight: Tensor, params: GroupParams, group_size: int) -> Tensor:
        values, codes = ascending_values(params)
        place = torch.searchsorted((values[..., 1:] + values[..., :-1]) / 2, grouped(weight.float(), group_size))
        return _ungrouped(codes.gather(2, place), weight.shape[1]).to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams, group_size: int) -> Tensor:
        values = _values(params).gather(2, grouped(codes.to(torch.int64), group_size))
        return _ungrouped(values, codes.shape[1])


@dataclass(frozen=True)
class KMeansGrid(_FittedGrid):
    """2^bits values. `scale_format` is that of the table: of a bfloat16 model they are numbers that both 16-bit floats
    hold, so that no cast changes them."""

    bits: int
    scale_format: str = "float16"

    @property
    def name(self) -> str:
        return f"kmeans{self.bits}"

    def fit(
        self, weight: Tensor, group_size: int, search: RangeSearch, importance: Tensor | None = None,
        global_scale: float | Tensor = 1.0,
    ) -> GroupParams:  # fmt: skip
        """importance float32 [K] or [N, K]; there is no range to search."""
        rows, columns = weight.shape
        mass = (torch.ones_like(weight, dtype=torch.float32) if importance is None else
                importance.float().expand(rows, columns))  # fmt: skip
        groups, mass = (grouped(each, group_size).flatten(0, 1) for each in (weight.float(), mass))
        table = self.storable(fit_tables(groups, 1 << self.bits, mass)).reshape(rows, -1, 1 << self.bits)
        return GroupParams(torch.ones_like(table[..., 0]), table=table)

    def storable(self, values: Tensor) -> Tensor:
        """The nearest numbers that a file stores, float32; ties to even, saturating."""
        if self.scale_format == "bfloat16_in_float16":
            values = values.to(torch.bfloat16).float()
        return values.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).to(torch.float16).float()

    def params_from_range(self, low: Tensor, high: Tensor, global_scale: float | Tensor = 1.0) -> GroupParams:
        """Values evenly spaced over the range."""
        shares = torch.linspace(0, 1, 1 << self.bits, device=low.device)
        table = self.storable(low[..., None] + (high - low)[..., None] * shares)
        return GroupParams(torch.ones_like(low), table=table)

    def clip_ratios(self, search: RangeSearch) -> list[float]:
        return []


@dataclass(frozen=True)
class LogGrid(_FittedGrid):
    """0 and signed powers of a base that every group chooses among 2^(2/8) .. 2^(8/8)."""

    bits: int
    scale_format: str = "float16"

    @property
    def name(self) -> str:
        return f"log{self.bits}"

    def fit(
        self, weight: Tensor, group_size: int, search: RangeSearch, importance: Tensor | None = None,
        global_scale: float | Tensor = 1.0,
    ) -> GroupParams:  # fmt: skip
        """The best scale with every base, by the range search of codebooks; then the best base. Ties: the smaller."""
        by_magnitude = search.method == "wmse"
        best = least = step = None
        for candidate in STEPS:
            grid = CodebookGrid(log_codebook(self.bits, candidate), self.scale_format)
            scale = grid.fit(weight, group_size, search, importance).scale
            error = grid.error(weight, GroupParams(scale), group_size, importance, by_magnitude)
            if best is None or least is None or step is None:
                best, least, step = scale, error, torch.full(scale.shape, candidate, device=scale.device)
                continue
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
            step = step.masked_fill(better, candidate)
        assert best is not None
        assert step is not None
        return GroupParams(best, table=log_tables(self.bits, step))

    def params_from_range(self, low: Tensor, high: Tensor, global_scale: float | Tensor = 1.0) -> GroupParams:
        """Base 2; the largest weight is a value."""
        grid = CodebookGrid(log_codebook(self.bits, 8), self.scale_format)
        scale = grid.params_from_range(low, high).scale
        return GroupParams(scale, table=log_tables(self.bits, torch.full(scale.shape, 8, device=scale.device)))

    def clip_ratios(self, search: RangeSearch) -> list[float]:
        return CodebookGrid(log_codebook(self.bits, 8), self.scale_format).clip_ratios(search)


@lru_cache
def log_codebook(bits: int, step: int) -> Codebook:
    """The values of codes with base 2^(step / 8), float32 as the nearest to the exact powers."""
    top = (1 << (bits - 1)) - 1
    exact = [0.0, *(2.0 ** (step * (exponent - top) / 8) for exponent in range(1, top + 1))]
    magnitudes = torch.tensor(exact, dtype=torch.float64).float().tolist()
    return Codebook(f"log{bits}/{step}", (*magnitudes, *(0.0 - magnitude for magnitude in magnitudes)))


def log_tables(bits: int, step: Tensor) -> Tensor:
    """Step, an integer [N, G] of `STEPS` → float32 [N, G, 2^bits]."""
    known = torch.tensor([log_codebook(bits, each).values for each in STEPS], device=step.device)
    return known[step.long() - STEPS[0]]


def log_steps(table: Tensor) -> Tensor:
    """The inverse of `log_tables`, uint8 [N, G], from the second largest value, 2^(−step / 8)."""
    return (table[..., table.shape[-1] // 2 - 2].double().log2() * -8).round().to(torch.uint8)


def ascending_values(params: GroupParams) -> tuple[Tensor, Tensor]:
    """(scale · table in ascending order, float32 [N, G, 2^b]; the code of each, int64)."""
    return _values(params).sort(dim=2, stable=True)


def _values(params: GroupParams) -> Tensor:
    assert params.table is not None, "a grid with fitted tables"
    return params.table * params.scale[..., None]


def _ungrouped(values: Tensor, columns: int) -> Tensor:
    return values.flatten(1)[:, :columns].contiguous()
