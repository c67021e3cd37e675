"""Rows of a weight while they are rounded with error feedback: columns in the order in which they are rounded.

A run is what is fitted at once: the group of a scale, a ggml block, or all columns where scales are static. For each
run in turn

    fit(w, run)     scales from w [N, K], by order, as it is by then; fitting sees the columns of a run as stored
    round(w, run)   codes and decoded weights, and what that changes in the columns that follow

Two kinds: codes of single columns, on grids and in most ggml types, and codes that stand for points of a lattice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels import feedback
from lowbit.numerics.codebook import CodebookGrid
from lowbit.numerics.codebook_tables import Codebook
from lowbit.numerics.ggml.blocks import Blocks
from lowbit.numerics.ggml.grid import IntLevels
from lowbit.numerics.integer import IntGrid
from lowbit.numerics.minifloat import MinifloatGrid
from lowbit.numerics.minifloat_formats import MinifloatFormat
from lowbit.rounding.hessian import Factor
from lowbit.rounding.rtn import Fitted
from lowbit.rounding.target import GgmlTarget, GridTarget
from lowbit.tensors import QuantizedTensor

Levels = IntLevels | MinifloatFormat | Codebook
Span = tuple[int, int, int]


@dataclass(frozen=True)
class Order:
    """How columns are rounded.

    factor   of the Hessian
    run      columns that are fitted at once, if that many are left
    weights  float32 [K] by order, or None: what squared errors count in the search of scales
    """

    factor: Factor
    run: int
    weights: Tensor | None

    def runs(self) -> list[tuple[int, int]]:
        """(begin, end) by order; the one that is stored last may be short."""
        columns, begin, found = len(self.factor.order), 0, []
        while begin < columns:
            first = int(self.factor.order[begin]) // self.run * self.run
            found.append((begin, begin + min(self.run, columns - first)))
            begin = found[-1][1]
        return found

    def as_stored(self, begin: int, end: int) -> Tensor:
        """Places, by order, of the columns of a run in the order in which they are stored."""
        return begin + self.factor.order[begin:end].argsort()

    def fit(self, target: GridTarget | GgmlTarget, w: Tensor, stored: Tensor) -> Fitted | Blocks:
        """Of the columns at `stored`, which are one run."""
        return target.fit(w.index_select(1, stored), None if self.weights is None else self.weights[stored])


class ScalarRows:
    """Rows whose codes stand for single columns.

    fitted   first column of a run → what the target's `fit` made of it
    All float32 [N, K] by order: scale, offset or None, decoded; zero_point int32 [N, K] or None; codes int8 or uint8
    """

    def __init__(self, w: Tensor, order: Order, target: GridTarget | GgmlTarget):
        self.order, self.target = order, target
        self.levels = _levels(target)
        self.scale, self.decoded = torch.empty_like(w), torch.empty_like(w)
        self.offset: Tensor | None = None
        self.zero_point: Tensor | None = None
        integers = isinstance(self.levels, IntLevels)
        self.codes = torch.empty(w.shape, dtype=torch.int8 if integers else torch.uint8, device=w.device)
        self.fitted: dict[int, Any] = {}

    def fit(self, w: Tensor, begin: int, end: int) -> None:
        """Scales of a run, from w as it is by then."""
        stored = self.order.as_stored(begin, end)
        fitted = self.order.fit(self.target, w, stored)
        self.fitted[int(self.order.factor.order[stored[0]])] = fitted
        self._set(begin, end, fitted, w)

    def _set(self, begin: int, end: int, fitted: Fitted | Blocks, w: Tensor) -> None:
        """The params of a run, column by column."""
        offset = zero_point = None
        if isinstance(fitted, Blocks):
            scale, offset, each = fitted.scale, fitted.offset, (end - begin) // fitted.scale.shape[1]
        else:
            params, each = fitted.grouped(w[:, begin:end])
            scale, zero_point = params.scale, params.zero_point
        run = self.order.factor.order[begin:end]
        group = (run - run.min()) // each
        self.scale[:, begin:end] = scale.index_select(1, group)
        if offset is not None:
            self.offset = torch.zeros_like(w) if self.offset is None else self.offset
            self.offset[:, begin:end] = offset.index_select(1, group)
        if zero_point is not None:
            self.zero_point = torch.zeros_like(w, dtype=torch.int32) if self.zero_point is None else self.zero_point
            self.zero_point[:, begin:end] = zero_point.index_select(1, group)

    def round(self, w: Tensor, span: Span, spread: Tensor | None = None, descend: bool = False) -> None:
        """Columns of `span` of w, in place; see `lowbit.kernels.feedback`."""
        spread = self.order.factor.spread if spread is None else spread
        levels, out = self.levels, (self.codes, self.decoded, descend)
        if isinstance(levels, IntLevels):
            limits = (levels.lowest, levels.highest)
            feedback.feedback_int(w, spread, span, self.scale, self.offset, self.zero_point, limits, *out)
        elif isinstance(levels, MinifloatFormat):
            feedback.feedback_minifloat(w, spread, span, self.scale, levels, *out)
        else:
            feedback.feedback_codebook(w, spread, span, self.scale, levels, *out)


class LatticeRows:
    """Rows of a ggml type that rounds `columns_per_code` columns together.

    decoded  float32 [N, K] by order; codes [N, K / columns_per_code] by order of the codes
    """

    def __init__(self, w: Tensor, order: Order, target: GridTarget | GgmlTarget):
        assert isinstance(target, GgmlTarget), "no grid of a folder has a lattice"
        self.order, self.target, self.grid = order, target, target.grid
        self.decoded = torch.empty_like(w)
        self.fitted: dict[int, Any] = {}
        self.codes = torch.empty(
            w.shape[0], w.shape[1] // self.grid.columns_per_code, dtype=torch.int32, device=w.device
        )

    def fit(self, w: Tensor, begin: int, end: int) -> None:
        """Scales of a block, from w as it is by then."""
        stored = self.order.as_stored(begin, end)
        fitted = self.order.fit(self.target, w, stored)
        assert isinstance(fitted, Blocks)
        self._here = fitted
        self._first = int(self.order.factor.order[stored[0]])
        self.fitted[self._first] = self._here

    def round(self, w: Tensor, span: Span) -> None:
        (begin, end, _), each = span, self.grid.columns_per_code
        factor = self.order.factor
        change = torch.empty_like(w[:, begin:end])
        for start in range(begin, end, each):
            now = slice(start, start + each)
            place = int(factor.order[start]) - self._first
            here = self.grid.at(self._here, place, place + each)
            codes = self.grid.round(w[:, now], here, factor.cost[now])
            self.decoded[:, now] = self.grid.decode(codes, here)
            change[:, start - begin : start - begin + each] = w[:, now] - self.decoded[:, now]
            feedback.subtract_product(
                w, change[:, start - begin : start - begin + each], factor.spread[now], start + each, end
            )
            self.codes[:, start // each] = codes[:, 0]
        feedback.subtract_product(w, change, factor.spread[begin:end], end, w.shape[1])


def _levels(target: GridTarget | GgmlTarget) -> Levels:
    if isinstance(target, GgmlTarget):
        levels = target.grid.levels
        assert levels is not None, f"{target.name} has no levels"
        return levels
    grid = target.grid
    if isinstance(grid, IntGrid):
        return IntLevels(grid.qmin, grid.qmax)
    assert isinstance(grid, MinifloatGrid | CodebookGrid)
    return grid.format


def joined(
    target: GridTarget | GgmlTarget, slabs: Sequence[ScalarRows | LatticeRows]
) -> tuple[QuantizedTensor | Tensor, Tensor]:
    """(what is stored, decoded float32 [N, K]) of all rows."""
    order = slabs[0].order.factor.order
    decoded = torch.cat([rows.decoded for rows in slabs]).index_select(1, order.argsort())
    each = target.columns_per_code
    codes = torch.cat([rows.codes for rows in slabs]).index_select(1, (order[::each] // each).argsort())
    fitted = [[rows.fitted[first] for first in sorted(rows.fitted)] for rows in slabs]
    if isinstance(target, GridTarget):
        return _join_fitted(fitted).with_codes(codes), decoded
    blocks = [target.grid.join(row) for row in fitted]
    levels = target.grid.levels
    if isinstance(levels, IntLevels) and levels.zero:
        codes = (codes.to(torch.int16) + levels.zero).to(torch.uint8)
    if isinstance(levels, IntLevels) and levels.lowest == 0:
        codes = codes.to(torch.uint8)
    slabs_of_codes = codes.split([len(rows.decoded) for rows in slabs])
    packed = [target.grid.pack(part, params) for part, params in zip(slabs_of_codes, blocks, strict=True)]
    return torch.cat(packed), decoded


def _join_fitted(fitted: list[list[Fitted]]) -> Fitted:
    """Of slabs of rows, of runs of columns."""
    first = fitted[0][0]
    if len(fitted) == len(fitted[0]) == 1:
        return first
    scale = torch.cat([torch.cat([part.scale for part in row], dim=1) for row in fitted])
    zero_point = None
    if first.zero_point is not None:
        zero_point = torch.cat([torch.cat([part.zero_point for part in row if part.zero_point is not None], dim=1)
                                for row in fitted])  # fmt: skip
    return replace(first, scale=scale, zero_point=zero_point)
