"""What a number format cannot hold: values beyond its largest, values below its smallest step, and both in one group.

Rounding goes on with them, so they are looked for where the error of a slab gives a reason, and said.

    clipped   a value that decodes to the same number when it is twice as large, or half
    flushed   a slab of weights that all decode to zero
    crowded   a value so large that nothing is left of the others that share its scale: they decode to zero, or to
              one number where a format has minimums (Q4_K)
    empty     a slab of zeros, which a damaged or unfinished checkpoint may have in place of weights
    huge      a value, kept as it is, with which any ordinary input overflows
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from lowbit.rounding.target import Stored, Sums, Target

# Errors of this size occur only where values are in the tens of thousands, the largest numbers of half precision.
_SUSPICIOUS = 256.0
_SUSPICIOUS_WEIGHT = 65504.0**2  # Σ w² of a slab; two million ordinary weights have some thousands
_CLIPPED = 0.99  # decoded / value, above which it is rounding
_LOST = 0.9  # Σ error² / Σ w², from which nothing is left of weights
EMPTY = "are all zero in the source"
_OVERFLOWING = 2.0**113  # times an activation of 2^14 or more it is beyond float32; Gemma 4's factors of RoPE are 2^100
_OVERFLOWS = "is so large that products with it overflow"


def tells_of_extremes(note: str) -> bool:
    """Whether a note is one of `find_extreme` or `overflowing`."""
    return tells_of_loss(note) or note.endswith((EMPTY, _OVERFLOWS))


def tells_of_loss(note: str) -> bool:
    """Whether a note is of `find_extreme`, on values that a format cannot hold; zeros it can."""
    return bool(re.search(r" (became -?[\d.]|sets the scale that it shares)|: they became zero$", note))


def find_extreme(values: Tensor, rows: Stored, sums: Sums, target: Target, name: str, first_row: int) -> str | None:
    """What became of extreme values in a slab of rows from `first_row` on, in words; None for ordinary weights.

    values  [rows, K]; rows: what they were rounded to; sums: of the errors; name: of the number format
    """
    error, weight, largest_error = sums
    if weight == 0 == error:
        return empty(first_row, len(values))
    flushed = weight > 0 and error >= 0.99 * weight
    if not flushed and largest_error <= _SUSPICIOUS and weight <= _SUSPICIOUS_WEIGHT:
        return None
    decoded = target.reader(rows)(torch.arange(len(values)))
    if flushed and not bool(decoded.any()):
        return (
            f"the values of rows {first_row}..{first_row + len(values)} ({values.numel():,} weights), at most "
            f"{values.abs().max().item():.3g}, are below half of the smallest step of {name}: they became zero"
        )
    off = (values.float() - decoded if largest_error > _SUSPICIOUS else values).abs()
    row, column = divmod(int(off.argmax()), values.shape[1])
    place = f"{values[row, column].item():.6g} at [{first_row + row}, {column}]"
    lost = _crowded_out(values, decoded, row, column, target)
    clipped = _clipped(values, decoded, target)
    if bool(clipped[row, column]):
        more = int(clipped.sum()) - 1
        return (
            f"{place} became {decoded[row, column].item():.6g}, the largest that {name} holds there"
            f"{f', and {more:,} more weights are cut like it' if more else ''}"
            f"{f'; it shares its scale with {lost}' if lost else ''}"
        )
    return f"{place} sets the scale that it shares with {lost}" if lost else None


def empty(first_row: int, rows: int) -> str:
    """The note on a slab of zeros."""
    return f"the weights of rows {first_row}..{first_row + rows} {EMPTY}"


def overflowing(values: Tensor, limit: float, first_row: int, is_vector: bool) -> str | None:
    """The note on a value, kept as it is, with which any ordinary input overflows.

    values  [rows, K], finite, none of them larger than the limit
    """
    if limit < _OVERFLOWING:
        return None
    at = int(values.abs().argmax())
    row, column = divmod(at, values.shape[1])
    if abs(values[row, column].item()) < _OVERFLOWING:
        return None
    place = f"[{first_row + at}]" if is_vector else f"[{first_row + row}, {column}]"
    return f"{values[row, column].item():.6g} at {place} {_OVERFLOWS}"


def _clipped(values: Tensor, decoded: Tensor, target: Target) -> Tensor:
    """bool [rows, K]: values that decode to less, and to the same where all are twice as large (or half)."""
    largest = values.abs().max().item()
    other = values.float() * (2.0 if largest < 1e38 else 0.5)
    again = target.reader(target.encode(other)[0])(torch.arange(len(values)))
    less = (decoded != 0) & (decoded.abs() < _CLIPPED * values.abs())
    return less & ((again.abs() - decoded.abs()).abs() <= 0.01 * decoded.abs())


def _crowded_out(values: Tensor, decoded: Tensor, row: int, column: int, target: Target) -> str:
    """How many smaller weights share a scale with [row, column] and what became of them, if all are lost; else ""."""
    width = target.columns_per_fit(values.shape[1], "compensated") if target.rows_are_apart else values.shape[1]
    columns = slice(column - column % width, column - column % width + width)
    rows = slice(row, row + 1) if target.rows_are_apart else slice(None)
    group, back = values[rows, columns].double(), decoded[rows, columns].double()
    others = (group.abs() < values[row, column].abs()) & (group != 0)
    group, back = group[others], back[others]
    if not len(group) or (back - group).square().sum() < _LOST * group.square().sum():
        return ""
    return f"{len(group):,} other weights, {'of which nothing is left' if back.any() else 'which became zero'}"
