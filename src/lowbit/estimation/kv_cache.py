"""Bytes of the KV cache, from a config.json alone.

    layer, full attention     2 · kv_heads · head_dim values for every token
    layer, sliding window     the same, for the tokens of the window at most, where the engine bounds it
    layer, latent (MLA)       kv_lora_rank + qk_rope_head_dim values, which every head expands

times the bytes of a cached value. Block types of llama.cpp carry their scales: q8_0 is 34 bytes for 32 values.
Grouped-query attention is kv_heads < heads. Engines differ, and `engines.ENGINES` has what each does.

Refused: layer types that are none of these (recurrent layers), and a cache type that the engine does not have.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from lowbit.errors import ArchitectureError, UsageError
from lowbit.estimation.engines import LLAMA_CPP_WINDOWS, Engine, find_engine
from lowbit.estimation.shapes import ModelShape, shape_of

# Bits of one cached value, block scales included. Scales per layer or head of FP8 are a few bytes in all.
CACHE_BITS: dict[str, float] = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0,
    "fp8": 8.0, "fp8_e4m3": 8.0, "fp8_e5m2": 8.0, "fp8_per_head": 8.0,
    "nvfp4": 4.5,  # an E4M3 scale for 16 values
    "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5,  # ggml blocks of 32
}  # fmt: skip
_SPELLINGS = {"float16": "f16", "fp16": "f16", "bfloat16": "bf16", "float32": "f32", "fp32": "f32"}


@dataclass(frozen=True)
class LayerCache:
    """values per token; tokens  that it keeps at most, None for all."""

    values: int
    tokens: int | None = None


@dataclass(frozen=True)
class KVCache:
    """The cache of a model in an engine.

    layers       one per decoder block
    bits         of a cached value
    token_block  the cache is handed out in so many tokens
    """

    layers: tuple[LayerCache, ...]
    bits: float = 16.0
    token_block: int = 1

    def bytes_per_token(self) -> float:
        """Of a token that every layer keeps."""
        return sum(layer.values for layer in self.layers) * self.bits / 8

    def growth(self, context: int) -> float:
        """Bytes that one token more costs a sequence of `context` tokens: full windows no longer grow."""
        growing = (layer.values for layer in self.layers if layer.tokens is None or layer.tokens > context)
        return sum(growing) * self.bits / 8

    def sequence_bytes(self, context: int) -> int:
        """Of one sequence of `context` tokens, in whole blocks."""
        total = 0
        for layer in self.layers:
            kept = context if layer.tokens is None else min(context, layer.tokens)
            total += -(-kept // self.token_block) * self.token_block * layer.values
        return round(total * self.bits / 8)

    @property
    def bounded(self) -> int:
        """How many layers keep a window only."""
        return sum(layer.tokens is not None for layer in self.layers)


def cache_of(
    shape: ModelShape, engine: str | None = None, kv_cache: str | float = "auto", memory: int | None = None
) -> KVCache:
    """The cache of a model.

    engine    whose rules hold; None: windows bounded, no blocks
    kv_cache  a name in CACHE_BITS, "auto" (16 bits), or the bits of a value
    memory    bytes of the device, where they are known: vLLM keeps more beside a window on a larger one

    Raises ArchitectureError for layer types that have another kind of cache, UsageError for a cache type that does not
    exist or that the engine lacks.
    """
    found = None if engine is None else find_engine(engine)
    bits = kv_cache if isinstance(kv_cache, int | float) else cache_bits(kv_cache, found)
    layers = tuple(
        _layer(kind, shape, found, memory) for kind in shape.layer_types or ("full_attention",) * shape.layers
    )
    return KVCache(layers, float(bits), 1 if found is None else found.token_block)


def kv_bytes_per_token(
    config: dict[str, Any] | ModelShape,
    dtype_bits: float = 16.0,
    context: int | None = None,
    engine: str | None = None,
) -> float:
    """Bytes of KV cache per token: of a sequence of `context` tokens on average, or of a token that all layers keep.

    config      a parsed config.json, or its shape
    dtype_bits  of a cached value: 16, 8 for FP8, 8.5 for q8_0, 4.5 for q4_0 (`CACHE_BITS`)
    engine      whose handling of windows and latents to count; None: the least
    """
    shape = config if isinstance(config, ModelShape) else shape_of(config)
    cache = cache_of(shape, engine, dtype_bits)
    return cache.bytes_per_token() if context is None else cache.sequence_bytes(context) / max(1, context)


def cache_bits(name: str, engine: Engine | None = None) -> float:
    """Bits of a cached value by the type's name; "auto" is the model's 16 bits."""
    spelled = name.lower()
    spelled = _SPELLINGS.get(spelled, spelled)
    offered = ("auto", *CACHE_BITS) if engine is None else engine.cache_types
    if spelled not in offered:
        known = spelled in CACHE_BITS
        near = difflib.get_close_matches(spelled, offered, n=2) or offered
        raise UsageError(
            f"{engine.name} keeps no KV cache in {name}" if engine is not None and known
            else f"there is no KV cache type {name!r}" + ("" if engine is None else f" in {engine.name}"),
            f"choose one of {', '.join(offered)}" if known or len(near) > 2 else f"did you mean {' or '.join(near)}?",
        )  # fmt: skip
    return 16.0 if spelled == "auto" else CACHE_BITS[spelled]


def _layer(kind: str, shape: ModelShape, engine: Engine | None, memory: int | None) -> LayerCache:
    values = _values(shape)
    if kind == "full_attention":
        return LayerCache(values)
    if kind not in ("sliding_attention", "chunked_attention"):
        raise ArchitectureError(
            f"a layer of type {kind!r} has no cache of keys and values that this estimate knows",
            "full, sliding and chunked attention and MLA are known",
        )
    window = shape.window if kind == "sliding_attention" else shape.chunk
    if window is None:
        raise ArchitectureError(f"config.json has layers of type {kind!r}, but no window for them")
    if engine is None:
        return LayerCache(values, window)
    knows = engine.name != "llama.cpp" or shape.model_type in LLAMA_CPP_WINDOWS
    slack = engine.slack_passes * (engine.pass_tokens(memory) or 0)
    return LayerCache(values, window + slack if engine.bounds_windows and knows else None)


def _values(shape: ModelShape) -> int:
    if shape.is_latent:
        return (shape.latent_rank or 0) + (shape.rope_dim or 0)
    return 2 * shape.kv_heads * shape.head_dim
