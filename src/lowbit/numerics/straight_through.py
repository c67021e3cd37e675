"""Numbers as a file stores them, with the gradient of what was rounded (Bengio et al. 2013, arXiv 1308.3432).

    straight_through(wanted, stored)    forward: stored, bit for bit      backward: d wanted

A scale is learned as its relative change: wanted = start · exp(change), so that one learning rate fits scales of every
size, signs stay, and a scale of 0 stays 0. A change of exactly 0 is the stored scale, whatever the format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.numerics.ggml.types import LARGEST_HALF
from lowbit.numerics.scales import E8M0_BIAS, storable_scale

_PER_OCTAVE = 1.4426950408889634  # 1 / ln 2


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wanted: Tensor, stored: Tensor) -> Tensor:
        return stored.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(wanted: Tensor, stored: Tensor) -> Tensor:
    """`stored`, with the gradient of `wanted`; both of one shape and dtype."""
    return _StraightThrough.apply(wanted, stored)  # type: ignore[return-value]


def changed_scale(start: Tensor, change: Tensor, scale_format: str, global_scale: float = 1.0) -> Tensor:
    """The scale of `scale_format` (`numerics.scales`) nearest to start · exp(change), float32 of start's shape.

    start   float32, a value that the format stores
    change  float32 of the same shape

    Powers of two (e8m0) are nearest by their exponent: `storable_scale`, which is for scales that must cover a range,
    takes the next larger one.
    """
    wanted = start * change.exp()
    with torch.no_grad():
        if scale_format == "e8m0":
            exponent = torch.log2(start).round() + change * _PER_OCTAVE
            stored = torch.exp2(exponent.round().clamp(-E8M0_BIAS, E8M0_BIAS))
        else:
            stored = storable_scale(wanted, scale_format, global_scale)
        stored = torch.where((change == 0) | (start == 0), start, stored)
    return straight_through(wanted, stored)


def changed_half(start: Tensor, change: Tensor) -> Tensor:
    """The half nearest to start · exp(change), as float32; saturates.

    start  float16
    """
    wanted = start.float() * change.exp()
    with torch.no_grad():
        stored = wanted.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()
        stored = torch.where(change == 0, start.float(), stored)
    return straight_through(wanted, stored)


def moved_half(start: Tensor, unit: Tensor, change: Tensor) -> Tensor:
    """The half nearest to start + unit · change, as float32: for minima, which may change their sign.

    start  float16;  unit  float32 of the same shape
    """
    wanted = start.float() + unit * change
    with torch.no_grad():
        stored = wanted.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()
        stored = torch.where(change == 0, start.float(), stored)
    return straight_through(wanted, stored)


def changed_integer(start: Tensor, change: Tensor, low: int, high: int, slope: int = 1, zero: int = 0) -> Tensor:
    """The integer s in low … high for which slope · s + zero is nearest to its start times exp(change), as float32.

    start  integers; (slope, zero) = (2, 1) where a scale is d · (2·s + 1), (1, −32) where it is d · (s − 32)
    """
    begun = start.float()
    wanted = ((slope * begun + zero) * change.exp() - zero) / slope
    with torch.no_grad():
        stored = torch.where(change == 0, begun, wanted.round().clamp(low, high))
    return straight_through(wanted, stored)
