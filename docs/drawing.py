"""Charts as SVG text on the axes of the report: lines, dots, bars, and labels beside what they name.

A picture has its own background, and its colours follow `prefers-color-scheme`, so it can be read on light and dark
pages. Coordinates are rounded to a tenth of a pixel: the same numbers give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from lowbit.report.axes import Axis

STYLE = """
.page{fill:#fff}.edge{fill:none;stroke:#d7dbe2}.text{fill:#1f2430}.soft{fill:#5c6575}.grid{stroke:#e6e9ef}
.axis{stroke:#8a93a3}.a{--c:#2563c9}.b{--c:#c2570c}.c{--c:#27803f}.d{--c:#8a4bb8}.e{--c:#7b8494}
@media(prefers-color-scheme:dark){.page{fill:#1b1f27}.edge{stroke:#363d4a}.text{fill:#e8ebf0}.soft{fill:#a4adbb}
.grid{stroke:#2d333e}.axis{stroke:#717b8c}.a{--c:#7db0ff}.b{--c:#ffa45c}.c{--c:#73d48c}.d{--c:#cf9bf2}.e{--c:#98a2b3}}
.line{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round}.fill{fill:var(--c)}.faint{fill:var(--c);opacity:.16}
.name{fill:var(--c);font-weight:600}.tick{stroke:var(--c);stroke-width:1.6}
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}.title{font-size:14px;font-weight:600}
"""


@dataclass
class Picture:
    """A picture that grows by what is drawn on it; `text` is the SVG. Sizes are in pixels."""

    title: str
    width: int = 720
    height: int = 350
    parts: list[str] = field(default_factory=list)

    def panel(self, x: Axis, y: Axis, left: float = 62, top: float = 64, width: float = 0, height: float = 0) -> Panel:
        """A chart inside; without sizes it takes what is left of the picture."""
        panel = Panel(self, x, y, left, top, width or self.width - left - 24, height or self.height - top - 54)
        panel.frame()
        return panel

    def words(self, x: float, y: float, text: str, kind: str = "soft", anchor: str = "start") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, round_: float = 0) -> None:
        self.parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{round_:g}"/>'
        )

    def segment(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    @property
    def text(self) -> str:
        size = f'width="{self.width}" height="{self.height}"'
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {self.width} {self.height}" role="img">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{STYLE.strip()}</style>",
            f'<rect class="page" {size} rx="8"/>',
            f'<rect class="edge" x=".5" y=".5" width="{self.width - 1}" height="{self.height - 1}" rx="8"/>',
            f'<text class="text title" x="20" y="27">{escape(self.title)}</text>',
            *self.parts,
            "</svg>",
            "",
        ])  # fmt: skip


@dataclass
class Panel:
    """Axes in a picture, and what is drawn between them in their units."""

    picture: Picture
    x: Axis
    y: Axis
    left: float
    top: float
    width: float
    height: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point; what lies beyond an axis is drawn at its end."""
        return self.left + self.x.share(x) * self.width, self.top + (1 - self.y.share(y)) * self.height

    def frame(self) -> None:
        picture, bottom = self.picture, self.top + self.height
        for index, tick in enumerate(self.y.ticks):
            _, height = self.at(self.x.low, tick)
            picture.segment(self.left, height, self.left + self.width, height, "grid")
            picture.words(self.left - 8, height + 4, self.y.label(index), anchor="end")
        picture.segment(self.left, bottom, self.left + self.width, bottom, "axis")
        for index, tick in enumerate(self.x.ticks):
            across, _ = self.at(tick, self.y.low)
            picture.segment(across, bottom, across, bottom + 4, "axis")
            picture.words(across, bottom + 18, self.x.label(index), anchor="middle")
        picture.words(self.left + self.width / 2, bottom + 38, self.x.title, anchor="middle")
        if self.y.title:
            picture.words(self.left - 42, self.top - 13, self.y.title)

    def line(self, xs: Sequence[float], ys: Sequence[float], kind: str) -> None:
        """Joined points; what lies above the y axis is left out."""
        pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if y <= self.y.high]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*pair) for pair in pairs))
        self.picture.parts.append(f'<polyline class="line {kind}" points="{points}"/>')

    def dots(self, xs: Sequence[float], ys: Sequence[float], kind: str, radius: float = 4) -> None:
        for x, y in (self.at(*pair) for pair in zip(xs, ys, strict=True) if pair[1] <= self.y.high):
            self.picture.parts.append(f'<circle class="fill {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>')

    def bars(self, values: Sequence[float], kind: str) -> None:
        """One bar for each of 0, 1, 2 … of the x axis."""
        step = self.width / len(values)
        for index, value in enumerate(values):
            _, top = self.at(self.x.low, value)
            self.picture.box(
                self.left + index * step + 0.12 * step, top, 0.76 * step, self.top + self.height - top, f"fill {kind}"
            )

    def area(self, xs: Sequence[float], ys: Sequence[float], kind: str) -> None:
        points = [self.at(xs[0], self.y.low), *(self.at(*pair) for pair in zip(xs, ys, strict=True))]
        points.append(self.at(xs[-1], self.y.low))
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.picture.parts.append(f'<polygon class="faint {kind}" points="{text}"/>')

    def legend(self, x: float, y: float, rows: Sequence[tuple[str, str]]) -> None:
        """Rows of (colour, text) with a dot, from the pixel (x, y) downwards."""
        for row, (kind, text) in enumerate(rows):
            self.picture.box(x, y + 20 * row, 10, 10, f"fill {kind}", 5)
            self.picture.words(x + 18, y + 9 + 20 * row, text)

    def name(
        self, x: float, y: float, text: str, kind: str, dx: float = 8, dy: float = 4, anchor: str = "start"
    ) -> None:
        """A label beside a point, in the colour of what it names."""
        across, height = self.at(x, y)
        self.picture.words(across + dx, height + dy, text, f"name {kind}", anchor)
