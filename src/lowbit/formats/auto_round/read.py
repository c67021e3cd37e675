"""AutoRound folders (quant_method "auto-round"), read: GPTQ's or AWQ's tensors under a statement of AutoRound's own.

    packing_format          tensors                                       read as
    auto_round:auto_gptq    GPTQ v1: zero points stored less 1, no g_idx  gptq
    auto_round              GPTQ v2: zero points as they are, no g_idx    gptq_v2
    auto_round:gptqmodel    the same with g_idx                           gptq_v2
    auto_round:auto_awq     AutoAWQ's GEMM layout                         awq

config.json has bits, group_size, sym, and `extra_config`: name of a linear, or a regex found anywhere in it → bits,
group_size and sym that differ; 16 bits leave it alone. The statement is restated in the terms of GPTQ or AWQ, and the
layout of that row of `registry.FORMATS` reads the files.

Spec: auto_round/export/export_to_autoround/export.py, inference/backend.py, inference/convert_model.py and
auto_round_extension/torch/qlinear_torch.py, qlinear_torch_zp.py of AutoRound 0.15.
Refused by name: quantized activations, floats (data_type mx_fp, nv_fp, fp; packing formats llm_compressor and
fp8_static, whose tensors follow other formats), rotated weights, other packing formats, and AWQ whose linears differ.
"""

from __future__ import annotations

import re
from typing import Any

from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.quantized import Layout
from lowbit.errors import CheckpointError
from lowbit.registry import FORMATS, load

_GPTQ = {"auto_round:auto_gptq": "gptq", "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2"}
_AWQ = "auto_round:auto_awq"
_HINT = "start from the 16-bit model, or export it again: auto-round --format auto_round (W4A16)"
_WHOLE = 16  # bits from which on a linear is not quantized


def open_auto_round(stored: Checkpoint, quantization: dict[str, Any]) -> Layout:
    """The layout of the tensors; CheckpointError for what the module docstring refuses."""
    packing = quantization.get("packing_format", quantization.get("backend"))
    packing = "auto_round:auto_gptq" if packing is None else str(packing)
    data_type = str(quantization.get("data_type", "int"))
    activations = quantization.get("act_bits")
    if data_type != "int" or (activations is not None and activations < _WHOLE):
        raise _refused(stored, f"data_type {data_type!r} with act_bits {activations!r}", "weight-only integers")
    if quantization.get("rotation_config"):
        raise _refused(stored, "a rotation_config", "weights in the model's own basis")
    if packing in _GPTQ:
        return load(FORMATS["gptq"].read or "")(stored, _as_gptq(stored, quantization, _GPTQ[packing]))
    if packing == _AWQ:
        return load(FORMATS["awq"].read or "")(stored, _as_awq(stored, quantization))
    raise _refused(stored, f"packing_format {packing!r}", f"one of {', '.join((*_GPTQ, _AWQ))}")


def _as_gptq(stored: Checkpoint, quantization: dict[str, Any], version: str) -> dict[str, Any]:
    """The statement as GPTQModel would make it."""
    stated = {key: quantization[key] for key in ("bits", "group_size", "sym") if key in quantization}
    dynamic: dict[str, dict[str, Any]] = {}
    for name, own in _extra(stored, quantization).items():
        pattern = re.escape(name) + "$" if _is_linear(stored, name) else f".*(?:{name})"
        if own.get("bits", 0) >= _WHOLE:
            dynamic[f"-:{pattern}"] = {}
        else:
            dynamic[f"+:{pattern}"] = {key: own[key] for key in ("bits", "group_size", "sym") if key in own}
    stated |= {"quant_method": "gptq", "desc_act": False, "checkpoint_format": version, "dynamic": dynamic}
    stated["lm_head"] = "lm_head.qweight" in stored.tensors
    if quantization.get("bits") != 3:  # it takes 1 from the fields of a word at once, as GPTQModel does
        stated["meta"] = {"quantizer": ["gptqmodel:as auto-round packs"]}
    return stated


def _as_awq(stored: Checkpoint, quantization: dict[str, Any]) -> dict[str, Any]:
    """The statement as AutoAWQ would make it."""
    left = []
    for name, own in _extra(stored, quantization).items():
        if own.get("bits", 0) < _WHOLE:
            raise _refused(stored, f"extra_config for {name}", "one scheme for all linears of AWQ files")
        left.append(name)
    stated = {key: quantization[key] for key in ("bits", "group_size") if key in quantization}
    return stated | {
        "quant_method": "awq", "version": "gemm", "zero_point": not quantization.get("sym", True),
        "modules_to_not_convert": left,
    }  # fmt: skip


def _extra(stored: Checkpoint, quantization: dict[str, Any]) -> dict[str, dict[str, Any]]:
    extra = quantization.get("extra_config") or {}
    bad = not isinstance(extra, dict) or not all(isinstance(own, dict) for own in extra.values())
    if bad or not all(type(own.get("bits", 0)) is int for own in extra.values()):
        raise _refused(stored, f"extra_config {str(extra)[:200]!r}", "a mapping of names to settings")
    return extra


def _is_linear(stored: Checkpoint, name: str) -> bool:
    return f"{name}.qweight" in stored.tensors or f"{name}.weight" in stored.tensors


def _refused(stored: Checkpoint, found: str, needed: str) -> CheckpointError:
    return CheckpointError(f"{stored.source}: config.json: auto-round with {found} cannot be read; {needed} can", _HINT)
