"""Speed from bytes and operations: the time of a kernel is the larger of its memory traffic and its arithmetic.

One decoding step makes one token for each of B sequences, whose caches hold L tokens:

    bytes     weights read by the step + B · KV cache of a sequence of L tokens
    ops       2 · active weights · B + 4 · B · L · heads · head_dim · layers            (attention: scores and values)
    seconds = max(bytes / (bandwidth · BANDWIDTH_SHARE), ops / (peak[compute] · COMPUTE_SHARE))
    tokens/s of one sequence = 1 / seconds, of all B / seconds

Prefill of P tokens does 2 · weights · P + 2 · P² · heads · head_dim · layers operations in the scheme's compute dtype
(the attention in 16 bits) and reads the weights once; the same maximum. Prompts of several sequences share a pass, as
many as the engine takes tokens in one; a longer prompt takes several passes, and reads the weights in each. Between
the products, activations are read and written in 16 bits: 8 vectors of the width and 6 of the MLP's a layer; and where
a scheme quantizes them, the four inputs once more, with 8 bits written. A small model's prompts therefore gain less by
8-bit arithmetic than a large one's.

Cards that divide every matrix (tensor parallelism) have n times the bandwidth and the peak, and add up their parts
twice a layer:

    seconds = 2 · layers · (latency + 2 (n − 1) / n · tokens · hidden · 2 bytes / link)

Cards that hold whole layers (llama.cpp, transformers) work one after the other: the speed of one card.

Weight-only kernels decode the weights on the fly. Up to `Support.small_batch` sequences the memory traffic hides that;
beyond, the weights' part of a step grows in proportion to B, up to the time of the step in 16 bits. An engine that
falls back to decoding, for a format without arithmetic on the card, reaches FALLBACK_SHARE of that; a kernel that
converts weights to the dtype of its arithmetic as it multiplies, that share of the arithmetic.

The shares below are assumptions. They are the same for all schemes, so they cancel in a ranking; tokens per second are
upper estimates without sampling, launches and scheduling. `benchmarks/decode_speed.py` compares a prediction with
llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.architecture.shape import ModelShape
from lowbit.engines.engine import Support
from lowbit.estimation.footprint import Footprint, active_weights
from lowbit.hardware import Device

# Shares that good kernels reach of a data sheet's bandwidth and peak, and of a measured bandwidth.
BANDWIDTH_SHARE, COMPUTE_SHARE = 0.8, 0.6
MEASURED_SHARE = 0.95
FALLBACK_SHARE = 0.9
# Seconds until a sum over cards begins, with direct links (vLLM's custom all-reduce) and over PCI Express (NCCL); round
# numbers.
LATENCY_DIRECT, LATENCY_PCIE = 10e-6, 30e-6
LINK_SHARE = 0.8
# Vectors of the width, and of the MLP's, that a layer reads or writes per token between and around its products: both
# norms, q, k, v, attention, residuals; gate, up, their product.
_HIDDEN_MOVES, _MLP_MOVES = 8, 6

ASSUMPTIONS = (
    f"kernels reach {BANDWIDTH_SHARE:.0%} of the data sheet's bandwidth ({MEASURED_SHARE:.0%} of a measured one) and "
    f"{COMPUTE_SHARE:.0%} of the dense peak",
    "speeds are upper estimates: launches, sampling and scheduling come on top",
)


@dataclass(frozen=True)
class Load:
    """The load on the model: B sequences, `context` tokens in the cache of each, prompts of `prompt` tokens."""

    batch: int
    context: int
    prompt: int


@dataclass(frozen=True)
class Speed:
    """tokens/s: decode of one sequence and of all, prefill of the prompts; bound: the bottleneck of decoding."""

    decode: float
    decode_all: float
    prefill: float
    bound: str


def speed(
    shape: ModelShape, weights: Footprint, sixteen: Footprint, cache_bytes: float, how: Support | None, device: Device,
    load: Load, ranks: int = 1, pass_tokens: int | None = None,
) -> Speed:  # fmt: skip
    """The speed by the roofline.

    weights      in the scheme; `sixteen`: the same model in 16 bits
    cache_bytes  of one sequence of load.context tokens, on all cards
    how          the engine's support of the scheme; None: 16 bits
    ranks        cards that divide every matrix among them
    pass_tokens  tokens of prompts that the engine takes in one pass; None: one whole prompt
    """
    bandwidth, peak, sixteen_peak = (ranks * rate for rate in rates(device, how))
    cache = load.batch * cache_bytes / bandwidth
    moving = _weights_seconds(weights, sixteen, how, load.batch, bandwidth)
    attention = 4 * load.batch * load.context * shape.heads * shape.head_dim * shape.layers / sixteen_peak
    computing = 2 * active_weights(shape) * load.batch / peak + attention
    exchanging = exchange_seconds(shape, device, ranks, load.batch)
    step = max(moving + cache, computing) + exchanging
    prefill = _prefill_speed(shape, weights, how, device, load, ranks, pass_tokens)
    parts = {"weights": moving, "KV cache": cache, "link between the cards": exchanging}
    bound = "arithmetic" if computing > moving + cache else max(parts, key=lambda part: parts[part])
    return Speed(1 / step, load.batch / step, prefill, bound)


def rates(device: Device, how: Support | None) -> tuple[float, float, float]:
    """(bytes/s, operations/s of the matrices, operations/s in 16 bits) that are reached."""
    measured = device.name == "this" and device.kind == "cpu"
    bandwidth = device.bandwidth * (MEASURED_SHARE if measured else BANDWIDTH_SHARE)
    sixteen = device.sixteen_bit_peak
    native = sixteen if how is None or how.compute == "16" else device.peak.get(how.compute, sixteen)
    if how is not None and how.converts:
        native = max(sixteen, native * FALLBACK_SHARE)
    return bandwidth, native * COMPUTE_SHARE, sixteen * COMPUTE_SHARE


def exchange_seconds(shape: ModelShape, device: Device, ranks: int, tokens: int) -> float:
    """Seconds of a pass of `tokens` tokens in which the cards add up their parts of attention and MLP."""
    if ranks == 1:
        return 0.0
    latency = LATENCY_DIRECT if device.direct else LATENCY_PCIE
    moved = 2 * (ranks - 1) / ranks * tokens * shape.hidden * 2
    return 2 * shape.layers * (latency + moved / (device.link * LINK_SHARE))


def _weights_seconds(
    weights: Footprint, sixteen: Footprint, how: Support | None, batch: int, bandwidth: float
) -> float:
    seconds = weights.read_by_a_step(batch) / bandwidth
    if how is None or how.small_batch is None:
        return seconds
    whole = sixteen.read_by_a_step(batch) / bandwidth
    if how.small_batch == 0:
        return whole
    coded = (weights.dense + weights.experts * weights.touched(batch)) / bandwidth
    slowed = coded * max(1.0, batch / how.small_batch) / (FALLBACK_SHARE if how.fallback else 1.0)
    return min(whole, seconds - coded + slowed)


def _prefill_speed(
    shape: ModelShape, weights: Footprint, how: Support | None, device: Device, load: Load, ranks: int,
    pass_tokens: int | None,
) -> float:  # fmt: skip
    """tokens/s of prompts: as many of them as a pass takes, or one in several passes."""
    bandwidth, peak, sixteen_peak = (ranks * rate for rate in rates(device, how))
    prompt, most = load.prompt, pass_tokens or load.prompt
    prompts, passes = max(1, min(load.batch, most // prompt)), -(-prompt // most)
    tokens = prompts * prompt
    inside = active_weights(shape) - shape.vocab * shape.hidden  # the output layer sees the last token only
    attention = 2 * prompts * prompt**2 * shape.heads * shape.head_dim * shape.layers / sixteen_peak
    reading = passes * weights.read_by_a_step(tokens // passes) / bandwidth
    between = tokens * shape.layers * _moved_bytes(shape, how) / bandwidth
    working = max(2 * inside * tokens / peak + attention, reading) + between
    return tokens / (working + exchange_seconds(shape, device, ranks, tokens))


def _moved_bytes(shape: ModelShape, how: Support | None) -> int:
    """Bytes of activations that one token moves in a layer between the products."""
    moved = 2 * (_HIDDEN_MOVES * shape.hidden + _MLP_MOVES * shape.widest_mlp)
    if how is None or how.compute == "16":
        return moved
    return moved + 3 * (3 * shape.hidden + shape.widest_mlp)
