"""Axes of every chart, of the page and of the documents' pictures: where a value lies, round ticks, room for labels.

    share = (value − low) / (high − low), or of the logarithms         0 at the low end, 1 at the high one

What lies beyond an end is drawn at it. Steps of ticks are 1, 2 or 5 times a power of ten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Values at the ends, tick positions, tick labels, and whether the axis is logarithmic."""

    low: float
    high: float
    ticks: Sequence[float]
    title: str = ""
    labels: Sequence[str] | None = None
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end, 1 at the high one."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def across(self, value: float) -> float:
        """Percent from the left."""
        return 100 * self.share(value)

    def down(self, value: float, height: float = 100) -> float:
        """From the top, of so many pixels, or of 100 %."""
        return height * (1 - self.share(value))

    def label(self, index: int) -> str:
        return self.labels[index] if self.labels is not None else f"{self.ticks[index]:g}"


def round_step(rough: float) -> float:
    """The smallest of 1, 2, 5, 10, 20 … times any power of ten that is not below `rough`."""
    decade = 10.0 ** math.floor(math.log10(rough))
    return next(factor * decade for factor in (1, 2, 5, 10) if factor * decade >= rough)


def linear(values: Sequence[float], most: int, margin: float = 0.1, least_step: float = 1.0) -> Axis:
    """Between round numbers that lie at least `margin` steps beyond the values, with about `most` steps of ticks."""
    step = max(round_step(max((max(values) - min(values)) / most, least_step)), least_step)
    first, last = math.floor(min(values) / step - margin), math.ceil(max(values) / step + margin)
    return Axis(step * first, step * last, tuple(step * i for i in range(first, last + 1)))


def decades(low: float, high: float, margin: float = 0.12) -> Axis:
    """Logarithmic, extended by `margin` of its length at both ends; ticks at 1, 2, 5, or at 1 beyond three decades."""
    beyond = (high / low) ** margin
    low, high = low / beyond, high * beyond
    factors = (1,) if high / low > 1000 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = (factor * 10.0**power for power in powers for factor in factors)
    return Axis(low, high, tuple(tick for tick in ticks if low <= tick <= high), log=True)


def every(count: int, room: int) -> int:
    """Step between the labels written, of `count`, where there is room for `room` of them: 1, 2, 5, 10 …"""
    return 1 if count <= room else round(round_step(count / room))


def columns(names: Sequence[str], room: int) -> tuple[tuple[float, str], ...]:
    """(percent from the left, name) of equally wide columns; those left out for which there is no room."""
    step = every(len(names), room)
    return tuple((100 * (i + 0.5) / len(names), name) for i, name in enumerate(names) if i % step == 0)
