"""The types of least cost within so many bytes: one type for each tensor.

    minimize Σ cost[tensor, type]   subject to   Σ bytes[tensor, type] ≤ bytes

Of each tensor only the types on the lower convex hull of (bytes, cost) can be part of a best mix, up to one tensor.
All tensors begin at the fewest bytes; then the step along a hull that saves most nats per byte is taken, as long as it
fits. Steps that no longer fit are passed over for smaller ones. This is the knapsack's greedy solution: it is exact for
the bytes that it uses, and misses at most one step of one tensor otherwise. Ties go to the tensor that comes first.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

Options = Mapping[str, tuple[int, float]]  # type → (bytes, cost)


def choose_within(tensors: Mapping[str, Options], budget: int) -> dict[str, str] | None:
    """Tensor → type; None where even the fewest bytes exceed `budget`."""
    hulls = {name: _hull(options) for name, options in tensors.items()}
    at = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0][0] for hull in hulls.values())
    if left < 0:
        return None
    order = {name: place for place, name in enumerate(hulls)}
    steps = [(_gain(hulls[name], 0), order[name], name) for name in hulls if len(hulls[name]) > 1]
    heapq.heapify(steps)
    while steps:
        _, place, name = heapq.heappop(steps)
        hull, index = hulls[name], at[name]
        added = hull[index + 1][0] - hull[index][0]
        if added > left:
            continue  # nor do later steps of this tensor, which begin behind it
        left -= added
        at[name] = index + 1
        if index + 2 < len(hull):
            heapq.heappush(steps, (_gain(hull, index + 1), place, name))
    return {name: hulls[name][index][2] for name, index in at.items()}


def _hull(options: Options) -> list[tuple[int, float, str]]:
    """(bytes, cost, type), of ever more bytes and lower cost, each step saving less per byte than the one before."""
    hull: list[tuple[int, float, str]] = []
    for nbytes, cost, name in sorted((nbytes, cost, name) for name, (nbytes, cost) in options.items()):
        if hull and cost >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (nbytes, cost, name)) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((nbytes, cost, name))
    return hull


def _slope(one: tuple[int, float, str], other: tuple[int, float, str]) -> float:
    """Change of cost per byte; negative."""
    return (other[1] - one[1]) / (other[0] - one[0])


def _gain(hull: list[tuple[int, float, str]], index: int) -> float:
    return _slope(hull[index], hull[index + 1])
