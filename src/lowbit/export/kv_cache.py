"""Scales of an FP8 or NVFP4 KV cache, in the formats that can store them.

    compressed-tensors  A.k_scale, A.v_scale float32 [1], or [kv_heads, 1, 1] per head
                        config.json: kv_cache_scheme, strategy "tensor" or "attn_head"
    modelopt            A.k_proj.k_scale, A.v_proj.v_scale float32 [] (A.qkv_proj.… where the three are one matrix)
                        config.json: kv_cache_scheme, a mapping for FP8 and "NVFP4" for NVFP4
                        hf_quant_config.json: kv_cache_quant_algo "FP8" or "NVFP4"

with A the attention of a layer, "model.layers.3.self_attn", and scale = largest |K| or |V| in float32, over 448 of FP8
and over 6 · 448 of NVFP4, whose blocks have scales of their own, made as keys and values are stored.
vLLM quantizes the cache of such a checkpoint by default (kv_cache_dtype "auto" becomes "fp8" or "nvfp4").

Spec: `CompressedTensorsKVCacheMethod`, `ModelOptKVCacheMethod`, `get_kv_cache_quant_algo_string` and
`get_cache_scale_mapper` of vLLM 0.32, which renames what lies under `self_attn`; `_init_kv_cache` of
compressed-tensors; export/quant_utils.py and convert_hf_config.py of ModelOpt 0.47; _torch/kv_cache_compression of
TensorRT-LLM.
Refused: other formats (vLLM's loaders of GPTQ and AWQ give the attention no scales, and would drop them), scales per
head in ModelOpt's, NVFP4 in compressed-tensors (vLLM takes 8 bits there), models whose attention is not called
`self_attn`, and multi-head latent attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.architecture import Architecture
from lowbit.checkpoint.kv_cache import key_value_heads
from lowbit.errors import ArchitectureError, FormatError
from lowbit.export import Piece
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.registry import Format
from lowbit.schemes import KVCacheScheme


@dataclass(frozen=True)
class CacheScales:
    """The stored scales of one layer."""

    layer: int
    k: StoredTensor
    v: StoredTensor

    def pieces(self, scheme: KVCacheScheme, absmax: tuple[Tensor, Tensor]) -> list[Piece]:
        """absmax  largest |K| and |V| of every head, [kv_heads]"""
        pieces = []
        for stored, largest in zip((self.k, self.v), absmax, strict=True):
            scales = scheme.scales(largest)
            if scales.numel() != (stored.shape[0] if stored.shape else 1):
                raise ArchitectureError(
                    f"{stored.name}: {scales.numel()} heads were measured, config.json has {stored.shape[0]}",
                    "store one scale per layer instead: --kv-cache fp8",
                )
            pieces.append(Piece(stored.name, scales.reshape(stored.shape)))
        return pieces


def unfit_kv_cache(format: Format, scheme: KVCacheScheme) -> str | None:
    """Why a format cannot store such scales; None where it can."""
    if not format.kv_cache:
        return f"{format.name} has no scales for a KV cache"
    if scheme.name in format.kv_cache:
        return None
    if scheme.per == "head":
        return f"{format.name} has one scale per layer for a KV cache, not one per {scheme.per}"
    return f"{format.name} has no scales for a KV cache in {scheme.label}; engines read them of modelopt"


def stored_kv_scales(
    format: Format, scheme: KVCacheScheme, architecture: Architecture, config: dict[str, Any]
) -> tuple[CacheScales, ...]:
    """The scales of every layer; raises what the module docstring refuses. config: config.json of the model"""
    reason = unfit_kv_cache(format, scheme)
    if reason is not None:
        fitting = "modelopt" if scheme.name == "nvfp4" else "compressed-tensors"
        raise FormatError(reason, f"use --format {fitting}, or leave --kv-cache out")
    heads = key_value_heads(config) if scheme.per == "head" else 0
    shape = () if format.name == "modelopt" else (heads, 1, 1) if heads else (1,)
    found = []
    for layer, (attention, key, value) in attention_of(architecture).items():
        names = (f"{key}.k_scale", f"{value}.v_scale")
        if format.name == "compressed-tensors":
            names = (f"{attention}.k_scale", f"{attention}.v_scale")
        found.append(CacheScales(layer, *(StoredTensor(name, torch.float32, shape) for name in names)))
    return tuple(found)


def attention_of(architecture: Architecture) -> dict[int, tuple[str, str, str]]:
    """Layer → (attention module, linear of keys, linear of values)."""
    found: dict[int, tuple[str, str, str]] = {}
    for linear in architecture.linears.values():
        if linear.block is None or linear.role not in ("k_proj", "qkv_proj"):
            continue
        attention = linear.name.rpartition(".")[0]
        value = linear.name if linear.role == "qkv_proj" else f"{attention}.v_proj"
        found[linear.block] = (attention, linear.name, value)
    for layer in range(len(architecture.blocks)):
        attention = found.get(layer, ("",))[0]
        if not attention.endswith(".self_attn"):
            what = f"the attention of layer {layer} is {attention}" if attention else f"layer {layer} makes no keys"
            raise ArchitectureError(
                f"{architecture.class_name}: {what}; scales of a KV cache are read below self_attn, of keys and values",
                "leave --kv-cache out",
            )
    return found


def state_kv_cache(format: str, scheme: KVCacheScheme, config: dict[str, Any]) -> dict[str, Any]:
    """config.json's `quantization_config`, with the KV cache."""
    if format == "modelopt":
        fp8 = {"dynamic": False, "num_bits": 8, "type": "float"}
        return config | {"kv_cache_scheme": fp8 if scheme.label == "FP8" else scheme.label}
    strategy = {"tensor": "tensor", "head": "attn_head"}[scheme.per]
    stated = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    return config | {"kv_cache_scheme": stated}


def state_kv_cache_beside(
    format: str, scheme: KVCacheScheme, files: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The format's other JSON files, with the KV cache."""
    if format != "modelopt":
        return files
    name = "hf_quant_config.json"
    quantization = files[name]["quantization"] | {"kv_cache_quant_algo": scheme.label}
    return files | {name: files[name] | {"quantization": quantization}}
