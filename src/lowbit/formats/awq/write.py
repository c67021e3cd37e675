"""AWQ checkpoints as AutoAWQ's GEMM version lays them out, loaded by vLLM, SGLang and transformers (GPTQModel).

For a linear `L` with weight [N, K], 4 bits, G groups; everything lies transposed:

    L.qweight  int32 [K, N/8]     u = code + 8, eight rows of the weight in a word, in the order below
    L.qzeros   int32 [G, N/8]     zero point, the same order
    L.scales   float16 [G, N]

    word c, bit 31 → 0:   row 8c+7  8c+5  8c+3  8c+1  8c+6  8c+4  8c+2  8c+0      nibble i holds row 8c + ORDER[i]
    decoded = (u − zero) · scale

Symmetric schemes are written with zero points of 8 and `zero_point: true`: AutoAWQ's GEMM kernels always subtract
qzeros, and vLLM has no fast GPU kernel for `zero_point: false` (Marlin takes unsigned codes with zero points only).

Refused: other bit widths, activation quantization, N that does not divide by 8, groups that do not divide K, different
schemes in one model, and names that `modules_to_not_convert` cannot tell apart.
Spec: AutoAWQ 0.2.9 awq/modules/linear/gemm.py; vLLM 0.32 auto_awq.py; transformers 5.23 integrations/awq.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.export import (
    Piece,
    every_zero_point,
    float16_scales,
    fused_names,
    no_companions,
    none_needless,
    usual_engine,
)
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.schemes import Scheme
from lowbit.tensors import Granularity, InputRange, QuantizedTensor
from lowbit.version import __version__

FORMAT = "awq"
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble → row within its eight
scale_format, lowest_zero_point = float16_scales, every_zero_point
companion_files, engine_of = no_companions, usual_engine
needless = none_needless


def storage_format(scheme: Scheme) -> str:
    """FORMAT; FormatError for what AWQ cannot hold."""
    weight = scheme.weight
    grouped = weight.granularity in (Granularity.GROUP, Granularity.CHANNEL)
    plain = weight.number == "int" and weight.scale_format == "model" and not weight.narrow
    if scheme.activation is not None or not plain or not grouped or weight.bits != BITS:
        raise FormatError(
            f"awq cannot hold {scheme.name}: it stores 4-bit integer weights with a scale per group or row, and leaves "
            f"activations alone",
            "choose W4A16_ASYM or W4A16, or leave --format out",
        )
    return FORMAT


def unfit(shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Why a shape cannot be stored: eight rows fill a word, groups must divide the row."""
    rows, columns = shape
    group_size = scheme.weight.columns_per_scale(columns)
    if columns % group_size:
        return f"{columns} columns do not divide into groups of {group_size}"
    if rows % 8:
        return f"{rows} rows do not fill 32-bit words; AWQ packs eight rows in one"
    return None


def stored_tensors(linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> list[StoredTensor]:
    rows, columns = shape
    groups = scheme.weight.granularity.scale_shape(rows, columns, scheme.weight.columns_per_scale(columns))[1]
    return [
        StoredTensor(f"{linear}.qweight", torch.int32, (columns, rows // 8)),
        StoredTensor(f"{linear}.qzeros", torch.int32, (groups, rows // 8)),
        StoredTensor(f"{linear}.scales", torch.float16, (groups, rows)),
    ]


def row_multiple(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Eight rows share a word."""
    return 8


def pack(linear: str, quantized: QuantizedTensor, scheme: Scheme, first_row: int, shape: tuple[int, int],
         dtype: torch.dtype, input_range: InputRange | None = None) -> list[Piece]:  # fmt: skip
    """A slab of rows: a strip of columns of every stored tensor."""
    zero_point = quantized.zero_point
    zeros = torch.zeros_like(quantized.scale, dtype=torch.int8) if zero_point is None else zero_point.to(torch.int8)
    return [
        Piece(f"{linear}.qweight", pack_rows(quantized.codes), column=first_row // 8),
        Piece(f"{linear}.qzeros", pack_rows(zeros), column=first_row // 8),
        Piece(f"{linear}.scales", quantized.scale.to(torch.float16).t().contiguous(), column=first_row),
    ]


def pack_rows(codes: Tensor) -> Tensor:
    """Signed codes int8 [n, K], n a multiple of 8 → int32 [K, n / 8], rows in AWQ's order."""
    rows, columns = codes.shape
    unsigned = (codes + 8).view(torch.uint8).view(rows // 8, 8, columns)
    if rows and int(unsigned.max()) > 15:
        raise ValueError("a code does not fit in its bits")
    words = torch.zeros(rows // 8, columns, dtype=torch.int32)
    for index in range(4):  # the bytes of a word, lowest first
        pair = unsigned[:, ORDER[2 * index]] | unsigned[:, ORDER[2 * index + 1]] << 4
        words |= pair.to(torch.int32) << 8 * index
    return words.t().contiguous()


def inexact(quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> str | None:
    """Why a source's codes would change: permuted columns, a zero point or a scale that has no place."""
    if quantized.g_idx is not None:
        return "its groups are not of consecutive columns (activation order)"
    if not torch.equal(quantized.scale.to(torch.float16).to(torch.float32), quantized.scale):
        return "one of its scales is no float16"
    zero_point = quantized.zero_point
    if zero_point is not None and bool(((zero_point < -8) | (zero_point > 7)).any()):
        return "one of its zero points does not fit 4 bits"
    return None


def quantization_config(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`; FormatError for mixed schemes, and for names that cannot be told apart.

    vLLM and AutoAWQ leave a linear alone if any of modules_to_not_convert is a substring of its name, transformers if
    its name ends with it; SGLang looks fused linears up under the fused name.
    """
    for found in set(schemes.values()):
        storage_format(found)
    weights = {scheme.weight: name for name, scheme in schemes.items()}
    if len(weights) > 1:
        (one, first), (other, second) = list(weights.items())[:2]
        raise FormatError(
            f"awq has one scheme for a whole model; {first} has {_said(one)}, {second} {_said(other)}",
            "give one scheme and group size for all (--scheme W4A16_ASYM --group-size 64), leave --override out, leave "
            "such linears in 16 bits with --ignore, or write compressed-tensors or gptq",
        )
    for name in ignored:
        hit = next((quantized for quantized in schemes if name in quantized), None)
        if hit is not None:
            raise FormatError(
                f"awq cannot leave {name} alone: engines match modules_to_not_convert by substring, and {hit}, which "
                f"is quantized, contains it",
                f"ignore {hit} too, quantize {name}, or write compressed-tensors or gptq",
            )
    weight = next(iter(weights))
    config: dict[str, Any] = {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": -1 if weight.group_size is None else weight.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [*ignored, *fused_names(ignored)] or None,
        "sym": weight.symmetric,  # for lowbit's own reader: the zero points are all 8
        "meta": {"quantizer": [f"lowbit:{__version__}"]},
    }
    if "lm_head" in schemes:
        config["lm_head"] = True  # without it vLLM takes lm_head for a float
    return config


def _said(weight: Any) -> str:
    spread = "one scale per row" if weight.group_size is None else f"group size {weight.group_size}"
    return f"{'symmetric' if weight.symmetric else 'asymmetric'} codes with {spread}"
