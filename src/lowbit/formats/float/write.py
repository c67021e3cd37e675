"""Decoded weights: what `lowbit convert --format float` writes, an unquantized model again.

For a linear `L` with weight [N, K]:   L.weight, the model's dtype, [N, K] = codes decoded in float32, then cast

The only loss is that of the cast to 16 bits; `inexact` reports whether there is any. config.json has no
quantization_config.
"""

from __future__ import annotations

from typing import Any

import torch

from lowbit.export import (
    Piece,
    block_rows,
    every_zero_point,
    float16_scales,
    no_companions,
    none_needless,
    usual_engine,
)
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.schemes import Scheme
from lowbit.tensors import InputRange, QuantizedTensor

FORMAT = "float"
row_multiple, lowest_zero_point, companion_files, engine_of = block_rows, every_zero_point, no_companions, usual_engine
needless = none_needless


def storage_format(scheme: Scheme) -> str:
    """ "float", of every scheme."""
    return FORMAT


def unfit(shape: tuple[int, int], scheme: Scheme) -> str | None:
    return None


def scale_format(scheme: Scheme, dtype: torch.dtype) -> str:
    """Scales are not stored; they are as fine as they come. Fitted values are those of a codebook folder."""
    return float16_scales(scheme, dtype) if scheme.weight.is_fitted else "float32"


def stored_tensors(linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> list[StoredTensor]:
    return [StoredTensor(f"{linear}.weight", dtype, shape)]


def pack(linear: str, quantized: QuantizedTensor, scheme: Scheme, first_row: int, shape: tuple[int, int],
         dtype: torch.dtype, input_range: InputRange | None = None) -> list[Piece]:  # fmt: skip
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
