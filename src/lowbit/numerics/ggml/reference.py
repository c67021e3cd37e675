"""Encoders and decoders in torch, by family: the specification that the compiled core must match bit for bit."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from lowbit.numerics.ggml.types import GgmlType

# family → module with encode(kind, weight, importance) and decode(kind, blocks)
_MODULES = {
    "plain": "plain",
    "legacy": "legacy",
    "k": "kquants",
    "codebook": "codebooks",
    "ternary": "ternary",
    "i": "iquants",
}


def encode(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """See `lowbit.numerics.ggml.encode`."""
    if not weight.numel():
        return weight.new_empty((weight.shape[0], kind.row_bytes(weight.shape[1])), dtype=torch.uint8)
    return family(kind).encode(kind, weight, importance)


def decode(kind: GgmlType, blocks: Tensor) -> Tensor:
    """See `lowbit.numerics.ggml.decode`."""
    if not blocks.numel():
        return blocks.new_empty((blocks.shape[0], blocks.shape[1] // kind.size * kind.weights), dtype=torch.float32)
    return family(kind).decode(kind, blocks)


def family(kind: GgmlType):
    """The module of the type's family; what it has is in `lowbit.numerics.ggml.blocks`."""
    return importlib.import_module(f"lowbit.numerics.ggml.{_MODULES[kind.family]}")
