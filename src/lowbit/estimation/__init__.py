"""What a quantized model costs before anything is spent: file bytes, memory while serving, and the run itself.

    lowbit.estimate("demo:smollm2", scheme="Q4_K_M", hardware="rtx4090")

Parts that stand by themselves, none of which reads a weight:

    shapes.shape_of(config)                       the numbers of a config.json
    kv_cache.kv_bytes_per_token(config, bits)     GQA, MLA, sliding windows
    engines.overhead_bytes(engine, shape, …)      activations and framework, as assumptions with their source
    weights.weight_bytes(model, scheme, format)   the writer's own plan

Importing the package imports nothing heavy; `estimate` and `weight_bytes` are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.estimation.api import estimate as estimate
    from lowbit.estimation.result import Estimate as Estimate
    from lowbit.estimation.weights import weight_bytes as weight_bytes

_PLACES = {
    "estimate": "lowbit.estimation.api",
    "Estimate": "lowbit.estimation.result",
    "weight_bytes": "lowbit.estimation.weights",
}

__all__ = ["Estimate", "estimate", "weight_bytes"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'lowbit.estimation' has no attribute {name!r}")
