"""Memory of serving a model: its KV cache, what fits a device, the largest context and the largest batch.

    total(context, batch) = weights + batch · cache(context) + activations(context, batch) + framework
    fits                    total ≤ the engine's share of the device's memory

The cache, from config.json alone:

    layer, full attention     2 · kv_heads · head_dim values for every token
    layer, sliding window     the same, for at most the tokens of the window, if the engine bounds it
    layer, latent (MLA)       kv_lora_rank + qk_rope_head_dim values, which every head expands

times the bytes of a cached value. Block types of llama.cpp include their scales: q8_0 is 34 bytes for 32 values. The
overhead of an engine is in its `MemoryModel` (`lowbit.engines`). The largest context and batch are found by bisection,
since memory grows with both.

Refused: other layer types (recurrent layers), and a cache type that the engine does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowbit.architecture.shape import ModelShape
from lowbit.engines import Engine
from lowbit.errors import ArchitectureError, UsageError, did_you_mean
from lowbit.estimation.footprint import matrices
from lowbit.estimation.result import DeviceFit, Serving
from lowbit.kv.types import CACHE_TYPES, OF_OUTPUT, find_cache_type

LONGEST = 1 << 24  # tokens of a sequence, and sequences: no model was made for more, and no engine takes more
# Bits of one cached value of a head of 128, scales included; those of a layer or head are a few bytes in all.
CACHE_BITS: dict[str, float] = {
    name: CACHE_TYPES[OF_OUTPUT.get(name, name)].bits(128) for name in ("fp8", *CACHE_TYPES) if name != "fp8_calibrated"
}
_SPELLINGS = {"float16": "f16", "fp16": "f16", "bfloat16": "bf16", "float32": "f32", "fp32": "f32"}


@dataclass(frozen=True)
class LayerCache:
    """values: per token; tokens: kept at most, None for all."""

    values: int
    tokens: int | None = None


@dataclass(frozen=True)
class KVCache:
    """The cache of a model in an engine.

    layers       one per decoder block
    bits         of a cached value
    token_block  allocation unit, in tokens
    """

    layers: tuple[LayerCache, ...]
    bits: float = 16.0
    token_block: int = 1

    def bytes_per_token(self) -> float:
        """Of a token that every layer keeps."""
        return sum(layer.values for layer in self.layers) * self.bits / 8

    def growth(self, context: int) -> float:
        """Bytes that one token more costs a sequence of `context` tokens: full windows no longer grow."""
        growing = (layer.values for layer in self.layers if layer.tokens is None or layer.tokens > context)
        return sum(growing) * self.bits / 8

    def sequence_bytes(self, context: int) -> int:
        """Of one sequence of `context` tokens, in whole blocks."""
        total = 0
        for layer in self.layers:
            kept = context if layer.tokens is None else min(context, layer.tokens)
            total += -(-kept // self.token_block) * self.token_block * layer.values
        return round(total * self.bits / 8)

    @property
    def bounded(self) -> int:
        """Number of layers that keep only a window."""
        return sum(layer.tokens is not None for layer in self.layers)


def cache_of(
    shape: ModelShape, engine: Engine | None = None, kv_cache: str | float = "auto", memory: int | None = None
) -> KVCache:
    """The cache of a model.

    engine    None: windows bounded, no blocks
    kv_cache  a name in CACHE_BITS, "auto" (16 bits), or the bits of a value
    memory    bytes of the device, if known: vLLM keeps more beside a window on a larger one

    ArchitectureError for layer types with another kind of cache, UsageError for a cache type that does not exist or
    that the engine lacks.
    """
    size = shape.head_dim if not shape.is_latent else (shape.latent_rank or 0) + (shape.rope_dim or 0)
    bits = kv_cache if isinstance(kv_cache, int | float) else cache_bits(kv_cache, engine, size)
    layers = tuple(
        _layer(kind, shape, engine, memory) for kind in shape.layer_types or ("full_attention",) * shape.layers
    )
    return KVCache(layers, float(bits), 1 if engine is None else engine.memory.token_block)


def cache_bits(name: str, engine: Engine | None = None, head_dim: int = 128) -> float:
    """Bits of a cached value by the type's name, or of a pair KEYS/VALUES, in heads of a size; "auto" is the model's 16
    bits."""
    spelled = name.lower()
    spelled = _SPELLINGS.get(spelled, spelled)
    offered = ("auto", *CACHE_BITS) if engine is None else engine.memory.cache_types
    if "/" in spelled or "=" in spelled:
        pair = find_cache_type(spelled)
        if engine is not None and engine.name not in pair.engines:
            raise UsageError(f"{engine.name} keeps keys and values in one type, not in {pair.name}",
                             f"choose one of {', '.join(offered)}")  # fmt: skip
        return pair.bits(head_dim)
    if spelled not in offered:
        known = spelled in CACHE_BITS
        choice = f"choose one of {', '.join(offered)}"
        raise UsageError(
            f"{engine.name} keeps no KV cache in {name}" if engine is not None and known
            else f"there is no KV cache type {name!r}" + ("" if engine is None else f" in {engine.name}"),
            choice if known else did_you_mean(spelled, offered, choice, 2),
        )  # fmt: skip
    return 16.0 if spelled == "auto" else CACHE_TYPES[OF_OUTPUT.get(spelled, spelled)].bits(head_dim)


def _layer(kind: str, shape: ModelShape, engine: Engine | None, memory: int | None) -> LayerCache:
    if shape.is_latent:
        values = (shape.latent_rank or 0) + (shape.rope_dim or 0)
    else:
        values = 2 * shape.kv_heads * shape.head_dim
    if kind == "full_attention":
        return LayerCache(values)
    if kind not in ("sliding_attention", "chunked_attention"):
        raise ArchitectureError(
            f"a layer of type {kind!r} has no cache of keys and values that this estimate knows",
            "full, sliding and chunked attention and MLA are known",
        )
    window = shape.window if kind == "sliding_attention" else shape.chunk
    if window is None:
        raise ArchitectureError(f"config.json has layers of type {kind!r}, but no window for them")
    return LayerCache(values, window if engine is None else engine.memory.cached_tokens(shape, window, memory))


@dataclass(frozen=True)
class Deployment:
    """A model in an engine. weights: bytes; memory: bytes of one card, if known; cards: how many there are."""

    engine: Engine
    shape: ModelShape
    weights: int
    cache: KVCache
    memory: int | None = None
    cards: int = 1

    @property
    def ranks(self) -> int:
        """Cards that divide every matrix among them."""
        return self.cards if self.engine.sharing == "tensor" else 1

    @property
    def copies(self) -> float:
        """How often the cards together hold the cache: a head of keys is on one card at least, a latent on each."""
        if self.shape.is_latent:
            return float(self.ranks)
        return max(1.0, self.ranks / self.shape.kv_heads)

    def sequence_bytes(self, context: int) -> int:
        """Bytes of the cache of one sequence, on all cards together."""
        return round(self.cache.sequence_bytes(context) * self.copies)

    def serving(self, context: int, batch: int) -> Serving:
        """Memory for `batch` sequences of `context` tokens, on all cards together."""
        model = self.engine.memory
        activations = model.activations(self.shape, context, batch, self.memory, self.ranks)
        return Serving(
            self.engine.name, context, batch, self.weights, batch * self.sequence_bytes(context),
            self.cards * activations, self.cards * model.framework,
        )  # fmt: skip

    def largest_context(self, usable: int, batch: int) -> int:
        """Tokens, up to the model's own limit."""
        bound = self.shape.max_positions or LONGEST
        return _largest(lambda context: self.serving(context, batch).total <= usable, bound)

    def largest_batch(self, usable: int, context: int) -> int:
        return _largest(lambda batch: self.serving(context, batch).total <= usable, LONGEST)


def refuse_absurd_load(context: int | None, batch: int | None, least: int = 1) -> None:
    """UsageError for tokens of a sequence, or sequences, that nobody serves. None: not asked; least: tokens"""
    if context is not None and not least <= context <= LONGEST:
        raise UsageError(f"a context of {context} tokens is not one",
                         f"give the tokens of a sequence, {least} to {LONGEST}, such as 8192")  # fmt: skip
    if batch is not None and not 1 <= batch <= LONGEST:
        raise UsageError(f"a batch of {batch} sequences is not one", f"give 1 to {LONGEST}")


def deploy(
    engine: Engine, shape: ModelShape, weights: int, kv_cache: str = "auto", memory: int | None = None, cards: int = 1
) -> Deployment:
    """A model with `weights` bytes on cards with `memory` bytes each; kv_cache as in `cache_of`."""
    return Deployment(engine, shape, weights, cache_of(shape, engine, kv_cache, memory), memory, cards)


def fit_of(
    load: Deployment, device: str, memory: int, usable: int, context: int, batch: int, weight_count: int
) -> DeviceFit:  # fmt: skip
    """Whether `batch` sequences of `context` tokens fit a device with `memory` bytes, in numbers and in a sentence.

    usable        bytes of it that the engine uses
    weight_count  of the whole model, for the bits per weight that would fit
    """
    serving = load.serving(context, batch)
    longest, most = load.largest_context(usable, batch), load.largest_batch(usable, context)
    if serving.total <= usable:
        whole = longest == load.shape.max_positions
        verdict = (
            f"fits: {_tokens(longest)} of context{', all that the model has,' if whole else ''} at batch {batch}; at "
            f"most {most} sequence{'s' * (most != 1)} of {context} tokens"
        )
        return DeviceFit(device, memory, usable, True, longest, most, verdict)
    short = serving.total - usable
    verdict = (
        f"does not fit: {gigabytes(serving.total)} are needed and {gigabytes(usable)} usable, "
        f"{gigabytes(short)} too much"
    )
    hint = _hint(load, serving, memory, usable, longest, weight_count)
    return DeviceFit(device, memory, usable, False, longest, most, verdict, hint)


def _hint(load: Deployment, serving: Serving, memory: int, usable: int, longest: int, weight_count: int) -> str:
    """What would fit."""
    ways = []
    if longest:
        ways.append(f"a context of {longest} tokens at batch {serving.batch}")
    single = load.serving(serving.context, 1)
    if serving.batch > 1 and single.total <= usable:
        ways.append(f"{load.largest_batch(usable, serving.context)} sequences of {serving.context} tokens")
    left = usable - (serving.total - serving.weights)
    bits = 8 * left / weight_count if weight_count else 0.0
    if bits >= 1.5:
        ways.append(f"files of at most {bits:.1f} bits per weight")
    if not ways:
        least = load.serving(1, 1)
        needed = gigabytes(least.total * memory / usable)
        return f"nothing of this model in this scheme: one token needs a device of {needed}"
    return "would fit: " + "; or ".join(ways)


def gigabytes(count: float) -> str:
    """15200000000 → "15.20 GB"."""
    return f"{count / 1e9:.2f} GB"


def _tokens(count: int) -> str:
    """131072 → "128k tokens"."""
    return f"{count // 1024}k tokens" if count >= 1024 and count % 1024 == 0 else f"{count} tokens"


def _largest(fits: Callable[[int], bool], bound: int) -> int:
    """The largest number up to `bound` that fits; 0 if 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, bound
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# QLoRA: adapters of this rank on every linear, each weight with a gradient and two Adam moments in float32.
ADAPTER_RANK, _ADAPTER_BYTES = 16, 2 + 4 + 4 + 4


def training_bytes(shape: ModelShape, context: int, batch: int) -> int:
    """Bytes of QLoRA with gradient checkpoints beside the weights: adapters, optimizer, a hidden state per layer, one
    active layer, logits.

    Assumes 14 bytes per trained weight, 34 · hidden bytes per token of the active layer, and logits in 16 and 32 bits
    with a gradient.
    """
    linears = (matrix for matrix in matrices(shape) if matrix.part in ("dense", "experts"))
    adapters = sum(ADAPTER_RANK * (matrix.rows + matrix.columns) * matrix.copies for matrix in linears)
    tokens = context * batch
    work = tokens * (shape.hidden * (2 * shape.layers + 34) + shape.vocab * 10)
    return adapters * _ADAPTER_BYTES + work + (1 << 30)
