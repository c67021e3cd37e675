"""The Hessian of a linear's output error, made ready for error feedback (GPTQ, Frantar et al. 2022, arXiv 2210.17323).

    H = Σ x xᵀ + λ·1       λ = damping · mean(diag H)
    H⁻¹ = Uᵀ U             U upper triangular, in the order in which columns are rounded
    spread = D⁻¹ U         D = diag U: rounding column j with error e changes the columns k > j by −e · spread[j, k]
    cost_j = 1 / U_jj²     what a unit of squared error in column j costs once all later columns have made up for it

No inverse is taken: with J the reversal of columns, J H J = L Lᵀ gives U = J L⁻¹ J. Codes that stand for v columns
(lattices of i-quants) are rounded together, and D is then the block diagonal of U.

Where float32 finds no Cholesky factor, float64 is tried, then ten times the damping, up to 1; after that there is no
factor, and whoever asked rounds to nearest. Columns that were 0 in every token ("dead") take no part: their rows and
columns of H are cleared, their diagonal is 1, so that they neither cause nor receive corrections.

The correction for a quantized prefix (asymmetric calibration: GPTAQ, arXiv 2504.02692; QEP, arXiv 2504.09629): the
input is x where the unquantized model has x₀, so the weight to round is the one that makes W x₀ of x,

    W* = argmin Σ ‖W* x − W x₀‖² = W + W D             D = C (H + λ)⁻¹, C = Σ (x₀ − x) xᵀ

of which a fraction α is taken. D comes with the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.errors import NonFiniteError
from lowbit.rounding.products import inverse_root, product
from lowbit.tensors import LayerStats

LARGEST_DAMPING = 1.0
_STEP = 10.0


@dataclass(frozen=True)
class Factor:
    """H factored in one order of its columns.

    order    int64 [K]         the column that is rounded first, second, …
    spread   float32 [K, K]    unit upper triangular, by order; block-unit where codes stand for several columns
    cost     float32 [K]       by order
    damping  what it took
    """

    order: Tensor
    spread: Tensor
    cost: Tensor
    damping: float


@dataclass(frozen=True)
class PreparedHessian:
    """What linears of one input share. Made by `prepare`; factors are made when first asked for, and kept.

    hessian   float32 [K, K]   Σ x xᵀ with dead columns cleared, their diagonal 1; not damped
    diagonal  float32 [K]      of Σ x xᵀ: 0 where dead
    dead      bool [K]
    damping   asked for
    drift     float32 [K, K] or None: D
    """

    hessian: Tensor
    diagonal: Tensor
    dead: Tensor
    damping: float
    drift: Tensor | None
    _factors: dict[tuple, Factor | None] = field(default_factory=dict, repr=False, compare=False)
    _descents: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def columns(self) -> int:
        return self.hessian.shape[0]

    def factor(self, run: int = 1, step: int = 1, by_importance: bool = True) -> Factor | None:
        """The factor for an order of columns, or None where H has none.

        run            columns that are rounded one after another: the columns of a scale, or 1
        step           columns that are rounded together
        by_importance  runs by falling Σ diag H, within them steps by falling Σ diag H; else as they are stored
        """
        key = (run, step, by_importance)
        if key not in self._factors:
            order = self._order(run, step) if by_importance else torch.arange(self.columns, device=self.dead.device)
            self._factors[key] = self._factored(order, step)
        return self._factors[key]

    def corrected(self, weight: Tensor, fraction: float) -> Tensor:
        """W + fraction · W D, float32 [N, K]."""
        if fraction == 0 or self.drift is None:
            return weight
        return weight + fraction * product(weight, self.drift)

    def descent(self, factor: Factor) -> Tensor:
        """float32 [K, K] by order, diagonal 0: H_jk / H_kk, what column k has to change by when column j does."""
        key = id(factor)  # factors live as long as this
        if key not in self._descents:
            hessian = self.hessian.index_select(0, factor.order).index_select(1, factor.order)
            diagonal = hessian.diagonal() + factor.damping * self._mean()
            self._descents[key] = hessian.div_(diagonal).fill_diagonal_(0.0)
        return self._descents[key]

    def _mean(self) -> float:
        """Of the diagonal of live columns."""
        live = self.diagonal[~self.dead]
        return live.double().mean().item() if live.numel() else 1.0

    def _order(self, run: int, step: int) -> Tensor:
        """Dead columns come last among equals; ties keep the order of storage."""
        count = -(-self.columns // run)
        if step == run:
            return _by_falling_sums(self.diagonal, run)
        runs = _by_falling_sums(self.diagonal, run).split(run) if count * run == self.columns else None
        if runs is None:  # the last run is short: sort starts of runs instead
            starts = torch.arange(0, self.columns, run)
            sums = torch.stack([self.diagonal[start : start + run].sum() for start in starts])
            chosen = starts[sums.cpu().argsort(descending=True, stable=True)].tolist()
            runs = [torch.arange(s, min(s + run, self.columns), device=self.dead.device) for s in chosen]
        return torch.cat([columns[_by_falling_sums(self.diagonal[columns], step)] for columns in runs])

    def _factored(self, order: Tensor, step: int) -> Factor | None:
        mean, damping, reversed_order = self._mean(), self.damping, order.flip(0)
        while True:
            for dtype in (torch.float32, torch.float64):
                damped = self.hessian.index_select(0, reversed_order).index_select(1, reversed_order).to(dtype)
                damped.diagonal().add_(damping * mean)
                root = inverse_root(damped)
                del damped
                found = None if root is None else _factor_of(order, root, step, damping)
                if found is not None:
                    return found
            if damping >= LARGEST_DAMPING:
                return None
            damping = min(max(damping, 1e-4) * _STEP, LARGEST_DAMPING)


def prepare(stats: LayerStats, damping: float = 0.01) -> PreparedHessian:
    """`stats` with a Hessian, ready for all linears that read this input; NonFiniteError where it is not finite."""
    if stats.hessian is None:
        raise AssertionError("error feedback needs the Hessian of the input")
    hessian = stats.hessian.to(torch.float32)
    diagonal = hessian.diagonal().clone()
    if not diagonal.isfinite().all() or (stats.drift is not None and not stats.drift.isfinite().all()):
        raise NonFiniteError(
            f"the Hessian of an input of {len(diagonal)} columns over {stats.tokens} tokens has NaN or inf",
            "check the model's activations on the calibration text, or run it in float32",
        )
    dead = diagonal <= 0
    diagonal = diagonal.clamp(min=0)
    if dead.any():
        hessian = hessian.masked_fill(dead[:, None] | dead[None, :], 0.0)
        hessian.diagonal()[dead] = 1.0
    return PreparedHessian(hessian, diagonal, dead, damping, stats.drift)


def _factor_of(order: Tensor, root: Tensor, step: int, damping: float) -> Factor | None:
    """root: L⁻¹ of H by falling order."""
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
    """Indices of `values`, whole runs of `run` together, by the falling sum of a run."""
    sums = values.double().reshape(-1, run).sum(dim=1)
    chosen = sums.argsort(descending=True, stable=True)
    return (chosen[:, None] * run + torch.arange(run, device=values.device)).flatten()
