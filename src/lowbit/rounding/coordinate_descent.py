"""Coordinate descent on the codes and scales of some rows, each step exact in what it changes (`descent`).

    minimise  J = tr((Ŵ − W*) H (Ŵ − W*)ᵀ)

    codes    z_k = ŵ_k + r_k / H_kk,  ŵ_k ← nearest(z_k)                 one weight; r = (W* − Ŵ) H
             for lattices 4 or 8 weights S: the point nearest to ŵ_S + H_SS⁻¹ r_S, if it lowers J
    scales   s ← s + (r_S · q) / (qᵀ H_SS q)                             of a group S with codes q, rounded to what the
             file can store, with its zero point or minimum as a second unknown; if it lowers J

A *sweep* is all scales once, then all codes. J never grows, row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels import feedback
from lowbit.kernels.tables import MinifloatFormat
from lowbit.numerics.ggml.grid import IntLevels
from lowbit.rounding.held import Held, HeldBlocks, ScalePart
from lowbit.rounding.hessian import Curvature, product


class Descent:
    """Rows [N, K] on their way down.

    z  float32 [N, K]: the best value of each weight, all others fixed
    """

    def __init__(self, held: Held, wanted: Tensor, curvature: Curvature, block: int):
        self.held, self.wanted, self.curvature, self.block = held, wanted, curvature, block
        self.begin()

    def sweep(self) -> None:
        """All scales once, then all codes."""
        self.refit()
        self.descend()

    def take(self, other: Descent, rows: Tensor) -> None:
        """The rows of another descent in place of these, bool [N]."""
        self.held.take(other.held, rows)
        self.z[rows] = other.z[rows]

    def begin(self) -> None:
        """z of what is held now."""
        self.z = self.wanted.clone()
        self._spread(self.held.decoded - self.wanted, slice(None))

    def error(self) -> Tensor:
        """J of each row, float64 [N]."""
        decoded = self.held.decoded
        return (self._residual(slice(None)) * (self.wanted - decoded)).sum(dim=1, dtype=torch.float64)

    def error_among(self, curvature: Tensor) -> float:
        """tr(G (Ŵ − W*) H (Ŵ − W*)ᵀ), where G, float32 [N, N], is what the loss says of pairs of these rows."""
        missed = self.wanted - self.held.decoded
        return (product(curvature, missed) * self._residual(slice(None))).sum(dtype=torch.float64).item()

    def _residual(self, columns: slice | Tensor) -> Tensor:
        """r = (W* − Ŵ) H, float32 [N, n]."""
        return (self.z[:, columns] - self.held.decoded[:, columns]) * self.curvature.diagonal[columns]

    def _spread(self, change: Tensor, columns: slice | Tensor) -> None:
        """Ŵ changes by `change` in some columns: the z of all others follow."""
        feedback.subtract_product(self.z, change, self.curvature.spread[columns], 0, self.z.shape[1])

    def refit(self) -> None:
        """All scales once, each in closed form, to what the file stores."""
        for part in self.held.parts():
            self._refit(part)

    def _refit(self, part: ScalePart) -> None:
        r, hessian = self._residual(part.columns), self.curvature.within(part.columns)
        fit = _ScaleFit(part, r, hessian)
        gain, first, second = fit.best()
        rows = (gain > 0).nonzero()[:, 0]
        if not len(rows):
            return
        part.put(rows, first[rows], None if second is None else second[rows])
        now = self.held.decode(part.columns)
        change = now - self.held.decoded[:, part.columns]
        self.held.decoded[:, part.columns] = now
        self._spread(change, part.columns)

    def descend(self) -> None:
        """All codes once."""
        levels = self.held.levels
        if levels is None:
            assert isinstance(self.held, HeldBlocks), "no grid of a folder has a lattice"
            self._descend_lattice(self.held)
            return
        scale, offset, zero_point = (None if each is None else each.contiguous() for each in self.held.per_column())
        assert scale is not None
        span, spread, decoded = (0, self.z.shape[1], self.block), self.curvature.spread, self.held.decoded
        if isinstance(levels, IntLevels):
            codes = (self.held.codes.to(torch.int16) - levels.zero).to(torch.int8)
            limits = (levels.lowest, levels.highest)
            feedback.feedback_int(self.z, spread, span, scale, offset, zero_point, limits, codes, decoded, True)
            self.held.codes = (codes.to(torch.int16) + levels.zero).to(self.held.codes.dtype)
            return
        codes = self.held.codes.view(torch.uint8).contiguous()
        if isinstance(levels, MinifloatFormat):
            feedback.feedback_minifloat(self.z, spread, span, scale, levels, codes, decoded, True)
        else:
            feedback.feedback_codebook(self.z, spread, span, scale, levels, codes, decoded, True)
        self.held.codes = codes.view(self.held.codes.dtype)

    def _descend_lattice(self, held: HeldBlocks) -> None:
        each, columns = held.grid.columns_per_code, self.z.shape[1]
        for begin in range(0, columns, self.block):
            end = min(begin + self.block, columns)
            change = torch.zeros_like(self.z[:, begin:end])
            for start in range(begin, end, each):
                here = slice(start, start + each)
                moved = change[:, start - begin : start - begin + each]
                moved.copy_(self._moved_point(held, here))
                feedback.subtract_product(self.z, moved, self.curvature.spread[here], begin, end)
            rest = self.curvature.spread[begin:end]
            feedback.subtract_product(self.z, change, rest, 0, begin)
            feedback.subtract_product(self.z, change, rest, end, columns)

    def _moved_point(self, held: HeldBlocks, here: slice) -> Tensor:
        """Take the point nearest to the best values of a code's columns, where that lowers J; the change, [N, n]."""
        hessian, r, decoded = self.curvature.within(here), self._residual(here), held.decoded[:, here]
        best = decoded + torch.linalg.solve(hessian, r.t()).t()
        params = held.at(here.start, here.stop)
        codes = held.grid.round(best.contiguous(), params, self.curvature.diagonal[here])
        change = held.grid.decode(codes, params) - decoded
        gain = 2 * (r * change).sum(dim=1) - ((change @ hessian) * change).sum(dim=1)
        change = torch.where((gain > 0)[:, None], change, 0.0)
        place = here.start // held.grid.columns_per_code
        held.codes[:, place] = torch.where(gain > 0, codes[:, 0], held.codes[:, place])
        held.decoded[:, here] = decoded + change
        return change


class _ScaleFit:
    """The quadratic that J is in the numbers of a part: how much J falls when they change by (δ, ε), row by row,

    2·(δ·a + ε·b) − δ²·A − 2·δ·ε·B − ε²·C       a = r·q, A = qᵀHq, b, C the same of the other direction, B between both
    """

    def __init__(self, part: ScalePart, r: Tensor, hessian: Tensor):
        self.part = part
        q = part.direction
        qh = q @ hessian
        self.a, self.aa = (r * q).sum(dim=1), (qh * q).sum(dim=1)
        if part.other is not None:
            o = part.other
            self.b, self.ab, self.bb = (r * o).sum(dim=1), (qh * o).sum(dim=1), ((o @ hessian) * o).sum(dim=1)

    def best(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(gain, first, second) of the best storable numbers tried, [N]; gains that are not positive mean none."""
        part = self.part
        best, first, second = torch.zeros_like(part.first), part.first, part.second
        for candidate in self._candidates():
            delta, partner, gain = candidate - part.first, None, None
            if part.second is None or part.seconds is None:
                gain = 2 * delta * self.a - delta.square() * self.aa
            else:
                partner = part.seconds(candidate, part.second + (self.b - delta * self.ab) / self.bb)
                gain = self._gain(delta, partner - part.second)
            better = gain > best
            best, first = torch.where(better, gain, best), torch.where(better, candidate, first)
            second = None if partner is None or second is None else torch.where(better, partner, second)
        return best, first, second

    def _candidates(self) -> list[Tensor]:
        """Firsts to try: the storable ones near the best alone and, with a second, near the best of both; and the
        present one, whose second may be better."""
        part, alone = self.part, self.part.firsts(self.part.first + self.a / self.aa)
        if part.second is None:
            return alone
        determinant = self.aa * self.bb - self.ab.square()
        together = part.first + (self.a * self.bb - self.b * self.ab) / determinant
        return [*part.firsts(torch.where(together.isfinite(), together, part.first)), part.first]

    def _gain(self, delta: Tensor, epsilon: Tensor) -> Tensor:
        first = 2 * (delta * self.a + epsilon * self.b)
        return first - delta.square() * self.aa - 2 * delta * epsilon * self.ab - epsilon.square() * self.bb
