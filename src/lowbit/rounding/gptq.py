"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round column by column, and let later columns make up for the error.

    minimise over codes  tr((Ŵ − W*) H (Ŵ − W*)ᵀ)          H = Σ x xᵀ + λ·1, W* the weight, corrected (`hessian`)
    for j in order:      ŵ_j = nearest(w_j);   e = w_j − ŵ_j;   w_k ← w_k − e · U_jk / U_jj  for k > j;   H⁻¹ = Uᵀ U

On any grid and any ggml type. Order of columns and choice of scales ("static": no g_idx is ever needed, since codes are
stored in place and every column keeps the scale of its group):

    static         scales of all groups are fitted first, columns go by falling diag H
    compensated    groups go by falling Σ diag H, their columns by falling diag H; each group's scale is fitted when its
                   turn comes, to weights that already make up for the groups before

ggml types are always fitted so, block by block, by their encoder; types that round 8 or 4 columns to a lattice point
spread the error of all of these at once. Scales that several rows share, or that are codes themselves, are static.
GPTQ rounds each column once; `refine` sweeps of coordinate descent go on from there (`descent`).

Where H has no inverse at any damping the weight is rounded to nearest, and the note says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lowbit.rounding.cells import LatticeRows, Order, ScalarRows, joined
from lowbit.rounding.descent import descend
from lowbit.rounding.hessian import Factor, PreparedHessian
from lowbit.rounding.hessian import prepare as _prepare
from lowbit.rounding.target import GgmlTarget, GridTarget, Rounded, Target
from lowbit.tensors import Granularity, LayerStats
from lowbit.workers import run_all

_Done = TypeVar("_Done")
# Rows that are worth a thread of their own.
_ROWS_PER_THREAD = 64


@dataclass(frozen=True)
class GPTQOptions:
    """
    damping     λ as a fraction of mean(diag H); raises itself tenfold, up to 1, while H has no Cholesky factor
    act_order   columns by falling diag H; False: as they are stored
    scales      "static" or "compensated", see above; "auto": compensated but where scales are powers of two. Mostly the
                two are close; behind a massive activation, whose error others must make up for by growing, scales
                fitted before leave them no room: in one layer of SmolLM2 the error is 50 times as large
    weighting   squared errors in the search of scales count with diag H ("diagonal"), with what they cost once later
                columns have made up for them ("cost"), or alike ("none")
    block       columns whose changes are spread over later blocks at once; changes nothing but rounding errors and time
    correction  α, how much of the quantized prefix's error is corrected, 0 to 1; without `drift` there is nothing to do
    refine      sweeps of coordinate descent after the last column
    """

    damping: float = 0.01
    act_order: bool = True
    scales: Literal["auto", "static", "compensated"] = "auto"
    weighting: Literal["diagonal", "cost", "none"] = "cost"
    block: int = 128
    correction: float = 0.75
    refine: int = 1


def prepare(stats: LayerStats, options: GPTQOptions) -> PreparedHessian:
    """What `gptq` needs of an input, once for all linears that read it; NonFiniteError where it is not finite."""
    return _prepare(stats, options.damping)


def gptq(weight: Tensor, target: Target, stats: LayerStats | PreparedHessian, options: GPTQOptions) -> Rounded:
    """Round a weight, float32 [N, K], to `target`; `stats` of its input."""
    assert isinstance(target, GridTarget | GgmlTarget), "error feedback needs to know how a target is fitted"
    hessian = prepare(stats, options) if isinstance(stats, LayerStats) else stats
    weight = weight.detach().to(torch.float32)
    if _holds_floats(target):
        return target.nearest(weight)
    run = _run(target, weight.shape[1], options)
    each = target.columns_per_code
    factor = hessian.factor(run if run < weight.shape[1] else each, each, options.act_order)
    if factor is None:
        plain = target.nearest(weight, hessian.diagonal)
        return Rounded(plain.stored, plain.decoded, ("rounded to nearest: the Hessian has no inverse at any damping",))
    notes = () if factor.damping <= options.damping else (f"damping raised to {factor.damping:g}",)
    wanted = hessian.corrected(weight, options.correction)
    order = Order(factor, run, _weights(hessian, factor, options))
    kind = ScalarRows if target.columns_per_code == 1 else LatticeRows

    def round_rows(part: Tensor) -> ScalarRows | LatticeRows:
        part = part.index_select(1, factor.order)
        rows, w = kind(part, order, target), part.clone()
        for begin, end in order.runs():
            rows.fit(w, begin, end)
            rows.round(w, (begin, end, options.block))
        if options.refine and isinstance(rows, ScalarRows):
            descend(part, rows, hessian.descent(factor), options.refine, options.block)
        return rows

    slabs = _in_slabs(round_rows, wanted, isinstance(target, GgmlTarget) or target.rows_are_apart)
    return Rounded(*joined(target, slabs), notes)


def layer_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ): the share of the output's energy that rounding made an error of."""
    error = (weight - decoded).double()
    weight, hessian = weight.double(), hessian.double()
    return ((error @ hessian * error).sum() / (weight @ hessian * weight).sum()).item()


def _weights(hessian: PreparedHessian, factor: Factor, options: GPTQOptions) -> Tensor | None:
    """What squared errors count in the search of scales, [K] by order; nothing in dead columns."""
    if options.weighting == "none":
        return None
    if options.weighting == "diagonal":
        return hessian.diagonal[factor.order]
    return factor.cost.masked_fill(hessian.dead[factor.order], 0.0)


def _holds_floats(target: GridTarget | GgmlTarget) -> bool:
    """True for F32, F16 and BF16, which have no scales and hardly round."""
    return isinstance(target, GgmlTarget) and target.grid.kind.family == "plain"


def _run(target: GridTarget | GgmlTarget, columns: int, options: GPTQOptions) -> int:
    """Columns whose scales are fitted at once."""
    if isinstance(target, GgmlTarget):
        return target.grid.block
    spec = target.spec
    if spec.granularity is not Granularity.GROUP or not target.rows_are_apart or options.scales == "static":
        return columns
    worth_it = spec.scale_format != "e8m0" or options.scales == "compensated"
    return min(spec.columns_per_scale(columns), columns) if worth_it else columns


def _in_slabs(work: Callable[[Tensor], _Done], rows: Tensor, are_apart: bool) -> list[_Done]:
    """`work` on slabs of rows, in threads; the results do not depend on how many."""
    threads = min(torch.get_num_threads(), max(1, len(rows) // _ROWS_PER_THREAD)) if are_apart else 1
    if threads == 1 or rows.device.type != "cpu":
        return [work(rows)]
    slabs = rows.chunk(threads)
    done: list[_Done | None] = [None] * len(slabs)

    def one(index: int) -> None:
        done[index] = work(slabs[index])

    run_all(((one, index) for index in range(len(slabs))), len(slabs))
    return [each for each in done if each is not None]
