"""ggml's blocks of 32 as a KV cache makes them: `quantize_row_*_ref` of ggml-quants.c and back, float32 → float32.

    q8_0    d = max|x| / 127                          q = round(x / d)                          x̂ = d·q
    q5_0    d = x_max / −16                           q = min(31, trunc(x / d + 16.5))          x̂ = d·(q − 16)
    q4_0    d = x_max / −8                            q = min(15, trunc(x / d + 8.5))           x̂ = d·(q − 8)
    q5_1    d = (max − min) / 31, m = min             q = trunc((x − m) / d + 0.5)              x̂ = d·q + m
    q4_1    d = (max − min) / 15, m = min             q = min(15, trunc((x − m) / d + 0.5))     x̂ = d·q + m
    iq4_nl  codes for d = x_max / −127, then d by least squares with weights x²                 x̂ = d·value[q]

x_max is the value of largest magnitude, with its sign; of several the first. Codes are chosen with 1 / d in float32, d
and m are stored as halves, and the codes are not chosen again for what is stored. `round` takes halves away from zero.

A cache is written token by token, so llama.cpp spends no search on it. Weights of GGUF files are another matter:
`lowbit.numerics.ggml` searches for the best scale of a block, and makes other codes of the same formats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics.ggml.codebooks import IQ4_VALUES

BLOCK = 32
_SMALLEST = 1e-15  # GROUP_MAX_EPS of ggml-quants.c
# Type → bits of a value, with the half d and, where there is one, the half m of 32 values.
BITS = {"q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5}


def round_trip(name: str, values: Tensor) -> Tensor:
    """What a cache of type `name` gives back for values float32 [..., D], D a multiple of 32."""
    blocks = values.reshape(-1, BLOCK)
    if name == "q8_0":
        rounded = _signed(blocks)
    elif name in ("q5_0", "q4_0"):
        rounded = _centred(blocks, 16 if name == "q5_0" else 8)
    elif name in ("q5_1", "q4_1"):
        rounded = _ranged(blocks, 31 if name == "q5_1" else 15)
    else:
        rounded = _iq4_nl(blocks)
    return rounded.reshape(values.shape)


def _signed(x: Tensor) -> Tensor:
    d = x.abs().amax(-1, keepdim=True) / 127
    return _away(x * _inverse(d)) * _half(d)


def _centred(x: Tensor, middle: int) -> Tensor:
    d = _largest(x) / -middle
    codes = (x * _inverse(d) + (middle + 0.5)).trunc().clamp(max=2 * middle - 1)
    return (codes - middle) * _half(d)


def _ranged(x: Tensor, highest: int) -> Tensor:
    low = x.amin(-1, keepdim=True)
    d = (x.amax(-1, keepdim=True) - low) / highest
    codes = ((x - low) * _inverse(d) + 0.5).trunc().clamp(max=highest)
    return codes * _half(d) + _half(low)


def _iq4_nl(x: Tensor) -> Tensor:
    table = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=x.device)
    largest = _largest(x)
    usable = largest.abs() >= _SMALLEST
    places = x * _inverse(torch.where(usable, largest / table[0], torch.zeros_like(largest)))
    between = (table[1:] + table[:-1]) / 2
    value = table[
        torch.bucketize(places.contiguous(), between, right=True)
    ]  # halfway goes to the higher, as best_index_int8 does
    weighed = x * x * value
    spread = (weighed * value).sum(-1, keepdim=True)
    fitted = (weighed * x).sum(-1, keepdim=True) / torch.where(spread > 0, spread, torch.ones_like(spread))
    return torch.where(usable & (spread > 0), value * _half(fitted), torch.zeros_like(x))


def _largest(x: Tensor) -> Tensor:
    """The value of largest magnitude of each block, [B, 1]."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d != 0, 1.0 / d, torch.zeros_like(d))


def _half(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(torch.float32)


def _away(x: Tensor) -> Tensor:
    """roundf: to nearest, halves away from zero."""
    return torch.copysign((x.abs() + 0.5).floor(), x)
