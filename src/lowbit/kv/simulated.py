"""Simulates a cache type inside the forward pass: attention sees what the engine's cache would give back.

Every token is treated as if it were being decoded: the tokens before it are read from the cache, and so is its own key
and value, but for types that keep a window of tokens in 16 bits (`Window`). Engines that compute the prompt with keys
and values in 16 bits and quantize them behind that (KIVI, transformers, TurboQuant) lose less in the prompt.

    keys, values     rounded where transformers passes them to an attention function, which it looks up by name: after
                     norms and rotary embedding, before they are repeated for the queries' heads
    before the RoPE  `apply_rotary_pos_emb` of the model's module is wrapped (KVQuant)
    MLA              the latent and the rotated key, where the module expands them: they are what its cache holds
    shared KV        a layer that takes keys and values of an earlier one rounds them alike
    sliding windows  rounded like the others; the mask stays the model's
    recurrent layers have no such cache, and stay as they are

Refused by name: models without such attention, heads that the type does not take, MLA with types that have no form for
a latent, attention with arguments that are not known here where a window needs its own attention.

Attention over a cache whose newest tokens are still in 16 bits: each query as if its token were being decoded.

    token t attends to  k̂_j, v̂_j  for j < quantized(t), and to k_j, v_j for the others

    scores[t, j] = q_t · (k̂_j or k_j) · scaling       soft-capped, masked
    p = softmax(scores)                               with a sink in the denominator where the model has one
    out_t = Σ_j p[t, j] · (v̂_j or v_j)

Queries are taken some at a time, so that scores are [heads, queries, T] of a part and never of the whole text. All keys
behind a query are left out before the mask: the models are causal.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.calibrate.kv_cache import attention_layers, wrapped_attention
from lowbit.errors import ArchitectureError, UsageError
from lowbit.kv.codecs import Codec, GgmlBlock, Minifloat, Plain, SideFacts
from lowbit.kv.types import CacheType, Window
from lowbit.numerics.straight_through import straight_through

# Layer → (facts of keys, facts of values).
CacheFacts = Mapping[int, tuple[SideFacts, SideFacts]]
# Arguments of attention functions that the windowed attention may leave unread: dropout is 0 in evaluation, and the
# mask already holds windows and positions.
_UNREAD = {
    "dropout", "sliding_window", "is_causal", "position_ids", "cache_position", "output_attentions", "use_cache",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic", "position_embeddings",
    "past_key_values", "labels", "logits_to_keep", "output_hidden_states", "return_dict", "output_router_logits",
}  # fmt: skip


def quantized_layers(model: nn.Module, cache_type: CacheType) -> tuple[int, ...]:
    """Indices of the layers whose cache the type quantizes, in order.

    ArchitectureError for a model without a cache of keys and values, ShapeError for heads of the wrong size.
    """
    layers = attention_layers(model)
    indices = sorted(set(layers.values()))
    for module in layers:
        if _is_latent(module):
            _check_latent(cache_type)
        else:
            size = _head_dim(module)
            if size is not None:
                cache_type.check(size, int(getattr(module, "v_head_dim", None) or size))
    blocks = int(getattr(model.config.get_text_config(), "num_hidden_layers", len(indices)))  # type: ignore[operator,union-attr]
    if cache_type.skip_ends and blocks == len(indices):
        ends = min(cache_type.skip_ends, len(indices) // 2)
        indices = indices[ends : len(indices) - ends]
    return tuple(indices)


@contextlib.contextmanager
def simulated_cache(
    model: nn.Module, cache_type: CacheType, facts: CacheFacts | Literal["batch"] | None = None,
    only: tuple[int, ...] | None = None, key_order: Tensor | None = None,
) -> Iterator[None]:  # fmt: skip
    """Inside, forward passes of the model (whole, or block by block; without a cache of their own) see the cache type.
    Gradients go straight through its rounding.

    facts  of every layer, for types that need calibration (`lowbit.kv.calibrated`); "batch": ranges are those of the
           keys and values at hand
    only   layers that are quantized; None: `quantized_layers`
    key_order  int64 [D]: the value of a key that is each of llama.cpp's, whose converter makes rotary pairs neighbours
               for some architectures; its blocks and rotations then hold other values. Read by its types alone
    """
    chosen = set(quantized_layers(model, cache_type) if only is None else only)
    if cache_type.needs and facts is None:
        raise UsageError(f"cache type {cache_type.name} needs ranges that a calibration text gives")
    order = key_order if isinstance(cache_type.keys, GgmlBlock) or cache_type.queries is not None else None
    known = {} if facts is None or facts == "batch" else facts
    layers = {module: _Layer(cache_type, index, known.get(index), order, facts == "batch")
              for module, index in attention_layers(model).items() if index in chosen}  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(wrapped_attention(_through(layers)))
        for module, layer in layers.items():
            if _is_latent(module):
                stack.enter_context(_latent(module, layer))
        if cache_type.before_rope:
            stack.enter_context(before_rope(dict.fromkeys(layers), _rounding(layers)))
        yield


@dataclass(frozen=True)
class _Layer:
    """The cache of one layer. of_batch: ranges are those of the states at hand"""

    type: CacheType
    index: int
    facts: tuple[SideFacts, SideFacts] | None
    order: Tensor | None = None
    of_batch: bool = False

    def keys(self, states: Tensor) -> Tensor:
        facts = None if self.facts is None else self.facts[0]
        return self._reordered(states, lambda ordered: self._given_back(ordered, self.type.keys, facts))

    def values(self, states: Tensor) -> Tensor:
        return self._given_back(states, self.type.values, None if self.facts is None else self.facts[1])

    def queries(self, states: Tensor) -> Tensor:
        codec = self.type.queries
        if codec is None:
            return states
        return self._reordered(states, lambda ordered: _rounded(ordered, codec, None))

    def _reordered(self, states: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        if self.order is None:
            return change(states)
        order = self.order.to(states.device)
        return change(states[..., order])[..., order.argsort()]

    def _given_back(self, states: Tensor, codec: Codec, facts: SideFacts | None) -> Tensor:
        if self.of_batch:
            facts = SideFacts(states.detach().abs().amax(dim=(0, 2, 3)).float())
        rounded, first = _rounded(states, codec, facts), self.type.exact_first
        return torch.cat([states[..., :first, :], rounded[..., first:, :]], dim=-2) if first else rounded


def _rounded(states: Tensor, codec: Codec, facts: SideFacts | None) -> Tensor:
    with torch.no_grad():
        rounded = codec.round_trip(states.float(), facts).to(states.dtype)
    return straight_through(states, rounded)


def _through(layers: Mapping[nn.Module, _Layer]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of an attention function, the one that sees keys and values of these layers as their cache gives them back."""

    def wrap(attention: Callable[..., Any]) -> Callable[..., Any]:
        def through_cache(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *args: Any,
            **kwargs: Any,
        ) -> Any:  # fmt: skip
            layer = layers.get(module)
            if layer is None or _is_latent(module):
                return attention(module, query, key, value, mask, *args, **kwargs)
            keys = TwoVersions(key, key if layer.type.before_rope else layer.keys(key))
            values = TwoVersions(value, layer.values(value))
            query = layer.queries(query)
            if layer.type.window is None:
                return attention(module, query, keys.cached, values.cached, mask, *args, **kwargs)
            known = _known_arguments(module, args, kwargs, query.shape[-1])
            return windowed_attention(query, keys, values, layer.type.window, mask, **known), None

        return through_cache

    return wrap


def _known_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Keywords of `windowed_attention`; ArchitectureError for an argument that would be left out in silence."""
    strange = [name for name, value in kwargs.items() if value is not None
               and name not in _UNREAD | {"scaling", "softcap", "s_aux"}]  # fmt: skip
    if args or strange:
        what = strange[0] if strange else "an argument without a name"
        raise ArchitectureError(
            f"{type(module).__name__} passes {what} to its attention, which a cache with a window in 16 bits cannot be "
            f"simulated with",
            "choose a type without a window, such as int4_per_token_head or q4_0",
        )
    scaling = kwargs.get("scaling")
    return {
        "scaling": head_dim**-0.5 if scaling is None else float(scaling),
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
    }


def _rounding(layers: Mapping[nn.Module, _Layer]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda module, key: layers[module].keys(key)


@contextlib.contextmanager
def before_rope(layers: Mapping[nn.Module, Any], change: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Inside, the keys of these attention modules pass through `change` before their rotary embedding, and the wrapped
    function is the model's own. ArchitectureError for a module that does not rotate by `apply_rotary_pos_emb(q, k, …)`.
    """
    running: list[nn.Module] = []
    with contextlib.ExitStack() as stack:
        for code in {sys.modules[type(module).__module__] for module in layers}:
            stack.enter_context(_wrapped_rope(code, layers, running, change))
        for module in layers:
            for handle in (
                module.register_forward_pre_hook(lambda module, _: running.append(module)),
                module.register_forward_hook(lambda *_: running.clear()),
            ):
                stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def _wrapped_rope(
    code: ModuleType, layers: Mapping[nn.Module, Any], running: list[nn.Module],
    change: Callable[[nn.Module, Tensor], Tensor],
) -> Iterator[None]:  # fmt: skip
    rotate: Any = getattr(code, "apply_rotary_pos_emb", None)
    if rotate is None or list(inspect.signature(rotate).parameters)[:2] != ["q", "k"]:
        name = type(next(iter(layers))).__name__
        raise ArchitectureError(
            f"{name} does not rotate queries and keys by apply_rotary_pos_emb(q, k, …); keys before the rotary "
            f"embedding cannot be rounded",
            "choose a type that rounds keys behind it, such as kivi4 or int4_per_token_head",
        )

    def rotated(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = running[-1] if running else None
        return rotate(q, k if module is None or module not in layers else change(module, k), *args, **kwargs)

    code.apply_rotary_pos_emb = rotated  # type: ignore[attr-defined]
    try:
        yield
    finally:
        code.apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]


@contextlib.contextmanager
def _latent(module: nn.Module, layer: _Layer) -> Iterator[None]:
    """The latent and the rotated key are one vector in engines' caches; no codec that is allowed here spans both.
    llama.cpp rotates that vector 64 values at a time."""
    expand: Any = module.expand_kv
    if isinstance(layer.type.keys, GgmlBlock):
        layer = replace(layer, order=None, type=replace(layer.type, keys=replace(layer.type.keys, rotation="values")))

    def expanded(latent: Tensor, rotated: Tensor) -> Any:
        return expand(layer.keys(latent), layer.keys(rotated))

    module.expand_kv = expanded  # type: ignore[assignment]
    try:
        yield
    finally:
        del module.expand_kv  # back to the method of its class


def _is_latent(module: nn.Module) -> bool:
    return hasattr(module, "expand_kv") and hasattr(module, "kv_lora_rank")


def _check_latent(cache_type: CacheType) -> None:
    codec = cache_type.keys
    fits = isinstance(codec, Plain | GgmlBlock) or (isinstance(codec, Minifloat) and codec.scale == "one")
    if not fits or cache_type.window is not None:
        raise UsageError(
            f"the model has multi-head latent attention, whose cache holds one latent vector per token; cache type "
            f"{cache_type.name} has no form for it",
            "choose fp8_e4m3, fp8_e5m2, bf16 or one of llama.cpp's types",
        )


def _head_dim(module: nn.Module) -> int | None:
    size = getattr(module, "head_dim", None)
    return int(size) if isinstance(size, int) else None


QUERIES = 128  # at a time


@dataclass(frozen=True)
class TwoVersions:
    """States [B, heads, T, D]: exact, and as the cache gives them back."""

    exact: Tensor
    cached: Tensor


def windowed_attention(
    query: Tensor, keys: TwoVersions, values: TwoVersions, window: Window, mask: Tensor | None, scaling: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The output [B, T, query heads, D_v], in the query's dtype; computed in float32.

    query  [B, query heads, T, D]
    mask   added to the scores, or bool where attention is allowed, [B or 1, 1 or heads, T, T]; None: causal
    sinks  [query heads], one more score of each query
    """
    batch, heads, length, _ = query.shape
    shared = heads // keys.exact.shape[1]
    grouped = query.float().unflatten(1, (-1, shared))  # [B, kv heads, query heads of each, T, D]
    parts = []
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        counts = {side: [window.quantized(t, side) for t in range(start, stop)] for side in ("keys", "values")}
        scores = _scores(grouped[..., start:stop, :], keys, counts["keys"], stop) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = _masked(scores, mask, start, stop, shared)
        if sinks is not None:
            extra = sinks.float().reshape(1, -1, shared, 1, 1).expand(batch, -1, -1, stop - start, 1)
            scores = torch.cat([scores, extra], dim=-1)
        weights = scores.softmax(-1)[..., :stop]
        parts.append(_summed(weights, values, counts["values"], stop))
    return torch.cat(parts, dim=-2).flatten(1, 2).transpose(1, 2).contiguous().to(query.dtype)


def _scores(query: Tensor, keys: TwoVersions, counts: list[int], stop: int) -> Tensor:
    """[B, kv heads, shared, C, stop]: columns below every count from the cache, above every count exact."""
    low, high = min(counts), min(max(counts), stop)

    def dot(states: Tensor) -> Tensor:
        return query @ states.float()[:, :, None].transpose(-1, -2)

    parts = [dot(keys.cached[:, :, :low])]
    if high > low:
        chosen = _chosen(counts, low, high, query.device)
        parts.append(torch.where(chosen, dot(keys.cached[:, :, low:high]), dot(keys.exact[:, :, low:high])))
    parts.append(dot(keys.exact[:, :, high:stop]))
    return torch.cat(parts, dim=-1)


def _summed(weights: Tensor, values: TwoVersions, counts: list[int], stop: int) -> Tensor:
    low, high = min(counts), min(max(counts), stop)
    total = weights[..., :low] @ values.cached.float()[:, :, None, :low]
    if high > low:
        chosen = _chosen(counts, low, high, weights.device)
        between = weights[..., low:high]
        total = total + (between * chosen) @ values.cached.float()[:, :, None, low:high]
        total = total + (between * ~chosen) @ values.exact.float()[:, :, None, low:high]
    return total + weights[..., high:] @ values.exact.float()[:, :, None, high:stop]


def _chosen(counts: list[int], low: int, high: int, device: torch.device) -> Tensor:
    """bool [C, high − low]: which columns each query takes from the cache."""
    return torch.arange(low, high, device=device) < torch.tensor(counts, device=device)[:, None]


def _masked(scores: Tensor, mask: Tensor | None, start: int, stop: int, shared: int) -> Tensor:
    if mask is None:
        rows, columns = torch.arange(start, stop, device=scores.device), torch.arange(stop, device=scores.device)
        return scores.masked_fill(columns > rows[:, None], -torch.inf)
    part = mask[:, :, start:stop, :stop]
    part = part.unflatten(1, (-1, shared)) if part.shape[1] > 1 else part[:, :, None]
    return scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.float()
