"""The error of every quantized tensor by transformer block, and of several models the mean of each block.

Pictures are plain SVG whose coordinates are percentages, so they fit any width without scaling their text, print, and
need no JavaScript; report.js adds pointing, keys and search by reading `data-t`, the number of the tensor's table row.
Within a block the roles stand side by side; a thin line per role joins the block means. Roles differ by marker shape
and by colour. Tensors outside the blocks get a column of their own; tensors of zero error sit on the floor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lowbit.report.axes import Axis, columns, linear
from lowbit.report.schema import TensorEntry
from lowbit.report.units import decibel, number

COLOURS = 8
# Drawn around the origin, about 8 CSS pixels across and of about equal ink.
MARKERS = (
    "M-3.8 0A3.8 3.8 0 1 1 3.8 0A3.8 3.8 0 1 1-3.8 0Z",  # circle
    "M-3.4-3.4H3.4V3.4H-3.4Z",  # square
    "M0-4.4L4.2 3.2H-4.2Z",  # triangle
    "M0 4.4L4.2-3.2H-4.2Z",  # triangle, point down
    "M0-4.8L4.8 0L0 4.8L-4.8 0Z",  # diamond
    "M-1.5-4.4H1.5V-1.5H4.4V1.5H1.5V4.4H-1.5V1.5H-4.4V-1.5H-1.5Z",  # plus
    "M-3-4.6L0-1.6L3-4.6L4.6-3L1.6 0L4.6 3L3 4.6L0 1.6L-3 4.6L-4.6 3L-1.6 0L-4.6-3Z",  # cross
    "M0-5L1.3-1.7L4.8-1.5L2.1.7L3 4.1L0 2.2L-3 4.1L-2.1.7L-4.8-1.5L-1.3-1.7Z",  # star
    "M-2.2-4H2.2L4.4 0L2.2 4H-2.2L-4.4 0Z",  # hexagon
)
USUAL_ROLES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embedding", "lm_head",
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd", "output",
)  # fmt: skip
MOST_DECIBELS = 60  # smaller errors are drawn at the bottom


def order_roles(roles: Iterable[str]) -> list[str]:
    """Each role once: the usual ones in the order of the forward pass, then the others by name."""
    distinct = set(roles)
    return [role for role in USUAL_ROLES if role in distinct] + sorted(distinct.difference(USUAL_ROLES))


@dataclass(frozen=True)
class Frame:
    """What surrounds the points: (percent from the top, decibels) of each line, (percent from the left, block)."""

    y: tuple[tuple[float, str], ...]
    x: tuple[tuple[float, str], ...]
    columns: int


@dataclass(frozen=True)
class PlotPoint:
    """x, y in percent; style: position of its role, which chooses marker and colour; row: of the tensor table"""

    x: float
    y: float
    style: int
    row: int


@dataclass(frozen=True)
class ErrorPlot:
    """lines: for each role the points of a polyline in a box of 100 by 100"""

    frame: Frame
    roles: list[str]
    points: list[PlotPoint]
    lines: list[str]


def error_plot(tensors: Sequence[TensorEntry]) -> ErrorPlot | None:
    """None if no tensor has a measured error."""
    measured = [(row, tensor) for row, tensor in enumerate(tensors) if tensor.relative_error is not None]
    if not measured:
        return None
    roles = order_roles(tensor.role for _, tensor in measured)
    blocks = sorted({tensor.block for _, tensor in measured if tensor.block is not None})
    outside = len(blocks)  # the column of tensors outside the blocks
    count = outside + any(tensor.block is None for _, tensor in measured)
    axis = _decibel_axis([decibel(tensor.relative_error or 0.0) for _, tensor in measured])
    column_of, style_of = {b: i for i, b in enumerate(blocks)}, {role: i for i, role in enumerate(roles)}
    points, heights = [], defaultdict[tuple[int, int], list[float]](list)
    for row, tensor in measured:
        style, column = style_of[tensor.role], outside if tensor.block is None else column_of[tensor.block]
        y = axis.down(decibel(tensor.relative_error or 0.0))
        points.append(PlotPoint(_side_by_side(column, style, len(roles), count), y, style, row))
        heights[style, column].append(y)
    lines = [
        " ".join(
            f"{_side_by_side(column, style, len(roles), count):.2f},{sum(ys) / len(ys):.2f}"
            for (of, column), ys in sorted(heights.items())
            if of == style
        )
        for style in range(len(roles))
    ]
    names = columns([str(block) for block in blocks], 16) if blocks else ()
    names = tuple((x * outside / count, name) for x, name in names)
    if count > outside:
        names += ((100 * (outside + 0.5) / count, "other"),)
    return ErrorPlot(_frame(axis, names, count), roles, points, lines)


def _side_by_side(column: int, style: int, roles: int, columns: int) -> float:
    """Percent from the left: roles side by side in the middle 80 % of their block's column."""
    return 100 * (column + 0.1 + 0.8 * (style + 0.5) / roles) / columns


def _decibel_axis(decibels: Sequence[float]) -> Axis:
    """At most eight lines on round numbers."""
    finite = [value for value in decibels if math.isfinite(value)] or [-20.0]
    return linear([max(value, max(finite) - MOST_DECIBELS) for value in finite], 7)


def _frame(axis: Axis, names: tuple[tuple[float, str], ...], count: int) -> Frame:
    return Frame(tuple((axis.down(tick), f"{number(tick, 0)} dB") for tick in axis.ticks), names, count)


@dataclass(frozen=True)
class Curve:
    """One model: its line, in a box of 100 by 100, and (percent, percent, words) of each block's marker."""

    label: str
    line: str
    points: list[tuple[float, float, str]]


@dataclass(frozen=True)
class ErrorCurves:
    frame: Frame
    curves: list[Curve]
    words: str


def error_curves(models: Mapping[str, Sequence[TensorEntry]]) -> ErrorCurves | None:
    """Mean relative error of the weights of each block, in decibels, one line per model; None if none is known."""
    curves = {label: errors for label, tensors in models.items() if (errors := block_errors(tensors))}
    values = [decibel(error) for errors in curves.values() for error in errors.values() if error > 0]
    if not values:
        return None
    axis = linear(values, 7)
    blocks = sorted({block for errors in curves.values() for block in errors})
    x_of = {block: 100 * (i + 0.5) / len(blocks) for i, block in enumerate(blocks)}
    drawn, words = [], []
    for label, errors in curves.items():
        points = [(x_of[block], axis.down(decibel(error)), f"{label}, block {block}: {number(decibel(error), 1)} dB")
                  for block, error in sorted(errors.items())]  # fmt: skip
        drawn.append(Curve(label, " ".join(f"{x:.2f},{y:.2f}" for x, y, _ in points), points))
        least, most = (number(decibel(end(errors.values())), 1) for end in (min, max))
        words.append(f"{label} {least} to {most} dB")
    return ErrorCurves(_frame(axis, columns([str(b) for b in blocks], 16), len(blocks)), drawn, "; ".join(words))


def block_errors(tensors: Sequence[TensorEntry]) -> dict[int, float]:
    """Block → mean relative error of its quantized tensors, by number of weights."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for tensor in tensors:
        if tensor.block is not None and tensor.relative_error is not None:
            weights = math.prod(tensor.shape)
            sums[tensor.block][0] += weights * tensor.relative_error
            sums[tensor.block][1] += weights
    return {block: error / weights for block, (error, weights) in sums.items() if weights}
