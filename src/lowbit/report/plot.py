"""Two pictures: the error of every quantized tensor by block, or of several models the mean of each block; and the
weights of one tensor before and after rounding.

Pictures are plain SVG whose coordinates are percentages, so they fit any width without scaling their text, print, and
need no JavaScript; report.js adds pointing, keys and search by reading `data-t`, the number of the tensor's table row.
Within a block the roles stand side by side; a thin line per role joins the block means. Roles differ by marker shape
and by colour. Tensors outside the blocks get a column of their own; tensors of zero error sit on the floor.

The weights of a tensor are two histograms on one axis; report.js shows any tensor's. What the page holds of each tensor
is what the report holds, 2 · 63 counts in base64, in the attribute `data-h` of its row in the tensor table: "reach
values rows source decoded". The tensor of largest error is drawn here, so that the picture is there without JavaScript,
too. Heights are square roots of counts, so that tails can be seen.
"""

from __future__ import annotations

import base64
import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lowbit.report.axes import Axis, columns, linear
from lowbit.report.schema import TensorEntry
from lowbit.report.units import DASH, MINUS, decibel, decibel_text, number, percent, shape_text, significant
from lowbit.rounding.histogram import BINS, WeightHistogram

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


NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class WeightsFigure:
    """The tensor that is drawn first: its table row, paths in a box of BINS by 100, ticks, facts as report.js has them.

    decoded  None if the tensor was left alone
    """

    row: int
    name: str
    words: str
    source: str
    decoded: str | None
    ticks: tuple[str, ...]
    facts: list[tuple[str, str]]


def histogram_data(histogram: WeightHistogram) -> str:
    """The attribute `data-h` of a table row."""
    return f"{histogram.reach:.6g} {histogram.values} {histogram.rows} {histogram.source} {histogram.decoded or ''}"


def weights_figure(tensors: Sequence[TensorEntry], recorded: frozenset[str] = frozenset()) -> WeightsFigure | None:
    """None if no tensor has a histogram.

    recorded  names of the inputs of which there are activations below
    """
    shown = [(row, tensor, tensor.histogram) for row, tensor in enumerate(tensors) if tensor.histogram is not None]
    if not shown:
        return None
    row, tensor, histogram = max(shown, key=lambda entry: entry[1].relative_error or -1.0)
    error, reach = tensor.relative_error, histogram.reach
    share = percent(histogram.values / max(math.prod(tensor.shape), 1))
    facts = [
        ("Error", DASH if error is None else f"{decibel_text(error)} dB" if error else "exact"),
        ("Scheme", tensor.scheme or "not quantized"),
        ("Bits per weight", number(tensor.bits_per_weight, 2)),
        ("Shape", shape_text(tensor.shape)),
        ("Sample", f"{histogram.values:,} weights in {histogram.rows:,} rows, {share}"),
    ]
    if recorded:
        facts.append(("Input", tensor.reads if tensor.reads in recorded and tensor.reads else NOT_RECORDED))
    both = "before and after rounding" if histogram.decoded else "as stored"
    words = f"Histogram of the weights of {tensor.name}, {both}, from {MINUS}{reach:.3g} to {reach:.3g}"
    outer, half = significant(reach), significant(reach / 2)
    decoded = outline(histogram.decoded) if histogram.decoded else None
    ticks = (f"{MINUS}{outer}", f"{MINUS}{half}", "0", half, outer)
    return WeightsFigure(row, tensor.name, words, outline(histogram.source), decoded, ticks, facts)


def bins_of(counts: str) -> tuple[float, ...]:
    """Shares of the largest count, BINS of them."""
    return tuple(count / 65535 for count in struct.unpack(f"<{BINS}H", base64.b64decode(counts)))


def outline(counts: str) -> str:
    """SVG path of the steps, in a box of BINS by 100: y is 100 less the square root of the share."""
    steps = (f"V{100 - 96 * share**0.5:.1f}H{column + 1}" for column, share in enumerate(bins_of(counts)))
    return "M0 100" + "".join(steps) + "V100"
