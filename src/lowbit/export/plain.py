"""Decoded weights: what `lowbit convert --format float` writes, an unquantized model again.

For a linear `L` with weight [N, K]:   L.weight, the model's dtype, [N, K] = codes decoded in float32, then cast

It loses what the cast to 16 bits loses, no more; `inexact` says whether it lost anything. config.json has no
quantization_config.
"""

from __future__ import annotations

from typing import Any

import torch

from lowbit.export import Piece
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.schemes import Scheme
from lowbit.tensors import Granularity, QuantizedTensor

FORMAT = "float"
ENGINE = "transformers"


def storage_format(scheme: Scheme) -> str:
    """ "float", of every scheme."""
    return FORMAT


def unfit(shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Every shape can be stored."""
    return None


def scale_format(scheme: Scheme, dtype: torch.dtype) -> str:
    """Scales are not stored; they are as fine as they come."""
    return "float32"


def lowest_zero_point(scheme: Scheme) -> int | None:
    """Every code can be a zero point."""
    return None


def stored_tensors(linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> list[StoredTensor]:
    """The weight alone."""
    return [StoredTensor(f"{linear}.weight", dtype, shape)]


def row_multiple(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Slabs must not cut a block, which is decoded as a whole."""
    return (scheme.weight.group_size or 1) if scheme.weight.granularity is Granularity.BLOCK else 1


def pack(linear: str, quantized: QuantizedTensor, scheme: Scheme, first_row: int, shape: tuple[int, int],
         dtype: torch.dtype, input_absmax: float | None = None) -> list[Piece]:  # fmt: skip
    """A slab of rows, decoded and cast (to nearest, ties to even)."""
    return [Piece(f"{linear}.weight", quantized.decode().to(dtype), first_row)]


def inexact(quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> str | None:
    """Why the cast to the model's dtype loses bits; None where every weight survives it."""
    weight = quantized.decode()
    changed = (weight.to(dtype).to(torch.float32) != weight) & ~weight.isnan()
    lost = int(changed.sum())
    if lost == 0:
        return None
    return f"{lost} of {weight.numel()} decoded weights are no {str(dtype).removeprefix('torch.')}"


def quantization_config(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """Nothing: the model is not quantized any more."""
    return {}


def companion_files(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, dict[str, Any]]:
    """None."""
    return {}
