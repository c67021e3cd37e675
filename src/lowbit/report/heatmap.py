"""Heat maps: one cell per transformer block (across) and role (down), the darker the larger; and strips of activations.

Percent across and CSS pixels down: it fits any width, prints, and needs no JavaScript. Where a role has several tensors
in a block (experts) the cell shows the worst. Cells of nothing measured stay empty.

    errors         colour by log(error), from that of the 20th part of least error, or FAITHFUL where that is more, to
                   the largest of the map, but over LEAST_DECIBELS at least: a step of colour is 1 dB or more, so the
                   2 dB by which tensors of a sound model differ stay pale, and so does what is as good as exact
    contributions  colour by value, from 0 to the largest, but to LEAST_NATS at least, under which the verdict calls
                   models practically the same; rows of nothing above 0 are left out and named
    activations    a strip per recorded input: log2 of the root mean square of a channel across, one bin per quarter of
                   a doubling; shade by the square root of the number of channels

A channel far to the right of the others is an outlier: rounding activations, and the columns of the weight behind it,
cost most there. Channels that were never anything but 0 are not drawn.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lowbit.calibrate.summary import InputSummary
from lowbit.report.axes import Axis, columns
from lowbit.report.diagnosis import Contribution
from lowbit.report.plot import order_roles
from lowbit.report.schema import Report, TensorEntry
from lowbit.report.units import NBSP, decibel_text, plural, significant

STEPS = 9
FAITHFUL = 1e-3  # −30 dB; errors below it have the palest colour
LEAST_DECIBELS = 9
LEAST_NATS = 0.005
ROW, STRIP = 22, 15  # CSS pixels
PER_DOUBLING = 4
MOST_BINS = 160


@dataclass(frozen=True)
class Cell:
    """One tensor's value; `row` is that of the tensor table, None if it stands for none."""

    block: int
    role: str
    value: float
    row: int | None = None


@dataclass(frozen=True)
class Shaded:
    """A cell as it is drawn: percent from the left, pixels from the top, step of colour, words."""

    x: float
    y: int
    step: int
    words: str
    row: int | None = None


@dataclass(frozen=True)
class HeatMap:
    """least, most  values at the ends of the colour scale
    left_out        rows in which nothing is above 0
    ticks           (percent from the left, block)
    """

    identity: str
    title: str
    words: str
    least: str
    most: str
    roles: list[str]
    columns: int
    cells: list[Shaded]
    ticks: tuple[tuple[float, str], ...]
    left_out: list[str]


def heat_map(
    identity: str, title: str, cells: Iterable[Cell], say: Callable[[float], str], logarithmic: bool = True
) -> HeatMap | None:
    """None without cells; say: formats a value for legend and titles."""
    worst: dict[tuple[int, str], Cell] = {}
    for cell in cells:
        place = (cell.block, cell.role)
        if place not in worst or cell.value > worst[place].value:
            worst[place] = cell
    blocks, empty = sorted({block for block, _ in worst}), list[str]()
    if not logarithmic:
        seen = {cell.role for cell in worst.values() if cell.value > 0}
        empty = [role for role in order_roles(role for _, role in worst) if role not in seen]
        worst = {place: cell for place, cell in worst.items() if cell.role in seen}
    if not worst:
        return None
    roles = order_roles(role for _, role in worst)
    axis = _colours([cell.value for cell in worst.values()], logarithmic)
    largest = max(worst.values(), key=lambda cell: cell.value)
    column_of, row_of = {b: i for i, b in enumerate(blocks)}, {role: i for i, role in enumerate(roles)}
    shaded = [
        Shaded(
            100 * column_of[cell.block] / len(blocks),
            ROW * row_of[cell.role],
            0 if cell.value <= axis.low else min(STEPS - 1, int(axis.share(cell.value) * STEPS)),
            f"block {cell.block}, {cell.role}: {say(cell.value)}",
            cell.row,
        )
        for cell in worst.values()
    ]
    least = f"{say(axis.low)} or less" if min(cell.value for cell in worst.values()) < axis.low else say(axis.low)
    counts = f"{plural(len(worst), 'cell')}, {plural(len(roles), 'role')} by {plural(len(blocks), 'block')}"
    most = f"largest in block {largest.block}, {largest.role}: {say(largest.value)}"
    words = f"{title}: {counts}, colours from {say(axis.low)} to {say(axis.high)}; {most}"
    ticks = columns([str(block) for block in blocks], 18)
    return HeatMap(identity, title, words, least, say(axis.high), roles, len(blocks), shaded, ticks, empty)


def _colours(values: Sequence[float], logarithmic: bool) -> Axis:
    """Values of the palest and the darkest colour."""
    if not logarithmic:
        return Axis(0.0, max(*values, LEAST_NATS), ())
    positive = sorted(value for value in values if value > 0) or [0.0]
    low = max(positive[len(positive) // 20], FAITHFUL)
    return Axis(low, max(positive[-1], low * 10 ** (LEAST_DECIBELS / 10)), (), log=True)


def error_maps(tensors: Sequence[TensorEntry]) -> list[HeatMap]:
    """Error of the weights, and of the outputs where a text was run."""

    def say(error: float) -> str:
        return "exact" if error == 0 else f"{decibel_text(error)}{NBSP}dB"

    inside = [(row, tensor.block, tensor) for row, tensor in enumerate(tensors) if tensor.block is not None]
    weights = [Cell(block, tensor.role, tensor.relative_error, row) for row, block, tensor in inside
               if tensor.relative_error is not None]  # fmt: skip
    outputs = [Cell(block, tensor.role, tensor.layer_error, row) for row, block, tensor in inside
               if tensor.layer_error is not None]  # fmt: skip
    maps = (
        heat_map("heat-weights", "Weights: ‖W − Ŵ‖² ∕ ‖W‖²", weights, say),
        heat_map("heat-outputs", "Outputs, on the calibration text: tr(ΔW H ΔWᵀ) ∕ tr(W H Wᵀ)", outputs, say),
    )
    return [each for each in maps if each is not None]


def sensitivity(contributions: Sequence[Contribution], tensors: Sequence[TensorEntry]) -> HeatMap | None:
    """Reduction of the KLD by restoring, by block and set of linears; values within the noise have the colour of 0."""
    row_of = {tensor.name: row for row, tensor in enumerate(tensors)}
    cells = [Cell(each.block, "whole block" if each.level == "block" else each.role,
                  each.kld if each.significant else 0.0, row_of.get(each.tensor or ""))
             for each in contributions
             if each.block is not None and each.level in ("block", "set", "tensor")]  # fmt: skip
    title = "Sensitivity: KLD that giving back the source's weights takes off"
    return heat_map("heat-sensitivity", title, cells, lambda kld: f"{significant(kld, 2) if kld > 0 else 0}{NBSP}nats",
                    logarithmic=False)  # fmt: skip


@dataclass(frozen=True)
class Strips:
    """names: (short, whole) of each input, one line each; ticks: (percent from the left, root mean square)"""

    names: list[tuple[str, str]]
    cells: list[Shaded]
    ticks: list[tuple[float, str]]
    columns: int
    tokens: int


def activation_strips(inputs: Sequence[InputSummary]) -> Strips | None:
    """The strips, those of one role together; None if nothing was recorded."""
    ordered = sorted(inputs, key=lambda record: (record.name.rpartition(".")[2], record.block or 0))
    counted = [(record, bins) for record in ordered if (bins := channel_bins(record))]
    if not counted:
        return None
    used = [position for _, bins in counted for position in bins]
    last = max(used)
    first = max(min(used), last - MOST_BINS + 1)  # weaker channels go into the first bin
    count = last - first + 1
    cells = []
    for line, (record, bins) in enumerate(counted):
        inside = Counter[int]()
        for position, channels in bins.items():
            inside[max(position, first)] += channels
        most = max(inside.values())
        for position, channels in sorted(inside.items()):
            words = f"{record.name}: {plural(channels, 'channel')} at {_strength(position, 3)}"
            step = min(STEPS - 1, int((channels / most) ** 0.5 * STEPS))
            cells.append(Shaded(100 * (position - first) / count, line * STRIP, step, words))
    step = next(step for step in (4, 8, 16, 32) if count / step <= 12)
    ticks = [(100 * (position - first + 0.5) / count, _strength(position, 2))
             for position in range(first, last + 1) if position % step == 0]  # fmt: skip
    names = [(record.name.removeprefix("model.layers."), record.name) for record, _ in counted]
    return Strips(names, cells, ticks, count, max(record.tokens for record, _ in counted))


def _strength(position: int, digits: int) -> str:
    return significant(2.0 ** (position / PER_DOUBLING), digits)


def recorded_inputs(report: Report) -> frozenset[str]:
    """Names of the inputs that have a strip."""
    calibration = report.settings.calibration
    return frozenset() if calibration is None else frozenset(record.name for record in calibration.inputs)


def channel_bins(record: InputSummary) -> Counter[int]:
    """Bin of log2 rms, in quarters of a doubling → channels; empty where the codes are not what they should be."""
    try:
        counts = Counter(base64.b64decode(record.codes, validate=True))
    except (binascii.Error, ValueError):
        return Counter()
    bins = Counter[int]()
    for code, count in counts.items():
        level = (record.low + record.step * (code - 1)) / 2 * PER_DOUBLING
        if code and math.isfinite(level) and abs(level) < 2000:
            bins[math.floor(level)] += count
    return bins
