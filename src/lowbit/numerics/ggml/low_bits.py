"""Types of one and two bits with one scale per block, for models trained so.

    Q1_0   half d; uint8 qs[16]    128 weights ±d         1.125 bits per weight; bit j % 8 of byte j // 8 is 1 for +d
    Q2_0   half d; uint8 qs[16]    64 weights d·(q − 1)   2.25; q is bits 2·(j % 4), 2·(j % 4) + 1 of byte j // 4

Encoders. Q1_0 takes the signs (+d for zero, as llama.cpp does); the d of least error is then the weighted mean of |x|.
Q2_0 has the values −d, 0, d, 2·d for d of either sign: the weight of largest magnitude is mapped to each of a list of
places, each gives codes and these their best d; the best is refined, and the half of least error near it is kept
(`one_scale`). Weights −a, 0, a with a a half come back exactly.

Unpacked, Q1_0 is 2·d·q − d with q 0 or 1, which is ±d exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics.ggml import one_scale
from lowbit.numerics.ggml.types import Blocks, GgmlType, per_column

# Places of the weight of largest magnitude, in units of d.
ENDS = (
    -1.8, -1.5, -1.3, -1.15, -1, -0.9, -0.8, -0.7, -0.6,
    0.6, 0.7, 0.8, 0.9, 1, 1.15, 1.3, 1.49, 1.6, 1.7, 1.8, 1.9, 2, 2.1, 2.2, 2.35, 2.5, 2.75, 3, 3.5,
)  # fmt: skip
STEPS = 2


class TwoBitGrid:
    """−1, 0, 1, 2; code 0 is −1."""

    per_step, scan_clamped = 1.0, True

    def bounded(self, place: Tensor) -> Tensor:
        return place.clamp(-1.0, 2.0)

    def value(self, place: Tensor) -> Tensor:
        return one_scale.nearest(place)

    def code(self, place: Tensor) -> Tensor:
        return (one_scale.nearest(place) + 1).to(torch.uint8)


_GRID = TwoBitGrid()


def encode(kind: GgmlType, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Weights [N, K] → blocks, uint8 [N, row bytes]; see `lowbit.numerics.ggml.encode`."""
    rows = weight.shape[0]
    tile = one_scale.load_tile(weight, importance, kind.weights)
    if kind.name == "Q1_0":
        mean = one_scale.ordered_sum(tile.importance * tile.value.abs()) / one_scale.ordered_sum(tile.importance)
        half = one_scale.half_bits(mean * tile.unit)
        codes = (tile.value >= 0).to(torch.uint8).T.reshape(rows, -1)
    else:
        half = one_scale.best_half(_GRID, tile, one_scale.search_scale(_GRID, tile, ENDS, STEPS).scale)
        codes = one_scale.codes(_GRID, tile, one_scale.float_of_half_bits(half) * tile.per_unit, rows)
    return pack(kind, codes, {"d": one_scale.halves(half, rows)})


def unpack(kind: GgmlType, blocks: Tensor) -> Blocks:
    """codes uint8 [N, K]; stored: d, half [N, B]."""
    rows, bits = blocks.shape[0], _bits(kind)
    parts = blocks.reshape(rows, -1, kind.size)
    d = parts[..., :2].contiguous().view(torch.float16)[..., 0]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=blocks.device)
    codes = (parts[..., 2:, None] >> shifts) & (2**bits - 1)
    scale = d.float()
    if kind.name == "Q1_0":
        return Blocks(codes.reshape(rows, -1), 2 * scale, -scale, {"d": d})
    return Blocks(codes.reshape(rows, -1), scale, None, {"d": d})


def pack(kind: GgmlType, codes: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """The inverse of `unpack`: uint8 [N, row bytes]."""
    rows, bits = codes.shape[0], _bits(kind)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    packed = (codes.reshape(rows, -1, kind.size - 2, 8 // bits) << shifts).sum(dim=3, dtype=torch.uint8)
    d = stored["d"][..., None].contiguous().view(torch.uint8)
    return torch.cat([d, packed], dim=2).flatten(1)


def value(kind: GgmlType, codes: Tensor) -> Tensor:
    """q of Q1_0, q − 1 of Q2_0."""
    return codes.float() if kind.name == "Q1_0" else codes.float() - 1


def round(kind: GgmlType, weight: Tensor, blocks: Blocks, importance: Tensor | None = None) -> Tensor:
    """Nearest codes, uint8, of weights [N, k] given the scale; of Q1_0 the sign, where d is positive."""
    scale, x = per_column(blocks.scale, weight.shape[1]), weight.float()
    if kind.name == "Q1_0":
        return torch.where(scale < 0, x < 0, x >= 0).to(torch.uint8)
    return _GRID.code(_GRID.bounded(x * one_scale.inverse_or_zero(scale)))


def _bits(kind: GgmlType) -> int:
    return 1 if kind.name == "Q1_0" else 2
