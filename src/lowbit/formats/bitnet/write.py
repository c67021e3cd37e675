"""BitNet b1.58 as transformers loads it (quant_method "bitnet", AutoBitLinear): ternary weights, four to a byte.

For a linear `L` with weight [N, K], N a multiple of 4:

    L.weight        uint8 [N/4, K]    row i holds rows i, i + N/4, i + 2N/4, i + 3N/4 of the weight
    L.weight_scale  dtype [1]         s, one for the matrix; multiplies

    byte, bit 7 → 0:   u(i + 3N/4)  u(i + 2N/4)  u(i + N/4)  u(i)        u = code + 1, code in −1, 0, 1
    decoded = (u − 1) · s

Inputs are rounded to int8, one scale per token, by the layer itself. Microsoft's bitnet-b1.58-2B-4T is stored so. The
other class, BitLinear, divides by weight_scale: most s have no reciprocal in 16 bits that gives them back, so that the
trained scale would change. read.py reads both.

Since four quarters of the rows share a byte, a matrix is packed whole.
Spec: `pack_weights`, `AutoBitLinear`, `BitNetDeserialize` of transformers 5.23 (integrations/bitnet.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.export import Piece, every_zero_point, no_companions, none_needless, not_converted, usual_engine
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.schemes import SCHEMES, Scheme
from lowbit.tensors import InputRange, QuantizedTensor

FORMAT = "bitnet"
lowest_zero_point, companion_files = every_zero_point, no_companions
needless, engine_of = none_needless, usual_engine

_ROWS = 4  # of the weight in a byte


def storage_format(scheme: Scheme) -> str:
    """ "bitnet", of TERNARY."""
    ternary = SCHEMES["TERNARY"]
    if scheme.weight != ternary.weight or scheme.activation != ternary.activation:
        raise FormatError(f"bitnet holds TERNARY only, not {scheme.name}", "use --scheme TERNARY, or another --format")
    return FORMAT


def unfit(shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Four rows fill a byte."""
    return f"{shape[0]} rows do not fill bytes of {_ROWS}" if shape[0] % _ROWS else None


def scale_format(scheme: Scheme, dtype: torch.dtype) -> str:
    """The model's dtype, in which transformers keeps it."""
    return str(dtype).removeprefix("torch.")


def stored_tensors(linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> list[StoredTensor]:
    return [
        StoredTensor(f"{linear}.weight", torch.uint8, (shape[0] // _ROWS, shape[1])),
        StoredTensor(f"{linear}.weight_scale", dtype, (1,)),
    ]


def row_multiple(scheme: Scheme, shape: tuple[int, int]) -> int:
    """All of them."""
    return shape[0]


def pack(linear: str, quantized: QuantizedTensor, scheme: Scheme, first_row: int, shape: tuple[int, int],
         dtype: torch.dtype, input_range: InputRange | None = None) -> list[Piece]:  # fmt: skip
    """The whole matrix."""
    return [
        Piece(f"{linear}.weight", pack_rows(quantized.codes)),
        Piece(f"{linear}.weight_scale", quantized.scale.reshape(1).to(dtype)),
    ]


def pack_rows(codes: Tensor) -> Tensor:
    """Codes int8 [N, K] of −1, 0, 1, N a multiple of 4 → uint8 [N/4, K]."""
    quarters = (codes + 1).to(torch.uint8).reshape(_ROWS, -1, codes.shape[1])
    if quarters.numel() and int(quarters.max()) > 2:
        raise ValueError("a code is not -1, 0 or 1")
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def inexact(quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> str | None:
    """Why a source's codes would change: a scale that the dtype does not hold."""
    stored = quantized.scale.to(dtype).to(torch.float32)
    return None if torch.equal(stored, quantized.scale) else f"its scale is no {str(dtype).removeprefix('torch.')}"


def quantization_config(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`, as `BitNetQuantConfig.to_dict` writes it; FormatError for mixed schemes."""
    for scheme in set(schemes.values()):
        storage_format(scheme)
    return {
        "quant_method": FORMAT,
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": not_converted(list(schemes), ignored),
        "use_rms_norm": False,
        "rms_norm_eps": 1e-6,
    }
