"""The error plot: one marker per quantized tensor, x = transformer block, y = relative error in decibels.

The picture is plain SVG whose coordinates are percentages, so it fits any width without scaling its text, prints, and
needs no JavaScript; report.js adds pointing, keys and search by reading `data-t`, the number of the tensor's table row.
Within a block the roles stand side by side; a thin line per role joins the block means. Roles differ by marker shape
and by colour. Tensors outside the blocks get a column of their own; tensors of zero error sit on the floor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowbit.report.markup import Html, join, tag
from lowbit.report.schema import TensorEntry
from lowbit.report.units import decibel, number

HEIGHT = 320  # CSS pixels, of the plotting area
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
USUAL_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embedding", "lm_head")


@dataclass(frozen=True)
class Point:
    row: int  # of the tensor table
    role: str
    column: int  # block, or the column after the last block
    decibels: float


@dataclass(frozen=True)
class Scale:
    """The y axis: decibels `low`..`high` with a line every `step`."""

    low: float
    high: float
    step: float

    def y(self, decibels: float) -> float:
        """Percent from the top; −inf is the floor."""
        inside = min(max(decibels, self.low), self.high)
        return 100 * (self.high - inside) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        return [self.low + self.step * i for i in range(round((self.high - self.low) / self.step) + 1)]


def order_roles(roles: Iterable[str]) -> list[str]:
    """Each role once: the usual ones in the order of the forward pass, then the others by name."""
    distinct = set(roles)
    return [role for role in USUAL_ROLES if role in distinct] + sorted(distinct.difference(USUAL_ROLES))


def marker_symbol(position: int) -> Html:
    """The marker of the role at this position of `order_roles`, as a small inline picture."""
    use = tag("use", href=f"#m{position % len(MARKERS)}", class_=_colour(position))
    return tag("svg", use, class_="symbol", viewBox="-6 -6 12 12", aria_hidden="true")


def marker_definitions() -> Html:
    """The shapes that `marker_symbol` and the plot refer to; once per page."""
    shapes = (tag("path", id=f"m{i}", d=outline) for i, outline in enumerate(MARKERS))
    return tag("svg", tag("defs", *shapes), class_="definitions", aria_hidden="true")


def error_plot(tensors: Sequence[TensorEntry]) -> Html | None:
    """The plot with its legend and y axis; None where no tensor has a measured error."""
    measured = [(row, tensor) for row, tensor in enumerate(tensors) if tensor.relative_error is not None]
    if not measured:
        return None
    roles = order_roles(tensor.role for _, tensor in measured)
    blocks = sorted({tensor.block for _, tensor in measured if tensor.block is not None})
    column_of = {block: column for column, block in enumerate(blocks)}
    points = [
        Point(
            row=row,
            role=tensor.role,
            column=len(blocks) if tensor.block is None else column_of[tensor.block],
            decibels=decibel(tensor.relative_error or 0.0),
        )
        for row, tensor in measured
    ]
    columns = 1 + max(point.column for point in points)
    labels = [str(block) for block in blocks] + ["other"]
    scale = _scale_for([point.decibels for point in points])
    picture = tag(
        "svg",
        _grid(scale, labels[:columns]),
        _lines(points, roles, scale, columns),
        _markers(points, roles, scale, columns),
        tag("use", id="ring", href="#m0", class_="ring", hidden=True),
        id="plot",
        width="100%",
        height=HEIGHT,
        tabindex="0",
        role="application",
        aria_label=f"Relative error of {len(points)} tensors by transformer block. "
        "Arrow keys move between tensors, Enter opens the table row.",
    )
    scroller = tag("div", picture, class_="plot-scroll", style=f"--columns:{columns}")
    frame = tag("div", _axis(scale), scroller, tag("div", id="tip", hidden=True), class_="plot-frame")
    return join(_legend(roles), frame)


def _scale_for(decibels: Sequence[float]) -> Scale:
    """At most eight lines on round numbers; errors more than 60 dB below the largest share the floor."""
    finite = [value for value in decibels if math.isfinite(value)] or [-20.0]
    top, bottom = max(finite), max(min(finite), max(finite) - 60)
    step = next((s for s in (1, 2, 5, 10) if (top - bottom) / s <= 7), 10)
    low, high = step * math.floor(bottom / step - 0.1), step * math.ceil(top / step + 0.1)
    return Scale(low, high, step)


def _legend(roles: Sequence[str]) -> Html:
    buttons = (
        tag("button", marker_symbol(i), role, type="button", data_role=role, aria_pressed="false")
        for i, role in enumerate(roles)
    )
    return tag("div", *buttons, class_="legend", role="group", aria_label="Show one role only")


def _axis(scale: Scale) -> Html:
    labels = (
        tag("text", f"{number(tick, 0)} dB", x="100%", y=f"{scale.y(tick):.2f}%", dy="0.32em") for tick in scale.ticks
    )
    return tag("svg", *labels, class_="plot-axis", height=HEIGHT, aria_hidden="true")


def _grid(scale: Scale, labels: Sequence[str]) -> Html:
    lines = [
        tag("line", x1="0", x2="100%", y1=f"{scale.y(tick):.2f}%", y2=f"{scale.y(tick):.2f}%") for tick in scale.ticks
    ]
    every = max(1, -(-len(labels) // 16))
    every = next((s for s in (1, 2, 5, 10, 20, 50) if s >= every), 100)
    names = [
        tag("text", label, x=f"{100 * (column + 0.5) / len(labels):.2f}%", y="100%", dy="1.7em")
        for column, label in enumerate(labels)
        if label == "other" or column % every == 0
    ]
    return tag("g", *lines, *names, class_="grid", aria_hidden="true")


def _lines(points: Sequence[Point], roles: Sequence[str], scale: Scale, columns: int) -> Html:
    """One line per role through the mean of each block, in a picture that is stretched to the plot's size."""
    values: dict[str, dict[int, list[float]]] = {role: defaultdict(list) for role in roles}
    for point in points:
        values[point.role][point.column].append(scale.y(point.decibels))
    lines = []
    for position, role in enumerate(roles):
        means = sorted((column, sum(ys) / len(ys)) for column, ys in values[role].items())
        path = " ".join(f"{_x(column, position, len(roles), columns):.2f},{y:.2f}" for column, y in means)
        lines.append(tag("polyline", points=path, class_=_colour(position), data_role=role))
    return tag("svg", *lines, class_="lines", viewBox="0 0 100 100", preserveAspectRatio="none", aria_hidden="true")


def _markers(points: Sequence[Point], roles: Sequence[str], scale: Scale, columns: int) -> Html:
    position = {role: i for i, role in enumerate(roles)}
    marks = []
    for point in points:
        at = position[point.role]
        x = _x(point.column, at, len(roles), columns)
        y = scale.y(point.decibels)
        shape = f"#m{at % len(MARKERS)}"
        marks.append(tag("use", href=shape, x=f"{x:.2f}%", y=f"{y:.2f}%", class_=_colour(at), data_t=point.row))
    return tag("g", *marks, class_="points", aria_hidden="true")


def _x(column: int, position: int, roles: int, columns: int) -> float:
    """Percent from the left: roles side by side in the middle 80 % of their block's column."""
    return 100 * (column + 0.1 + 0.8 * (position + 0.5) / roles) / columns


def _colour(position: int) -> str:
    return f"c{position % COLOURS}"
