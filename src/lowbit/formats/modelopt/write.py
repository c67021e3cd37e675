"""ModelOpt: NVIDIA's format, loaded by TensorRT-LLM, vLLM and SGLang.

For a linear `L` with weight [N, K]; every scale multiplies; [] is a tensor without dimensions:

    FP8                        L.weight float8_e4m3fn [N, K]   L.weight_scale float32 []
                               L.input_scale float32 []: largest |input| / 448
    FP8_PER_CHANNEL_PER_TOKEN  L.weight float8_e4m3fn [N, K]   L.weight_scale float32 [N]
    fp8_pb_wo                  L.weight float8_e4m3fn [N, K]   L.weight_scale float32 [⌈N/128⌉, 1, K/128, 1]
    NVFP4, W4A16_NVFP4         L.weight uint8 [N, K/2]         even column in the low nibble
                               L.weight_scale float8_e4m3fn [N, K/16]   L.weight_scale_2 float32 []
                               NVFP4 also: L.input_scale float32 []: largest |input| / (448 · 6)
    MXFP8                      L.weight float8_e4m3fn [N, K]   L.weight_scale uint8 [N, K/32], exponent + 127
    W4A16_AWQ                  L.weight uint8 [N/2, K]         row 2i in the low nibble, row 2i + 1 in the high one,
                                                               two's complement
                               L.weight_scale float [N, K/g], of the model's dtype
                               L.pre_quant_scale [K], of the model's dtype: multiplies the input
    W4A8_AWQ                   the same with L.weight_scale float16; L.weight_scale_2 float32 []: the largest |weight|
                               / 448 or above; L.input_scale float32 []: largest |input| / 448
    W8A16                      L.weight int8 [N, K]            L.weight_scale [N], of the model's dtype
    W8A8_SQ_PER_CHANNEL        L.weight int8 [N, K]            L.weight_scale float32 [N]
                               L.input_scale float32 []: largest |input| / 127
    W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN   the same without L.input_scale

    hf_quant_config.json       {producer, quantization: {quant_algo, kv_cache_quant_algo, group_size?, exclude_modules}}
                               several schemes: quant_algo MIXED_PRECISION, quantized_layers {linear: {quant_algo, …}}
    config.json                quantization_config: the same as `convert_hf_quant_config_format` rewrites it

The factors of AWQ and SmoothQuant are folded into the weights and norms before, so `pre_quant_scale` is all ones, and
left out in q, k and v, and in gate and up: the loader of TensorRT-LLM asks for it in every AWQ linear that it does not
fuse, and in every expert. W4A8_AWQ's `weight_scale_2` changes no value, since kernels divide by it and multiply by it
again; it is a power of two, and one for a fused set.
vLLM takes the maximum of the scales of a fused set (q, k and v; gate and up): they are equal in what lowbit writes.
TensorRT-LLM knows fp8_pb_wo as the scheme of a whole model only, not in quantized_layers.
ModelOpt writes every algorithm above but the last, which is a name of TensorRT-LLM's for the same tensors.
Spec: torch/export of ModelOpt 0.47 (unified_export_hf.py, quant_utils.py, convert_hf_config.py), modelopt.py of vLLM
0.32, modelopt_config.py and _torch/modules/linear.py of TensorRT-LLM.
Refused: zero points, other integers, MXFP4, FP8 with other scales or activations, K that the groups or blocks do not
divide, and an odd N in packed integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.errors import FormatError
from lowbit.export import FUSED, Piece, every_zero_point
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.numerics.scales import E2M1_MAX, E4M3_MAX, INT8_MAX, SCALE_DTYPES, e8m0_codes, e8m0_values
from lowbit.schemes import SCHEMES, Scheme, WeightSpec
from lowbit.tensors import Granularity, InputRange, QuantizedTensor

FORMAT = "modelopt"
lowest_zero_point = every_zero_point
# Of the format that this file writes. Loaders take hf_quant_config.json for theirs by the producer's name.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}

# quant_algo → the scheme it stands for. fp8_pb_wo is lower case since TensorRT-LLM knows it by that spelling.
ALGORITHMS = {
    "FP8": SCHEMES["FP8"],
    "FP8_PER_CHANNEL_PER_TOKEN": SCHEMES["FP8_DYNAMIC"],
    "fp8_pb_wo": SCHEMES["FP8_BLOCK"],
    "NVFP4": SCHEMES["NVFP4"],
    "W4A16_NVFP4": SCHEMES["NVFP4A16"],
    "MXFP8": SCHEMES["MXFP8"],
    "W4A16_AWQ": SCHEMES["W4A16"],
    "W4A8_AWQ": SCHEMES["W4AFP8_STATIC"],
    "W8A16": SCHEMES["W8A16"].with_group_size(-1),
    "W8A8_SQ_PER_CHANNEL": SCHEMES["W8A8_STATIC"],
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": SCHEMES["W8A8"],
}
_AWQ = ("W4A16_AWQ", "W4A8_AWQ")  # of any group size
_STATES_GROUP_SIZE = ("NVFP4", "W4A16_NVFP4", "MXFP8", *_AWQ)
# Only TensorRT-LLM knows them.
_TENSORRT_LLM = (*_AWQ, "W8A16", "W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN")
# Model dtype → scales that its kernels multiply by: they compute in 16 bits, and cast the scales.
_SCALES_OF = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "bfloat16_in_float16"}

# What `convert_hf_quant_config_format` says of an algorithm in config_groups; g is its group size. For a model of one
# scheme it speaks of those in _WITH_GROUPS alone; loaders know the others by quant_algo.
_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
_MX8 = _FP8 | {"group_size": 32}
_INT8 = {"dynamic": False, "num_bits": 8, "type": "int"}
_GROUPS: dict[str, dict[str, Any]] = {
    "FP8": {"input_activations": _FP8, "weights": _FP8},
    "FP8_PER_CHANNEL_PER_TOKEN": {"input_activations": _FP8, "weights": _FP8 | {"strategy": "channel"}},
    "fp8_pb_wo": {"quant_algo": "fp8_pb_wo"},
    "NVFP4": {"input_activations": _FP4, "weights": _FP4},
    "W4A16_NVFP4": {"weights": _FP4},
    "MXFP8": {"input_activations": _MX8, "weights": _MX8},
    "W4A16_AWQ": {"weights": {"dynamic": False, "num_bits": 4, "type": "int"}},
    # "float" is ModelOpt's word for these integers; loaders go by quantized_layers.
    "W4A8_AWQ": {"input_activations": _FP8, "weights": {"dynamic": False, "num_bits": 4, "type": "float"}},
    "W8A16": {"weights": _INT8},
    "W8A8_SQ_PER_CHANNEL": {"input_activations": _INT8, "weights": _INT8 | {"strategy": "channel"}},
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": {"quant_algo": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"},
}
_WITH_GROUPS = ("FP8", "NVFP4", "W4A16_NVFP4")


def storage_format(scheme: Scheme) -> str:
    """The quant_algo of a scheme. FormatError if the format cannot hold it."""
    for algorithm, known in ALGORITHMS.items():
        if algorithm in _AWQ and scheme.weight.group_size is not None and scheme.weight.group_size_is_free:
            known = known.with_group_size(scheme.weight.group_size)
        if (known.weight, known.activation) == (scheme.weight, scheme.activation):
            return algorithm
    raise FormatError(
        f"modelopt cannot hold {scheme.name}; it holds {', '.join(known.name for known in ALGORITHMS.values())} (W8A16 "
        f"with one scale per row, --group-size -1)",
        "choose one of these, or leave --format out",
    )


def unfit(shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Groups and blocks must divide K, and bytes of two rows N; the last block of rows may be cut."""
    if _packs_rows(scheme.weight) and shape[0] % 2:
        return f"out_features {shape[0]} is odd, and a byte holds two rows"
    size = scheme.weight.columns_per_scale(shape[1])
    if shape[1] % size == 0:
        return None
    return f"in_features {shape[1]} is not a multiple of {size}"


def engine_of(schemes: dict[str, Scheme]) -> str | None:
    """tensorrt-llm where a scheme is one that only its loader knows; None for the format's usual engine."""
    known_there = any(storage_format(scheme) in _TENSORRT_LLM for scheme in set(schemes.values()))
    return "tensorrt-llm" if known_there else None


def needless(scheme: Scheme) -> tuple[str, ...]:
    """TensorRT-LLM multiplies the input of a fused set by its `pre_quant_scale` where there is one, of ones too."""
    return ("pre_quant_scale",)


def row_multiple(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Slabs must not cut a block, nor a byte of two rows."""
    return 2 if _packs_rows(scheme.weight) else scheme.weight.block_rows


def _packs_rows(weight: WeightSpec) -> bool:
    return weight.number == "int" and weight.bits == 4


def scale_format(scheme: Scheme, dtype: torch.dtype) -> str:
    """float32; in weight-only integers numbers of the model's dtype, and in W4A8_AWQ of float16, since the loader casts
    to these."""
    algorithm = storage_format(scheme)
    if algorithm in ("W4A16_AWQ", "W8A16"):
        return _SCALES_OF.get(dtype, "bfloat16")
    return "float16" if algorithm == "W4A8_AWQ" else "float32"


def stored_tensors(linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> list[StoredTensor]:
    algorithm, weight = storage_format(scheme), scheme.weight
    stored = [
        StoredTensor(f"{linear}.weight", *_code_layout(weight, shape)),
        StoredTensor(f"{linear}.weight_scale", _scale_dtype(scheme, dtype), _scale_shape(weight, shape)),
    ]
    if weight.two_level or weight.ranged:
        stored.append(StoredTensor(f"{linear}.weight_scale_2", torch.float32, ()))
    if scheme.activation is not None and scheme.activation.needs_calibration:
        stored.append(StoredTensor(f"{linear}.input_scale", torch.float32, ()))
    if algorithm in _AWQ:
        stored.append(StoredTensor(f"{linear}.pre_quant_scale", dtype, (shape[1],)))
    return stored


def _code_layout(weight: WeightSpec, shape: tuple[int, int]) -> tuple[torch.dtype, tuple[int, ...]]:
    rows, columns = shape
    if weight.number == "e2m1":
        return torch.uint8, (rows, columns // 2)
    if weight.number == "int":
        return (torch.uint8, (rows // 2, columns)) if _packs_rows(weight) else (torch.int8, shape)
    return torch.float8_e4m3fn, shape


def _scale_dtype(scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
    fixed = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}.get(scheme.weight.scale_format)
    form = scale_format(scheme, dtype)
    return fixed or (torch.float16 if form == "bfloat16_in_float16" else SCALE_DTYPES[form])


def _scale_shape(weight: WeightSpec, shape: tuple[int, int]) -> tuple[int, ...]:
    rows, groups = weight.granularity.scale_shape(*shape, weight.columns_per_scale(shape[1]))
    if weight.granularity is Granularity.BLOCK:
        return (rows, 1, groups, 1)
    return {Granularity.TENSOR: (), Granularity.CHANNEL: (rows,)}.get(weight.granularity, (rows, groups))


def pack(linear: str, quantized: QuantizedTensor, scheme: Scheme, first_row: int, shape: tuple[int, int],
         dtype: torch.dtype, input_range: InputRange | None = None) -> list[Piece]:  # fmt: skip
    weight = scheme.weight
    codes, place = _packed(quantized.codes, weight), first_row // 2 if _packs_rows(weight) else first_row
    pieces = [Piece(f"{linear}.weight", codes, place)]
    scale = _stored_scale(quantized, scheme, dtype)
    if weight.granularity is Granularity.TENSOR:
        if first_row == 0:
            pieces.append(Piece(f"{linear}.weight_scale", scale.reshape(())))
    elif weight.granularity is Granularity.BLOCK:
        pieces.append(Piece(f"{linear}.weight_scale", scale[:, None, :, None], first_row // weight.block_rows))
    else:
        by_row = scale.reshape(-1) if weight.granularity is Granularity.CHANNEL else scale
        pieces.append(Piece(f"{linear}.weight_scale", by_row, first_row))
    if first_row == 0:
        pieces += _once_per_linear(linear, quantized, scheme, input_range)
        if storage_format(scheme) in _AWQ:
            pieces.append(Piece(f"{linear}.pre_quant_scale", torch.ones(shape[1], dtype=dtype)))
    return pieces


def _packed(codes: Tensor, weight: WeightSpec) -> Tensor:
    if weight.number == "e2m1":
        return kernels.pack_nibbles(codes)
    if _packs_rows(weight):
        return (codes[0::2].view(torch.uint8) & 0x0F) | (codes[1::2].view(torch.uint8) << 4)
    if weight.number == "int":
        return codes
    return codes.view(torch.float8_e4m3fn)


def _once_per_linear(
    linear: str, quantized: QuantizedTensor, scheme: Scheme, input_range: InputRange | None
) -> list[Piece]:
    pieces = []
    if scheme.weight.two_level or scheme.weight.ranged:
        pieces.append(Piece(f"{linear}.weight_scale_2", _global_scale(quantized)))
    if scheme.activation is not None and scheme.activation.needs_calibration:
        if input_range is None:
            raise AssertionError("a static activation scale was planned but not measured")
        largest_code = INT8_MAX if scheme.activation.number == "int" else E4M3_MAX
        largest_code *= E2M1_MAX if scheme.weight.two_level else 1.0
        input_scale = torch.tensor(input_range.absmax / largest_code, dtype=torch.float32)
        pieces.append(Piece(f"{linear}.input_scale", input_scale))
    return pieces


def _global_scale(quantized: QuantizedTensor) -> Tensor:
    return torch.tensor(quantized.global_scale, dtype=torch.float32)


def _stored_scale(quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    weight = scheme.weight
    if weight.scale_format == "e8m0":
        return e8m0_codes(quantized.scale)
    if weight.two_level:
        return (quantized.scale / _global_scale(quantized)).to(torch.float8_e4m3fn)
    return quantized.scale.to(_scale_dtype(scheme, dtype))


def inexact(quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> str | None:
    """Why a source's codes would change: permuted columns, or scales that are not what they will decode to."""
    if quantized.g_idx is not None:
        return "its groups are not of consecutive columns (activation order)"
    stored = _stored_scale(quantized, scheme, dtype)
    if scheme.weight.number == "int":
        held = stored.to(torch.bfloat16) if scale_format(scheme, dtype) == "bfloat16_in_float16" else stored
        same = torch.equal(held.float(), quantized.scale)
        return None if same else f"one of its scales is no {scale_format(scheme, dtype).partition('_')[0]} number"
    if scheme.weight.scale_format == "e8m0":
        same = torch.equal(e8m0_values(stored), quantized.scale)
        return None if same else "one of its scales is no power of two within 2^-127 .. 2^127"
    if not scheme.weight.two_level:
        return None
    if torch.equal(stored.float() * _global_scale(quantized), quantized.scale):
        return None
    return "no float32 multiplies its E4M3 scales to the scales it has (its global scale is stored as a divisor)"


def quantization_config(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`: hf_quant_config.json in the terms of llm-compressor, and quant_method."""
    stated = hf_quant_config(schemes, ignored)["quantization"]
    algorithm = stated["quant_algo"]
    config: dict[str, Any] = {}
    if algorithm == "MIXED_PRECISION":
        members: dict[tuple[str, int | None], list[str]] = {}
        for linear, layer in stated["quantized_layers"].items():
            members.setdefault((layer["quant_algo"], layer.get("group_size")), []).append(linear)
        config["config_groups"] = {
            f"group_{index}": {**_group(*each), "targets": sorted(linears)}
            for index, (each, linears) in enumerate(members.items())
        }
        config["quantized_layers"] = stated["quantized_layers"]
    elif algorithm in _WITH_GROUPS:
        config["config_groups"] = {"group_0": {**_GROUPS[algorithm], "targets": ["Linear"]}}
    config["ignore"] = stated.get("exclude_modules", [])
    return config | {"quant_algo": algorithm, "producer": PRODUCER, "quant_method": FORMAT}


def _group(algorithm: str, group_size: int | None) -> dict[str, Any]:
    """What config_groups says of an algorithm; AWQ's group size is the model's own."""
    group = _GROUPS[algorithm]
    return {key: args | {"group_size": group_size} for key, args in group.items()} if algorithm in _AWQ else group


def companion_files(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, which TensorRT-LLM reads first."""
    return {"hf_quant_config.json": hf_quant_config(schemes, ignored)}


def hf_quant_config(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """The content of hf_quant_config.json, as `get_quant_config` of ModelOpt makes it."""
    layers: dict[str, dict[str, Any]] = {}
    for linear, scheme in schemes.items():
        layers[linear] = {"quant_algo": storage_format(scheme)}
        if layers[linear]["quant_algo"] in _STATES_GROUP_SIZE:
            layers[linear]["group_size"] = scheme.weight.group_size
        if layers[linear]["quant_algo"] in _AWQ:
            layers[linear] |= {"has_zero_point": False, "pre_quant_scale": True}
    quantization: dict[str, Any] = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}
    if len({(layer["quant_algo"], layer.get("group_size")) for layer in layers.values()}) > 1:
        quantization["quantized_layers"] = layers
    else:
        quantization |= next(iter(layers.values())) | {"exclude_modules": exclude_modules(list(schemes), ignored)}
    return {"producer": PRODUCER, "quantization": quantization}


def exclude_modules(quantized: list[str], ignored: list[str]) -> list[str]:
    """Entries that match every ignored linear and no quantized one.

    Entries are wildcards (fnmatch), and vLLM also takes each for a substring of a name, of a fused one too: the router
    "mlp.gate" would catch "mlp.gate_proj" and "mlp.gate_up_proj". Such an entry is written so that it is a wildcard of
    one name and a substring of none: "mlp.gat[e]". A tied output head is a linear to loaders though the files do not
    hold one, hence "lm_head".
    """
    names = set(quantized)
    for name in quantized:
        path, _, leaf = name.rpartition(".")
        names |= {f"{path}.{fused}" for fused, members in FUSED.items() if leaf in members}
    entries = []
    for name in sorted({*ignored, "lm_head"} - set(quantized)):
        catches = any(name in other for other in names)
        entries.append(f"{name[:-1]}[{name[-1]}]" if catches else name)
    return entries
