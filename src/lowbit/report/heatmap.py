"""Heat maps: one cell per transformer block (across) and role (down), the darker the larger.

Plain SVG in percentages, like the plot: it fits any width, prints, and needs no JavaScript. Where a role has several
tensors in a block (experts) the cell shows the worst. Cells of nothing measured stay empty.

    errors         colour by log(error), from that of the 20th part of least error to the largest of the map
    contributions  colour by value, from 0 to the largest; what is below 0 has the colour of 0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowbit.report.markup import Html, join, tag
from lowbit.report.plot import order_roles

STEPS = 9
ROW = 22  # CSS pixels


@dataclass(frozen=True)
class Cell:
    """One tensor's value; `row` is that of the tensor table, None where it stands for none."""

    block: int
    role: str
    value: float
    row: int | None = None


def heat_map(
    identity: str, title: str, cells: Sequence[Cell], say: Callable[[float], str], logarithmic: bool = True
) -> Html | None:
    """The map with its legend; None for no cells.

    say  a value in words, for legend and titles
    """
    worst: dict[tuple[int, str], Cell] = {}
    for cell in cells:
        place = (cell.block, cell.role)
        if place not in worst or cell.value > worst[place].value:
            worst[place] = cell
    if not worst:
        return None
    blocks = sorted({block for block, _ in worst})
    roles = order_roles(role for _, role in worst)
    low, high = _range([cell.value for cell in worst.values()], logarithmic)
    shades = (tag("i", class_=f"h{step}") for step in range(STEPS))
    least = f"{say(low)} or less" if logarithmic and min(cell.value for cell in worst.values()) < low else say(low)
    legend = tag("p", tag("span", least), *shades, tag("span", say(high)), class_="heat-legend")
    largest = max(worst.values(), key=lambda cell: cell.value)
    description = (
        f"{title}: {len(worst)} cells, {len(roles)} roles by {len(blocks)} blocks, from {say(low)} to "
        f"{say(high)}; largest in block {largest.block}, {largest.role}"
    )
    marks = (
        _rect(
            cell,
            blocks.index(cell.block),
            roles.index(cell.role),
            len(blocks),
            _step(cell.value, low, high, logarithmic),
            say,
        )
        for cell in worst.values()
    )
    every = next(step for step in (1, 2, 5, 10, 20, 50, 10**9) if step * 18 >= len(blocks))
    names = (
        tag("text", str(block), x=f"{100 * (column + 0.5) / len(blocks):.2f}%", y=ROW * len(roles), dy="1.35em")
        for column, block in enumerate(blocks)
        if column % every == 0
    )
    picture = tag(
        "svg",
        tag("g", *marks),
        tag("g", *names, class_="ticks", aria_hidden="true"),
        width="100%",
        height=ROW * len(roles) + 22,
        role="img",
        aria_label=description,
        style=f"--columns:{len(blocks)}",
        class_="heat",
    )
    labels = (tag("span", role) for role in roles)
    heading = tag("h3", title, id=f"{identity}-title")
    frame = tag(
        "div",
        tag("div", *labels, class_="heat-roles", aria_hidden="true"),
        tag("div", picture, class_="heat-scroll", tabindex="0", role="region", aria_label=title),
        class_="heat-frame",
    )
    return tag("div", tag("div", heading, legend, class_="heat-head"), frame, class_="heat-map", id=identity)


def _rect(cell: Cell, column: int, line: int, columns: int, step: int, say: Callable[[float], str]) -> Html:
    words = tag("title", join(f"block {cell.block}, {cell.role}: {say(cell.value)}"))
    return tag(
        "rect",
        words,
        x=f"{100 * column / columns:.2f}%",
        y=line * ROW,
        width=f"{100 / columns:.2f}%",
        height=ROW,
        class_=f"h{step}",
        data_t=cell.row,
    )


def _range(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    if not logarithmic:
        return 0.0, max(*values, 0.0)
    positive = sorted(value for value in values if value > 0)
    return (positive[len(positive) // 20], positive[-1]) if positive else (0.0, 0.0)


def _step(value: float, low: float, high: float, logarithmic: bool) -> int:
    if value <= low or high <= low:
        return 0
    share = math.log(value / low) / math.log(high / low) if logarithmic else value / high
    return min(STEPS - 1, int(share * STEPS))
