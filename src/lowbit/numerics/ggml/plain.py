"""F32, F16 and BF16 in GGUF: little-endian numbers, no blocks.

    F32    float                   32 bits per weight
    F16    IEEE half               16
    BF16   upper half of a float   16

Conversions round to nearest, ties to even, as `Tensor.to` and ggml do. Above 65519 a half becomes inf; writers of F16
must check for that. Importance is not used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics.ggml.types import Blocks, GgmlType

_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = {"F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}


def encode(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """See `lowbit.numerics.ggml.encode`."""
    return weight.to(_DTYPE[kind.name]).contiguous().view(torch.uint8)


def unpack(kind: GgmlType, blocks: Tensor) -> Blocks:
    """The bit patterns, with a scale of 1."""
    codes = blocks.contiguous().view(_BITS[kind.name])
    return Blocks(codes, torch.ones(codes.shape, device=blocks.device))


def pack(kind: GgmlType, codes: Tensor, stored: dict[str, Tensor]) -> Tensor:
    return codes.to(_BITS[kind.name]).contiguous().view(torch.uint8)


def value(kind: GgmlType, codes: Tensor) -> Tensor:
    """The numbers whose bit patterns the codes are."""
    return codes.to(_BITS[kind.name]).contiguous().view(_DTYPE[kind.name]).to(torch.float32)


def round(kind: GgmlType, weight: Tensor, blocks: Blocks, importance: Tensor | None = None) -> Tensor:
    """The bit patterns of the nearest numbers."""
    return weight.to(_DTYPE[kind.name]).contiguous().view(_BITS[kind.name])
