"""Size against quality: one point per model that was measured on the same text, and marks for sizes that are planned.

    x   bytes of the weight files, linear from a round number below the smallest
    y   mean KL divergence from the source, nats per token, logarithmic; lower is better
    ±   one standard error

A model is on the front when no other is at most as large and at most as far from the source; the stepped line joins the
front. Percent across and CSS pixels down, so that labels can be kept apart without scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowbit.report.axes import Axis, decades, linear
from lowbit.report.schema import Report
from lowbit.report.summary import headline_evaluation
from lowbit.report.units import DASH, NBSP, number, percent, plus_minus, significant, size

HEIGHT = 300  # CSS pixels, of the plotting area
LABEL = 17  # height of a label in pixels
_NEAR = 26.0  # labels closer than this (percent across) may collide
_TICKS, _PLANNED = 26, 15  # pixels of the size axis below the plot, and of each further row of planned sizes


@dataclass(frozen=True)
class Mark:
    """One model, or a planned one (`kld` None), with its published loss in percent. `own` is the one that the page is
    about."""

    label: str
    bytes: int
    bits_per_weight: float
    kld: float | None = None
    kld_se: float | None = None
    same_top1: float | None = None
    own: bool = False
    href: str | None = None
    expected_loss: float | None = None


def report_marks(report: Report) -> list[Mark]:
    """The model of a report and its neighbours."""
    evaluation = headline_evaluation(report)
    scheme, method = report.settings.scheme, report.settings.method
    label = f"{scheme} {method}" if scheme in {neighbour.scheme for neighbour in report.neighbours} else scheme
    own = Mark(label, report.totals.bytes_out, report.totals.decoder_bits_per_weight, own=True)
    if evaluation is not None and evaluation.kld_mean is not None:
        own = replace(own, kld=evaluation.kld_mean, kld_se=evaluation.kld_se, same_top1=evaluation.same_top1)
    return [own, *(Mark(other.label, other.bytes, other.bits_per_weight, other.kld_mean, other.kld_se, other.same_top1,
                        expected_loss=other.expected_loss)
                   for other in report.neighbours)]  # fmt: skip


def on_front(mark: Mark, marks: Sequence[Mark]) -> bool:
    """True if no other measured model is as small or smaller and as close or closer."""
    if mark.kld is None:
        return False
    return not any(
        other.kld is not None
        and other.bytes <= mark.bytes
        and other.kld <= mark.kld
        and (other.bytes, other.kld) != (mark.bytes, mark.kld)
        for other in marks
    )


@dataclass(frozen=True)
class Spot:
    """A measured model: x in percent, the rest in pixels; bar: ends of the error bar; label: where its name stands."""

    mark: Mark
    x: float
    y: float
    bar: tuple[float, float]
    label: float
    on_left: bool
    front: bool
    words: str


@dataclass(frozen=True)
class QualityChart:
    """front: path of the stepped line in a box of 100 by 100; planned: (label, x, row of names, anchor, words)"""

    words: str
    height: int
    y: list[tuple[float, str]]
    x: list[tuple[float, str, str]]
    front: str
    spots: list[Spot]
    planned: list[tuple[str, float, int, str, str]]


def quality_chart(marks: Sequence[Mark]) -> QualityChart | None:
    """None for fewer than two measured models: there is nothing to compare."""
    measured = sorted((mark for mark in marks if mark.kld is not None), key=lambda mark: mark.bytes)
    if len(measured) < 2:
        return None
    planned = sorted((mark for mark in marks if mark.kld is None), key=lambda mark: mark.bytes)
    sizes = [mark.bytes for mark in marks]
    across = linear(sizes, 4, 0.25, max(0.1 * max(sizes), 1) / 4)
    across = replace(across, low=max(0.0, across.low), ticks=[tick for tick in across.ticks if tick >= 0])
    down = _divergences(measured)
    rows = _rows_of_names([across.across(mark.bytes) for mark in planned])
    front = ""
    for mark in (mark for mark in measured if on_front(mark, measured)):
        x, y = across.across(mark.bytes), down.down(mark.kld or 0)
        front += f"H{x:.2f}V{y:.2f}" if front else f"M{x:.2f} {y:.2f}"
    names = []
    for index, tick in enumerate(across.ticks):
        x = across.across(tick)  # every second tick is dropped where space is short
        names.append((x, _round_size(tick), f"{_anchor(x)}{' alternate' if index % 2 else ''}".strip()))
    return QualityChart(
        words="; ".join(f"{mark.label} {size(mark.bytes)}, {significant(mark.kld or 0)}" for mark in measured),
        height=HEIGHT + _TICKS + _PLANNED * (max(rows, default=-1) + 1),
        y=[(down.down(tick, HEIGHT), significant(tick, 1)) for tick in down.ticks],
        x=names,
        front=front or "M0 0",
        spots=_spots(measured, across, down),
        planned=[
            (mark.label, x, HEIGHT + 34 + _PLANNED * row, _anchor(x),
             f"{mark.label} would be {size(mark.bytes)}; it has not been made")
            for mark, row in zip(planned, rows, strict=True) for x in (across.across(mark.bytes),)
        ],
    )  # fmt: skip


def _divergences(measured: Sequence[Mark]) -> Axis:
    """A little beyond the error bars; divergences of 0 or below sit on the floor."""
    ends = [(mark.kld or 0) + sign * (mark.kld_se or 0) for mark in measured for sign in (-1, 1)]
    positive = [end for end in ends if end > 0] or [1e-6]
    return decades(min(positive), max(*positive, min(positive) * 2))


def _round_size(count: float) -> str:
    """Without superfluous decimals."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.4g}{NBSP}{unit}"
    return f"{count:.0f}{NBSP}B"


def _anchor(x: float) -> str:
    return "at-start" if x < 4 else "at-end" if x > 96 else ""


def _spots(measured: Sequence[Mark], across: Axis, down: Axis) -> list[Spot]:
    """From the top downwards. A label that would meet an earlier one is pushed down; one that would cover another point
    stands on the left of its own.
    """
    spots: list[Spot] = []
    for mark in sorted(measured, key=lambda mark: -(mark.kld or 0)):
        kld, error = mark.kld or 0, mark.kld_se or 0
        x, y = across.across(mark.bytes), down.down(kld, HEIGHT)
        label = y
        crowded = any(0 < across.across(other.bytes) - x < _NEAR / 2
                      and abs(down.down(other.kld or 0, HEIGHT) - y) < LABEL for other in measured)  # fmt: skip
        while any(abs(label - other.label) < LABEL and abs(x - other.x) < _NEAR for other in spots):
            label += 3
        words = f"{mark.label}: {size(mark.bytes)}, {significant(kld)} nats per token"
        bar = (down.down(kld - error, HEIGHT), down.down(kld + error, HEIGHT))
        spots.append(Spot(mark, x, y, bar, label, x > 68 or (crowded and x > 12), on_front(mark, measured), words))
    return spots


def _rows_of_names(places: Sequence[float]) -> list[int]:
    """For each planned size, the row below the axis with room for its name."""
    rows: list[int] = []
    ends: list[float] = []
    for x in places:
        row = next((row for row, end in enumerate(ends) if x - end > _NEAR), len(ends))
        ends[row:] = [x, *ends[row + 1 :]]
        rows.append(row)
    return rows


@dataclass(frozen=True)
class SizeRow:
    """The chart as a table row: kind is "own", "planned" or empty, width that of the bar in percent."""

    mark: Mark
    kind: str
    note: str
    width: float
    figures: tuple[str, ...]


def size_rows(marks: Sequence[Mark]) -> list[SizeRow]:
    """Sorted by size; models on the front are marked."""
    largest, rows = max((mark.bytes for mark in marks), default=1), []
    for mark in sorted(marks, key=lambda mark: mark.bytes):
        planned = mark.kld is None
        note = "this model" if mark.own else "planned" if planned else "on the front" if on_front(mark, marks) else ""
        same = DASH if mark.same_top1 is None else percent(mark.same_top1)
        figures = (size(mark.bytes), number(mark.bits_per_weight, 2), plus_minus(mark.kld, mark.kld_se), same)
        if planned and not mark.own and mark.expected_loss is not None:
            note += f", {significant(mark.expected_loss, 2)}{NBSP}% worse at 8B"
        kind = "own" if mark.own else "planned" if planned else ""
        rows.append(SizeRow(mark, kind, note, 100 * mark.bytes / max(largest, 1), figures))
    return rows
