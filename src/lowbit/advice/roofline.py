"""Speed from bytes and operations: the time of a kernel is the larger of its memory traffic and its arithmetic.

One decoding step makes one token for each of B sequences, whose caches hold L tokens:

    bytes     weights read by the step + B · KV cache of a sequence of L tokens
    ops       2 · active weights · B + 4 · B · L · heads · head_dim · layers            (attention: scores and values)
    seconds = max(bytes / (bandwidth · BANDWIDTH_SHARE), ops / (peak[compute] · COMPUTE_SHARE))
    tokens/s of one sequence = 1 / seconds, of all B / seconds

Prefill of P tokens does 2 · weights · P + 2 · P² · heads · head_dim · layers operations in the scheme's compute dtype
(the attention in 16 bits) and reads the weights once; the same maximum.

Weight-only kernels decode the weights on the fly. Up to `Support.small_batch` sequences the memory traffic hides that;
beyond, the weights' part of a step grows in proportion to B, up to the time of the step in 16 bits. An engine that
falls back to decoding, for a format without arithmetic on the card, reaches FALLBACK_SHARE of that.

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
    """tokens/s: decode of one sequence and of all, prefill of one prompt; bound: the bottleneck of decoding."""

    decode: float
    decode_all: float
    prefill: float
    bound: str


def speed(
    shape: ModelShape, weights: Footprint, sixteen: Footprint, cache_bytes: float, how: Support | None, device: Device,
    load: Load,
) -> Speed:  # fmt: skip
    """The speed by the roofline.

    weights      in the scheme; `sixteen`: the same model in 16 bits
    cache_bytes  of one sequence of load.context tokens
    how          the engine's support of the scheme; None: 16 bits
    """
    bandwidth, peak, sixteen_peak = rates(device, how)
    cache = load.batch * cache_bytes / bandwidth
    moving = _weights_seconds(weights, sixteen, how, load.batch, bandwidth)
    attention = 4 * load.batch * load.context * shape.heads * shape.head_dim * shape.layers / sixteen_peak
    computing = 2 * active_weights(shape) * load.batch / peak + attention
    step = max(moving + cache, computing)
    prefill = load.prompt / _prefill_seconds(shape, weights, how, device, load.prompt)
    bound = "arithmetic" if computing > moving + cache else "KV cache" if cache > moving else "weights"
    return Speed(1 / step, load.batch / step, prefill, bound)


def rates(device: Device, how: Support | None) -> tuple[float, float, float]:
    """(bytes/s, operations/s of the matrices, operations/s in 16 bits) that are reached."""
    measured = device.name == "this" and device.kind == "cpu"
    bandwidth = device.bandwidth * (MEASURED_SHARE if measured else BANDWIDTH_SHARE)
    sixteen = device.sixteen_bit_peak
    native = sixteen if how is None or how.compute == "16" else device.peak.get(how.compute, sixteen)
    return bandwidth, native * COMPUTE_SHARE, sixteen * COMPUTE_SHARE


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


def _prefill_seconds(shape: ModelShape, weights: Footprint, how: Support | None, device: Device, prompt: int) -> float:
    bandwidth, peak, sixteen_peak = rates(device, how)
    inside = active_weights(shape) - shape.vocab * shape.hidden  # the output layer sees the last token only
    attention = 2 * prompt**2 * shape.heads * shape.head_dim * shape.layers / sixteen_peak
    return max(2 * inside * prompt / peak + attention, weights.read_by_a_step(prompt) / bandwidth)
