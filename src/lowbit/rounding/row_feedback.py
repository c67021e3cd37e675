"""Error feedback between the rows of a weight, by what the loss says of pairs of outputs (YAQA, Tseng et al. 2025,
arXiv 2505.22988; the factors are those of K-FAC, Martens and Grosse 2015, arXiv 1503.05671).

    minimise over codes   tr(G (Ŵ − W*) H (Ŵ − W*)ᵀ)
    for rows i in order   ŵ_i = GPTQ(w_i), in H;   e = w_i − ŵ_i;   w_k ← w_k − e · V_ik / V_ii  for k > i

    G [N, N]  curvature of the loss in the outputs of the linear; G⁻¹ = Vᵀ V, V upper triangular, in rounding order
    H [K, K]  that in its inputs (`hessian`)

The Hessian of all weights of a linear is near the Kronecker product G ⊗ H. GPTQ alone is the case G = 1: its rows know
nothing of each other. With G, the error of a row is partly made up for by the rows after it, where the loss cannot tell
the two apart: outputs of one attention head, channels of the residual stream that later layers read as one. The best
values of all later rows, given the error e of row i, do not depend on H, so each row is a GPTQ of its own.

Rows go by falling diag G, ROWS at a time: the rows of a step are rounded side by side, and their errors are spread
together, through the block diagonal of V, as those of a lattice are.

G is estimated from the gradients of few tokens, and heavy-tailed, so its off-diagonals are shrunk more than those of H.
Outputs that the loss does not depend on take no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lowbit.kernels import feedback
from lowbit.rounding.hessian import Factor, prepared, row_groups

ROWS = 8  # rounded side by side
LARGEST_PART = 2048  # rows of one G; a linear with more has several, of consecutive rows
DAMPING = 0.01  # of the mean of diag G
SHRINKAGE = 0.3  # of G


class HasDecoded(Protocol):
    """Rows after rounding: decoded float32 [n, K], columns in the order of the weight that was given."""

    decoded: Tensor


Rows = TypeVar("Rows", bound=HasDecoded)


def parts_of(rows: int) -> list[slice]:
    """The consecutive rows that share a G."""
    return row_groups(rows, -(-rows // LARGEST_PART))


def damped(curvature: Tensor) -> Tensor:
    """G as it is computed with, float32 [n, n], of the measured one."""
    return prepared(curvature, DAMPING, SHRINKAGE).curvature().within(slice(None))


def row_factor(curvature: Tensor) -> Factor | None:
    """The factor of G, float32 [n, n]; None if it has none."""
    together = _rows_together(len(curvature))
    return prepared(curvature, DAMPING, SHRINKAGE).factor(together, together)


def _rows_together(rows: int) -> int:
    """The largest number up to ROWS that divides `rows`."""
    return next(count for count in range(min(ROWS, rows), 0, -1) if rows % count == 0)


def rounded_in_order(round_rows: Callable[[Tensor], Rows], weight: Tensor, factor: Factor) -> Iterator[Rows]:
    """Round float32 [N, K] step by step: what `round_rows` made of the rows factor.order[0:step], [step:2 step], …

    round_rows  rounds some rows; it may not write to them
    """
    together = _rows_together(len(weight))
    w = weight.index_select(0, factor.order)
    for begin in range(0, len(w), together):
        end = begin + together
        rows = round_rows(w[begin:end])
        if end < len(w):
            change = w[begin:end] - rows.decoded
            feedback.subtract_product(w[end:], factor.spread[begin:end, end:].t(), change, 0, w.shape[1])
        yield rows


def curvature_of(gradient: Tensor, power: float) -> Tensor:
    """Σ_t g gᵀ / (mean g²)^(1 − power): float32 [n, n] of the gradients [tokens, n] of some outputs.

    Squares of gradients are heavy-tailed; with power ½ a token counts by the size of its gradient, not by its square.
    """
    g = gradient.to(torch.float32)
    size = g.square().mean(dim=1, keepdim=True)
    g = g * torch.where(size > 0, size, torch.inf).pow((power - 1) / 2)
    return g.t() @ g
