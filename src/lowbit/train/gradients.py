"""Gradients of DistributedDataParallel in few bits, with error feedback: a communication hook.

    sent_t = C(g_t + e_t)        e_{t+1} = g_t + e_t − decode(sent_t)        step along the mean of decode(sent_t)

What rounding loses in one step is added to the gradient of the next, so that nothing is lost for good (Seide et al.
2014, 1-bit SGD; Karimireddy et al. 2019, arXiv 1901.09847). C is one of

    8 or 4 bits    blocks of 256 values: s = max|g| / (2^(b−1) − 1) as float32, codes = rint(g / s); ties to even
    Top-K          the share of values with the largest magnitudes, as int32 index and float32 value (Stich et al. 2018,
                   arXiv 1809.07599)

Bytes of a rank's message, n values: n·b/8 + 4·n/256, or 8·K. 4-bit codes lie two in a byte, the one of even index in
the low nibble, plus 8. Every rank gets the messages of all others (all_gather): of R ranks it receives R − 1, where a
ring all-reduce receives about 2·4·n bytes; so 8 bits save traffic up to about 8 ranks, 4 bits up to about 16.

A block of zeros has scale 0. NaN and inf are not hidden: their block decodes to NaN on every rank, and is not fed back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lowbit.errors import UsageError

BLOCK = 256


@dataclass
class CompressedGradients:
    """State of the hook.

    bits            8 or 4; None with `top_k`
    top_k           share of the values that is sent; None with `bits`
    error_feedback  what is lost is added to the next gradient
    sent            bytes of this rank's messages so far
    plain           bytes that the same gradients have in their own dtype
    """

    bits: int | None = 8
    top_k: float | None = None
    error_feedback: bool = True
    sent: int = 0
    plain: int = 0
    _errors: dict[nn.Parameter, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if (self.bits is None) == (self.top_k is None):
            raise UsageError("gradients are sent either in few bits or as Top-K", "give bits=8, bits=4, or top_k=0.01")
        if self.bits not in (None, 8, 4):
            raise UsageError(f"gradients of {self.bits} bits are not sent", "give bits=8 or bits=4")
        if self.top_k is not None and not 0 < self.top_k <= 1:
            raise UsageError(f"top_k={self.top_k} is no share of the values", "give one between 0 and 1, such as 0.01")

    def encode(self, values: Tensor) -> Tensor:
        """The message, uint8, of a flat float32 tensor."""
        return encode_top(values, self.top_k) if self.top_k is not None else encode_bits(values, self.bits or 8)

    def decode(self, message: Tensor, count: int) -> Tensor:
        """Float32 [count] of a message."""
        if self.top_k is not None:
            return decode_top(message, count)
        return decode_bits(message, count, self.bits or 8)


def compress_gradients(
    model: nn.parallel.DistributedDataParallel, bits: int | None = 8, top_k: float | None = None,
    error_feedback: bool = True,
) -> CompressedGradients:  # fmt: skip
    """Let a DistributedDataParallel model send its gradients compressed from now on; returns the counters.

    UsageError for another kind of model, and for a choice that makes no sense.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        raise UsageError(
            f"{type(model).__name__} sends no gradients", "wrap the model in DistributedDataParallel first"
        )
    state = CompressedGradients(None if top_k is not None else bits, top_k, error_feedback)
    model.register_comm_hook(state, lambda state, bucket: _hook(state, bucket))  # torch reads annotations, not text
    return state


def _hook(state: CompressedGradients, bucket: Any) -> torch.futures.Future[Tensor]:
    """The mean over all ranks of what they sent of a bucket of gradients."""
    buffer, parameters = bucket.buffer(), bucket.parameters()
    values = buffer.float()
    if state.error_feedback and state._errors:
        kept = [state._errors[each] if each in state._errors else values.new_zeros(each.numel()) for each in parameters]
        values = values + torch.cat(kept)
    message = state.encode(values)
    state.sent, state.plain = state.sent + message.numel(), state.plain + buffer.nbytes
    if state.error_feedback:
        error = torch.nan_to_num(values - state.decode(message, len(values)), nan=0.0, posinf=0.0, neginf=0.0)
        for each, part in zip(parameters, error.split([each.numel() for each in parameters]), strict=True):
            state._errors[each] = part
    ranks = distributed.get_world_size()
    messages = [torch.empty_like(message) for _ in range(ranks)]
    work = distributed.all_gather(messages, message, async_op=True)
    assert work is not None

    def mean(_: Any) -> Tensor:
        total = torch.zeros_like(values)
        for each in messages:  # in the order of ranks, so that all of them get the same sum
            total += state.decode(each, len(values))
        return buffer.copy_(total / ranks)

    return work.get_future().then(mean)


def encode_bits(values: Tensor, bits: int) -> Tensor:
    """uint8: codes of all blocks, then their scales. values: float32 [n]"""
    blocks = nn.functional.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)
    limit = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(dim=1) / limit
    ratio = blocks / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]
    codes = torch.nan_to_num(ratio, nan=0.0, posinf=0.0, neginf=0.0).round().clamp(-limit, limit).to(torch.int8)
    packed = codes.reshape(-1)
    if bits == 4:
        nibbles = (packed + 8).to(torch.uint8)
        packed = nibbles[0::2] | (nibbles[1::2] << 4)
    return torch.cat([packed.view(torch.uint8), scale.view(torch.uint8)])


def decode_bits(message: Tensor, count: int, bits: int) -> Tensor:
    """Float32 [count]; NaN where the block held NaN or inf."""
    blocks = -(-count // BLOCK)
    size = blocks * BLOCK * bits // 8
    packed, scale = message[:size], message[size:].clone().view(torch.float32)
    if bits == 4:
        codes = torch.stack([packed & 15, packed >> 4], dim=1).reshape(-1).to(torch.int8) - 8
    else:
        codes = packed.view(torch.int8)
    scale = torch.where(torch.isfinite(scale), scale, torch.full_like(scale, torch.nan))
    return (codes.reshape(blocks, BLOCK).float() * scale[:, None]).reshape(-1)[:count]


def encode_top(values: Tensor, share: float) -> Tensor:
    """uint8: indices (int32) of the K values of largest magnitude, at least one, then the values (float32)."""
    count = max(1, round(share * len(values)))
    index = values.abs().topk(count).indices
    return torch.cat([index.to(torch.int32).view(torch.uint8), values[index].view(torch.uint8)])


def decode_top(message: Tensor, count: int) -> Tensor:
    """Float32 [count], zeros where nothing was sent."""
    half = len(message) // 2
    index, kept = message[:half].clone().view(torch.int32), message[half:].clone().view(torch.float32)
    return torch.zeros(count, device=message.device).scatter_(0, index.long(), kept)
