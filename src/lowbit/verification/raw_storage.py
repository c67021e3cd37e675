"""What only the stored words show, and a decoded view does not: padding bits, second-level scales, stated shapes.

    L.weight_packed int32   b-bit codes + 2^(b−1), dense: element i of a row occupies bits i·b .. i·b + b − 1 of the
                            row's little-endian bit stream; bits past the last element are zero
    L.weight_zero_point int32   the same, down the columns
    L.weight_shape int64 [2]    [N, K]
    L.weight_global_scale, L.weight_scale_2 float32   divisor or multiplier of the group scales; finite and above 0

compressed-tensors and ModelOpt; formats that have nothing of this pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.checkpoint.rows import row_slabs

if TYPE_CHECKING:
    from lowbit.verification.subject import Subject
    from lowbit.verification.survey import Survey

_SLAB_WORDS = 1 << 18
_SECOND_LEVEL = ("weight_global_scale", "weight_scale_2")


def check_raw(subject: Subject, linear: str, survey: Survey) -> bool:
    """Look at one linear's storage; False where it cannot be decoded."""
    for leaf in _SECOND_LEVEL:
        name = f"{linear}.{leaf}"
        if name in subject.stored.tensors:
            values = subject.stored.read(name).float().reshape(-1)
            if not bool(((values > 0) & torch.isfinite(values)).all()):
                survey.scales.append(f"{name} is {values.tolist()}; a finite number above 0 is needed")
                return False
    if subject.format == "compressed-tensors":
        _check_shape(subject, linear, survey)
        _check_padding(subject, linear, survey)
    return True


def _check_shape(subject: Subject, linear: str, survey: Survey) -> None:
    name, shape = f"{linear}.weight_shape", subject.architecture.linears[linear].shape
    if name in subject.stored.tensors:
        found = subject.stored.read(name).tolist()
        if found != list(shape):
            survey.codes.append(f"{name} says {found}; the weight is {list(shape)}")


def _check_padding(subject: Subject, linear: str, survey: Survey) -> None:
    """Only where a row, or a column of zero points, does not fill its words."""
    rows, columns = subject.architecture.linears[linear].shape
    bits, stored = subject.schemes[linear].weight.bits, subject.stored
    packed, zeros = f"{linear}.weight_packed", f"{linear}.weight_zero_point"
    if columns * bits % 32 and packed in stored.tensors and stored.tensors[packed].dtype == torch.int32:
        for start, stop in row_slabs(tuple(stored.tensors[packed].shape), _SLAB_WORDS):
            if padding_is_set(stored.read(packed, start, stop), columns * bits):
                survey.codes.append(f"{packed}: bits past the last column are set (rows {start}..)")
                break
    packed_zeros = zeros in stored.tensors and stored.tensors[zeros].dtype == torch.int32
    if packed_zeros and rows * bits % 32 and padding_is_set(stored.read(zeros).t(), rows * bits):
        survey.zero_points.append(f"{zeros}: bits past the last row are set")


def padding_is_set(words: Tensor, used_bits: int) -> bool:
    """True where a bit of int32 [rows, words] after the first `used_bits` of a row is set."""
    stream = words.contiguous().view(torch.uint8)
    whole, partial = divmod(used_bits, 8)
    if partial and bool((stream[:, whole] >> partial).any()):
        return True
    return bool(stream[:, whole + (partial > 0) :].any())
