"""Rows of a weight as a file holds them: codes, and scales in the precision that the file stores.

    x = scale · u + offset      u = value(code); offset: −scale · zero_point of grids, −dmin · m of K-quants, m of Q4_1

`Held` unpacks what a file stores, lists the numbers that can be refitted (`parts`), takes new ones, and packs again. A
part is one number per row, or two, that some columns share:

    x[:, columns] = first · direction + second · other

    grids            scale and zero point of a group
    Q4_0, IQ4_NL …   d of a block                                  Q4_1, Q5_1   d and m of a block
    K-quants         s (and m) of a sub-block, integers; d (and dmin) of a block
    i-quants         s of a sub-block, an integer of 3 or 4 bits; d of a block

`ScalePart.firsts` gives the storable numbers around a wanted one, `ScalePart.seconds` the nearest storable partner.
Scales of the whole tensor, of square blocks and nested ones stay: rows share them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels.tables import values
from lowbit.numerics.ggml.codebooks import e8m0_half, ue4m3_half
from lowbit.numerics.ggml.grid import GgmlGrid, IntLevels
from lowbit.numerics.ggml.types import LARGEST_HALF, Blocks, family, per_column
from lowbit.numerics.scalar_grids import CodebookGrid, IntGrid, MinifloatGrid
from lowbit.numerics.scales import storable_scale
from lowbit.rounding.target import GgmlTarget, GridTarget, Levels, ScaledBlocks, Stored, Target
from lowbit.tensors import Granularity, GroupParams, QuantizedTensor

Columns = slice | Tensor
Put = Callable[[Tensor, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class ScalePart:
    """Numbers, one or two per row, that can be refitted.

    columns    where they apply
    direction  float32 [N, n], what the first is multiplied with; `other` likewise, None without a second
    first, second   float32 [N], as they are now
    firsts     wanted [N] → storable numbers near it, each [N]
    seconds    (first, wanted) → the nearest storable second
    put        (rows [n], first [n], second [n]) keeps new numbers, which came from `firsts` and `seconds`
    """

    columns: Columns
    direction: Tensor
    first: Tensor
    firsts: Callable[[Tensor], list[Tensor]]
    put: Put
    other: Tensor | None = None
    second: Tensor | None = None
    seconds: Callable[[Tensor, Tensor], Tensor] | None = None


class Held(ABC):
    """Rows [N, K] of a weight.

    codes    as the format stores them, [N, K / columns_per_code]
    decoded  float32 [N, K]
    """

    codes: Tensor
    decoded: Tensor

    @property
    @abstractmethod
    def levels(self) -> Levels | None:
        """The values of codes of single columns; None for lattices."""

    @abstractmethod
    def per_column(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(scale, offset, zero point) of every column, [N, K], as `kernels.feedback` takes them."""

    @abstractmethod
    def parts(self) -> Iterator[ScalePart]:
        """What can be refitted, one after the other: a part is made when it is asked for, of what is held then."""

    @abstractmethod
    def decode(self, columns: Columns) -> Tensor:
        """The weights of some columns, bit for bit as a reader of the file decodes them."""

    @abstractmethod
    def copy(self) -> Any:
        """The same rows, to be changed apart."""

    @abstractmethod
    def take(self, other: Any, rows: Tensor) -> None:
        """The rows of another one, held for the same target, in place of these; bool [N]."""

    @abstractmethod
    def stored(self) -> Stored: ...


def hold(target: Target, stored: Stored, rows: slice) -> Held:
    """Rows of what a file stores."""
    if isinstance(stored, QuantizedTensor):
        assert isinstance(target, GridTarget)
        return HeldGrid(target, stored, rows)
    assert isinstance(target, GgmlTarget)
    blocks = stored.blocks if isinstance(stored, ScaledBlocks) else stored
    return HeldBlocks(target, blocks[rows])


def joined(parts: list[Held]) -> Stored:
    """Slabs of rows as one, in their order."""
    first, slabs = parts[0].stored(), [part.stored() for part in parts]
    if len(slabs) == 1:
        return first
    if isinstance(first, QuantizedTensor):
        zero_point = None
        if first.zero_point is not None:
            zero_point = torch.cat([slab.zero_point for slab in slabs])  # type: ignore[union-attr, arg-type]
        return replace(first, codes=torch.cat([slab.codes for slab in slabs]),  # type: ignore[union-attr]
                       scale=torch.cat([slab.scale for slab in slabs]), zero_point=zero_point)  # type: ignore[union-attr] # fmt: skip
    if isinstance(first, ScaledBlocks):
        return replace(first, blocks=torch.cat([slab.blocks for slab in slabs]))  # type: ignore[union-attr]
    return torch.cat(slabs)  # type: ignore[arg-type]


class HeldGrid(Held):
    """Rows of a grid. Groups may be of any columns (`g_idx`)."""

    def __init__(self, target: GridTarget, stored: QuantizedTensor, rows: slice):
        self.grid, self._stored = target.grid, stored
        params = stored.params()
        self.codes = stored.codes[rows].clone()
        self.scale = params.scale[rows].contiguous().clone()
        self.zero_point = None if params.zero_point is None else params.zero_point[rows].contiguous().clone()
        columns = stored.codes.shape[1]
        if stored.g_idx is not None:
            self.group_of = stored.g_idx.long()
        else:
            self.group_of = torch.arange(columns) // stored.columns_per_scale
        self.may_refit = stored.granularity in (Granularity.CHANNEL, Granularity.GROUP) and stored.nested is None
        self.decoded = self.decode(slice(None))

    @property
    def levels(self) -> Levels:
        if isinstance(self.grid, IntGrid):
            return IntLevels(self.grid.qmin, self.grid.qmax)
        assert isinstance(self.grid, MinifloatGrid | CodebookGrid)
        return self.grid.format

    def per_column(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        zero_point = None if self.zero_point is None else self.zero_point[:, self.group_of]
        return self.scale[:, self.group_of], None, zero_point

    def decode(self, columns: Columns) -> Tensor:
        groups = self.group_of[columns]
        zero_point = None if self.zero_point is None else self.zero_point[:, groups].contiguous()
        params = GroupParams(self.scale[:, groups].contiguous(), zero_point, self._stored.global_scale)
        return self.grid.decode(self.codes[:, columns].contiguous(), params, 1)

    def parts(self) -> Iterator[ScalePart]:
        if not self.may_refit:
            return
        for group in range(self.scale.shape[1]):
            columns = (self.group_of == group).nonzero()[:, 0]
            if len(columns):
                yield self._part(group, columns)

    def _part(self, group: int, columns: Tensor) -> ScalePart:
        scale = self.scale[:, group]
        raw = self.codes[:, columns]
        near = partial(self._scales_near, scale.sign())
        if not isinstance(self.grid, IntGrid):
            table = values(self.grid.format).to(raw.device)  # type: ignore[attr-defined]
            return ScalePart(columns, table[raw.long()], scale.clone(), near, self._putter(group))
        direction = raw.float()
        if self.zero_point is None:
            return ScalePart(columns, direction, scale.clone(), near, self._putter(group))
        lowest = self.grid.qmin if self.grid.lowest_zero_point is None else self.grid.lowest_zero_point

        def seconds(scales: Tensor, wanted: Tensor) -> Tensor:
            return -scales * (-wanted / scales).round().clamp(lowest, self.grid.qmax)  # type: ignore[attr-defined]

        second = -scale * self.zero_point[:, group]
        return ScalePart(columns, direction, scale.clone(), near, self._putter(group),
                    torch.ones_like(direction), second, seconds)  # fmt: skip

    def _scales_near(self, sign: Tensor, wanted: Tensor) -> list[Tensor]:
        """A scale keeps its sign; where another one is wanted NaN comes back, which gains nothing."""
        form, above = self.grid.scale_format, torch.where(wanted * sign > 0, wanted, torch.nan)  # type: ignore[attr-defined]
        nearest = storable_scale(above, form, self._stored.global_scale)
        return [nearest, nearest / 2] if form == "e8m0" else [nearest]

    def _putter(self, group: int) -> Put:
        def put(rows: Tensor, first: Tensor, second: Tensor | None) -> None:
            self.scale[rows, group] = first
            if second is not None and self.zero_point is not None:
                self.zero_point[rows, group] = (-second / first).round().to(torch.int32)

        return put

    def copy(self) -> HeldGrid:
        again = copy(self)
        again.codes, again.scale, again.decoded = self.codes.clone(), self.scale.clone(), self.decoded.clone()
        again.zero_point = None if self.zero_point is None else self.zero_point.clone()
        return again

    def take(self, other: HeldGrid, rows: Tensor) -> None:
        self.codes[rows], self.scale[rows], self.decoded[rows] = (
            other.codes[rows],
            other.scale[rows],
            other.decoded[rows],
        )
        if self.zero_point is not None and other.zero_point is not None:
            self.zero_point[rows] = other.zero_point[rows]

    def stored(self) -> QuantizedTensor:
        if not self.may_refit:
            return replace(self._stored, codes=self.codes)
        return replace(self._stored, codes=self.codes, scale=self.scale, zero_point=self.zero_point)


@dataclass(frozen=True)
class _Integers:
    """Sub-scales of a type: the key in `Blocks.stored`, the lowest and highest, and unit · (times · s + plus)."""

    key: str
    lowest: int
    highest: int
    times: float = 1.0
    plus: float = 0.0

    def factor(self, stored: Tensor) -> Tensor:
        """What multiplies d, float32."""
        return self.times * stored.float() + self.plus

    def around(self, wanted: Tensor) -> list[Tensor]:
        """The two integers around the one of a wanted factor, within the range."""
        exact = (wanted - self.plus) / self.times
        return [each.clamp(self.lowest, self.highest) for each in (exact.floor(), exact.ceil())]

    def nearest(self, wanted: Tensor) -> Tensor:
        return ((wanted - self.plus) / self.times).round().clamp(self.lowest, self.highest)


_SCALES = {
    "Q2_K": _Integers("scales", 0, 15), "Q3_K": _Integers("scales", -32, 31), "Q4_K": _Integers("scales", 0, 63),
    "Q5_K": _Integers("scales", 0, 63), "Q6_K": _Integers("scales", -128, 127),
    "IQ4_XS": _Integers("scales", 0, 63, 1.0, -32.0),
    "IQ1_S": _Integers("scale", 0, 7, 2.0, 1.0), "IQ1_M": _Integers("scale", 0, 7, 2.0, 1.0),
    "IQ2_XXS": _Integers("scale", 0, 15, 2 / 8, 1 / 8), "IQ2_XS": _Integers("scale", 0, 15, 2 / 8, 1 / 8),
    "IQ2_S": _Integers("scale", 0, 15, 2 / 8, 1 / 8), "IQ3_XXS": _Integers("scale", 0, 15, 2 / 4, 1 / 4),
    "IQ3_S": _Integers("scale", 0, 15, 2.0, 1.0),
}  # fmt: skip
_MINIMA = {name: _Integers("minima", 0, top) for name, top in (("Q2_K", 15), ("Q4_K", 63), ("Q5_K", 63))}
# Types whose one scale is no half: its codes in order, and what they stand for.
_TABLES = {
    "MXFP4": ("e", lambda: e8m0_half(torch.arange(255, dtype=torch.uint8))),
    "NVFP4": ("scales", lambda: ue4m3_half(torch.arange(127, dtype=torch.uint8))),
}


class HeldBlocks(Held):
    """Rows of a ggml type, of the weight over the scale of the matrix (`GgmlTarget.scale`, which stays)."""

    def __init__(self, target: GgmlTarget, blocks: Tensor):
        self.target, self.grid, self.kind = target, GgmlGrid(target.type_name), target.grid.kind
        self.codes, self.params = self.grid.unpack(blocks.contiguous())
        self.kept = {key: value.clone() for key, value in self.params.stored.items()}
        self._all_values: Tensor | None = None
        self.decoded = self.decode(slice(None))

    @property
    def levels(self) -> Levels | None:
        return self.grid.levels

    def per_column(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        columns = self.decoded.shape[1]
        offset = None if self.params.offset is None else per_column(self.params.offset * self.target.scale, columns)
        return per_column(self.params.scale * self.target.scale, columns), offset, None

    def at(self, start: int, stop: int) -> Blocks:
        """Params of some columns, for `GgmlGrid.round` and `decode`."""
        return self.grid.at(self.params, start, stop)

    def decode(self, columns: Columns) -> Tensor:
        """scale · value + offset, as `ggml.types.weights_of` has it."""
        assert isinstance(columns, slice)
        each, group = self.grid.columns_per_code, self.kind.group
        start, stop, _ = columns.indices(self.codes.shape[1] * each)
        value = self._values(start, stop)
        groups = slice(start // group, -(-stop // group))
        weight = per_column(self.params.scale[:, groups], stop - start) * value
        if self.params.offset is not None:
            weight = weight + per_column(self.params.offset[:, groups], stop - start)
        return weight if self.target.scale == 1 else weight * self.target.scale

    def _values(self, start: int, stop: int) -> Tensor:
        """The unscaled values of some columns."""
        if self._all_values is not None:
            return self._all_values[:, start:stop]
        each = self.grid.columns_per_code
        return family(self.kind).value(self.kind, self.codes[:, start // each : stop // each])

    def parts(self) -> Iterator[ScalePart]:
        self._all_values = self._values(0, self.decoded.shape[1])  # codes stay while scales are refitted
        try:
            yield from self._parts()
        finally:
            self._all_values = None

    def _parts(self) -> Iterator[ScalePart]:
        blocks, group = self.decoded.shape[1] // self.kind.weights, self.kind.group
        has_sub_scales = self.kind.name in _SCALES
        for block in range(blocks):
            if has_sub_scales:
                yield self._super_scale(block)
            per_block = self.kind.weights // group
            for place in range(block * per_block, (block + 1) * per_block):
                columns = slice(place * group, (place + 1) * group)
                yield self._sub_scale(block, place, columns) if has_sub_scales else self._scale(place, columns)

    def _unit(self, columns: slice) -> Tensor:
        """What the effective scale is multiplied with; of IQ1_S with the shift, which goes with the scale."""
        value = self._values(columns.start, columns.stop)
        if self.kind.name == "IQ1_S":
            shift = torch.where(self.kept["shift"][:, columns.start // self.kind.group] > 0, -0.125, 0.125)
            value = value + shift[:, None]
        return value if self.target.scale == 1 else value * self.target.scale

    def _scale(self, place: int, columns: slice) -> ScalePart:
        """The one scale of a block without sub-scales, and its minimum."""
        direction, name = self._unit(columns), self.kind.name
        if name in _TABLES:
            key, table = _TABLES[name]
            return self._of_table(place, columns, direction, key, table())
        if name == "Q1_0":  # ±d
            direction = 2 * direction - self.target.scale
        d = self.kept["d"][:, place].float()
        if "m" not in self.kept:
            return ScalePart(columns, direction, d, _halves_near, self._putter(place, "d"))
        m, ones = self.kept["m"][:, place].float(), torch.full_like(direction, self.target.scale)
        return ScalePart(columns, direction, d, _halves_near, self._putter(place, "d", "m"), ones, m,
                    lambda _, wanted: _half(wanted))  # fmt: skip

    def _of_table(self, place: int, columns: slice, direction: Tensor, key: str, table: Tensor) -> ScalePart:
        def near(wanted: Tensor) -> list[Tensor]:
            above = torch.searchsorted(table, wanted.contiguous()).clamp(1, len(table) - 1)
            return [table[above - 1], table[above]]

        def put(rows: Tensor, first: Tensor, second: Tensor | None) -> None:
            self.kept[key][rows, place] = torch.searchsorted(table, first.contiguous()).to(torch.uint8)
            self._renew()

        return ScalePart(columns, direction, table[self.kept[key][:, place].long()], near, put)

    def _sub_scale(self, block: int, place: int, columns: slice) -> ScalePart:
        """The integers of a sub-block. Their block's d may be 0; a number that is not finite gains nothing."""
        scales, minima = _SCALES[self.kind.name], _MINIMA.get(self.kind.name)
        d = self.kept["d"][:, block].float()
        first = d * scales.factor(self.kept[scales.key][:, place])

        def firsts(wanted: Tensor) -> list[Tensor]:
            return [d * scales.factor(each) for each in scales.around(wanted / d)]

        if minima is None:
            return ScalePart(columns, self._unit(columns), first, firsts, self._integers(place, d, None))
        dmin = self.kept["dmin"][:, block].float()
        second = -dmin * self.kept["minima"][:, place].float()

        def seconds(_: Tensor, wanted: Tensor) -> Tensor:
            return torch.where(dmin == 0, 0.0, -dmin * minima.nearest(-wanted / dmin))

        unit = self._unit(columns)
        return ScalePart(columns, unit, first, firsts, self._integers(place, d, dmin), torch.ones_like(unit), second,
                    seconds)  # fmt: skip

    def _super_scale(self, block: int) -> ScalePart:
        """d of a block, and dmin: the directions hold the integers of its sub-blocks."""
        scales, weights = _SCALES[self.kind.name], self.kind.weights
        columns = slice(block * weights, (block + 1) * weights)
        per_block = weights // self.kind.group
        places = slice(block * per_block, (block + 1) * per_block)
        factor = per_column(scales.factor(self.kept[scales.key][:, places]), weights)
        direction = torch.cat(
            [self._unit(slice(start, start + self.kind.group))
             for start in range(columns.start, columns.stop, self.kind.group)], dim=1
        ) * factor  # fmt: skip
        d = self.kept["d"][:, block].float()
        if "dmin" not in self.kept:
            return ScalePart(columns, direction, d, _halves_near, self._putter(block, "d"))
        other = -per_column(self.kept["minima"][:, places].float(), weights)
        return ScalePart(columns, direction, d, _halves_near, self._putter(block, "d", "dmin"), other,
                    self.kept["dmin"][:, block].float(), lambda _, wanted: _half(wanted.clamp(min=0)))  # fmt: skip

    def _putter(self, place: int, key: str, other: str | None = None) -> Put:
        def put(rows: Tensor, first: Tensor, second: Tensor | None) -> None:
            self.kept[key][rows, place] = first.half()
            if other is not None and second is not None:
                self.kept[other][rows, place] = second.half()
            self._renew()

        return put

    def _integers(self, place: int, d: Tensor, dmin: Tensor | None) -> Put:
        scales = _SCALES[self.kind.name]

        def put(rows: Tensor, first: Tensor, second: Tensor | None) -> None:
            held = self.kept[scales.key]
            held[rows, place] = scales.nearest(first / d[rows]).to(held.dtype)
            if dmin is not None and second is not None:
                least = dmin[rows]
                integers = torch.where(least == 0, self.kept["minima"][rows, place].float(), (-second / least).round())
                self.kept["minima"][rows, place] = integers.to(torch.int8)
            self._renew()

        return put

    def _renew(self) -> None:
        """The effective scales and offsets of what is held now, as the decoder computes them."""
        scale, offset = effective(self.kind.name, self.kept)
        self.params = replace(self.params, scale=scale, offset=offset)

    def copy(self) -> HeldBlocks:
        again = copy(self)
        again.codes, again.decoded = self.codes.clone(), self.decoded.clone()
        again.kept = {key: values_now.clone() for key, values_now in self.kept.items()}
        return again

    def take(self, other: HeldBlocks, rows: Tensor) -> None:
        self.codes[rows], self.decoded[rows] = other.codes[rows], other.decoded[rows]
        for key, values_now in self.kept.items():
            values_now[rows] = other.kept[key][rows]
        self._renew()

    def stored(self) -> Tensor | ScaledBlocks:
        blocks = self.grid.pack(self.codes, replace(self.params, stored=self.kept))
        return ScaledBlocks(blocks, self.target.scale) if self.target.scaled else blocks


def effective(name: str, held: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """(scale, offset) of sub-blocks, float32 [N, G], of what a block stores: the same products as the decoder's."""
    if name in _TABLES:
        key, table = _TABLES[name]
        return table()[held[key].long()], None
    d = held["d"].float()
    if name not in _SCALES:
        if name == "Q1_0":
            return 2 * d, -d
        return d, held["m"].float() if "m" in held else None
    integers = _SCALES[name].factor(held[_SCALES[name].key])
    scale = per_column(d, integers.shape[1]) * integers
    if name == "IQ1_S":
        return scale, scale * torch.where(held["shift"] > 0, -0.125, 0.125)
    if "dmin" not in held:
        return scale, None
    minima = held["minima"].float()
    return scale, -(per_column(held["dmin"].float(), minima.shape[1]) * minima)


def _half(wanted: Tensor) -> Tensor:
    return wanted.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()


def _halves_near(wanted: Tensor) -> list[Tensor]:
    """The nearest half. One that rounds to 0 would end its block; it comes back as NaN, which gains nothing."""
    half = _half(wanted)
    return [torch.where(half == 0, torch.nan, half)]
