"""Rounding column by column with error feedback: the inner loop of GPTQ and of coordinate descent.

    for each column j:   code_j, ŵ_j = nearest(w_j)
        feedback         change = w_j − ŵ_j          for the columns k > j:  w_k −= change · spread[j, k]
        descent          change = ŵ_j − former ŵ_j   for all k ≠ j:          w_k −= change · spread[j, k]

Columns are processed in storage order; callers permute them for another. Changes reach the columns of the same block of
`block` columns at once, and all others after the block, in one product ("lazily"). Arguments, N = rows, K = columns:

    w         float32 [N, K], written to. Feedback: the weights; afterwards, as they were when rounded. Descent: the
              target of each weight, given all others
    spread    float32 [K, K]; descent needs a zero diagonal, feedback reads only above it
    span      (begin, end, block): the columns to round
    descend   descent instead of feedback
    scale     float32 [N, K], of every column; likewise offset float32 and zero_point int32, or None
    codes     int8 [N, K] (integers) or uint8 [N, K], written at begin .. end
    decoded   float32 [N, K], written likewise; descent reads the former values there

On the CPU results have the same bits on every instruction set, and rows are independent: split them over threads. A
scale of 0 gives the code of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels import reference
from lowbit.kernels.choice import compiled
from lowbit.kernels.tables import Codebook, MinifloatFormat, steps, values

__all__ = ["feedback_codebook", "feedback_int", "feedback_minifloat", "subtract_product"]

Span = tuple[int, int, int]


def subtract_product(w: Tensor, change: Tensor, spread: Tensor, begin: int, end: int) -> None:
    """w[:, begin:end] −= change @ spread[:, begin:end], in place; change [N, B], spread [B, K]."""
    core = compiled(w.device)
    if core is None:
        return reference.subtract_product(w, change, spread, begin, end)
    return core.subtract_product(w, change.contiguous(), spread.contiguous(), begin, end)


def feedback_int(
    w: Tensor, spread: Tensor, span: Span, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None,
    limits: tuple[int, int], codes: Tensor, decoded: Tensor, descend: bool = False,
) -> None:  # fmt: skip
    """x = scale · (code − zero_point) + offset, codes int8 within `limits`; true division, ties to even."""
    core = compiled(w.device)
    if core is None:
        nearest = reference.nearest_int(scale, offset, zero_point, *limits)
        return reference.feedback(w, spread, span, descend, codes, decoded, nearest)
    return core.feedback_int(w, spread, *span, scale, offset, zero_point, *limits, descend, codes, decoded)


def feedback_minifloat(
    w: Tensor, spread: Tensor, span: Span, scale: Tensor, fmt: MinifloatFormat, codes: Tensor, decoded: Tensor,
    descend: bool = False,
) -> None:  # fmt: skip
    """x = scale · value(code), codes uint8 the bit patterns; ties to the even code, saturating."""
    core = compiled(w.device)
    if core is None:
        nearest = reference.nearest_minifloat(scale, fmt)
        return reference.feedback(w, spread, span, descend, codes, decoded, nearest)
    fields = (fmt.exponent_bits, fmt.mantissa_bits, fmt.bias, fmt.max_value)
    return core.feedback_minifloat(w, spread, *span, scale, fields, descend, codes, decoded)


def feedback_codebook(
    w: Tensor, spread: Tensor, span: Span, scale: Tensor, book: Codebook, codes: Tensor, decoded: Tensor,
    descend: bool = False,
) -> None:  # fmt: skip
    """x = scale · value(code) of 16 values, codes uint8; w · (1 / scale) halfway between two goes to the smaller."""
    core = compiled(w.device)
    if core is None:
        nearest = reference.nearest_codebook(scale, book)
        return reference.feedback(w, spread, span, descend, codes, decoded, nearest)
    midpoints, code_of = steps(book)
    ascending = values(book)[code_of.to(torch.int64)]
    return core.feedback_codebook(w, spread, *span, scale, midpoints, ascending, code_of, descend, codes, decoded)
