"""What a number format cannot hold: values beyond its largest, values below its smallest step, and both in one group.

Rounding goes on with them, so they are looked for where the error of a slab gives a reason, and said.

    clipped   a value that decodes to the same number when it is twice as large, or half
    flushed   a slab of weights that all decode to zero
    crowded   a value so large that all others that share its scale decode to zero
    empty     a slab of zeros, which a damaged or unfinished checkpoint may have in place of weights
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from lowbit.rounding.target import Stored, Sums, Target

# Errors of this size occur only where values are in the tens of thousands, the largest numbers of half precision.
_SUSPICIOUS = 256.0
_SUSPICIOUS_WEIGHT = 65504.0**2  # Σ w² of a slab; two million ordinary weights have some thousands
_EMPTY = "are all zero in the source"


def tells_of_extremes(note: str) -> bool:
    """Whether a note is one of `find_extreme`."""
    return tells_of_loss(note) or note.endswith(_EMPTY)


def tells_of_loss(note: str) -> bool:
    """Whether a note is of `find_extreme`, on values that a format cannot hold; zeros it can."""
    return bool(re.search(r" (became [\d.]|sets the scale that it shares)|: they became zero$", note))


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
            f"the values of rows {first_row}..{first_row + len(values)}, at most {values.abs().max().item():.3g}, are "
            f"below half of the smallest step of {name}: they became zero"
        )
    off = (values.float() - decoded if largest_error > _SUSPICIOUS else values).abs()
    row, column = divmod(int(off.argmax()), values.shape[1])
    value, became = values[row, column].item(), decoded[row, column].item()
    other = values.float().clone()
    other[row, column] *= 2 if math.isfinite(value * 2) and abs(value) < 1e38 else 0.5
    again = target.reader(target.encode(other)[0])(torch.tensor([row]))[0, column].item()
    if abs(became) < abs(value) and abs(abs(again) - abs(became)) <= 0.01 * abs(became):
        return f"{value:.6g} at [{first_row + row}, {column}] became {became:.6g}, the largest that {name} holds there"
    lost = _crowded_out(values, decoded, row, column, target)
    if lost:
        return (
            f"{value:.6g} at [{first_row + row}, {column}] sets the scale that it shares with {lost} other weights, "
            f"which became zero; --ignore keeps the tensor in 16 bits"
        )
    return None


def empty(first_row: int, rows: int) -> str:
    """The note on a slab of zeros."""
    return f"the weights of rows {first_row}..{first_row + rows} {_EMPTY}"


def _crowded_out(values: Tensor, decoded: Tensor, row: int, column: int, target: Target) -> int:
    """How many weights other than 0 share a scale with [row, column], if all of them decode to zero; else 0."""
    width = target.columns_per_fit(values.shape[1], "compensated") if target.rows_are_apart else values.shape[1]
    columns = slice(column - column % width, column - column % width + width)
    rows = slice(row, row + 1) if target.rows_are_apart else slice(None)
    others = values[rows, columns].abs() < values[row, column].abs()
    others &= values[rows, columns] != 0
    return int(others.sum()) if not bool((decoded[rows, columns] != 0)[others].any()) else 0
