"""Coordinate descent on all rows of a weight, where the loss tells pairs of outputs apart (`row_feedback`).

    minimise  J = tr(G E H Eᵀ)       E = Ŵ − W*; G, H the curvature of the loss in outputs and inputs of the linear

With all other rows fixed, the rows S have the errors T = −G_SS⁻¹ G_SR E_R as their best ones, so

    J = tr(G_SS (E_S − T) H (E_S − T)ᵀ) + what S does not change,

and S descends to W*_S + T in H as single rows do (`coordinate_descent`): scales, then codes. Its rows lie far apart in
the weight, where G says least of pairs, and what G_SS says of them is judged, not descended: a step that does not lower
J is taken back. A sweep is a step of all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.rounding.coordinate_descent import Descent
from lowbit.rounding.held import Held, hold, joined
from lowbit.rounding.hessian import Curvature, inverse_root, product
from lowbit.rounding.target import Rounded, Stored, Target

ROWS = 64  # of a step, at most: 16 take four times as long for 2 % less of the error
STEPS = 8  # of a sweep, at least
_BLOCK = 128  # columns whose changes are spread at once; affects only rounding errors and time


class RowDescent:
    """The rows that share a G, on their way down.

    held    rows of a step
    errors  float32 [n, K]: E, in the order of the weight
    """

    def __init__(self, stored: Stored, target: Target, rows: slice, wanted: Tensor, outputs: Tensor, inputs: Curvature):
        """
        stored   a weight, of which `rows` are these
        wanted   float32 [n, K]: W* of these rows
        outputs  float32 [n, n]: G, `damped`;  inputs: H
        """
        count = len(wanted)
        apart = max(count // ROWS, min(count, STEPS))
        self.wanted, self.outputs, self.inputs = wanted, outputs, inputs
        self.places = [torch.arange(first, count, apart) for first in range(apart)]
        self.held = [hold(target, stored, slice(rows.start + first, rows.stop, apart)) for first in range(apart)]
        self.errors = torch.empty_like(wanted)
        for place, one in zip(self.places, self.held, strict=True):
            self.errors[place] = one.decoded - wanted[place]

    def error(self) -> float:
        """J."""
        within = product(product(self.outputs, self.errors), self.inputs.within(slice(None)))
        return (within * self.errors).sum(dtype=torch.float64).item()

    def sweep(self) -> None:
        """A step of all rows."""
        for index, place in enumerate(self.places):
            self.held[index] = self._step(self.held[index], place)

    def _step(self, held: Held, rows: Tensor) -> Held:
        """Some rows descended, where that lowers J."""
        towards = self.outputs[rows]
        among = towards[:, rows].contiguous()
        root = inverse_root(among.clone())
        if root is None:
            return held
        pull = product(towards, self.errors) - product(among, self.errors[rows])
        best = self.wanted[rows] - product(root.t(), product(root, pull))
        descent = Descent(held.copy(), best, self.inputs, _BLOCK)
        before = descent.error_among(among)
        descent.sweep()
        if not descent.error_among(among) < before:
            return held
        self.errors[rows] = descent.held.decoded - self.wanted[rows]
        return descent.held


def joined_rows(parts: list[RowDescent], notes: tuple[str, ...] = ()) -> Rounded:
    """The weight, of the consecutive parts of its rows."""
    order, first = list[Tensor](), 0
    for part in parts:
        order += [place + first for place in part.places]
        first += len(part.wanted)
    held = [one for part in parts for one in part.held]
    decoded = torch.cat([one.decoded for one in held])
    return Rounded(joined(held), decoded, notes).in_rows(torch.cat(order).argsort())
