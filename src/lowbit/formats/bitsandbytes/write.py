"""bitsandbytes: what transformers loads as Linear4bit (QLoRA) and Linear8bitLt (LLM.int8()).

For a linear `L` with weight [N, K], 4-bit codes in blocks of g = 64 columns (or another block size of bitsandbytes):

    NF4, FP4   L.weight uint8 [N·K/2, 1]               row after row; byte j, bit 7 → 0:  code[2j]  code[2j + 1]
               L.weight.absmax float32 [N·K/g]         the scales, row after row
               L.weight.quant_map float32 [16]         the codebook
               L.weight.quant_state.bitsandbytes__nf4 (or __fp4) uint8 [bytes]      JSON, see `quant_state`
      nested   L.weight.absmax uint8 [N·K/g]           codes of the scales
               L.weight.nested_absmax float32 [ceil(N·K/g/256)]   L.weight.nested_quant_map float32 [256]
    INT8       L.weight int8 [N, K]   −127 .. 127      L.SCB float32 [N]: scale · 127      L.weight_format uint8 [] = 0

Blocks are of the flattened matrix and could cross rows; the writer refuses K that g does not divide, since a quarter of
such a weight's rows could not be written by themselves. One scheme per model: config.json has room for one.
Spec: `QuantState.as_dict` and `Linear8bitLt._save_to_state_dict` of bitsandbytes 0.50, `BitsAndBytesConfig` and
`should_convert_module` of transformers 5.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from lowbit import kernels
from lowbit.errors import FormatError
from lowbit.export import Piece, every_zero_point, no_companions, none_needless, not_converted, usual_engine
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.kernels.tables import CODEBOOKS, values
from lowbit.numerics.scales import NESTED_BLOCK, dynamic_map
from lowbit.schemes import Scheme
from lowbit.tensors import Granularity, InputRange, QuantizedTensor

FORMAT = "bitsandbytes"
lowest_zero_point, companion_files, engine_of = every_zero_point, no_companions, usual_engine
needless = none_needless

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_INT8_MAX = 127.0
# The longest that Python writes a float32, "-1.1754943508222875e-38", and what it is padded to: the length of the JSON
# must be known before the offset is.
_OFFSET_WIDTH = 24


def storage_format(scheme: Scheme) -> str:
    """ "nf4", "fp4" or "int8". FormatError if the format cannot hold the scheme."""
    weight = scheme.weight
    grouped = weight.granularity is Granularity.GROUP and weight.group_size in BLOCK_SIZES
    if weight.number in CODEBOOKS and weight.scale_format in ("model", "nested") and grouped:
        return weight.number
    is_int8 = weight.number == "int" and weight.bits == 8 and weight.narrow and weight.symmetric
    if is_int8 and weight.granularity is Granularity.CHANNEL:
        return "int8"
    group = "" if weight.group_size is None else f" in groups of {weight.group_size}"
    raise FormatError(
        f"bitsandbytes cannot hold {weight.bits}-bit {weight.number} weights{group} ({scheme.name})",
        "it holds the schemes NF4, FP4 and INT8",
    )


def unfit(shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Blocks of the flattened matrix must not cross rows."""
    block = scheme.weight.group_size
    if block is None or shape[1] % block == 0:
        return None
    return f"in_features {shape[1]} is not a multiple of {block}, and bitsandbytes' blocks would cross rows"


def scale_format(scheme: Scheme, dtype: torch.dtype) -> str:
    """Scales are float32 whatever the model's dtype; INT8 stores them times 127, which not every float32 survives."""
    return "float32_over_127" if storage_format(scheme) == "int8" else "float32"


def stored_tensors(linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> list[StoredTensor]:
    rows, columns = shape
    kind = storage_format(scheme)
    if kind == "int8":
        return [
            StoredTensor(f"{linear}.weight", torch.int8, shape),
            StoredTensor(f"{linear}.SCB", torch.float32, (rows,)),
            StoredTensor(f"{linear}.weight_format", torch.uint8, ()),
        ]
    nested = scheme.weight.scale_format == "nested"
    scales = rows * columns // (scheme.weight.group_size or 1)
    state = quant_state(scheme, shape, dtype, 0.0 if nested else None)
    weight = f"{linear}.weight"
    stored = [
        StoredTensor(weight, torch.uint8, (rows * columns // 2, 1)),
        StoredTensor(f"{weight}.absmax", torch.uint8 if nested else torch.float32, (scales,)),
        StoredTensor(f"{weight}.quant_map", torch.float32, (16,), _bytes(values(CODEBOOKS[kind]))),
        StoredTensor(f"{weight}.quant_state.bitsandbytes__{kind}", torch.uint8, (len(state),), state),
    ]
    if nested:
        stored += [
            StoredTensor(f"{weight}.nested_absmax", torch.float32, (-(-scales // NESTED_BLOCK),)),
            StoredTensor(f"{weight}.nested_quant_map", torch.float32, (len(dynamic_map()),), _bytes(dynamic_map())),
        ]
    return stored


def _bytes(table: torch.Tensor) -> bytes:
    """float32 [n], as a file holds it."""
    return table.to(torch.float32).cpu().numpy().astype("<f4").tobytes()


def quant_state(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, offset: float | None) -> bytes:
    """The JSON that bitsandbytes keeps beside a 4-bit weight, byte for byte as it writes it.

    offset   of double-quantized scales, None where they are not; its text is filled up with spaces to a fixed width
    """
    state: dict[str, Any] = {
        "quant_type": storage_format(scheme),
        "blocksize": scheme.weight.group_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if offset is None:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    padding = _OFFSET_WIDTH - len(json.dumps(offset))
    return (json.dumps(state) + " " * padding).encode()


def row_multiple(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Slabs must begin at multiples of this many rows, so that blocks of 256 nested scales are not cut."""
    if scheme.weight.scale_format != "nested":
        return 1
    return NESTED_BLOCK // math.gcd(NESTED_BLOCK, shape[1] // (scheme.weight.group_size or 1))


def pack(linear: str, quantized: QuantizedTensor, scheme: Scheme, first_row: int, shape: tuple[int, int],
         dtype: torch.dtype, input_range: InputRange | None = None) -> list[Piece]:  # fmt: skip
    kind = storage_format(scheme)
    if kind == "int8":
        pieces = [
            Piece(f"{linear}.weight", quantized.codes, first_row),
            Piece(f"{linear}.SCB", (quantized.scale * _INT8_MAX).reshape(-1), first_row),
        ]
        if first_row == 0:
            pieces.append(Piece(f"{linear}.weight_format", torch.tensor(0, dtype=torch.uint8)))
        return pieces
    weight, nested = f"{linear}.weight", quantized.nested if scheme.weight.scale_format == "nested" else None
    first_scale = first_row * shape[1] // (scheme.weight.group_size or 1)
    absmax = quantized.scale if nested is None else nested.codes
    packed = kernels.pack_nibbles(quantized.codes)  # bitsandbytes has the even column in the high nibble
    pieces = [
        Piece(weight, ((packed << 4) | (packed >> 4)).reshape(-1, 1), first_row * shape[1] // 2),
        Piece(f"{weight}.absmax", absmax.reshape(-1), first_scale),
    ]
    if nested is not None:
        pieces.append(Piece(f"{weight}.nested_absmax", nested.absmax, first_scale // NESTED_BLOCK))
    if first_row == 0:
        state = quant_state(scheme, shape, dtype, None if nested is None else nested.offset)
        state_name = f"{weight}.quant_state.bitsandbytes__{kind}"
        pieces.append(Piece(state_name, torch.frombuffer(bytearray(state), dtype=torch.uint8)))
        pieces.append(Piece(f"{weight}.quant_map", values(CODEBOOKS[kind])))
        if nested is not None:
            pieces.append(Piece(f"{weight}.nested_quant_map", dynamic_map()))
    return pieces


def inexact(quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> str | None:
    """Why a source's codes would change."""
    if quantized.g_idx is not None:
        return "its groups are not of consecutive columns (activation order)"
    block = scheme.weight.group_size
    if block is not None and quantized.group_size != block:
        return f"its groups are of {quantized.group_size} columns, not {block}"
    if scheme.weight.scale_format == "nested":
        if quantized.nested is None:
            return "its scales are not double-quantized, and doing so would change them"
        if quantized.nested.block != NESTED_BLOCK:
            return f"its scales are double-quantized in blocks of {quantized.nested.block}, not {NESTED_BLOCK}"
    if scheme.weight.narrow and not torch.equal((quantized.scale * _INT8_MAX) / _INT8_MAX, quantized.scale):
        return "one of its scales is no 127th of a float32"
    if scheme.weight.narrow and bool((quantized.codes == -128).any()):
        return "it has the code -128, which LLM.int8() lacks"
    return None


def quantization_config(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`, as `BitsAndBytesConfig.to_dict` writes it.

    Weights are decoded to `bnb_4bit_compute_dtype`, which can be changed when the model is loaded.
    """
    found = set(schemes.values())
    if len(found) != 1:
        names = ", ".join(sorted({scheme.name for scheme in found})) or "none"
        raise FormatError(
            f"bitsandbytes has one scheme per model; here there are {len(found)} ({names})",
            "quantize all linears alike or leave some in 16 bits; compressed-tensors holds mixed schemes",
        )
    scheme = found.pop()
    kind = storage_format(scheme)
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": kind != "int8",
        "_load_in_8bit": kind == "int8",
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if kind == "int8" else kind,
        "bnb_4bit_use_double_quant": scheme.weight.scale_format == "nested",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": not_converted(list(schemes), ignored),
        "llm_int8_threshold": 6.0,
    }
