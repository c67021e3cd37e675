"""Refinement: the codes and scales of a finished file, moved until no single step brings the layer nearer.

    minimise  J = tr((Ŵ − W*) H (Ŵ − W*)ᵀ)     H = Σ x xᵀ + λ·1, W* the unquantized weight, corrected (`hessian`)

from what the file holds, by steps of which each minimises J exactly in what it changes:

    codes    z_k = ŵ_k + r_k / H_kk,  ŵ_k ← nearest(z_k)                 one weight; r = (W* − Ŵ) H
             for lattices 4 or 8 weights S: the point nearest to ŵ_S + H_SS⁻¹ r_S, if it lowers J
    scales   s ← s + (r_S · q) / (qᵀ H_SS q)                             of a group S with codes q, rounded to what the
             file can store, with its zero point or minimum as a second unknown; if it lowers J

(QuantEase, arXiv 2309.01885, for the codes; for the scales the closed form of least squares, group by group.) Descent
ends in a local minimum, so each row is also rounded anew with error feedback (GPTQ):

    anew        with scales that GPTQ chooses, and swept once; a row goes on from there where that is better
    rerounded   on the scales that it has after its first sweep; descended, and kept where that is better

A *sweep* is all scales once, then all codes. J never grows, row by row.

A linear whose codes nobody can better (no statistics, F16) keeps what it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.kernels import feedback
from lowbit.kernels.tables import MinifloatFormat
from lowbit.numerics.ggml.grid import IntLevels
from lowbit.rounding.gptq import CORRECTION, SEARCH, STREAM_CORRECTION, GPTQOptions, gptq
from lowbit.rounding.held import Held, HeldBlocks, ScalePart, hold, joined
from lowbit.rounding.hessian import SHRINKAGE, Curvature, Factor, InputData
from lowbit.rounding.target import Rounded, ScaledBlocks, Stored, Target
from lowbit.tensors import QuantizedTensor
from lowbit.workers import run_all

if TYPE_CHECKING:
    from lowbit.settings import Settings

_ROWS_PER_THREAD = 64  # at least


@dataclass(frozen=True)
class RefineOptions:
    """
    damping     λ as a fraction of mean(diag H)
    shrinkage   ρ, the share by which every off-diagonal of H is taken back, 0 to 1
    correction  α, the share of the error of what lies before that is corrected, 0 to 1; no effect without `drift`
    stream      β, the share of what the residual stream lost before that is corrected, 0 to 1
    sweeps      number of them
    anew        also start from the codes and scales of GPTQ
    reround     with error feedback, on the scales of the first sweep
    block       columns whose changes are spread over the others at once; affects only rounding errors and time
    """

    damping: float = 0.01
    shrinkage: float = SHRINKAGE
    correction: float = CORRECTION
    stream: float = STREAM_CORRECTION
    sweeps: int = 4
    anew: bool = True
    reround: bool = True
    block: int = 128

    @property
    def needs_drift(self) -> bool:
        """True if the unquantized model must run beside the quantized one."""
        return self.correction > 0

    @property
    def needs_lost(self) -> bool:
        """True if what the residual stream lost must be measured too."""
        return self.needs_drift and self.stream > 0

    @classmethod
    def of(cls, settings: Settings) -> RefineOptions:
        """The user's settings, defaults for the rest."""
        more = not settings.codes_only
        given = {"damping": settings.damping, "shrinkage": settings.shrinkage, "correction": settings.correction,
                 "stream": settings.stream_correction, "sweeps": settings.sweeps}  # fmt: skip
        return cls(**{name: value for name, value in given.items() if value is not None},
                   anew=more, reround=more)  # fmt: skip


def refine(weight: Tensor, target: Target, data: InputData, options: RefineOptions, start: Stored) -> Rounded:
    """Refine what a file holds of a weight, float32 [N, K]; `start` are its codes for `target`, in the same rows."""
    if target.holds_floats:
        return kept(target, start, len(weight), f"{target.name} has no codes to refine")
    hessian = data.hessian(options.damping, options.shrinkage)
    curvature, wanted = hessian.curvature(), hessian.corrected(weight, options.correction, options.stream)
    starts, each = [start], target.columns_per_code
    factor = hessian.factor(each, each) if options.reround else None
    if options.anew and _can_start_anew(start):
        again = gptq(weight, target, data, _anew(options))
        if not again.fell_back and _mixes(start, again.stored):
            starts.append(again.stored)

    def of_rows(rows: slice) -> tuple[Held, int]:
        """The first sweep from each start; each row goes on with the better."""
        unchanged = Descent(hold(target, start, rows), wanted[rows], curvature, options.block)
        begun = [Descent(hold(target, each, rows), wanted[rows], curvature, options.block) for each in starts]
        for descent in begun:
            descent.sweep()
        best, anew = begun[0], 0
        for other in begun[1:]:
            better = other.error() < best.error()
            best.take(other, better)
            anew += int(better.sum())
        if factor is not None:
            best.reround(factor)
        for _ in range(options.sweeps - 1):
            best.sweep()
        best.refit()
        best.begin()  # anew: rounding errors of the sums have added up
        best.take(unchanged, ~(best.error() < unchanged.error()))
        return best.held, anew

    apart = target.rows_are_apart
    threads = min(torch.get_num_threads(), max(1, len(weight) // _ROWS_PER_THREAD)) if apart else 1
    step = -(-len(weight) // threads)
    slabs = [slice(first, min(first + step, len(weight))) for first in range(0, len(weight), step)]
    done: list[tuple[Held, int] | None] = [None] * len(slabs)

    def one(index: int) -> None:
        done[index] = of_rows(slabs[index])

    if len(slabs) == 1:
        one(0)
    else:
        run_all(((one, index) for index in range(len(slabs))), threads)
    finished = [each for each in done if each is not None]
    stored = joined([held for held, _ in finished])
    decoded = target.reader(stored)(torch.arange(len(weight)))
    notes = ("rows rounded anew, by GPTQ, where that is better",) if any(count for _, count in finished) else ()
    return Rounded(stored, decoded, notes)


def _anew(options: RefineOptions) -> GPTQOptions:
    return GPTQOptions(options.damping, shrinkage=options.shrinkage, correction=options.correction,
                       stream=options.stream, refine=0, search=SEARCH)  # fmt: skip


def kept(target: Target, start: Stored, rows: int, why: str) -> Rounded:
    """What the file holds, as it is."""
    return Rounded(start, target.reader(start)(torch.arange(rows)), (f"kept: {why}",), fell_back=True)


def _can_start_anew(start: Stored) -> bool:
    """False where GPTQ would choose scales that rows share, or other groups of columns, and rows could not be mixed."""
    return not isinstance(start, QuantizedTensor) or (
        start.g_idx is None and start.granularity in ("channel", "group") and start.nested is None
    )


def _mixes(start: Stored, other: Stored) -> bool:
    """True if both have the scale of the whole tensor, so that rows of one can stand among rows of the other."""
    if isinstance(start, QuantizedTensor) and isinstance(other, QuantizedTensor):
        return start.global_scale == other.global_scale
    return not isinstance(start, ScaledBlocks) or (isinstance(other, ScaledBlocks) and start.scale == other.scale)


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

    def reround(self, factor: Factor) -> None:
        """With error feedback on the present scales, then descended; each row that is better so."""
        other = Descent(rerounded(self.held, self.wanted, factor, self.block), self.wanted, self.curvature, self.block)
        other.descend()
        other.refit()
        self.take(other, other.error() < self.error())

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


def rerounded(held: Held, wanted: Tensor, factor: Factor, block: int) -> Held:
    """The same rows with the codes that error feedback (GPTQ) chooses on their scales; see `rounding.gptq`."""
    again, order = held.copy(), factor.order
    w = wanted.index_select(1, order)
    if held.levels is None:
        assert isinstance(again, HeldBlocks), "no grid of a folder has a lattice"
        _feed_back_lattice(again, w, factor)
        return again
    decoded, back = torch.empty_like(w), order.argsort()
    scale, offset, zero_point = (
        None if each is None else each.index_select(1, order).contiguous() for each in held.per_column()
    )
    assert scale is not None
    span = (0, w.shape[1], block)
    if isinstance(held.levels, IntLevels):
        codes = torch.empty(w.shape, dtype=torch.int8)
        limits = (held.levels.lowest, held.levels.highest)
        feedback.feedback_int(w, factor.spread, span, scale, offset, zero_point, limits, codes, decoded)
        codes = codes.to(torch.int16) + held.levels.zero
    else:
        codes = torch.empty(w.shape, dtype=torch.uint8)
        if isinstance(held.levels, MinifloatFormat):
            feedback.feedback_minifloat(w, factor.spread, span, scale, held.levels, codes, decoded)
        else:
            feedback.feedback_codebook(w, factor.spread, span, scale, held.levels, codes, decoded)
        codes = codes.view(held.codes.dtype)
    again.codes, again.decoded = codes.index_select(1, back).to(held.codes.dtype), decoded.index_select(1, back)
    return again


def _feed_back_lattice(held: HeldBlocks, w: Tensor, factor: Factor) -> None:
    """The same for points of a lattice, so many columns together; w, in the order of the factor, is used up."""
    each, columns = held.grid.columns_per_code, w.shape[1]
    for start in range(0, columns, each):
        now, place = slice(start, start + each), int(factor.order[start])
        params = held.at(place, place + each)
        codes = held.grid.round(w[:, now], params, factor.cost[now])
        decoded = held.grid.decode(codes, params)
        feedback.subtract_product(w, w[:, now] - decoded, factor.spread[now], start + each, columns)
        held.codes[:, place // each] = codes[:, 0]
        held.decoded[:, place : place + each] = decoded


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
