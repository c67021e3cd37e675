"""Double quantization: the float32 scales of a weight, themselves quantized to 8 bits (Dettmers et al. 2023, "QLoRA").

    scale = table[code] · absmax[block] + offset          all float32; blocks are of 256 scales in row-major order

The table is Dettmers' dynamic map of 256 values: the leading bits of a code choose one of seven decades, the rest a
fraction of it, so that small and large values have similar relative precision.

    decade 10^(i − 6), i = 0 .. 6:  2^i values, the middles of 2^i equal parts of [0.1, 1], times ±1;   and 0, and 1

Rounding is bitsandbytes': (scale − offset) · (1 / absmax), the reciprocal rounded to float32 first, then the nearest
table value, halfway the smaller one. Two differences: no code is chosen that would make a scale zero or negative, and a
group without weights takes the offset as its scale (its codes decode to 0 whatever it is), so that it does not stretch
the range of the 255 others.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lowbit.tensors import NestedScale

BLOCK = 256
_SMALLEST_ABSMAX = 1e-38  # bitsandbytes' guard against division by 0, where all scales of a block equal the offset


@lru_cache
def dynamic_map() -> Tensor:
    """The table, float32 [256], ascending. Shared: never write into it."""
    magnitudes: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        magnitudes += (10 ** (decade - 6) * middles).tolist()
    table = [*(-magnitude for magnitude in magnitudes), 0.0, *magnitudes, 1.0]
    return torch.tensor(sorted(table), dtype=torch.float32)


def quantize_scales(scale: Tensor, offset: float, unused: Tensor | None = None) -> NestedScale:
    """Scales float32 [N, G] > 0, of rows that begin where a block begins, as 8-bit codes.

    offset   about the mean scale of the whole tensor
    unused   bool [N, G]: groups of zeros, whose scale does not matter
    """
    offset = torch.tensor(offset, dtype=torch.float32).item()
    centred = scale - offset
    if unused is not None:
        centred = torch.where(unused, torch.zeros_like(centred), centred)
    blocks = _in_blocks(centred)
    absmax = blocks.abs().amax(dim=1)
    table = dynamic_map().to(scale.device)
    midpoints = (table[1:] + table[:-1]) / 2
    per_block = absmax.clamp(min=_SMALLEST_ABSMAX)[:, None]
    relative = (blocks * (1.0 / per_block)).clamp(-1.0, 1.0)
    codes = torch.bucketize(relative, midpoints)
    codes = torch.maximum(codes, _least_positive(table, absmax, offset)[:, None])
    flat = codes.reshape(-1)[: scale.numel()].to(torch.uint8)
    return NestedScale(flat.reshape(scale.shape), absmax, offset, BLOCK)


def decode_scales(nested: NestedScale) -> Tensor:
    """The scales that codes are multiplied with, float32 [N, G]."""
    table = dynamic_map().to(nested.codes.device)
    per_scale = nested.absmax.repeat_interleave(nested.block)[: nested.codes.numel()]
    flat = table[nested.codes.reshape(-1).to(torch.int64)] * per_scale + nested.offset
    return flat.reshape(nested.codes.shape)


def _in_blocks(values: Tensor) -> Tensor:
    """[blocks, 256], the last one filled up with zeros."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).reshape(-1, BLOCK)


def _least_positive(table: Tensor, absmax: Tensor, offset: float) -> Tensor:
    """The smallest code [blocks] that decodes to a scale above 0; the last one where none does."""
    decoded = table[None] * absmax[:, None] + offset
    return (decoded <= 0).sum(dim=1).clamp(max=len(table) - 1)
