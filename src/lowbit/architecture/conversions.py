"""What transformers' own conversion of parameters does to their rows, found by converting numbers.

transformers describes the way from files to parameters as operations (`ConversionOps`), and runs their reverse when it
saves. What an operation does is not looked up here, but seen: the parameters are replaced by numbers, one for each row,
the operations run on them, and where a number comes out is where the row lies in the file.

    q_proj [4, K]  0 1 2 3   ──reverse of PermuteForRope, Chunk──►   qkv [8, K]  0 2 1 3 4 5 6 7
    k_proj [4, K]  4 5 6 7                                            └ every second row of q_proj, and so on

So an operation that transformers adds needs nothing here, as long as it moves rows whole: it may permute, cut, join,
stack, take apart and transpose. One that does more (sums, rows that are cut) leaves the parameter without parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lowbit.architecture.structure import Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Columns of a matrix of numbers, in place of its own: enough that no operation mistakes them for experts or halves.
_COLUMNS = 4
# Elements up to which rows of which nothing is left together are followed element by element (biases of experts).
_FEW = 1 << 22

Shape = tuple[int, ...]


@dataclass
class ConvertedGroup:
    """Parameters that transformers converts together.

    converter  the reversed `WeightConverter`
    key        the name that transformers gives the group, of which the stored names are made
    members    (pattern of the converter that the name matched, parameter, its shape)
    """

    converter: Any
    key: str
    members: list[tuple[str, str, Shape]] = field(default_factory=list)


class Conversions:
    """The parts of converted parameters of one model. Groups that differ in their names alone are followed once."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._known: dict[object, dict[int, list[Part]] | None] = {}

    def parts(self, group: ConvertedGroup) -> dict[str, tuple[Part, ...]]:
        """Parameter → its parts in stored tensors; nothing where their rows cannot be followed."""
        key = (id(group.converter), tuple((pattern, shape) for pattern, _, shape in group.members))
        if key not in self._known:
            self._known[key] = self._followed(group)
        found = self._known[key]
        if found is None:
            return {}
        whole_key = group.key.replace("*.", "0.")
        stems = [part.name.replace("*", "0") for parts in found.values() for part in parts]
        prefix, _, suffix = next((whole_key.partition(stem) for stem in stems if stem in whole_key), ("", "", ""))
        return {
            group.members[member][1]: tuple(replace(part, name=f"{prefix}{part.name}{suffix}") for part in parts)
            for member, parts in found.items()
        }

    def _followed(self, group: ConvertedGroup) -> dict[int, list[Part]] | None:
        shapes = [shape for _, _, shape in group.members]
        numbered = [_numbers(shapes, _COLUMNS)]
        if sum(map(math.prod, shapes)) <= _FEW:
            numbered.append(_numbers(shapes, 1))
        for columns, numbers in zip((_COLUMNS, 1), numbered, strict=False):
            try:
                stored = self._converted(group, numbers)
                placed = [
                    (name, member, *each)
                    for name, values in stored.items()
                    for member, *each in _placed(values, columns, shapes)
                ]
                return _parts(placed, shapes, [name for name in group.converter.target_patterns if "*" in name])
            except Exception:  # operations are transformers' code: what they raise on numbers is that it does not go
                continue
        return None

    def _converted(self, group: ConvertedGroup, numbers: list[Tensor]) -> dict[str, Tensor]:
        values: dict[str, Any] = {}
        for (pattern, _, _), each in zip(group.members, numbers, strict=True):
            values.setdefault(pattern, []).append(each)
        for operation in group.converter.operations:
            if getattr(operation, "check_dims", False):  # by shape, of files that have it either way: the one it turns
                operation = type(operation)(operation.dim0, operation.dim1)
            values = operation.convert(
                values,
                source_patterns=group.converter.source_patterns,
                target_patterns=group.converter.target_patterns,
                full_layer_name=group.key,
                model=self.model,
                config=self.model.config,
                missing_keys=None,
            )
        return {name: each[0] if isinstance(each, list) else each for name, each in values.items()}


@dataclass(frozen=True)
class _RowSequence:
    """Rows start, start + step, … of a parameter, at rows at, at + stride, … of a stored tensor."""

    start: int
    step: int
    rows: int
    at: int
    stride: int


def _numbers(shapes: list[Shape], columns: int) -> list[Tensor]:
    """For each shape, int64 numbers that no other has. columns 1: of every element; else of every row of a matrix,
    times `columns`, plus the number of the column, of which there are so many."""
    found, first = [], 0
    for shape in shapes:
        rows = _rows_shape(shape, columns)
        numbers = columns * torch.arange(first, first + math.prod(rows)).reshape(rows)
        if len(rows) < len(shape):
            numbers = numbers[..., None] + torch.arange(columns)
        found.append(numbers)
        first += math.prod(rows)
    return found


def _rows_shape(shape: Shape, columns: int) -> Shape:
    """Shape of the rows of a parameter: all of a vector is rows."""
    return shape[:-1] if columns > 1 and len(shape) > 1 else shape


def _placed(values: Tensor, columns: int, shapes: list[Shape]) -> Iterator[tuple[int, int | None, int, bool, Any, int]]:
    """(parameter, expert, dimension, transposed, runs; None for all of it, rows of the stored tensor) of what came out
    as one stored tensor. ValueError where rows were taken apart."""
    rows, turned = _row_numbers(values, columns)
    counts = [math.prod(_rows_shape(shape, columns)) for shape in shapes]
    ends = np.cumsum(counts)
    owners = np.searchsorted(ends, rows, side="right")
    for owner in np.unique(owners):
        shape = _rows_shape(shapes[owner], columns)
        inside = rows - (ends[owner] - counts[owner])
        if (owners == owner).all() and rows.shape == shape and (inside.ravel() == np.arange(counts[owner])).all():
            yield int(owner), None, 0, turned, None, 0
            continue
        expert, dim, index = _index(inside, owners == owner, shape)
        total = rows.shape[dim] if rows.ndim else 0
        places = np.flatnonzero(index >= 0)
        yield int(owner), expert, dim, turned, _runs(index[places], places) if rows.ndim else None, total


def _row_numbers(values: Tensor, columns: int) -> tuple[np.ndarray, bool]:
    """(numbers of the rows in a stored tensor, whether it has them as columns)."""
    if columns == 1:
        return values.numpy(), False
    if values.dim() == 1 and bool((values % columns == 0).all()):
        return values.numpy() // columns, False
    for turned in (False, True):
        each = values.transpose(-1, -2) if turned else values
        first = each[..., :1]
        if each.shape[-1] == columns and bool(
            (each == first + torch.arange(columns)).all() & (first % columns == 0).all()
        ):
            return each[..., 0].numpy() // columns, turned
    raise ValueError("rows are not whole")


def _index(rows: np.ndarray, own: np.ndarray, shape: Shape) -> tuple[int | None, int, np.ndarray]:
    """(expert, dimension, row of the parameter at each place along it; -1 where another parameter's row is).

    rows  numbers of rows of a parameter of this shape where `own`
    """
    if rows.ndim == 1 and len(shape) == 1:
        return None, 0, np.where(own, rows, -1)
    if not own.all() or len(shape) != 2:
        raise ValueError("rows of several parameters that are no matrices")
    if rows.ndim == 2:
        expert, row = np.divmod(rows, shape[1])
        if rows.shape[1] == shape[1] and (expert == expert[:, :1]).all() and (row == np.arange(shape[1])).all():
            return None, 0, expert[:, 0]
        if rows.shape[0] == shape[0] and (expert == np.arange(shape[0])[:, None]).all() and (row == row[:1]).all():
            return None, 1, row[0]
        raise ValueError("rows of several experts")
    expert, row = np.divmod(rows, shape[1]) if rows.ndim else (rows, np.zeros(1, int))
    if not (expert == expert.flat[0]).all():
        raise ValueError("rows of several experts")
    return int(expert.flat[0]), 0, row


def _runs(index: np.ndarray, places: np.ndarray) -> tuple[_RowSequence, ...]:
    """Both as arithmetic sequences; taken in the order of either, whichever gives fewer."""
    order = np.argsort(index, kind="stable")
    return min(_sequences(index, places), _sequences(index[order], places[order]), key=len)


def _sequences(index: np.ndarray, places: np.ndarray) -> tuple[_RowSequence, ...]:
    steps, strides = np.diff(index), np.diff(places)
    found, first = [], 0
    while first < len(index):
        step, stride, stop = 1, 1, first + 1
        if first < len(steps) and steps[first] > 0 and strides[first] > 0:
            step, stride = int(steps[first]), int(strides[first])
            same = (steps[first:] == step) & (strides[first:] == stride)
            stop = first + 1 + (int(np.argmin(same)) if not same.all() else len(same))
        found.append(_RowSequence(int(index[first]), step, stop - first, int(places[first]), stride))
        first = stop
    return tuple(found)


def _parts(placed: list[Any], shapes: list[Shape], patterns: list[str]) -> dict[int, list[Part]]:
    """Parameter → its parts, those of all its experts as one with "*" for their numbers in the name."""
    found: dict[int, list[Part]] = {member: [] for member in range(len(shapes))}
    experts: dict[tuple[str, int, object], dict[int, int]] = {}  # → expert → its number in the name
    for name, member, expert, dim, turned, runs, total in placed:
        if expert is None:
            found[member] += _as_parts(name, shapes[member], dim, turned, runs, total)
            continue
        pattern, number = next(
            (each, int(match[1]))
            for each in patterns
            if (match := re.fullmatch(re.escape(each).replace(r"\*", r"(\d+)"), name))
        )
        experts.setdefault((pattern, member, (turned, runs, total)), {})[expert] = number
    for (pattern, member, (turned, runs, total)), numbers in experts.items():  # type: ignore[misc]
        first = numbers[0]
        if numbers != {expert: expert + first for expert in range(shapes[member][0])}:
            raise ValueError("experts in another order")
        parts = _as_parts(pattern, shapes[member][1:], 0, turned, runs, total)
        found[member] += [replace(part, first=first) for part in parts]
    return found


def _as_parts(name: str, shape: Shape, dim: int, turned: bool, runs: Any, total: int) -> list[Part]:
    """The parts of a parameter (of one expert) in one stored tensor."""
    if runs is None:
        return [Part(name, transposed=turned)]
    first = runs[0]
    all_stored = len(runs) == 1 and (first.rows, first.at, first.stride) == (total, 0, 1)
    if all_stored and (first.start, first.step, first.rows) == (0, 1, shape[dim]):
        return [Part(name, transposed=turned)]
    if turned:
        raise ValueError("some rows of a matrix, as columns")
    if all_stored:
        return [Part(name, first.start, first.step, first.rows, dim=dim)]
    return [Part(name, run.start, run.step, run.rows, False, dim, 0, run.at, run.stride, total) for run in runs]
