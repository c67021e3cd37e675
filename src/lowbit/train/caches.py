"""Keys and values as a quantized KV cache gives them back, while a model is trained.

    k̂ = decode(encode(k))        forward; backward straight through: the gradient of k̂ is that of k

Each attention module gets the cache around its own forward pass, by hooks: so whatever runs it, a trainer, or the
recomputation of activation checkpointing in the backward pass, sees the same. `lowbit.kv.simulated` has what types do.
Ranges that an engine has stored, of FP8 and NVFP4, are those of the batch, as static activation scales are in training.

Refused: types with tables that need a calibration text (KVQuant), and what the simulation refuses.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from lowbit.calibrate.kv_cache import attention_layers
from lowbit.errors import UsageError
from lowbit.kv.simulated import quantized_layers, simulated_cache
from lowbit.kv.types import CacheType, find_cache_type

# --kv-cache of an output, whose scales are stored → the cache that an engine then has.
OF_OUTPUT = {"fp8": "fp8_calibrated", "fp8_per_head": "fp8_per_head", "nvfp4": "nvfp4_calibrated"}


def cache_of(name: str) -> CacheType:
    """The type of a name; UsageError for one that a training cannot have."""
    found = find_cache_type(OF_OUTPUT.get(name, name))
    if "distribution" in found.needs:
        raise UsageError(f"cache type {found.name} needs tables of a calibration text, which change in training",
                         "choose fp8_calibrated, int8_per_token_head, int4_per_token_head, kivi4 or kivi2")  # fmt: skip
    return found


def round_cache(model: nn.Module, cache: CacheType) -> list[Any]:
    """Have the attention of a model see keys and values of this cache type; returns the hooks."""
    layers = set(quantized_layers(model, cache))
    hooks: list[Any] = []
    for module, layer in attention_layers(model).items():
        if layer in layers:
            within = ExitStack()  # empty outside of the module's forward pass
            enter = partial(_enter, within, model, cache, layer)
            hooks += [module.register_forward_pre_hook(enter),
                      module.register_forward_hook(partial(_leave, within), always_call=True)]  # fmt: skip
    return hooks


def _enter(within: ExitStack, model: nn.Module, cache: CacheType, layer: int, *_: Any) -> None:
    within.enter_context(simulated_cache(model, cache, "batch", only=(layer,)))


def _leave(within: ExitStack, *_: Any) -> None:
    within.close()
