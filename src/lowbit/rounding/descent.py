"""Refinement: the codes and scales of a finished file, moved until no single step brings the layer nearer.

    minimise  J = tr((Ŵ − W*) H (Ŵ − W*)ᵀ)     H = Σ x xᵀ + λ·1, W* the unquantized weight, corrected (`hessian`)

from what the file holds, by steps of which each minimises J exactly in what it changes (`coordinate_descent`;
QuantEase, arXiv 2309.01885, for the codes; for the scales the closed form of least squares, group by group). Descent
ends in a local minimum, so each row is also rounded anew with error feedback (GPTQ):

    anew        with scales that GPTQ chooses, and swept once; a row goes on from there where that is better
    rerounded   on the scales that it has after its first sweep; descended, and kept where that is better

A *sweep* is all scales once, then all codes. J never grows, row by row. Where the loss tells pairs of rows apart, J is
tr(G (Ŵ − W*) H (Ŵ − W*)ᵀ), and rows that share a G start anew together and descend together (`row_descent`).

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
from lowbit.rounding.coordinate_descent import Descent
from lowbit.rounding.gptq import SEARCH, GPTQOptions, HessianOptions, gptq, share_corrected
from lowbit.rounding.held import Held, HeldBlocks, hold, joined
from lowbit.rounding.hessian import Curvature, Factor, InputData
from lowbit.rounding.row_descent import RowDescent, joined_rows
from lowbit.rounding.row_feedback import damped, parts_of
from lowbit.rounding.target import Rounded, ScaledBlocks, Stored, Target
from lowbit.tensors import QuantizedTensor
from lowbit.workers import run_all

if TYPE_CHECKING:
    from lowbit.settings import Settings

ANEW = "rows rounded anew, by GPTQ, where that is better"
_ROWS_PER_THREAD = 64  # at least


@dataclass(frozen=True)
class RefineOptions(HessianOptions):
    """
    damping     λ as a fraction of mean(diag H)
    shrinkage   ρ, the share by which every off-diagonal of H is taken back, 0 to 1
    correction  α, the share of the error of what lies before that is corrected, 0 to 1; no effect without `drift`.
                None: as GPTQ's
    stream      β, the share of what the residual stream lost before that is corrected, 0 to 1
    sweeps      number of them
    anew        also start from the codes and scales of GPTQ
    reround     with error feedback, on the scales of the first sweep
    block       columns whose changes are spread over the others at once; affects only rounding errors and time
    """

    sweeps: int = 4
    anew: bool = True
    reround: bool = True
    block: int = 128

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
    starts = [start]
    if options.anew and _can_start_anew(start):
        again = gptq(weight, target, data, _anew(options))
        if not again.fell_back and _mixes(start, again.stored):
            starts.append(again.stored)
    if data.rows and target.rows_are_apart:
        return _refine_together(weight, target, data, options, starts)
    return _refine_apart(weight, target, data, options, starts)


def _refine_apart(
    weight: Tensor, target: Target, data: InputData, options: RefineOptions, starts: list[Stored]
) -> Rounded:
    """Every row by itself; each goes on with the start that is better after a sweep."""
    each, apart = target.columns_per_code, target.rows_are_apart
    shares = share_corrected(options.correction, False), options.stream
    slabs: list[tuple[slice, Tensor, Curvature, Factor | None]] = []
    for rows, part in data.by_rows(len(weight)):
        hessian, count = part.hessian(options.damping, options.shrinkage), rows.stop - rows.start
        wanted, curvature = hessian.corrected(weight[rows], *shares, rows), hessian.curvature()
        factor = hessian.factor(each, each) if options.reround else None
        threads = min(torch.get_num_threads(), max(1, count // _ROWS_PER_THREAD)) if apart else 1
        step = -(-count // threads)
        slabs += [(slice(rows.start + first, rows.start + min(first + step, count)), wanted[first : first + step],
                   curvature, factor) for first in range(0, count, step)]  # fmt: skip

    def of_rows(rows: slice, wanted: Tensor, curvature: Curvature, factor: Factor | None) -> tuple[Held, int]:
        unchanged = Descent(hold(target, starts[0], rows), wanted, curvature, options.block)
        begun = [Descent(hold(target, one, rows), wanted, curvature, options.block) for one in starts]
        for descent in begun:
            descent.sweep()
        best, anew = begun[0], 0
        for other in begun[1:]:
            better = other.error() < best.error()
            best.take(other, better)
            anew += int(better.sum())
        if factor is not None:
            _rerounded_where_better(best, factor)
        for _ in range(options.sweeps - 1):
            best.sweep()
        best.refit()
        best.begin()  # anew: rounding errors of the sums have added up
        best.take(unchanged, ~(best.error() < unchanged.error()))
        return best.held, anew

    done: list[tuple[Held, int] | None] = [None] * len(slabs)

    def one(index: int) -> None:
        done[index] = of_rows(*slabs[index])

    if len(slabs) == 1:
        one(0)
    else:
        run_all(((one, index) for index in range(len(slabs))), min(len(slabs), torch.get_num_threads()))
    finished = [result for result in done if result is not None]
    stored = joined([held for held, _ in finished])
    decoded = target.reader(stored)(torch.arange(len(weight)))
    notes = (ANEW,) if any(count for _, count in finished) else ()
    return Rounded(stored, decoded, notes)


def _refine_together(
    weight: Tensor, target: Target, data: InputData, options: RefineOptions, starts: list[Stored]
) -> Rounded:
    """All rows that share a G together (`row_descent`); they go on with the start that is better after a sweep."""
    hessian = data.hessian(options.damping, options.shrinkage)
    wanted = hessian.corrected(weight, share_corrected(options.correction, True), options.stream)
    parts, notes = list[RowDescent](), ()
    for rows, outputs in zip(parts_of(len(weight)), data.rows, strict=True):
        g = damped(outputs)
        begun = [RowDescent(one, target, rows, wanted[rows], g, hessian.curvature()) for one in starts]
        unchanged = begun[0].error()
        for descent in begun:
            descent.sweep()
        best = min(begun, key=RowDescent.error)
        for _ in range(options.sweeps - 1):
            best.sweep()
        if not best.error() < unchanged:
            best = RowDescent(starts[0], target, rows, wanted[rows], g, hessian.curvature())
        elif best is not begun[0]:
            notes = (ANEW,)
        parts.append(best)
    return joined_rows(parts, notes)


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


def _rerounded_where_better(descent: Descent, factor: Factor) -> None:
    """With error feedback on the present scales, then descended; each row that is better so."""
    again = rerounded(descent.held, descent.wanted, factor, descent.block)
    other = Descent(again, descent.wanted, descent.curvature, descent.block)
    other.descend()
    other.refit()
    descent.take(other, other.error() < descent.error())


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
