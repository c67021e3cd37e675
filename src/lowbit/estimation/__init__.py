"""The cost of a quantized model before the run: file bytes, memory while serving, and the run itself.

    lowbit.estimate("demo:smollm2", scheme="Q4_K_M", hardware="rtx4090")

Independent parts, none of which reads a weight:

    weights.weight_bytes(model, scheme, format)   the writer's own plan
    footprint.footprint(shape, scheme)            the same from a shape alone, by parts
    serving.deploy(engine, shape, weights, …)     KV cache, activations, framework; what fits
    run_memory.peak_memory(prepared, program)     of the quantization itself

The package imports nothing heavy; `estimate` and `weight_bytes` are loaded on first use.
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
