"""Ranges of keys and values, for the scales of an FP8 KV cache.

    k[layer][head] = max over tokens and channels of |K|,  K as the cache stores it: after norms and rotary embedding
    v[layer][head] = the same of V

transformers passes K and V to an attention function that it looks up by name. While a model is observed, the look-up
returns that function wrapped, so that its arguments are measured; masks and everything else stay the same.

Refused: classes that call no such function (Bloom), one module that is the attention of several layers (Zamba), and
multi-head latent attention (DeepSeek): its cache holds one latent vector per token, whose k_scale vLLM's
compressed-tensors loader does not fill.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import ArchitectureError, NonFiniteError


@dataclass
class CacheRanges:
    """k, v: layer index → largest |K| and |V| of every key-value head, float32 [kv_heads]."""

    k: dict[int, Tensor] = field(default_factory=dict)
    v: dict[int, Tensor] = field(default_factory=dict)

    def absmax(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer → (absmax of K, absmax of V), for `Plan.kv_absmax`."""
        return {layer: (self.k[layer], self.v[layer]) for layer in sorted(self.k)}

    def look(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value [B, kv_heads, T, head_dim]; NonFiniteError if one is NaN or inf."""
        for name, found, states in (("keys", self.k, key), ("values", self.v, value)):
            largest = states.abs().amax(dim=(0, 2, 3)).float().cpu()
            if not torch.isfinite(largest).all():
                head = int((~torch.isfinite(largest)).nonzero()[0])
                raise NonFiniteError(
                    f"the {name} of layer {layer}, head {head}, are not finite for some token of the calibration text",
                    "run it in float32, or look for damage with `lowbit evaluate`",
                )
            found[layer] = torch.maximum(found[layer], largest) if layer in found else largest


@contextmanager
def observed_cache(model: nn.Module) -> Iterator[CacheRanges]:
    """Inside, forward passes of the model (whole, or block by block) are measured.

    ArchitectureError for what this module refuses, and on exit for attention that never ran.
    """
    refuse_latent_attention(model.config.to_dict(), type(model).__name__)  # type: ignore[operator,union-attr]
    layers = attention_layers(model)
    ranges = CacheRanges()

    def measuring(attention: Callable[..., Any]) -> Callable[..., Any]:
        def measured(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if module in layers:
                ranges.look(layers[module], key, value)
            return attention(module, query, key, value, *args, **kwargs)

        return measured

    with wrapped_attention(measuring):
        yield ranges
    missing = sorted(set(layers.values()) - ranges.k.keys())
    if missing:
        raise ArchitectureError(
            f"the attention of layer {missing[0]} of {type(model).__name__} does not run through transformers' "
            f"attention functions; its keys and values cannot be measured",
            "leave --kv-cache out",
        )


@contextmanager
def wrapped_attention(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, what transformers looks up as a model's attention function is `wrap(function)`. May be nested."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    outer = vars(ALL_ATTENTION_FUNCTIONS).get("get_interface")
    find = ALL_ATTENTION_FUNCTIONS.get_interface
    ALL_ATTENTION_FUNCTIONS.get_interface = lambda name, default: wrap(find(name, default))  # type: ignore[method-assign]
    try:
        yield
    finally:
        if outer is None:
            del ALL_ATTENTION_FUNCTIONS.get_interface  # back to the method of its class
        else:
            ALL_ATTENTION_FUNCTIONS.get_interface = outer  # type: ignore[method-assign]


def refuse_latent_attention(config: dict[str, Any], model: str) -> None:
    """ArchitectureError for a config.json with multi-head latent attention."""
    text = config.get("text_config")
    if any(isinstance(each, dict) and each.get("kv_lora_rank") for each in (config, text)):
        raise ArchitectureError(
            f"{model} has multi-head latent attention, whose cache holds one latent vector per token; there are no "
            f"keys and values to scale",
            "leave --kv-cache out; vLLM can quantize that cache without stored scales",
        )


def attention_layers(model: nn.Module) -> dict[nn.Module, int]:
    """Attention module → index of its layer; towers for images and the like have none. ArchitectureError for a model
    without any, and where one module is the attention of several layers (Zamba), with a cache for each."""
    name = type(model).__name__
    layers = {
        module: module.layer_idx
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")
    }
    if not layers:
        stateful = getattr(model, "_is_stateful", False)
        raise _not_measured(name, "its layers keep a recurrent state of fixed size and no keys and values" if stateful
                            else "it does not run its attention through transformers' attention functions")  # fmt: skip
    shared = next((module for module in layers if "layer_idx" in inspect.signature(module.forward).parameters), None)
    if shared is not None:
        raise _not_measured(name, f"one {type(shared).__name__} runs as several layers, with keys and values for each")
    return layers  # type: ignore[return-value]


def _not_measured(name: str, why: str) -> ArchitectureError:
    return ArchitectureError(f"{name} has no KV cache that can be measured: {why}", "leave --kv-cache out")
