"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round column by column; later columns compensate each error.

    minimise over codes  tr((Ŵ − W*) H (Ŵ − W*)ᵀ)          H = Σ x xᵀ + λ·1, W* the weight, corrected (`hessian`)
    for j in order:      ŵ_j = nearest(w_j);   e = w_j − ŵ_j;   w_k ← w_k − e · U_jk / U_jj  for k > j;   H⁻¹ = Uᵀ U

Works on any grid and any ggml type. Codes stay in place and every column keeps the scale of its group, so no g_idx is
needed. Two orders:

    static         fit the scales of all groups first; columns by falling diag H
    compensated    groups by falling Σ diag H, their columns by falling diag H; fit each group's scale when its turn
                   comes, to weights that already compensate the groups before

ggml types are always compensated, block by block, with their encoder as the fit; types that round 8 or 4 columns to a
lattice point spread the error of all of these at once. Scales that rows share, or that are codes themselves, are
static. Tables of values (k-means, logarithmic) are fitted as scales are: one of a whole row before its first column,
as GPTVQ does in one dimension (arXiv 2402.15319); outliers keep the compensated weight in 16 bits. A *run* is the
columns fitted at once: the group of a scale, a ggml block, or all columns with static scales.

GPTQ rounds each column once. Where codes stand for single columns, `refine` sweeps of coordinate descent (QuantEase,
arXiv 2309.01885; CDQuant, arXiv 2406.17542) follow, with scales fixed:

    z_k = w*_k + Σ_{j ≠ k} (w*_j − ŵ_j) H_jk / H_kk      the best value of column k, all others fixed
    ŵ_k ← nearest(z_k)                                   update the z of the others

Each step minimises the error exactly in one weight, so the error never grows. If H has no inverse at any damping, the
weight is rounded to nearest, with a note.

Rows are independent, unless the curvature of the loss in the outputs is known (`InputData.rows`): then each row is
rounded so by itself, and its error fed to the rows after it (`row_feedback`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lowbit.kernels import feedback, reference
from lowbit.kernels.tables import MinifloatFormat
from lowbit.numerics.fitted_grids import ascending_values
from lowbit.numerics.ggml.grid import IntLevels
from lowbit.rounding.hessian import SHRINKAGE, Factor, InputData, PreparedHessian
from lowbit.rounding.row_feedback import parts_of, rounded_in_order, row_factor
from lowbit.rounding.target import GgmlTarget, Rounded, Target
from lowbit.tensors import GroupParams, RangeSearch
from lowbit.workers import run_all

if TYPE_CHECKING:
    from lowbit.settings import Settings

# With --range auto; a finer search gains nothing (docs/gptq.md).
SEARCH = RangeSearch("wmse", steps=24, smallest=0.5)
# α where none is given, without and with feedback between rows; β, of what the residual stream lost (docs/log.md)
CORRECTION, CORRECTION_WITH_ROWS, STREAM_CORRECTION = 0.75, 0.4, 0.4
_ROWS_PER_THREAD = 64  # at least


@dataclass(frozen=True)
class HessianOptions:
    """What roundings by a Hessian share; the fields are told in `GPTQOptions`."""

    damping: float = 0.01
    shrinkage: float = SHRINKAGE
    correction: float | None = None
    stream: float = STREAM_CORRECTION

    @property
    def needs_drift(self) -> bool:
        """True if the unquantized model must run beside the quantized one."""
        return self.correction != 0

    @property
    def needs_lost(self) -> bool:
        """True if what the residual stream lost must be measured too."""
        return self.needs_drift and self.stream > 0


@dataclass(frozen=True)
class GPTQOptions(HessianOptions):
    """
    damping     λ as a fraction of mean(diag H); multiplied by ten, up to 1, while H has no Cholesky factor
    shrinkage   ρ, the share by which every off-diagonal of H is taken back (`hessian`), 0 to 1
    act_order   columns by falling diag H; False: in storage order
    scales      "static" or "compensated", see above; "auto": compensated, unless scales are powers of two. The two are
                usually close. After a massive activation other columns must grow to compensate its error, and static
                scales leave them no room: in one layer of SmolLM2 the error is 50 times as large
    weighting   weights of squared errors in the scale search: diag H ("diagonal"), the cost after later columns have
                compensated ("cost"), or none ("none")
    block       columns whose changes are spread over later blocks at once; affects only rounding errors and time
    correction  α, the share of the quantized prefix's error to correct, 0 to 1; no effect without `drift`. None: less
                where rows are fed than where they are not
    stream      β, the share of what the residual stream lost to correct, 0 to 1; no effect where `lost` is not known,
                and without a correction
    refine      sweeps of coordinate descent after the last column
    search      range search that replaces the target's own, which suits rounding to nearest
    """

    act_order: bool = True
    scales: Literal["auto", "static", "compensated"] = "auto"
    weighting: Literal["diagonal", "cost", "none"] = "cost"
    block: int = 128
    refine: int = 1
    search: RangeSearch | None = None

    @classmethod
    def of(cls, settings: Settings) -> GPTQOptions:
        """The user's settings, defaults for the rest."""
        given = {"damping": settings.damping, "shrinkage": settings.shrinkage,
                 "correction": settings.correction, "stream": settings.stream_correction, "refine": settings.refine,
                 "search": SEARCH if settings.range == "auto" else None}  # fmt: skip
        return cls(**{name: value for name, value in given.items() if value is not None})


def share_corrected(correction: float | None, feeds_rows: bool) -> float:
    """α of a linear whose rows are fed, or not."""
    if correction is not None:
        return correction
    return CORRECTION_WITH_ROWS if feeds_rows else CORRECTION


def gptq(weight: Tensor, target: Target, data: InputData, options: GPTQOptions | None = None) -> Rounded:
    """Round a weight, float32 [N, K], to `target`; `data` holds the statistics of its input."""
    options = options or GPTQOptions()
    target = target if options.search is None else target.with_search(options.search)
    weight = weight.detach().to(torch.float32)
    groups = [(rows, part.hessian(options.damping, options.shrinkage)) for rows, part in data.by_rows(len(weight))]
    if target.holds_floats:
        return replace(target.nearest(weight), fell_back=True)
    notes, factors = _row_factors(target, data)
    if factors:
        groups = [(rows, groups[0][1]) for rows in parts_of(len(weight))]
    slabs: list[_Slab] = []
    order: list[Tensor] = []
    for (rows, hessian), rows_by in zip(groups, factors or [None] * len(groups), strict=True):
        rounder = _row_rounder(weight.shape[1], target, hessian, options)
        if rounder is None:
            note = "rounded to nearest: the Hessian has no inverse at any damping"
            return replace(target.nearest(weight, hessian.diagonal), notes=(note,), fell_back=True)
        factor, round_rows = rounder
        shares = share_corrected(options.correction, rows_by is not None), options.stream
        corrected = hessian.corrected(weight[rows], *shares, rows).index_select(1, factor.order)
        threads = min(torch.get_num_threads(), len(corrected) // _ROWS_PER_THREAD) if target.rows_are_apart else 1
        if rows_by is not None:  # one step after another
            done = list(rounded_in_order(round_rows, corrected, rows_by))
            order.append(rows_by.order + rows.start)
        elif threads <= 1 or weight.device.type != "cpu":
            done = [round_rows(corrected)]
        else:
            done = _in_threads(round_rows, corrected.chunk(threads))
        slabs += [_stored(each, factor, target.columns_per_code) for each in done]
    decoded = torch.cat([slab.decoded for slab in slabs])
    codes = torch.cat([slab.codes for slab in slabs])
    damping = max(slab.damping for slab in slabs)
    if damping > options.damping:
        notes = (*notes, f"damping raised to {damping:g}")
    rounded = Rounded(target.with_codes([slab.fitted for slab in slabs], codes), decoded, notes)
    return rounded.in_rows(torch.cat(order).argsort()) if order else rounded


def _row_factors(target: Target, data: InputData) -> tuple[tuple[str, ...], list[Factor]]:
    """(notes, the factors of G for each part of the rows); none where there is no G, or rows cannot wait for others."""
    if not data.rows:
        return (), []
    if not target.rows_are_apart:
        return ("errors of rows are not fed to other rows: they share scales",), []
    if target.fits_tables:
        return ("errors of rows are not fed to other rows: tables are fitted to all rows at once",), []
    factors = [row_factor(part) for part in data.rows]
    if any(factor is None for factor in factors):
        return ("errors of rows are not fed to other rows: the curvature of the outputs has no inverse",), []
    return (), [factor for factor in factors if factor is not None]


@dataclass(frozen=True)
class _Slab:
    """Some rows after rounding, in storage order: decoded [n, K], codes, params by run, and the damping used."""

    decoded: Tensor
    codes: Tensor
    fitted: list[Any]
    damping: float


def _row_rounder(
    columns: int, target: Target, hessian: PreparedHessian, options: GPTQOptions
) -> tuple[Factor, Callable[[Tensor], ScalarRows | LatticeRows]] | None:
    """(the factor of a Hessian, what rounds rows [n, K] in its order); None if the Hessian has no factor."""
    each, run = target.columns_per_code, target.columns_per_fit(columns, options.scales)
    factor = hessian.factor(run if run < columns else each, each, options.act_order)
    if factor is None:
        return None
    runs, weighting = _runs(factor.order, run), _weighting(hessian, factor, options)
    descent = hessian.descent(factor) if options.refine and each == 1 else None
    kind = TableRows if target.fits_tables else ScalarRows if each == 1 else LatticeRows

    def round_rows(part: Tensor) -> ScalarRows | LatticeRows:
        rows, w = kind(target, factor, weighting, part), part.clone()
        for begin, end in runs:
            rows.fit(w, begin, end)
            rows.round(w, (begin, end, options.block), factor.spread)
        if descent is not None and isinstance(rows, ScalarRows):
            z = part.clone()
            feedback.subtract_product(z, rows.decoded - part, descent, 0, columns)
            for _ in range(options.refine):
                rows.round(z, (0, columns, options.block), descent, descend=True)
        return rows

    return factor, round_rows


def _stored(rows: ScalarRows | LatticeRows, factor: Factor, each: int) -> _Slab:
    """Rounded rows in storage order."""
    order = factor.order
    return _Slab(rows.decoded.index_select(1, order.argsort()),
                 rows.codes.index_select(1, (order[::each] // each).argsort()),
                 [rows.fitted[first] for first in sorted(rows.fitted)], factor.damping)  # fmt: skip


def _runs(order: Tensor, run: int) -> list[tuple[int, int]]:
    """(begin, end) of each run, in rounding order; the run stored last may be short."""
    begin, runs = 0, []
    while begin < len(order):
        first = int(order[begin]) // run * run
        runs.append((begin, begin + min(run, len(order) - first)))
        begin = runs[-1][1]
    return runs


def _weighting(hessian: PreparedHessian, factor: Factor, options: GPTQOptions) -> Tensor | None:
    """Weights of squared errors in the scale search, [K] in rounding order; 0 for dead columns."""
    if options.weighting == "none":
        return None
    if options.weighting == "diagonal":
        return hessian.diagonal[factor.order]
    return factor.cost.masked_fill(hessian.dead[factor.order], 0.0)


class ScalarRows:
    """Rows of a weight whose codes stand for single columns, rounded column by column.

    fitted   first column of a run → params that the target's `fit` returned
    All [N, K] in rounding order: scale, offset or None, decoded float32; zero_point int32 or None; codes int8 or uint8
    """

    def __init__(self, target: Target, factor: Factor, weighting: Tensor | None, w: Tensor):
        self.target, self.order, self.weighting = target, factor.order, weighting
        self.levels = target.levels
        self.scale, self.decoded = torch.empty_like(w), torch.empty_like(w)
        self.offset: Tensor | None = None
        self.zero_point: Tensor | None = None
        integers = isinstance(self.levels, IntLevels)
        self.codes = torch.empty(w.shape, dtype=torch.int8 if integers else torch.uint8, device=w.device)
        self.fitted: dict[int, Any] = {}

    def fit(self, w: Tensor, begin: int, end: int) -> None:
        """Fit the scales of a run to the current w [N, K]."""
        columns = self.order[begin:end]
        fitted = fit_run(self.target, w, columns, begin, self.weighting)
        first = columns.min()
        self.fitted[int(first)] = fitted
        params = self.target.column_params(fitted, w[:, begin:end])
        group = (columns - first) // params.columns
        self.scale[:, begin:end] = params.scale.index_select(1, group)
        if params.offset is not None:
            self.offset = torch.zeros_like(w) if self.offset is None else self.offset
            self.offset[:, begin:end] = params.offset.index_select(1, group)
        if params.zero_point is not None:
            self.zero_point = torch.zeros_like(w, dtype=torch.int32) if self.zero_point is None else self.zero_point
            self.zero_point[:, begin:end] = params.zero_point.index_select(1, group)

    def round(self, w: Tensor, span: feedback.Span, spread: Tensor, descend: bool = False) -> None:
        """Round the columns of `span` and update the others in w; arguments as in `lowbit.kernels.feedback`."""
        levels, out = self.levels, (self.codes, self.decoded, descend)
        if isinstance(levels, IntLevels):
            limits = (levels.lowest, levels.highest)
            feedback.feedback_int(w, spread, span, self.scale, self.offset, self.zero_point, limits, *out)
        elif isinstance(levels, MinifloatFormat):
            feedback.feedback_minifloat(w, spread, span, self.scale, levels, *out)
        else:
            assert levels is not None, f"{self.target.name} has no levels"
            feedback.feedback_codebook(w, spread, span, self.scale, levels, *out)


class TableRows(ScalarRows):
    """Rows whose values are fitted, by row or by group; in torch, column by column.

    values  place of a column → (its values ascending [N, 2^b], their middles [N, 2^b − 1], the code of each [N, 2^b])
    kept    bool [N, K] in rounding order: outliers; None where there are none
    """

    def __init__(self, target: Target, factor: Factor, weighting: Tensor | None, w: Tensor):
        super().__init__(target, factor, weighting, w)
        self.values: list[tuple[Tensor, Tensor, Tensor]] = [()] * w.shape[1]  # type: ignore[list-item]
        self.kept: Tensor | None = None

    def fit(self, w: Tensor, begin: int, end: int) -> None:
        columns = self.order[begin:end]
        fitted = fit_run(self.target, w, columns, begin, self.weighting)
        first = int(columns.min())
        self.fitted[first] = fitted
        params = self.target.column_params(fitted, w[:, begin:end])
        ascending, codes = ascending_values(GroupParams(params.scale, table=params.table))
        middles = (ascending[..., 1:] + ascending[..., :-1]) / 2
        groups = [tuple(each[:, group].contiguous() for each in (ascending, middles, codes))
                  for group in range(ascending.shape[1])]  # fmt: skip
        for place, column in enumerate(columns.tolist(), begin):
            self.values[place] = groups[(column - first) // params.columns]
        if fitted.outliers is not None:
            kept = torch.zeros(w.shape, dtype=torch.bool, device=w.device).scatter(1, fitted.outliers.columns, True)
            self.kept = kept.index_select(1, self.order)

    def round(self, w: Tensor, span: feedback.Span, spread: Tensor, descend: bool = False) -> None:
        reference.feedback(w, spread, span, descend, self.codes, self.decoded, self._nearest)
        if self.kept is not None:  # one run holds all columns
            self.fitted[0] = self.fitted[0].keeping(self.decoded.index_select(1, self.order.argsort()))

    def _nearest(self, w: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        ascending, middles, codes = self.values[here.start]
        index = torch.searchsorted(middles, w.contiguous())
        value = ascending.gather(1, index)
        if self.kept is not None:
            value = torch.where(self.kept[:, here], self.target.grid.storable(w), value)  # type: ignore[attr-defined]
        return codes.gather(1, index).to(torch.uint8), value


class LatticeRows:
    """Rows of a ggml type that rounds `columns_per_code` columns together.

    fitted   first column of a block → its params
    decoded  float32 [N, K]; codes int32 [N, K / columns_per_code]; both in rounding order
    """

    def __init__(self, target: Target, factor: Factor, weighting: Tensor | None, w: Tensor):
        assert isinstance(target, GgmlTarget), "no grid of a folder has a lattice"
        self.target, self.grid, self.factor, self.weighting = target, target.grid, factor, weighting
        self.decoded = torch.empty_like(w)
        self.codes = torch.empty(len(w), w.shape[1] // target.columns_per_code, dtype=torch.int32, device=w.device)
        self.fitted: dict[int, Any] = {}

    def fit(self, w: Tensor, begin: int, end: int) -> None:
        """Fit the scales of a block to the current w [N, K]."""
        columns = self.factor.order[begin:end]
        self.first = int(columns.min())
        self.fitted[self.first] = fit_run(self.target, w, columns, begin, self.weighting)

    def round(self, w: Tensor, span: feedback.Span, spread: Tensor) -> None:
        """Round the block fitted last and update the later columns of w."""
        (begin, end, _), each = span, self.grid.columns_per_code
        change = torch.empty_like(w[:, begin:end])
        for start in range(begin, end, each):
            now = slice(start, start + each)
            place = int(self.factor.order[start]) - self.first
            params = self.grid.at(self.fitted[self.first], place, place + each)
            codes = self.grid.round(w[:, now], params, self.factor.cost[now])
            self.decoded[:, now] = self.grid.decode(codes, params)
            errors = change[:, start - begin : start - begin + each]
            errors.copy_(w[:, now] - self.decoded[:, now])
            feedback.subtract_product(w, errors, spread[now], start + each, end)
            self.codes[:, start // each] = codes[:, 0]
        feedback.subtract_product(w, change, spread[begin:end], end, w.shape[1])


def fit_run(target: Target, w: Tensor, columns: Tensor, begin: int, weighting: Tensor | None) -> Any:
    """Params that `target` fits to a run, in storage order; `columns` are its column numbers, from place `begin` on."""
    stored = begin + columns.argsort()
    return target.fit(w.index_select(1, stored), None if weighting is None else weighting[stored])


def _in_threads(round_rows: Callable[[Tensor], Any], slabs: tuple[Tensor, ...]) -> list[Any]:
    """`round_rows` of each slab; the results do not depend on the number of slabs."""
    done: list[Any] = [None] * len(slabs)

    def one(index: int) -> None:
        done[index] = round_rows(slabs[index])

    run_all(((one, index) for index in range(len(slabs))), len(slabs))
    return done
