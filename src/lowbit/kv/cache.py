"""`QuantizedCache`: a KV cache of 8, 4 or 2 bits for transformers' models, after KIVI (arXiv 2402.02750).

    keys     a range for each channel of `group` tokens          values   a range for `group` channels of each token
    codes    packed into bytes; s and m of each range as halves: bits + 32 / group bits a value
    window   the newest `window` tokens and up to group − 1 more stay in the model's dtype

    cache = QuantizedCache(model.config, bits=4)
    model.generate(**inputs, past_key_values=cache)

The first pass, over the prompt, attends to exact keys and values; later ones to what the cache gives back
(`cache_type` names what `lowbit evaluate --kv-cache` simulates). A step decodes the cache of one layer at a time, into
two buffers that all layers share: what `update` returns is valid until its next call, unless gradients are wanted.

A byte holds codes of one channel, of tokens that lie half a group apart, a quarter with 2 bits, for keys and for
values: so unpacking writes runs of whole heads and not every other value. With hadamard=True heads are turned before
rounding and back after decoding.

Quantized are layers that attend to everything. Layers with a sliding window keep it in the model's dtype, as it is
bounded, and recurrent layers their state. Supported: batches with padding, beams (reordering, repeating, selecting),
resetting, cropping of tokens that are still in the window. Refused by name: cropping beyond it, offloading, heads that
the group or the Hadamard matrix does not divide, other numbers of bits.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer

from lowbit.errors import ShapeError, UsageError
from lowbit.kv.codecs import Affine, hadamard
from lowbit.kv.types import CACHE_TYPES, OWN_GROUP, OWN_WINDOW, CacheType, find_cache_type

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_GROWTH = 256  # tokens by which the shared buffers grow
_SMALLEST_GROUP = 8  # and what divides a group: codes of 2 bits fill bytes


@dataclass
class _Buffers:
    """Room for the decoded states of one layer, which the next layer writes over."""

    held: dict[str, Tensor] = field(default_factory=dict)

    def take(self, side: str, like: Tensor, tokens: int, own: bool) -> Tensor:
        """[B, heads, tokens, D] of the dtype of `like`, with what was there before. own: not shared."""
        batch, heads, _, size = like.shape
        if own:
            return like.new_empty(batch, heads, tokens, size)
        found = self.held.get(side)
        wanted = (batch, heads, size, like.dtype, like.device)
        if found is None or (*found.shape[:2], found.shape[3], found.dtype, found.device) != wanted:
            found = None
        if found is None or found.shape[2] < tokens:
            found = self.held[side] = like.new_empty(batch, heads, -(-tokens // _GROWTH) * _GROWTH, size)
        return found[:, :, :tokens]


@dataclass
class _Packed:
    """Quantized states of one side: codes uint8 [B, heads, n, group · bits / 8, D], of n groups of tokens; scale and
    low float16, [B, heads, n, 1, D] of keys and [B, heads, T, D / group, 1] of values."""

    codes: Tensor
    scale: Tensor
    low: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.scale, self.low

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts())


class QuantizedCacheLayer(DynamicLayer):
    """The cache of one layer; `keys` and `values` hold the window."""

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def __init__(self, bits: int, group: int, window: int, rotated: bool, buffers: _Buffers):
        super().__init__()
        self.bits, self.group, self.window, self.rotated = bits, group, window, rotated
        self._buffers = buffers
        self._packed: dict[str, _Packed] = {}

    @property
    def quantized_tokens(self) -> int:
        return self._packed["values"].scale.shape[2] if self._packed else 0

    @property
    def nbytes(self) -> int:
        """Bytes that the layer holds between steps."""
        window = 0 if not self.is_initialized else self.keys.nbytes + self.values.nbytes
        return window + sum(packed.nbytes for packed in self._packed.values())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        key_size, value_size = key_states.shape[-1], value_states.shape[-1]
        name = f"int{self.bits}{'_hadamard' if self.rotated else ''}"
        try:
            Affine(self.bits, "tokens", self.group, self.rotated).check(key_size, name)
            Affine(self.bits, "head", self.group, self.rotated).check(value_size, name)
        except ShapeError as error:
            raise ShapeError(str(error), self._what_fits(math.gcd(key_size, value_size, self.group))) from error
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def _what_fits(self, group: int) -> str:
        if self.rotated or group % _SMALLEST_GROUP:
            return "leave --kv-cache out: the cache of such heads stays in 16 bits"
        return f"QuantizedCache(model.config, bits={self.bits}, group={group}) takes them; else leave --kv-cache out"

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep new states [B, heads, T, D]; all of them as attention is to see them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        seen = (self.keys, self.values)
        if self._packed:
            seen = (self._decoded("keys", self.keys), self._decoded("values", self.values))
        self._quantize_beyond_window()
        return seen

    def _quantize_beyond_window(self) -> None:
        count = max(0, self.keys.shape[-2] - self.window) // self.group * self.group
        if not count:
            return
        for side, states in (("keys", self.keys), ("values", self.values)):
            self._append(side, self._encoded(side, states[:, :, :count]))
        # Copies, so that the states before them are freed.
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()

    def _encoded(self, side: str, states: Tensor) -> _Packed:
        values = states.detach().float()
        if self.rotated:
            values = hadamard(values, values.shape[-1])
        codec = Affine(self.bits)
        if side == "keys":
            groups = values.unflatten(2, (-1, self.group)).transpose(-1, -2)  # [B, heads, n, D, group]
            codes, scale, low = (each.transpose(-1, -2) for each in codec.encode(groups))
        else:
            codes, scale, low = codec.encode(values.unflatten(-1, (-1, self.group)))  # [B, heads, T, D / group, group]
            codes = codes.flatten(-2).unflatten(2, (-1, self.group))
        return _Packed(self._pack(codes), scale.half().contiguous(), low.half().contiguous())

    def _pack(self, codes: Tensor) -> Tensor:
        """Runs of the tokens of a group, `8 / bits` of them, beside each other in the bits of a byte; codes
        [B, heads, n, group, D]."""
        runs = codes.to(torch.uint8).chunk(8 // self.bits, dim=3)
        packed = runs[0].clone()
        for index, run in enumerate(runs[1:], 1):
            packed |= run << (self.bits * index)
        return packed.contiguous()

    def _append(self, side: str, new: _Packed) -> None:
        old = self._packed.get(side)
        if old is not None:
            new = _Packed(*(torch.cat(pair, dim=2) for pair in zip(old.parts(), new.parts(), strict=True)))
        self._packed[side] = new

    def _decoded(self, side: str, window: Tensor) -> Tensor:
        """All states of one side: decoded, then the window."""
        packed, count = self._packed[side], self.quantized_tokens
        whole = self._buffers.take(side, window, count + window.shape[-2], own=torch.is_grad_enabled())
        scale, low = packed.scale.to(window.dtype), packed.low.to(window.dtype)
        at = whole[:, :, :count]
        codes = self._unpacked(packed.codes).to(window.dtype)
        if side == "keys":
            groups = at.unflatten(2, (-1, self.group))
        else:
            groups, codes = (each.unflatten(-1, (-1, self.group)) for each in (at, codes.flatten(2, 3)))
        torch.addcmul(low, codes, scale, out=groups)
        if self.rotated:
            at.copy_(hadamard(at, at.shape[-1]))
        whole[:, :, count:] = window
        return whole

    def _unpacked(self, packed: Tensor) -> Tensor:
        """Codes uint8 [B, heads, n, group, D]."""
        if self.bits == 8:
            return packed
        codes = packed.new_empty(*packed.shape[:3], self.group, packed.shape[4])
        for index, run in enumerate(codes.chunk(8 // self.bits, dim=3)):
            last = (index + 1) * self.bits == 8
            shifted = packed >> (self.bits * index) if index else packed
            if last:
                run.copy_(shifted)
            else:
                torch.bitwise_and(shifted, 2**self.bits - 1, out=run)
        return codes

    def get_seq_length(self) -> int:
        return self.quantized_tokens + (self.keys.shape[-2] if self.is_initialized else 0)

    def reset(self) -> None:
        self._packed = {}
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last −`tokens_to_remove` tokens; UsageError where some of them are quantized."""
        count = -tokens_to_remove
        if count < 0:
            raise UsageError(
                f"crop({tokens_to_remove}) names a length; give the tokens to remove, as a negative number"
            )
        if not count or not self.is_initialized:
            return
        left = self.keys.shape[-2]
        if count > left:
            raise UsageError(
                f"crop of {count} tokens reaches into the quantized part of the cache; {left} are still in 16 bits",
                f"make the cache with a window of {count} tokens or more",
            )
        self.keys, self.values = self.keys[:, :, : left - count], self.values[:, :, : left - count]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda part: part[indices])

    def _select(self, change: Any) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        self._packed = {side: _Packed(*map(change, packed.parts())) for side, packed in self._packed.items()}

    def offload(self) -> None:
        raise UsageError("a quantized cache is not offloaded", "it is small: leave offloading out")

    prefetch = offload


class QuantizedCache(Cache):
    """The cache of a model.

    config    of the model: which layers attend to everything
    bits      8, 4 or 2
    group     tokens (keys) or channels (values) that share a range; it divides the heads
    window    newest tokens that stay in the model's dtype
    hadamard  turn every head before rounding
    """

    def __init__(
        self, config: PretrainedConfig, bits: int = 4, group: int = OWN_GROUP, window: int = OWN_WINDOW,
        hadamard: bool = False,
    ):  # fmt: skip
        if bits not in (8, 4, 2):
            raise UsageError(f"a cache of {bits} bits is not one of 8, 4 and 2", "choose bits=4")
        if group < _SMALLEST_GROUP or group % _SMALLEST_GROUP or window < 0:
            raise UsageError(f"groups of {group} tokens and a window of {window} are no cache",
                             "choose a group of a multiple of 8, and a window of 0 tokens or more")  # fmt: skip
        buffers = _Buffers()
        layers: list[Any] = [
            QuantizedCacheLayer(bits, group, window, hadamard, buffers) if type(layer) is DynamicLayer else layer
            for layer in DynamicCache(config=config).layers
        ]
        if not any(isinstance(layer, QuantizedCacheLayer) for layer in layers):
            if any(isinstance(layer, LinearAttentionAndFullAttentionLayer) for layer in layers):
                raise UsageError(
                    f"{config.model_type} has keys and values beside a recurrent state in one layer, which this cache "
                    f"cannot hold",
                    "leave the cache in 16 bits",
                )
            raise UsageError(
                f"{config.model_type} has no layer that attends to every token, so there is nothing to quantize",
                "windows and recurrent states are of bounded size: leave the cache in 16 bits",
            )
        super().__init__(layers=layers)
        self.cache_type = CACHE_TYPES[f"int{bits}{'_hadamard' if hadamard else ''}"]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers between steps; the two buffers of one layer's decoded states are not counted."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, QuantizedCacheLayer):
                total += layer.nbytes
            elif isinstance(layer, DynamicLayer) and layer.is_initialized:
                total += sum(part.nbytes for part in (layer.keys, layer.values) if part is not None)
        return total


OWN_TYPES = tuple(name for name, row in CACHE_TYPES.items() if row.source == "lowbit.kv.QuantizedCache")


def cache_for(name: str, model: PreTrainedModel) -> QuantizedCache:
    """`own_cache` of a model; UsageError for one that would leave it unread (RWKV)."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UsageError(f"{type(model).__name__} keeps a state of its own and no keys and values to quantize",
                         "leave --kv-cache out")  # fmt: skip
    return own_cache(name, model.config)


def own_cache(name: str, config: PretrainedConfig) -> QuantizedCache:
    """The cache called int8, int4, int2, or one of these with _hadamard; UsageError for a type that others run."""
    found: CacheType = find_cache_type(name)
    if found.name not in OWN_TYPES:
        where = f"is run by {', '.join(found.engines)}" if found.engines else "is only measured here"
        raise UsageError(f"cache type {found.name} {where}; `generate` keeps its cache in {', '.join(OWN_TYPES)}",
                         f"`lowbit evaluate --kv-cache {found.name}` says what it costs")  # fmt: skip
    bits, _, rotated = found.name.removeprefix("int").partition("_")
    return QuantizedCache(config, int(bits), hadamard=bool(rotated))
