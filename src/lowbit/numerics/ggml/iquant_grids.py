"""The vector codebooks ("grids") of the i-quants, from the gguf package.

A grid is a list of points of 8 or 4 columns whose coordinates come from a small alphabet; a code names one of them:

    IQ1_S, IQ1_M     2048 points of −1, 0, 1                  8 columns
    IQ2_XXS          256 points of 8, 25, 43                  8
    IQ2_XS, IQ2_S    512, 1024 points of 8, 25, 43            8
    IQ3_XXS          256 points of 4, 12, 20, …, 52, 62       4
    IQ3_S            512 points of 1, 3, …, 15                4

The compiled core has no copy: it gets a grid from here when a type is first used, and makes the same index of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from gguf import quants
from torch import Tensor

from lowbit.numerics.ggml.types import GgmlType

if TYPE_CHECKING:
    from lowbit.kernels._core import Isa


@cache
def grid(type_name: str) -> Tensor:
    """int8 [points, columns] of an i-quant."""
    codec = getattr(quants, type_name)
    codec.init_grid()
    return torch.from_numpy(codec.grid.reshape(codec.grid_shape)).to(torch.int8)


_handed_over: set[str] = set()


def hand_over(core: Isa, kind: GgmlType) -> None:
    """Gives the grid of an i-quant to the compiled core; again and from any thread does no harm."""
    if kind.name not in _handed_over:
        core.set_ggml_grid(kind.number, grid(kind.name))
        _handed_over.add(kind.name)


@dataclass(frozen=True)
class GridIndex:
    """A grid, ready for `iquant_search.nearest_points`.

    A point is two halves; a half of n columns is pattern Σ level[i] · levels^i, one of levels^n.

    levels   float32 [L], ascending
    first    int64 [A]       patterns of first halves, those with most second halves first
    second   int64 [A, most] patterns that complete them to a point, ascending; the last repeats
    entry    int32 [patterns, patterns] → number of the point, −1 where there is none
    """

    levels: Tensor
    first: Tensor
    second: Tensor
    entry: Tensor


@cache
def index_of(type_name: str) -> GridIndex:
    """The index of an i-quant's grid."""
    points = grid(type_name)
    levels = points.unique()
    half = points.shape[1] // 2
    digits = torch.searchsorted(levels, points).reshape(len(points), 2, half)
    patterns = (digits * len(levels) ** torch.arange(half)).sum(dim=2)
    entry = torch.full((len(levels) ** half,) * 2, -1, dtype=torch.int32)
    entry[patterns[:, 0], patterns[:, 1]] = torch.arange(len(points), dtype=torch.int32)
    second = [row.nonzero()[:, 0] for row in entry >= 0]
    first = sorted((a for a in range(len(second)) if len(second[a])), key=lambda a: -len(second[a]))
    most = len(second[first[0]])
    padded = torch.stack([torch.cat([second[a], second[a][-1:].expand(most - len(second[a]))]) for a in first])
    return GridIndex(levels.to(torch.float32), torch.tensor(first), padded, entry)
