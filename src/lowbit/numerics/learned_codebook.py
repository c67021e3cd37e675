"""A codebook of its own for every row (SqueezeLLM's non-uniform grid, arXiv 2306.07629).

    x = table[row, code]          2^b float16 values per row, ascending; no scale, no zero point

Bits per weight: b + 16 · 2^b / K, so 4.444 for four bits and K = 576, 4.063 for K = 4096. Rounding takes the nearest
value of the row, halfway between two the smaller one. `rounding/kmeans.py` learns the tables.

As a `Grid`, the tables take the place of what `fit` would find: params are scales of 1, one for each row and group, and
what is given to `round` and `decode` has all rows of the table, whatever slice of the columns it is cut to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import ShapeError
from lowbit.numerics.grid import RangeSearch
from lowbit.tensors import GroupParams


@dataclass(frozen=True, eq=False)
class LearnedCodebookGrid:
    """table  float32 [N, 2^b], each row ascending, float16 values"""

    table: Tensor
    scale_format: str = "float32"

    def __post_init__(self):
        rows, count = self.table.shape
        if count < 2 or count & (count - 1) or count > 256:
            raise ShapeError(f"a codebook has 2, 4, … or 256 values; this table of {rows} rows has {count}",
                             "ask for 1 to 8 bits")  # fmt: skip

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LearnedCodebookGrid) and torch.equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash((self.name, tuple(self.table.shape)))

    @property
    def name(self) -> str:
        return f"lut{self.bits}"

    @property
    def bits(self) -> int:
        return self.table.shape[1].bit_length() - 1

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def columns_per_code(self) -> int:
        return 1

    def bits_per_weight(self, columns: int) -> float:
        """Of a row of K = `columns` weights, its table included."""
        return self.bits + 16.0 * self.table.shape[1] / columns

    def params_from_range(self, low: Tensor, high: Tensor, global_scale: float = 1.0) -> GroupParams:
        """Scales of 1: the table is in the units of the weights, whatever their range."""
        return GroupParams(torch.ones_like(low, dtype=torch.float32))

    def fit(
        self,
        weight: Tensor,
        group_size: int,
        search: RangeSearch,
        importance: Tensor | None = None,
        global_scale: float = 1.0,
    ) -> GroupParams:
        """Scales of 1, [N, G]."""
        rows, columns = weight.shape
        return GroupParams(torch.ones(rows, -(-columns // group_size), device=weight.device))

    def clip_ratios(self, search: RangeSearch) -> list[float]:
        """None: there is no range to shrink."""
        return []

    def round(self, weight: Tensor, params: GroupParams, group_size: int) -> Tensor:
        """Codes uint8 [N, k] of any k columns of all N rows."""
        table = self._table_for(weight)
        halfway = (table[:, 1:] + table[:, :-1]) / 2
        return torch.searchsorted(halfway, weight.float().contiguous()).to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams, group_size: int) -> Tensor:
        return self._table_for(codes).gather(1, codes.long())

    def error(
        self,
        weight: Tensor,
        params: GroupParams,
        group_size: int,
        importance: Tensor | None = None,
        by_magnitude: bool = False,
    ) -> Tensor:
        wanted = weight.float()
        error = (wanted - self.decode(self.round(weight, params, group_size), params, group_size)).square()
        if importance is not None:
            error = error * importance
        if by_magnitude:
            error = error * wanted.abs()
        error = torch.nn.functional.pad(error, (0, -error.shape[1] % group_size))
        return error.reshape(len(error), -1, group_size).sum(-1)

    def _table_for(self, matrix: Tensor) -> Tensor:
        if len(matrix) != len(self.table):
            raise ShapeError(f"{len(matrix)} rows for a table of codebooks of {len(self.table)} rows")
        return self.table.to(matrix.device)
