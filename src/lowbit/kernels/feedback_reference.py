"""Rounding with error feedback in torch: the readable specification, which the compiled core must match bit for bit.

Every weight sees the same float32 operations in the same order, whatever the number of rows or threads: a product is
rounded before it is added, and the sum over the columns of a block goes from left to right. Other devices than the CPU
may sum in their own order (`torch.matmul`), so a code that lies at a tie can differ there.

Signatures and shapes are those of `lowbit.kernels.feedback`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels import reference
from lowbit.numerics import codebook_tables
from lowbit.numerics.codebook_tables import Codebook
from lowbit.numerics.minifloat_formats import MinifloatFormat

_LEAST_SCALE = torch.finfo(torch.float32).smallest_normal


def subtract_product(w: Tensor, change: Tensor, spread: Tensor, begin: int, end: int) -> None:
    """w[:, begin:end] −= change @ spread[:, begin:end], in place."""
    here = spread[:, begin:end]
    if w.device.type != "cpu":
        w[:, begin:end] -= change @ here
        return
    total = torch.zeros_like(w[:, begin:end])
    for column in range(change.shape[1]):
        total += change[:, column : column + 1] * here[column]
    w[:, begin:end] -= total


def feedback(
    w: Tensor, spread: Tensor, span: tuple[int, int, int], descend: bool, codes: Tensor, decoded: Tensor, nearest
) -> None:
    """nearest(weights [N, 1], column) → (codes [N, 1], decoded [N, 1])."""
    begin, end, block = span
    for start in range(begin, end, block):
        stop = min(start + block, end)
        change = torch.empty_like(w[:, start:stop])
        for column in range(start, stop):
            here = slice(column, column + 1)
            code, value = nearest(w[:, here], here)
            delta = value - decoded[:, here] if descend else w[:, here] - value
            codes[:, here], decoded[:, here] = code, value
            first = start if descend else column + 1
            w[:, first:stop] -= delta * spread[column, first:stop]
            change[:, column - start : column - start + 1] = delta
        if descend:
            subtract_product(w, change, spread[start:stop], 0, start)
        subtract_product(w, change, spread[start:stop], stop, w.shape[1])


def nearest_int(scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, qmin: int, qmax: int):
    """x = scale · (code − zero_point) + offset; the code of 0 where the scale is 0."""

    def nearest(w: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        above = w if offset is None else w - offset[:, here]
        steps = torch.where(scale[:, here] == 0, 0.0, above / scale[:, here])
        zero = torch.zeros((), dtype=torch.int32, device=w.device) if zero_point is None else zero_point[:, here]
        steps = torch.minimum(torch.maximum(steps, (qmin - zero).float()), (qmax - zero).float()).round()
        value = scale[:, here] * steps
        return (steps.to(torch.int32) + zero).to(torch.int8), value if offset is None else value + offset[:, here]

    return nearest


def nearest_minifloat(scale: Tensor, fmt: MinifloatFormat):
    """As `round_minifloat`."""

    def nearest(w: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        codes = reference.round_minifloat(w, 1, scale[:, here], fmt)
        return codes, reference.decode_minifloat(codes, 1, scale[:, here], fmt)

    return nearest


def nearest_codebook(scale: Tensor, book: Codebook):
    """As `round_codebook`, for scales of either sign; the value nearest to 0 where a scale is 0 (or subnormal)."""
    midpoints, code_of = (table.to(scale.device) for table in codebook_tables.steps(book))
    values = codebook_tables.values(book).to(scale.device)
    reciprocal = torch.where(scale.abs() >= _LEAST_SCALE, 1.0 / scale, 0.0)

    def nearest(w: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        codes = code_of[torch.bucketize((w * reciprocal[:, here]).contiguous(), midpoints)]
        return codes, scale[:, here] * values[codes.to(torch.int64)]

    return nearest
