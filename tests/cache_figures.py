"""Figures of KV caches, as `lowbit evaluate --kv-cache` puts them into a report."""

from __future__ import annotations

from lowbit.evaluation.cache_result import CacheEvaluation, LayerLoss
from lowbit.evaluation.result import TextRecord
from lowbit.kv import find_cache_type


def make_cache(name: str, kld: float, alone: tuple[float, ...] = (), **changes) -> CacheEvaluation:
    """One row at 512 tokens; alone: the KLD with each layer alone quantized."""
    kept = find_cache_type(name)
    values = {
        "model": "out", "scheme": "W4A16", "type": kept.name, "engines": kept.engines, "per": kept.per,
        "how": kept.how, "source": kept.source, "bits_per_value": kept.bits(64), "bytes_per_token": 5760.0,
        "scales": "none", "text": TextRecord(name="prose.txt", sha256="ab" * 32, tokens=9000), "protocol": "full",
        "context": 512, "windows": 4, "first_scored": 1, "scored_tokens": 2044, "bos": False, "dtype": "float32",
        "layers": tuple(range(max(1, len(alone)))), "kld_mean": kld, "kld_se": kld / 20, "kld_p99": kld * 5,
        "kld_max": kld * 9, "same_top1": 0.9, "same_top1_se": 0.01, "ppl": 12.0, "ppl_ratio": 1.01,
        "ppl_ratio_se": 0.001, "seconds": 1.0, "versions": {},
        "by_layer": tuple(LayerLoss(layer=layer, kld_mean=loss, kld_se=loss / 20) for layer, loss in enumerate(alone)),
    }  # fmt: skip
    return CacheEvaluation(**(values | changes))
