"""Size against quality: one point per model that was measured on the same text, and marks for sizes that are planned.

    x   bytes of the weight files, linear from a round number below the smallest
    y   mean KL divergence from the source, nats per token, logarithmic; lower is better
    ±   one standard error

A model is on the front when no other is at most as large and at most as far from the source; the stepped line joins the
front. Plain SVG in percentages across and CSS pixels down, so that labels can be kept apart without scripts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.report.elements import column_heads, number_cell, scrolling
from lowbit.report.markup import Html, join, tag
from lowbit.report.plot import MARKERS
from lowbit.report.units import DASH, NBSP, number, percent, significant, size, with_error

HEIGHT = 300  # CSS pixels, of the plotting area
LABEL = 17  # pixels that a label takes down
_NEAR = 26.0  # percent across within which two labels could meet
_TICKS = 26  # pixels of the size axis below the plot, and for each further row of planned sizes


@dataclass(frozen=True)
class Mark:
    """One model, or a planned one (`kld` None). `own` is the one that the page is about."""

    label: str
    bytes: int
    bits_per_weight: float
    kld: float | None = None
    kld_se: float | None = None
    same_top1: float | None = None
    own: bool = False
    href: str | None = None


def on_front(mark: Mark, marks: Sequence[Mark]) -> bool:
    """True where no other measured model is as small or smaller and as close or closer."""
    if mark.kld is None:
        return False
    return not any(
        other.kld is not None
        and other.bytes <= mark.bytes
        and other.kld <= mark.kld
        and (other.bytes, other.kld) != (mark.bytes, mark.kld)
        for other in marks
    )


def quality_chart(marks: Sequence[Mark]) -> Html | None:
    """The picture; None for fewer than two measured models, of which no picture can say anything."""
    measured = sorted((mark for mark in marks if mark.kld is not None), key=lambda mark: mark.bytes)
    if len(measured) < 2:
        return None
    planned = sorted((mark for mark in marks if mark.kld is None), key=lambda mark: mark.bytes)
    across, down = _Across.over([mark.bytes for mark in marks]), _Down.over(measured)
    tick_rows = _rows_of_ticks(planned, across)
    height = HEIGHT + _TICKS + 15 * (max(tick_rows, default=-1) + 1)
    words = "; ".join(f"{mark.label} {size(mark.bytes)}, {significant(mark.kld or 0)}" for mark in measured)
    picture = tag(
        "svg",
        _grid(across, down),
        _front(measured, across, down),
        tag(
            "g", *(_planned(mark, row, across) for mark, row in zip(planned, tick_rows, strict=True)), class_="planned"
        ),
        *_points(measured, across, down),
        width="100%",
        height=height,
        role="img",
        aria_label=f"Size of the weight files against mean KL divergence from the source: {words}",
        class_="quality",
    )
    axis = (tag("text", text, x="100%", y=f"{down.y(value):.1f}", dy="0.32em") for value, text in down.ticks)
    side = tag("svg", *axis, class_="plot-axis", height=HEIGHT, aria_hidden="true")
    caption = tag("p", "nats per token, logarithmic: lower is better", class_="axis-title")
    return join(caption, tag("div", side, tag("div", picture), class_="plot-frame quality-frame"))


def quality_table(marks: Sequence[Mark]) -> Html:
    """The same as a table, with a bar for the size; those on the front say so."""
    largest = max((mark.bytes for mark in marks), default=1)
    head = column_heads("", "", "Size", "Bits / weight", "KL divergence", "Same next token")
    rows = (_row(mark, largest, on_front(mark, marks)) for mark in sorted(marks, key=lambda mark: mark.bytes))
    return scrolling(tag("table", head, tag("tbody", *rows), class_="sizes"), "Size and quality")


def _row(mark: Mark, largest: int, front: bool) -> Html:
    kind = "own" if mark.own else "planned" if mark.kld is None else None
    bar = tag("i", style=f"width:{100 * mark.bytes / max(largest, 1):.1f}%")
    name = tag("a", mark.label, href=mark.href) if mark.href else tag("span", mark.label)
    said = tag(
        "span",
        "this model" if mark.own else "planned" if mark.kld is None else "on the front" if front else "",
        class_="soft",
    )
    quality = DASH
    if mark.kld is not None:
        value, error = with_error(mark.kld, mark.kld_se)
        quality = f"{value} ±{NBSP}{error}" if error else value
    same = DASH if mark.same_top1 is None else percent(mark.same_top1)
    numbers = (size(mark.bytes), number(mark.bits_per_weight, 2), quality, same)
    return tag(
        "tr",
        tag("th", name, " ", said, scope="row"),
        tag("td", bar, class_="bar"),
        *(number_cell(text) for text in numbers),
        class_=kind,
    )


@dataclass(frozen=True)
class _Across:
    low: float
    high: float
    step: float

    @classmethod
    def over(cls, sizes: Sequence[int]) -> _Across:
        """From a round number below the smallest to one above the largest."""
        least, most = min(sizes), max(sizes)
        step = _round_step(max(most - least, 0.1 * most, 1) / 4)
        low, high = step * math.floor(least / step - 0.25), step * math.ceil(most / step + 0.25)
        return cls(max(0.0, low), high, step)

    def x(self, count: float) -> float:
        """Percent from the left."""
        return 100 * (count - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        return [self.low + self.step * i for i in range(round((self.high - self.low) / self.step) + 1)]


@dataclass(frozen=True)
class _Down:
    low: float
    high: float

    @classmethod
    def over(cls, measured: Sequence[Mark]) -> _Down:
        """A little beyond the error bars; divergences of 0 or below sit on the floor."""
        ends = [
            end
            for mark in measured
            for end in ((mark.kld or 0) - (mark.kld_se or 0), (mark.kld or 0) + (mark.kld_se or 0))
        ]
        positive = [end for end in ends if end > 0] or [1e-6]
        low, high = min(positive), max(*positive, min(positive) * 2)
        margin = (high / low) ** 0.12
        return cls(low / margin, high * margin)

    def y(self, kld: float) -> float:
        """Pixels from the top."""
        inside = min(max(kld, self.low), self.high)
        return HEIGHT * (1 - math.log(inside / self.low) / math.log(self.high / self.low))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """1, 2, 5 of each decade; 1 alone over more than three decades."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1,) if self.high / self.low > 1000 else (1, 2, 5)
        values = [factor * 10.0**decade for decade in decades for factor in factors]
        return [(value, significant(value, 1)) for value in values if self.low <= value <= self.high]


def _round_step(rough: float) -> float:
    decade = 10 ** math.floor(math.log10(rough))
    return next(factor * decade for factor in (1, 2, 5, 10) if factor * decade >= rough)


def _grid(across: _Across, down: _Down) -> Html:
    lines = [tag("line", x1="0", x2="100%", y1=f"{down.y(v):.1f}", y2=f"{down.y(v):.1f}") for v, _ in down.ticks]
    base = tag("line", x1="0", x2="100%", y1=HEIGHT, y2=HEIGHT, class_="base")
    names = [
        tag("text", _round_size(tick), x=f"{across.x(tick):.2f}%", y=HEIGHT, dy="1.5em", class_=_classes(across, index))
        for index, tick in enumerate(across.ticks)
    ]
    return tag("g", *lines, base, *names, class_="grid", aria_hidden="true")


def _classes(across: _Across, index: int) -> str | None:
    """Every second tick gives way where there is little room."""
    anchor, every_second = _anchor(across.x(across.ticks[index])), "alternate" if index % 2 else None
    return " ".join(filter(None, (anchor, every_second))) or None


def _round_size(count: float) -> str:
    """Without the decimals that a round number does not need."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.4g}{NBSP}{unit}"
    return f"{count:.0f}{NBSP}B"


def _anchor(x: float) -> str | None:
    return "at-start" if x < 4 else "at-end" if x > 96 else None


def _front(measured: Sequence[Mark], across: _Across, down: _Down) -> Html:
    """A stepped line through the models on the front, in a box stretched to the plot's size."""
    front = [mark for mark in measured if on_front(mark, measured)]
    path = ""
    for mark in front:
        x, y = across.x(mark.bytes), 100 * down.y(mark.kld or 0) / HEIGHT
        path += f"H{x:.2f}V{y:.2f}" if path else f"M{x:.2f} {y:.2f}"
    line = tag("path", d=path or "M0 0")
    return tag(
        "svg",
        line,
        class_="front",
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        width="100%",
        height=HEIGHT,
        aria_hidden="true",
    )


def _points(measured: Sequence[Mark], across: _Across, down: _Down) -> list[Html]:
    """Markers with error bars; then labels, pushed down where two would meet."""
    bars, points, labels = [], [], []
    taken: list[tuple[float, float]] = []
    for mark in sorted(measured, key=lambda mark: down.y(mark.kld or 0)):
        x, y, error = across.x(mark.bytes), down.y(mark.kld or 0), mark.kld_se or 0
        ends = {"y1": f"{down.y((mark.kld or 0) - error):.1f}", "y2": f"{down.y((mark.kld or 0) + error):.1f}"}
        bars.append(tag("line", x1=f"{x:.2f}%", x2=f"{x:.2f}%", **ends))
        kind = " ".join(filter(None, ("own" if mark.own else "", "on-front" if on_front(mark, measured) else "")))
        title = tag("title", f"{mark.label}: {size(mark.bytes)}, {significant(mark.kld or 0)} nats per token")
        shape = tag("path", d=MARKERS[4] if mark.own else MARKERS[0], transform="scale(1.35)")
        at = tag("svg", tag("g", shape, title), x=f"{x:.2f}%", y=f"{y:.1f}", class_=f"spot {kind}".strip())
        points.append(at)
        where = y
        while any(abs(where - other) < LABEL and abs(x - beside) < _NEAR for beside, other in taken):
            where += 3
        taken.append((x, where))
        left = x > 68
        labels.append(
            tag(
                "text",
                mark.label,
                x=f"{x:.2f}%",
                y=f"{where:.1f}",
                dx=-12 if left else 12,
                dy="0.32em",
                class_=f"{'at-end' if left else 'at-start'}{' own' if mark.own else ''}",
            )
        )
    return [tag("g", *bars, class_="error-bars"), *points, tag("g", *labels, class_="labels")]


def _rows_of_ticks(planned: Sequence[Mark], across: _Across) -> list[int]:
    """For each planned size the row below the axis in which its name finds room."""
    rows: list[int] = []
    ends: list[float] = []
    for mark in planned:
        x = across.x(mark.bytes)
        row = next((row for row, end in enumerate(ends) if x - end > _NEAR), len(ends))
        ends[row:] = [x, *ends[row + 1 :]]
        rows.append(row)
    return rows


def _planned(mark: Mark, row: int, across: _Across) -> Html:
    x, y = across.x(mark.bytes), HEIGHT + 34 + 15 * row
    line = tag("line", x1=f"{x:.2f}%", x2=f"{x:.2f}%", y1=HEIGHT - 6, y2=HEIGHT + 6)
    title = tag("title", f"{mark.label} would be {size(mark.bytes)}; it has not been made")
    return tag("g", line, tag("text", mark.label, x=f"{x:.2f}%", y=y, class_=_anchor(x)), title)
