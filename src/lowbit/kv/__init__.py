"""The KV cache: what engines keep keys and values in (`CACHE_TYPES`), and a quantized cache for transformers.

cache = lowbit.kv.QuantizedCache(model.config, bits=4)
model.generate(ids, past_key_values=cache)
"""

from lowbit.kv.types import CACHE_TYPES, CacheType, find_cache_type, find_cache_types

__all__ = ["CACHE_TYPES", "CacheType", "find_cache_type", "find_cache_types"]
