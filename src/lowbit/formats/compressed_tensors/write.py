"""compressed-tensors: the format of llm-compressor, loaded by vLLM, SGLang and transformers.

For a linear `L` with weight [N, K], b bits, G groups, in the model's float dtype unless said otherwise:

    pack-quantized         L.weight_packed int32 [N, ceil(K·b/32)]   code + 2^(b−1), dense, low bits first, along K
                           L.weight_scale [N, G]     L.weight_shape int64 [2]
                           L.weight_zero_point int32 [ceil(N·b/32), G]   asymmetric only; packed along N
    int-quantized          L.weight int8 [N, K]      L.weight_scale [N, G]
    float-quantized        L.weight float8_e4m3fn [N, K]   L.weight_scale [1], [N, 1] or [N/128, K/128] (rounded up)
    nvfp4-pack-quantized   L.weight_packed uint8 [N, K/2]  even column in the low nibble
                           L.weight_scale float8_e4m3fn [N, K/16]   L.weight_global_scale float32 [1], a divisor
    mxfp4-pack-quantized   L.weight_packed uint8 [N, K/2]  L.weight_scale uint8 [N, K/32], exponent + 127
    mxfp8-quantized        L.weight float8_e4m3fn [N, K]   L.weight_scale uint8 [N, K/32]

Static activation scales add L.input_scale [1] (range of |input| / 448 for E4M3, / 127 for INT8; with a zero point, L.
input_zero_point int8 [1], the range of the input / 255), or, for NVFP4,
L.input_global_scale float32 [1] (a divisor). Scales of a KV cache: kv_cache.py.
Spec: the compressors of compressed-tensors 0.20. Refused: E5M2 (the format's 8-bit float is E4M3).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.errors import FormatError
from lowbit.export import Piece, every_zero_point, no_companions, none_needless, usual_engine
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.numerics.scales import E2M1_MAX, E4M3_MAX, INT8_MAX, e8m0_codes
from lowbit.schemes import ActivationSpec, Scheme, WeightSpec
from lowbit.tensors import Granularity, InputRange, QuantizedTensor

FORMAT = "compressed-tensors"
lowest_zero_point, companion_files, engine_of = every_zero_point, no_companions, usual_engine
needless = none_needless
VERSION = "0.20.0"  # of the format that this file writes


def storage_format(scheme: Scheme) -> str:
    """The compressed-tensors format string of a scheme. FormatError if the format cannot hold it."""
    weight = scheme.weight
    if weight.number == "int" and not weight.narrow:
        # FP8 activations over packed integers are what the W4AFP8 kernel reads; 8-bit integer ones want a byte a code.
        # No engine reads integer activations of fewer bits, so the files are small.
        activation = scheme.activation
        if weight.ranged or (activation is not None and activation.number == "e4m3" and activation.needs_calibration):
            raise FormatError(
                f"compressed-tensors holds no static FP8 activations over integers ({scheme.name}): its engines "
                f"measure them per token",
                "choose W4AFP8, or --format modelopt",
            )
        bytes_wanted = activation is not None and activation.number == "int" and activation.bits == 8
        if bytes_wanted and weight.bits not in (4, 8):
            raise FormatError(
                f"compressed-tensors holds {weight.bits}-bit integers with 8-bit activations ({scheme.name}), but no "
                f"engine loads them: kernels multiply 8-bit weights, on some processors 4-bit ones",
                "choose W8A8 or W4A8, or integers without activations such as W2A16",
            )
        return "int-quantized" if bytes_wanted else "pack-quantized"
    if weight.number == "e2m1" and weight.two_level:
        return "nvfp4-pack-quantized"
    if weight.number == "e2m1" and weight.scale_format == "e8m0":
        return "mxfp4-pack-quantized"
    if weight.number == "e4m3":
        return "mxfp8-quantized" if weight.scale_format == "e8m0" else "float-quantized"
    raise FormatError(
        f"compressed-tensors cannot hold {weight.number} weights with {weight.scale_format} scales ({scheme.name})",
        "its 8-bit float is E4M3 and its 4-bit float needs E4M3 or power-of-two scales; NF4, FP4 and INT8 are of "
        "--format bitsandbytes, TERNARY of --format bitnet, KMEANS4, KMEANS3 and LOG4 of --format codebook",
    )


def unfit(shape: tuple[int, int], scheme: Scheme) -> str | None:
    return None


def scale_format(scheme: Scheme, dtype: torch.dtype) -> str:
    """Scales have the model's dtype, whatever it is."""
    return str(dtype).removeprefix("torch.")


def stored_tensors(linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> list[StoredTensor]:
    rows, columns = shape
    weight = scheme.weight
    scale_shape = weight.granularity.scale_shape(rows, columns, weight.columns_per_scale(columns))
    if weight.granularity is Granularity.TENSOR:
        scale_shape = (1,)
    kind = storage_format(scheme)
    if kind == "pack-quantized":
        stored = [
            StoredTensor(f"{linear}.weight_packed", torch.int32, (rows, -(-columns * weight.bits // 32))),
            StoredTensor(f"{linear}.weight_scale", dtype, scale_shape),
            StoredTensor(f"{linear}.weight_shape", torch.int64, (2,)),
        ]
        if not weight.symmetric:
            packed_rows, groups = -(-rows * weight.bits // 32), scale_shape[-1]
            stored.append(StoredTensor(f"{linear}.weight_zero_point", torch.int32, (packed_rows, groups)))
    elif kind in ("int-quantized", "float-quantized", "mxfp8-quantized"):
        code = torch.int8 if kind == "int-quantized" else torch.float8_e4m3fn
        scale_dtype = torch.uint8 if kind == "mxfp8-quantized" else dtype
        stored = [
            StoredTensor(f"{linear}.weight", code, shape),
            StoredTensor(f"{linear}.weight_scale", scale_dtype, scale_shape),
        ]
    else:
        scale_dtype = torch.uint8 if kind == "mxfp4-pack-quantized" else torch.float8_e4m3fn
        stored = [
            StoredTensor(f"{linear}.weight_packed", torch.uint8, (rows, columns // 2)),
            StoredTensor(f"{linear}.weight_scale", scale_dtype, scale_shape),
        ]
        if kind == "nvfp4-pack-quantized":
            stored.append(StoredTensor(f"{linear}.weight_global_scale", torch.float32, (1,)))
    if scheme.activation is not None and scheme.activation.needs_calibration:
        local = scheme.activation.dynamic == "local"
        leaf, input_dtype = ("input_global_scale", torch.float32) if local else ("input_scale", dtype)
        stored.append(StoredTensor(f"{linear}.{leaf}", input_dtype, (1,)))
        if not scheme.activation.symmetric:
            stored.append(StoredTensor(f"{linear}.input_zero_point", torch.int8, (1,)))
    return stored


def row_multiple(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Slabs must begin at multiples of this many rows, so that packed zero points and blocks are not cut."""
    return scheme.weight.block_rows if scheme.weight.symmetric else 32


def pack(linear: str, quantized: QuantizedTensor, scheme: Scheme, first_row: int, shape: tuple[int, int],
         dtype: torch.dtype, input_range: InputRange | None = None) -> list[Piece]:  # fmt: skip
    kind = storage_format(scheme)
    weight = scheme.weight
    stored: list[tuple[str, Tensor, int]] = []
    if kind == "pack-quantized":
        stored.append(("weight_packed", kernels.pack_dense(quantized.codes, weight.bits), first_row))
        if quantized.zero_point is not None:
            packed = kernels.pack_dense_columns(quantized.zero_point, weight.bits)
            stored.append(("weight_zero_point", packed, first_row * weight.bits // 32))
    elif kind == "int-quantized":
        stored.append(("weight", quantized.codes, first_row))
    elif kind in ("float-quantized", "mxfp8-quantized"):
        stored.append(("weight", quantized.codes.view(torch.float8_e4m3fn), first_row))
    else:
        stored.append(("weight_packed", kernels.pack_nibbles(quantized.codes), first_row))
    scale = _stored_scale(quantized, weight, dtype)
    if weight.granularity is Granularity.TENSOR:
        if first_row == 0:
            stored.append(("weight_scale", scale.reshape(1), 0))
    else:
        stored.append(("weight_scale", scale, first_row // weight.block_rows))
    if first_row == 0:
        stored += _once_per_linear(kind, quantized, scheme.activation, shape, dtype, input_range)
    return [Piece(f"{linear}.{leaf}", values, row) for leaf, values, row in stored]


def inexact(quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> str | None:
    """Why a source's codes would change: permuted columns, or a scale that the stored dtype does not hold."""
    if quantized.g_idx is not None:
        return "its groups are not of consecutive columns (activation order)"
    if scheme.weight.scale_format == "e8m0":
        return None
    stored = _stored_scale(quantized, scheme.weight, dtype)
    back = stored.to(torch.float32)
    if scheme.weight.two_level:
        back = back / torch.tensor(1.0 / quantized.global_scale, dtype=torch.float32)
    if torch.equal(back, quantized.scale):
        return None
    if scheme.weight.two_level:
        return "float32 does not hold the reciprocal of its global scale exactly"
    return f"one of its scales is no {str(stored.dtype).removeprefix('torch.')}"


def _stored_scale(quantized: QuantizedTensor, weight: WeightSpec, dtype: torch.dtype) -> Tensor:
    if weight.scale_format == "e8m0":
        return e8m0_codes(quantized.scale)
    if weight.two_level:
        return (quantized.scale / quantized.global_scale).to(torch.float8_e4m3fn)
    return quantized.scale.to(dtype)


def _once_per_linear(kind: str, quantized: QuantizedTensor, activation: ActivationSpec | None, shape: tuple[int, int],
                     dtype: torch.dtype, input_range: InputRange | None) -> list[tuple[str, Tensor, int]]:  # fmt: skip
    stored: list[tuple[str, Tensor, int]] = []
    if kind == "pack-quantized":
        stored.append(("weight_shape", torch.tensor(shape, dtype=torch.int64), 0))
    if kind == "nvfp4-pack-quantized":
        stored.append(("weight_global_scale", torch.tensor([1.0 / quantized.global_scale], dtype=torch.float32), 0))
    if activation is not None and activation.needs_calibration:
        if input_range is None:
            raise AssertionError("a static activation scale was planned but not measured")
        if activation.dynamic == "local":
            divisor = E4M3_MAX * E2M1_MAX / input_range.absmax
            stored.append(("input_global_scale", torch.tensor([divisor], dtype=torch.float32), 0))
        elif activation.symmetric:
            largest_code = INT8_MAX if activation.number == "int" else E4M3_MAX
            stored.append(("input_scale", torch.tensor([input_range.absmax / largest_code]).to(dtype), 0))
        else:
            scale = torch.tensor([input_range.affine(activation.bits)[0]]).to(dtype)
            zero_point = input_range.zero_point(scale.item(), activation.bits)
            stored += [("input_scale", scale, 0), ("input_zero_point", torch.tensor([zero_point], dtype=torch.int8), 0)]
    return stored


def quantization_config(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`.

    Experts that lie in one tensor are ignored by a regex too: vLLM looks up names below theirs, some of them renamed.
    One scheme for the decoder: the target is the class "Linear". Otherwise every linear is named exactly: some releases
    of vLLM look for a class name before they look into fused layers, so that a "Linear" group beside others would win
    for every q/k/v, and lm_head is of another class there.
    """
    groups: dict[Scheme, list[str]] = {}
    for linear, scheme in schemes.items():
        groups.setdefault(scheme, []).append(linear)
    by_class = len(groups) == 1 and "lm_head" not in schemes
    config_groups = {}
    for index, (scheme, members) in enumerate(groups.items()):
        config_groups[f"group_{index}"] = {
            "targets": ["Linear"] if by_class else members,
            "weights": _weight_args(scheme.weight),
            "input_activations": None if scheme.activation is None else _activation_args(scheme.activation),
            "output_activations": None,
            "format": storage_format(scheme),
        }
    formats = {storage_format(scheme) for scheme in groups}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": [*ignored, *(f"re:{re.escape(name)}\\..*" for name in ignored if name.endswith(".experts"))],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _weight_args(weight: WeightSpec) -> dict[str, Any]:
    strategy = "tensor_group" if weight.two_level else weight.granularity.value
    args: dict[str, Any] = {
        "num_bits": weight.bits,
        "type": "int" if weight.number == "int" else "float",
        "symmetric": weight.symmetric,
        "strategy": strategy,
        "group_size": weight.group_size if weight.granularity is Granularity.GROUP else None,
        "dynamic": False,
    }
    if weight.granularity is Granularity.BLOCK:
        args["block_structure"] = [weight.group_size, weight.group_size]
    return args | _scale_dtype(weight.scale_format)


def _activation_args(activation: ActivationSpec) -> dict[str, Any]:
    args: dict[str, Any] = {
        "num_bits": activation.bits,
        "type": "int" if activation.number == "int" else "float",
        "symmetric": activation.symmetric,
        "strategy": "tensor_group" if activation.scale_format == "e4m3" else activation.per,
        "group_size": activation.group_size,
        "dynamic": activation.dynamic,
    }
    return args | _scale_dtype(activation.scale_format)


def _scale_dtype(scale_format: str) -> dict[str, str]:
    return {"e8m0": {"scale_dtype": "torch.uint8"}, "e4m3": {"scale_dtype": "torch.float8_e4m3fn"}}.get(
        scale_format, {}
    )
