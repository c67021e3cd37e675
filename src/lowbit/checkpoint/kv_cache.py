"""Read the scales of an FP8 or NVFP4 KV cache in a quantized folder of any format, for conversions.

    compressed-tensors   A.k_scale, A.v_scale float [1], or [kv_heads, 1, 1] per head (kv_cache_scheme.strategy)
    modelopt             A.k_proj.k_scale, A.v_proj.v_scale float [] or [1]; A.qkv_proj.k_scale where q, k, v are one
    quark                A.k_proj.output_scale, A.v_proj.output_scale float []
    fp8                  either of the first two; config.json does not state it

with A the attention of a layer, "model.layers.3.self_attn". A scale multiplies codes: the range is scale · 448 of
FP8, scale · 6 · 448 of NVFP4 (ModelOpt's alone).

Left out with a note, since weights do not depend on them: scales of another number format, a key's scale without a
value's, and scales that are not finite and above 0. Scales of queries (q_scale) and zero points, which are 0 in a
symmetric cache, are always left out; engines do not need them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import ArchitectureError
from lowbit.schemes import KV_CACHE_SCHEMES, KVCacheScheme

_NAME = re.compile(r"(?:^|.*\.)(\d+)\.self_attn\.(?:(?:[qkv]|qkv)_proj\.|attn\.)?([qkv])_(scale|zero_point)")
_QUARK_NAME = re.compile(r"(?:^|.*\.)(\d+)\.self_attn\.([qkv])_proj\.output_(scale|zero_point)")


@dataclass(frozen=True)
class StoredKVCache:
    """absmax: layer → largest |K| and |V| that the scales cover, float64 [1] or [kv_heads]: scale · reach, exactly."""

    scheme: KVCacheScheme
    absmax: dict[int, tuple[Tensor, Tensor]]


def kv_cache_names(stored: Checkpoint) -> dict[str, tuple[int, str]]:
    """Stored name → (layer, leaf), of everything that belongs to a quantized KV cache: (3, "k_scale")."""
    found = {name: _NAME.fullmatch(name) or _QUARK_NAME.fullmatch(name) for name in stored.tensors}
    return {name: (int(match[1]), f"{match[2]}_{match[3]}") for name, match in found.items() if match}


def read_kv_cache(stored: Checkpoint, scheme: KVCacheScheme | None) -> tuple[StoredKVCache | None, list[str]]:
    """(the scales, notes for the user). scheme: that of config.json; None if it states none that lowbit knows"""
    found = kv_cache_names(stored)
    names = {place: name for name, place in found.items()}
    if not names:
        if scheme is None:
            return None, []
        note = f"config.json states an {scheme.label} KV cache, but the files hold no scales for it; engines take 1.0"
        return None, [note]
    if scheme is None:
        return None, [_left_out("config.json does not say that the cache is FP8 or NVFP4")]
    if len(names) < len(found):
        twice = next(name for name, place in found.items() if names[place] != name)
        return None, [_left_out(f"{twice} and {names[found[twice]]} are both of layer {found[twice][0]}")]
    absmax = {}
    for layer in sorted({layer for layer, _ in names}):
        pair = []
        for leaf in ("k_scale", "v_scale"):
            name = names.get((layer, leaf))
            if name is None:
                return None, [_left_out(f"layer {layer} has no {leaf}")]
            scale = _values(stored, name)
            if scale is None or (scheme.per == "tensor" and scale.numel() != 1):
                return None, [_left_out(f"{name} is not one finite number above 0 for each {scheme.per}")]
            pair.append(scale * scheme.reach)
        absmax[layer] = (pair[0], pair[1])
    return StoredKVCache(scheme, absmax), []


def kv_cache_scheme(per: str) -> KVCacheScheme:
    """The FP8 scheme with one scale per "tensor" or "head"."""
    return KV_CACHE_SCHEMES["fp8" if per == "tensor" else "fp8_per_head"]


def key_value_heads(config: dict[str, Any]) -> int:
    """Heads of keys and values, of a config.json."""
    text = config.get("text_config")
    for values in (text, config):
        if isinstance(values, dict):
            heads = values.get("num_key_value_heads") or values.get("num_attention_heads")
            if type(heads) is int and heads > 0:
                return heads
    raise ArchitectureError(
        "config.json does not say how many key-value heads there are", "store one scale per layer: --kv-cache fp8"
    )


def _values(stored: Checkpoint, name: str) -> Tensor | None:
    """float64 [n]; None unless all are finite and above 0."""
    if not stored.tensors[name].dtype.is_floating_point:
        return None
    values = stored.read(name).double().reshape(-1)
    usable = values.numel() and bool((torch.isfinite(values) & (values > 0)).all())
    return values if usable else None


def _left_out(why: str) -> str:
    return f"scales of a quantized KV cache (k_scale, v_scale) are left out: {why}"
