"""ggml's number formats: the types of GGUF files.

    encode   weights [N, K] → blocks, uint8 [N, row bytes]: what the file holds, of least weighted squared error
    decode   blocks → float32 [N, K], bit for bit as the gguf package and llama.cpp decode

`TYPES` is the table. Each family (a file of this package) has a readable encoder and decoder in torch: the
specification, and what runs where there is no compiled core. The compiled ones (`csrc/ggml`) make the same bytes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.errors import ShapeError
from lowbit.kernels.choice import compiled
from lowbit.numerics.ggml.iquant_layout import hand_over
from lowbit.numerics.ggml.types import TYPES, GgmlType, family, find_type, weights_of

if TYPE_CHECKING:
    from lowbit.kernels._core import Isa

__all__ = ["TYPES", "GgmlType", "decode", "encode", "encode_measured", "find_type", "squared_error"]


def encode(type_name: str, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Blocks, uint8 [N, row bytes], of the rows of a weight.

    weight      float32, bfloat16 or float16 [N, K], finite; K divides by the type's block
    importance  float32 [K], finite and ≥ 0: weights the squared errors; None: all columns alike

    Single-threaded and reentrant (the GIL is released): split rows over threads. Raises ShapeError if K does not
    divide, UsageError for an unknown type.
    """
    return encode_measured(type_name, weight, importance)[0]


def encode_measured(
    type_name: str, weight: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, tuple[float, float, float]]:
    """(blocks as from `encode`, squared errors as from `squared_error`), in one pass.

    A weight that is NaN or inf makes all three sums NaN, and the blocks are then undefined; weights beyond the range of
    the type make the first one inf.
    """
    kind = find_type(type_name)
    if weight.shape[1] % kind.weights:
        raise ShapeError(
            f"rows of {weight.shape[1]} weights are not whole blocks of {kind.weights} ({kind.name})",
            "choose a type whose block divides them: Q8_0, Q5_0, Q4_0 and IQ4_NL have blocks of 32",
        )
    core = _core_for(kind, weight)
    blocks = torch.empty((len(weight), kind.row_bytes(weight.shape[1])), dtype=torch.uint8, device=weight.device)
    if not weight.numel():
        return blocks, (0.0, 0.0, 0.0)
    if core is not None:
        importance = None if importance is None else importance.contiguous()
        return blocks, core.ggml_encode(kind.number, weight.contiguous(), importance, blocks)
    if not torch.isfinite(weight).all():
        return blocks.zero_(), (math.nan, math.nan, math.nan)
    blocks = family(kind).encode(kind, weight, importance)
    return blocks, squared_error(type_name, weight, blocks)


def decode(type_name: str, blocks: Tensor) -> Tensor:
    """Float32 [N, K] of blocks, uint8 [N, row bytes]."""
    kind = find_type(type_name)
    if blocks.shape[1] % kind.size:
        raise ShapeError(f"rows of {blocks.shape[1]} bytes are not whole blocks of {kind.size} ({kind.name})")
    core = _core_for(kind, blocks)
    weights = blocks.new_empty((len(blocks), blocks.shape[1] // kind.size * kind.weights), dtype=torch.float32)
    if not blocks.numel():
        return weights
    if core is None:
        unpacked = family(kind).unpack(kind, blocks)
        return weights_of(kind, unpacked.codes, unpacked)
    core.ggml_decode(kind.number, blocks.contiguous(), weights)
    return weights


def squared_error(type_name: str, weight: Tensor, blocks: Tensor) -> tuple[float, float, float]:
    """(Σ (w − ŵ)², Σ w², max |w − ŵ|) of rows [N, K] and the blocks made of them; not finite where a weight is not."""
    kind = find_type(type_name)
    core = _core_for(kind, weight)
    if core is not None:
        return core.ggml_error(kind.number, weight.contiguous(), blocks.contiguous())
    original = weight.float()
    error = original - decode(type_name, blocks)
    return (
        error.square().sum(dtype=torch.float64).item(),
        original.square().sum(dtype=torch.float64).item(),
        error.abs().max().item() if error.numel() else 0.0,
    )


def _core_for(kind: GgmlType, tensor: Tensor) -> Isa | None:
    """The compiled core, with the codebook that this type needs, or None for the torch reference."""
    core = compiled(tensor.device)
    if core is not None and kind.family == "i":
        hand_over(core, kind)
    return core
