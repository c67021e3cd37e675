"""What some cache types need to know beforehand, from a calibration text that runs through the model.

    "range"         largest |x| of every head of keys and of values: FP8 and NVFP4 with calibrated scales
    "distribution"  keys before the rotary embedding: the quantiles 0.5 % and 99.5 % of every channel, and a codebook of
                    what lies between, by k-means of all channels together; of values the codebook alone, in the range
                    of their token without its outliers (KVQuant; its weights by Fisher information are left out)

Distributions keep the states of all tokens in memory: layers · tokens · 2 · kv_heads · head_dim · 4 bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibrate.kv_cache import attention_layers, observed_cache, wrapped_attention
from lowbit.kv.codecs import NonUniform, SideFacts
from lowbit.kv.simulated import CacheFacts, before_rope
from lowbit.kv.types import CacheType

_SAMPLE = 200_000  # values that k-means sees
_SEED = 0


@dataclass
class _States:
    """Layer → states [heads, tokens, D] of every window, in order."""

    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    values: dict[int, list[Tensor]] = field(default_factory=dict)


def measure_facts(model: nn.Module, types: tuple[CacheType, ...], run: Callable[[], object]) -> CacheFacts:
    """Facts of every layer for these types. run: runs the calibration text through the model, without a cache."""
    needs = {need for cache_type in types for need in cache_type.needs}
    states = _States()
    with contextlib.ExitStack() as stack:
        if "distribution" in needs:
            stack.enter_context(_recorded(model, states))
        ranges = stack.enter_context(observed_cache(model))
        run()
    facts = {layer: (SideFacts(ranges.k[layer]), SideFacts(ranges.v[layer])) for layer in sorted(ranges.k)}
    codecs = {codec for each in types for codec in (each.keys, each.values) if isinstance(codec, NonUniform)}
    for layer in sorted(states.keys):
        both = (torch.cat(states.keys.pop(layer), dim=1), torch.cat(states.values.pop(layer), dim=1))
        keys, values = (
            _distribution(side, found, [codec for codec in codecs if codec.per == per])
            for side, found, per in zip(facts[layer], both, ("channel", "token"), strict=True)
        )
        facts[layer] = (keys, values)
    return facts


def _distribution(side: SideFacts, states: Tensor, codecs: list[NonUniform]) -> SideFacts:
    """side with quantiles and codebooks of states [heads, tokens, D], for the keys' codecs or the values'."""
    low = high = None
    codebooks = {}
    for codec in sorted(codecs, key=lambda each: each.code_bits):
        if codec.per == "channel" and low is None:
            low, high = (_quantile(states, at) for at in (codec.share / 2, 1 - codec.share / 2))
        least, largest, outside = codec.range_of(states[None], low, high)
        middle, half = (largest + least) / 2, ((largest - least) / 2).clamp(min=1e-12)
        codebooks[codec.code_bits] = k_means(((states[None] - middle) / half)[~outside], 2**codec.code_bits)
    return replace(side, low=low, high=high, codebooks=codebooks)


def _quantile(states: Tensor, at: float) -> Tensor:
    """[heads, D], of each channel over all tokens; as torch.quantile, which takes 2^24 values at most."""
    place = at * (states.shape[1] - 1)
    below = int(place)
    ordered = states.sort(dim=1).values
    above = ordered[:, min(below + 1, states.shape[1] - 1)]
    return ordered[:, below] + (above - ordered[:, below]) * (place - below)


def k_means(values: Tensor, count: int, steps: int = 60) -> Tensor:
    """float32 [count], rising: centres of least squared distance, from quantiles on, by Lloyd's iterations.

    At most 200 000 values are used, drawn with a fixed seed. An empty cell keeps its centre.
    """
    values = values.flatten().double()
    if len(values) > _SAMPLE:
        drawn = torch.randint(len(values), (_SAMPLE,), generator=torch.Generator().manual_seed(_SEED))
        values = values[drawn.to(values.device)]
    values = values.sort().values
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count * (len(values) - 1)
    centres = values[places.long().to(values.device)]
    for _ in range(steps):
        cells = torch.bucketize(values, (centres[1:] + centres[:-1]) / 2)
        sizes = torch.bincount(cells, minlength=count)
        sums = torch.zeros(count, dtype=torch.float64, device=values.device).scatter_add_(0, cells, values)
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres.float()


@contextlib.contextmanager
def _recorded(model: nn.Module, states: _States) -> Iterator[None]:
    """Inside, keys before the rotary embedding and values are kept."""
    layers = attention_layers(model)

    def keep(kept: dict[int, list[Tensor]], layer: int, found: Tensor) -> None:
        kept.setdefault(layer, []).append(found.detach().float().transpose(0, 1).flatten(1, 2).cpu())

    def recording(attention: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if module in layers:
                keep(states.values, layers[module], value)
            return attention(module, query, key, value, *args, **kwargs)

        return recorded

    def record(module: nn.Module, key: Tensor) -> Tensor:
        keep(states.keys, layers[module], key)
        return key

    with wrapped_attention(recording), before_rope(layers, record):
        yield
