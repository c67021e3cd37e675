"""Products and a triangular inverse whose bits do not depend on the number of threads.

    product        a @ b                                     rows in parallel, each sum from left to right
    inverse_root   M = L Lᵀ  →  L⁻¹, lower triangular         by blocks of columns, from those products

BLAS and LAPACK split sums as they see fit: a weight at a tie could then round one way with one thread and the other way
with two. Devices other than the CPU do it their own way all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lowbit.kernels.feedback import subtract_product
from lowbit.workers import run_all

_BLOCK = 128
# Multiplications that are worth a thread.
_WORTH_A_THREAD = 1 << 25


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [N, I] @ b [I, K], float32."""
    if a.device.type != "cpu":
        return a @ b
    result = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.float32)
    _subtract(result, -a, b, 0, b.shape[1])
    return result


def inverse_root(matrix: Tensor) -> Tensor | None:
    """L⁻¹ of matrix = L Lᵀ, float32 or float64 [K, K], in its place or not; None where it is not positive definite."""
    if matrix.device.type != "cpu" or matrix.dtype != torch.float32:
        with _one_thread():
            return _small_inverse_root(matrix)
    # Columns to the left of `start` hold what will be L⁻¹, the others what is left of the matrix; both need nothing
    # above the diagonal.
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
    """w −= change @ spread, up to the last diagonal of w [N, K], N ≤ K, but for whole blocks of rows."""
    rows, columns = w.shape
    slabs = [slice(start, min(start + _BLOCK, rows)) for start in range(0, rows, _BLOCK)]
    jobs = [(subtract_product, w[slab], change[slab], spread, 0, columns - rows + slab.stop) for slab in slabs]
    threads = min(torch.get_num_threads(), rows * columns * change.shape[1] // _WORTH_A_THREAD)
    if threads > 1:
        run_all(jobs, threads)
        return
    for job in jobs:
        job[0](*job[1:])


def _subtract(w: Tensor, change: Tensor, spread: Tensor, begin: int, end: int) -> None:
    """w[:, begin:end] −= change @ spread[:, begin:end], slabs of rows in threads; w has contiguous rows."""
    rows = len(w)
    change, spread = change.contiguous(), spread.contiguous()
    work = rows * change.shape[1] * (end - begin)
    threads = max(1, min(torch.get_num_threads(), work // _WORTH_A_THREAD))
    if threads == 1:
        subtract_product(w, change, spread, begin, end)
        return
    step = -(-rows // threads)
    slabs = [slice(start, start + step) for start in range(0, rows, step)]
    run_all(((subtract_product, w[slab], change[slab], spread, begin, end) for slab in slabs), threads)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
