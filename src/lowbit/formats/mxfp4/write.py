"""MXFP4 as gpt-oss ships it (quant_method "mxfp4"): the experts of a block in fused 4-bit tensors.

For P = model.layers.L.mlp.experts, E experts, hidden size H, expert size I:

    P.gate_up_proj_blocks  uint8 [E, 2I, H/32, 16]   byte j of a block, bit 7 → 0:   code[2j + 1]  code[2j]
    P.gate_up_proj_scales  uint8 [E, 2I, H/32]       exponent + 127, of 32 consecutive columns
    P.down_proj_blocks     uint8 [E, H, I/32, 16]
    P.down_proj_scales     uint8 [E, H, I/32]

    rows of gate_up_proj[e]:   gate 0, up 0, gate 1, up 1, …

A linear P.e.gate_proj gives `P.e.gate_proj.weight_blocks` [I, H/32, 16] and `…weight_scales` [I, H/32], which
`lowbit.export.fused_experts` places in the fused tensors, biases too.
Spec: `convert_moe_packed_tensors` and `GptOssExperts` of transformers 5.23, models/gpt_oss.py of vLLM 0.32.

Refused: schemes other than MXFP4A16; linears that are no experts, which loaders expect in 16 bits; a model of which
some experts stay in 16 bits; models other than gpt-oss (`lowbit.plan` looks at those).
"""

from __future__ import annotations

import re
from typing import Any

import torch

from lowbit import kernels
from lowbit.errors import FormatError
from lowbit.export import Piece, block_rows, every_zero_point, no_companions, none_needless, usual_engine
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.numerics.scales import e8m0_codes
from lowbit.schemes import SCHEMES, Scheme
from lowbit.tensors import InputRange, QuantizedTensor

FORMAT = "mxfp4"
row_multiple, lowest_zero_point, companion_files, engine_of = block_rows, every_zero_point, no_companions, usual_engine
needless = none_needless

_BLOCK_COLUMNS = 32
_BLOCK_BYTES = 16
_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.(gate|up|down)_proj$")
# As in the config.json of openai/gpt-oss-20b and 120b.
_NOT_CONVERTED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def storage_format(scheme: Scheme) -> str:
    """ "mxfp4", of MXFP4A16."""
    if scheme.weight != SCHEMES["MXFP4A16"].weight or scheme.activation is not None:
        raise FormatError(f"mxfp4 holds MXFP4A16 only, not {scheme.name}",
                          "use --scheme MXFP4A16, or another --format")  # fmt: skip
    return FORMAT


def unfit(shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Columns must fill blocks of 32."""
    return f"in_features {shape[1]} is not a multiple of {_BLOCK_COLUMNS}" if shape[1] % _BLOCK_COLUMNS else None


def scale_format(scheme: Scheme, dtype: torch.dtype) -> str:
    """Scales are powers of two by the scheme; this is what would hold them in floats."""
    return "float32"


def stored_tensors(linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> list[StoredTensor]:
    """What one expert adds to the fused tensors."""
    blocks = shape[1] // _BLOCK_COLUMNS
    return [
        StoredTensor(f"{linear}.weight_blocks", torch.uint8, (shape[0], blocks, _BLOCK_BYTES)),
        StoredTensor(f"{linear}.weight_scales", torch.uint8, (shape[0], blocks)),
    ]


def pack(linear: str, quantized: QuantizedTensor, scheme: Scheme, first_row: int, shape: tuple[int, int],
         dtype: torch.dtype, input_range: InputRange | None = None) -> list[Piece]:  # fmt: skip
    """A slab of rows: two codes a byte, the even column in the low nibble, and biased exponents."""
    blocks = kernels.pack_nibbles(quantized.codes).reshape(-1, shape[1] // _BLOCK_COLUMNS, _BLOCK_BYTES)
    return [
        Piece(f"{linear}.weight_blocks", blocks, first_row),
        Piece(f"{linear}.weight_scales", e8m0_codes(quantized.scale), first_row),
    ]


def inexact(quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> str | None:
    """Why a source's codes would change: permuted columns, or a NaN for a scale (byte 255)."""
    if quantized.g_idx is not None:
        return "its groups are not of consecutive columns (activation order)"
    return None if bool(quantized.scale.isfinite().all()) else "one of its scales is NaN"


def quantization_config(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`, as the released models have it.

    Raises FormatError where anything but all experts is quantized: loaders look for blocks there, and nowhere else.
    """
    stray = next((name for name in schemes if not _EXPERT.search(name)), None)
    if stray is not None:
        raise FormatError(f"{stray} would be quantized, and mxfp4 holds experts only",
                          "leave it in 16 bits, or use another --format")  # fmt: skip
    left = next((name for name in ignored if _EXPERT.search(name)), None)
    if left is not None:
        raise FormatError(
            f"{left} would stay in 16 bits, and mxfp4 holds all experts of a model or none",
            "quantize all of them, or use --format float to keep the whole model in 16 bits",
        )
    return {"modules_to_not_convert": list(_NOT_CONVERTED), "quant_method": FORMAT}
