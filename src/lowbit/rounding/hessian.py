"""The Hessian of a linear's output error, factored for error feedback (GPTQ, Frantar et al. 2022, arXiv 2210.17323).

    H = (1 − ρ) Σ x xᵀ + ρ diag Σ x xᵀ + λ·1       λ = damping · mean(diag H)
    H⁻¹ = Uᵀ U             U upper triangular, in rounding order
    spread = D⁻¹ U         D = diag U: rounding column j with error e changes the columns k > j by −e · spread[j, k]
    cost_j = 1 / U_jj²     cost of a unit of squared error in column j after all later columns have compensated

No inverse is taken: with J the reversal of columns, J H J = L Lᵀ gives U = J L⁻¹ J. Codes that stand for v columns
(lattices of i-quants) are rounded together, and D is then the block diagonal of U.

Shrinkage ρ (Schäfer and Strimmer 2005, target D; Ledoit and Wolf 2004) keeps every diagonal and takes from what the
text says of pairs of channels: those are what differs in another domain, and what error feedback believes. Unlike
damping, it is in proportion to each channel, so that one massive activation does not set it for all.

If float32 finds no Cholesky factor, float64 is tried, then ten times the damping, up to 1; after that there is no
factor, and the caller rounds to nearest. Columns that are 0 in every token ("dead") take no part: their rows and
columns of H are cleared and their diagonal is 1, so that they neither cause nor receive corrections.

The correction for a quantized prefix (asymmetric calibration: GPTAQ, arXiv 2504.02692; QEP, arXiv 2504.09629): the
quantized model's input is x, the unquantized model's x₀, so the weight to round is the one that maps x to W x₀,

    W* = argmin Σ ‖W* x − W x₀‖² = W + W D             D = C (H + λ)⁻¹, C = Σ (x₀ − x) xᵀ

If the output is added to the residual stream r, as those of attention and MLP are, it can make up for what the stream
lost before too, so far as x tells:

    W* = argmin Σ ‖(r + W* x) − (r₀ + W x₀)‖² = W + W D + R                   R = C_r (H + λ)⁻¹, C_r = Σ (r₀ − r) xᵀ

Fractions of W D and of R are applied. D and R come with the statistics.

On the CPU, the bits of products and of L⁻¹ do not depend on the number of threads. (BLAS and LAPACK split sums freely,
and a weight at a tie could then round differently with one thread and with two.) Rows of a product run in parallel,
each sum from left to right; L⁻¹ is built from such products, by blocks of columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.errors import NonFiniteError
from lowbit.kernels.feedback import subtract_product
from lowbit.tensors import LayerStats
from lowbit.workers import run_all

LARGEST_DAMPING = 1.0
SHRINKAGE = 0.2  # ρ where none is given; what it gains: docs/benchmarks.md#domains
_STEP = 10.0
_BLOCK = 128
_WORTH_A_THREAD = 1 << 25  # multiplications


@dataclass
class InputData:
    """The statistics of one input (None if no token reached it), with the Hessians that its readers share.

    parts  where groups of output rows have Hessians of their own (`row_groups`): one for each; empty otherwise. `stats`
           is then that of the first
    rows   of one reader: G of each of its consecutive parts (`row_feedback`), float32 [n, n]; empty otherwise
    """

    stats: LayerStats | None = None
    parts: tuple[InputData, ...] = ()
    rows: tuple[Tensor, ...] = ()
    _hessians: dict[tuple[float, float], PreparedHessian] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that reached the input."""
        return 0 if self.stats is None else self.stats.tokens

    @property
    def importance(self) -> Tensor | None:
        """Mean x² of every channel, float32 [K]."""
        return None if self.stats is None else self.stats.mean_sq

    @property
    def has_hessian(self) -> bool:
        return self.stats is not None and self.stats.hessian is not None

    def hessian(self, damping: float, shrinkage: float = 0.0) -> PreparedHessian:
        """The Hessian, prepared; NonFiniteError if it is not finite."""
        key = (damping, shrinkage)
        if key not in self._hessians:
            assert self.stats is not None, "error feedback needs the statistics of the input"
            self._hessians[key] = prepare(self.stats, damping, shrinkage)
        return self._hessians[key]

    def of(self, linear: str) -> InputData:
        """The data of one reader: itself, or what was weighed for this linear."""
        weighted = () if self.stats is None else self.stats.weighted.get(linear, ())
        parts = tuple(InputData(stats) for stats in weighted)
        return InputData(parts[0].stats, parts if len(parts) > 1 else ()) if parts else self

    def by_rows(self, rows: int) -> list[tuple[slice, InputData]]:
        """The rows of a weight that share a Hessian, with their data."""
        if not self.parts:
            return [(slice(0, rows), self)]
        return list(zip(row_groups(rows, len(self.parts)), self.parts, strict=True))

    def energy(self, weight: Tensor) -> float:
        """tr(W H Wᵀ), in float32: what error feedback leaves is a small difference of large terms behind a massive
        activation, of which bfloat16 would show the rounding alone. Never below 0."""
        assert self.stats is not None
        assert self.stats.hessian is not None
        return max(0.0, ((weight @ self.stats.hessian) * weight).sum().item())


@dataclass(frozen=True)
class Factor:
    """H factored in one order of its columns; spread and cost are in that order.

    order    int64 [K]         first, second, … column to round
    spread   float32 [K, K]    unit upper triangular; block-unit if codes stand for several columns
    cost     float32 [K]
    damping  used to factor
    """

    order: Tensor
    spread: Tensor
    cost: Tensor
    damping: float


@dataclass(frozen=True)
class Curvature:
    """H, damped, as coordinate descent uses it; columns in storage order.

    spread    float32 [K, K]   H_jk / H_kk, diagonal 0
    diagonal  float32 [K]      H_kk
    """

    spread: Tensor
    diagonal: Tensor

    def within(self, columns: slice | Tensor) -> Tensor:
        """H of some columns, float32 [n, n]."""
        diagonal = self.diagonal[columns]
        part = self.spread[columns][:, columns] * diagonal
        return part.diagonal_scatter(diagonal)


@dataclass(frozen=True)
class PreparedHessian:
    """The Hessian that the readers of one input share (`prepare`); factors are computed on first use and kept.

    hessian    float32 [K, K]   Σ x xᵀ with dead columns cleared, their diagonal 1; neither shrunk nor damped
    diagonal   float32 [K]      of Σ x xᵀ, 0 for dead columns
    dead       bool [K]
    mean       of the diagonal over live columns, 1 if there are none
    damping    requested
    drift      float32 [K, K] or None: D
    lost       float32 [N, K] or None: R
    shrinkage  ρ, 0 to 1
    """

    hessian: Tensor
    diagonal: Tensor
    dead: Tensor
    mean: float
    damping: float
    drift: Tensor | None
    shrinkage: float = 0.0
    lost: Tensor | None = None
    _factors: dict[tuple[int, int, bool], Factor | None] = field(default_factory=dict, repr=False, compare=False)
    _descents: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _curvatures: list[Curvature] = field(default_factory=list, repr=False, compare=False)

    def factor(self, run: int = 1, step: int = 1, by_importance: bool = True) -> Factor | None:
        """The factor for an order of columns, or None if H has none.

        run            columns rounded one after another: the columns of a scale, or 1
        step           columns rounded together
        by_importance  runs by falling Σ diag H, within them steps by falling Σ diag H; else in storage order
        """
        key = (run, step, by_importance)
        if key not in self._factors:
            columns = len(self.diagonal)
            order = self._order(run, step) if by_importance else torch.arange(columns, device=self.dead.device)
            self._factors[key] = self._factored(order, step)
        return self._factors[key]

    def corrected(self, weight: Tensor, fraction: float, stream: float = 0.0, rows: slice = slice(None)) -> Tensor:
        """W + fraction · W D + stream · R, float32 [n, K], of some rows of the linear; W if the fraction is 0."""
        if fraction == 0 or self.drift is None:
            return weight
        corrected = weight + fraction * product(weight, self.drift)
        return corrected if self.lost is None else corrected + stream * self.lost[rows]

    def descent(self, factor: Factor) -> Tensor:
        """H_jk / H_kk, the change of column k per change of column j: float32 [K, K] in rounding order, diagonal 0."""
        key = id(factor)  # factors live as long as this
        if key not in self._descents:
            hessian = self._shrunk(factor.order, torch.float32)
            diagonal = hessian.diagonal() + factor.damping * self.mean
            self._descents[key] = hessian.div_(diagonal).fill_diagonal_(0.0)
        return self._descents[key]

    def _shrunk(self, order: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of H in an order of columns, shrunk but not damped."""
        hessian = self.hessian.index_select(0, order).index_select(1, order).to(dtype)
        if self.shrinkage:
            diagonal = hessian.diagonal().clone()
            hessian.mul_(1 - self.shrinkage).diagonal().copy_(diagonal)
        return hessian

    def curvature(self) -> Curvature:
        """The damped Hessian in storage order, for descent that needs no factor."""
        if not self._curvatures:
            hessian = self._shrunk(torch.arange(len(self.hessian), device=self.hessian.device), torch.float32)
            diagonal = hessian.diagonal() + self.damping * self.mean
            self._curvatures.append(Curvature((hessian / diagonal).fill_diagonal_(0.0), diagonal))
        return self._curvatures[0]

    def _order(self, run: int, step: int) -> Tensor:
        """Columns by falling sums of the diagonal, dead ones last; ties keep the storage order."""
        columns = len(self.diagonal)
        if step == run:
            return _by_falling_sums(self.diagonal, run)
        if columns % run:  # the last run is short: sort starts of runs instead
            starts = torch.arange(0, columns, run)
            sums = torch.stack([self.diagonal[start : start + run].sum() for start in starts])
            chosen = starts[sums.cpu().argsort(descending=True, stable=True)].tolist()
            runs = [torch.arange(s, min(s + run, columns), device=self.dead.device) for s in chosen]
        else:
            runs = _by_falling_sums(self.diagonal, run).split(run)
        return torch.cat([places[_by_falling_sums(self.diagonal[places], step)] for places in runs])

    def _factored(self, order: Tensor, step: int) -> Factor | None:
        damping, reversed_order = self.damping, order.flip(0)
        while True:
            for dtype in (torch.float32, torch.float64):
                damped = self._shrunk(reversed_order, dtype)
                damped.diagonal().add_(damping * self.mean)
                root = inverse_root(damped)
                del damped
                factor = None if root is None else _factor_of(order, root, step, damping)
                if factor is not None:
                    return factor
            if damping >= LARGEST_DAMPING:
                return None
            damping = min(max(damping, 1e-4) * _STEP, LARGEST_DAMPING)


def prepare(stats: LayerStats, damping: float = 0.01, shrinkage: float = 0.0) -> PreparedHessian:
    """The prepared Hessian of `stats`; NonFiniteError if it is not finite."""
    if stats.hessian is None:
        raise AssertionError("error feedback needs the Hessian of the input")
    hessian = stats.hessian.to(torch.float32)
    foretold = [each for each in (stats.drift, stats.lost) if each is not None]
    if not hessian.diagonal().isfinite().all() or not all(each.isfinite().all() for each in foretold):
        raise NonFiniteError(
            f"the Hessian of an input of {len(hessian)} columns over {stats.tokens} tokens has NaN or inf",
            "check the model's activations on the calibration text, or run it in float32",
        )
    return prepared(hessian, damping, shrinkage, stats.drift, stats.lost)


def prepared(
    hessian: Tensor, damping: float, shrinkage: float, drift: Tensor | None = None, lost: Tensor | None = None
) -> PreparedHessian:
    """A finite float32 [K, K], prepared."""
    diagonal = hessian.diagonal().clone()
    dead = diagonal <= 0
    diagonal = diagonal.clamp(min=0)
    if dead.any():
        hessian = hessian.masked_fill(dead[:, None] | dead[None, :], 0.0)
        hessian.diagonal()[dead] = 1.0
    live = diagonal[~dead]
    mean = live.double().mean().item() if live.numel() else 1.0
    return PreparedHessian(hessian, diagonal, dead, mean, damping, drift, shrinkage, lost)


def row_groups(rows: int, groups: int) -> list[slice]:
    """Consecutive rows in groups as equal as can be; no more groups than rows."""
    groups = min(groups, rows)
    edges = [rows * index // groups for index in range(groups + 1)]
    return [slice(first, last) for first, last in pairwise(edges)]


def _factor_of(order: Tensor, root: Tensor, step: int, damping: float) -> Factor | None:
    """root: L⁻¹ of H in reversed order."""
    columns = len(order)
    upper = root.flip(0, 1).float().contiguous()
    diagonal = upper.diagonal()
    if not upper.isfinite().all() or not (diagonal > 0).all():
        return None
    if step == 1:
        cost = diagonal.square().reciprocal()
        return Factor(order, upper.div_(diagonal.clone()[:, None]), cost, damping)
    steps = columns // step
    blocks = upper.reshape(steps, step, steps, step).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    inverse = torch.linalg.solve_triangular(blocks, torch.eye(step, device=root.device).expand_as(blocks), upper=True)
    spread = (inverse @ upper.reshape(steps, step, columns)).reshape(columns, columns).contiguous()
    # An error e costs ‖e · block⁻¹‖²; of column j alone, the j-th row of block⁻¹ squared.
    return Factor(order, spread, inverse.square().sum(dim=2).flatten(), damping)


def _by_falling_sums(values: Tensor, run: int) -> Tensor:
    """Indices of `values`, run by run, by the falling sum of a run."""
    sums = values.double().reshape(-1, run).sum(dim=1)
    chosen = sums.argsort(descending=True, stable=True)
    return (chosen[:, None] * run + torch.arange(run, device=values.device)).flatten()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [N, I] @ b [I, K], float32."""
    if a.device.type != "cpu":
        return a @ b
    change, b = (-a).contiguous(), b.contiguous()
    (rows, inner), columns = a.shape, b.shape[1]
    result = torch.zeros((rows, columns), dtype=torch.float32)
    threads = max(1, min(torch.get_num_threads(), rows * inner * columns // _WORTH_A_THREAD))
    if threads == 1:
        subtract_product(result, change, b, 0, columns)
        return result
    slabs = [slice(start, start + -(-rows // threads)) for start in range(0, rows, -(-rows // threads))]
    run_all(((subtract_product, result[slab], change[slab], b, 0, columns) for slab in slabs), threads)
    return result


def inverse_root(matrix: Tensor) -> Tensor | None:
    """L⁻¹ of matrix = L Lᵀ, float32 or float64 [K, K], may overwrite it; None if it is not positive definite."""
    if matrix.device.type != "cpu" or matrix.dtype != torch.float32:
        with _one_thread():
            return _small_inverse_root(matrix)
    # Columns left of `start` hold L⁻¹ so far, the others the remaining matrix; nothing above the diagonal is read.
    columns, both = len(matrix), matrix
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        with _one_thread():
            inverse = _small_inverse_root(both[start:stop, start:stop])
        if inverse is None:
            return None
        both[start:stop, :start] = product(inverse, both[start:stop, :start])
        both[start:stop, start:stop] = inverse
        below = product(both[stop:, start:stop], inverse.t())
        both[stop:, start:stop] = 0
        _subtract_lower(both[stop:], below, torch.cat([both[start:stop, :stop], below.t()], dim=1))
    both.tril_()
    return both if both.isfinite().all() else None


def _small_inverse_root(matrix: Tensor) -> Tensor | None:
    root, failed = torch.linalg.cholesky_ex(matrix)
    if failed or not root.isfinite().all():
        return None
    identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, identity, upper=False)
    return inverse if inverse.isfinite().all() else None


def _subtract_lower(w: Tensor, change: Tensor, spread: Tensor) -> None:
    """w −= change @ spread, up to the last diagonal of w [N, K], N ≤ K, rounded up to whole blocks of rows."""
    rows, columns = w.shape
    slabs = [slice(start, min(start + _BLOCK, rows)) for start in range(0, rows, _BLOCK)]
    jobs = [(subtract_product, w[slab], change[slab], spread, 0, columns - rows + slab.stop) for slab in slabs]
    threads = min(torch.get_num_threads(), rows * columns * change.shape[1] // _WORTH_A_THREAD)
    if threads > 1:
        run_all(jobs, threads)
        return
    for job in jobs:
        job[0](*job[1:])


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
