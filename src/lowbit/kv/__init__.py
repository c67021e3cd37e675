"""The KV cache: what engines keep keys and values in (`CACHE_TYPES`), and a quantized cache for transformers.

cache = lowbit.kv.QuantizedCache(model.config, bits=4)
model.generate(**inputs, past_key_values=cache)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowbit.kv.types import CACHE_TYPES, CacheType, find_cache_type, find_cache_types

if TYPE_CHECKING:
    from lowbit.kv.cache import QuantizedCache as QuantizedCache

__all__ = ["CACHE_TYPES", "CacheType", "QuantizedCache", "find_cache_type", "find_cache_types"]


def __getattr__(name: str) -> Any:  # transformers is imported when somebody wants a cache
    if name == "QuantizedCache":
        from lowbit.kv.cache import QuantizedCache

        return QuantizedCache
    raise AttributeError(f"module 'lowbit.kv' has no attribute {name!r}")
