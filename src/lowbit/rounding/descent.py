"""Coordinate descent over codes (QuantEase, arXiv 2309.01885; CDQuant, arXiv 2406.17542): GPTQ's answer, improved.

    z_k = w*_k + Σ_{j ≠ k} (w*_j − ŵ_j) H_jk / H_kk      the best value of column k, all others as they are
    ŵ_k ← nearest(z_k)                                   and the z of the others follow

Each step minimises the error exactly in one weight, so the error never grows. Scales stay as they are.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.kernels.feedback import subtract_product
from lowbit.rounding.cells import ScalarRows


def descend(wanted: Tensor, rows: ScalarRows, spread: Tensor, sweeps: int, block: int) -> None:
    """`sweeps` over all columns of `rows`, towards `wanted` [N, K] by order; spread as of `PreparedHessian.descent`."""
    z = wanted.clone()
    columns = wanted.shape[1]
    subtract_product(z, rows.decoded - wanted, spread, 0, columns)
    for _ in range(sweeps):
        rows.round(z, (0, columns, block), spread, descend=True)
