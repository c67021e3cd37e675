"""Rules on a quantized KV cache: what config.json says of it, and the scales that engines then look for.

vLLM takes an absent scale for 1.0 without a word: keys and values beyond 448 are cut off, small ones lose their bits.
"""

from __future__ import annotations

from lowbit.checkpoint.compressed_tensors_config import is_fp8_cache
from lowbit.checkpoint.kv_cache import key_value_heads, kv_cache_names
from lowbit.checkpoint.quantized import FLOATS, HasKVCache
from lowbit.verification.result import Finding
from lowbit.verification.subject import Subject

KV_LEAVES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")


def quantizes_kv_cache(subject: Subject) -> bool:
    """True where config.json (or ModelOpt's file) speaks of a quantized KV cache."""
    stated = subject.quantization
    nested = stated.get("quantization")
    inner = nested if isinstance(nested, dict) else {}
    return any((stated.get("kv_cache_scheme"), stated.get("kv_cache_quant_algo"), inner.get("kv_cache_quant_algo")))


def check_scheme(subject: Subject) -> Finding:
    """A KV-cache scheme is FP8, symmetric, static, one scale per tensor or head."""
    stated = subject.parsed.kv_cache
    if stated is None:
        return Finding([], "not quantized")
    problem = f"quantization_config.kv_cache_scheme is {stated!r}; vLLM takes 8-bit float, tensor or attn_head"
    return Finding([] if is_fp8_cache(stated) else [problem], f"FP8, {stated.get('strategy')}")


def check_scales(subject: Subject) -> Finding:
    """Every layer has a scale of keys and one of values: floats, finite and above 0, of the shape that is stated."""
    found = kv_cache_names(subject.stored)
    places = {place: name for name, place in found.items()}
    layout = subject.layout
    scheme = layout.kv_cache if isinstance(layout, HasKVCache) else None
    if not quantizes_kv_cache(subject) and not (subject.format == "fp8" and places):
        return Finding([], "the cache is not quantized")
    if scheme is None:
        return Finding([], "the cache is not quantized to FP8 with one scale per tensor or head")
    problems = [f"{name} and {places[place]} are both of layer {place[0]}"
                for name, place in found.items() if places[place] != name]  # fmt: skip
    heads = key_value_heads(subject.config) if scheme.per == "head" else 1
    for layer in range(len(subject.architecture.blocks)):
        for leaf in ("k_scale", "v_scale"):
            name = places.get((layer, leaf))
            if name is None:
                problems.append(f"layer {layer} has no {leaf}; config.json says that the KV cache is FP8")
                continue
            problem = _problem(subject, name, heads)
            problems += [] if problem is None else [problem]
    return Finding(problems, f"FP8, one scale per {scheme.per}, in {len(subject.architecture.blocks)} layers")


def _problem(subject: Subject, name: str, heads: int) -> str | None:
    info = subject.stored.tensors[name]
    if info.dtype not in FLOATS:
        return f"{name} is {str(info.dtype).removeprefix('torch.')}; a float is needed"
    count = 1
    for size in info.shape:
        count *= size
    if count != heads:
        return f"{name} has shape {list(info.shape)}; {heads} {'number is' if heads == 1 else 'numbers are'} needed"
    values = subject.stored.read(name).float().reshape(-1)
    wrong = [value for value in values.tolist() if not 0 < value < float("inf")]
    return f"{name} is {wrong[0]}; a finite number above 0 is needed" if wrong else None
