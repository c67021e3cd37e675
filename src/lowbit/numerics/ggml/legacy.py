"""ggml's first types: 32 weights with one half-precision scale d, some with a minimum m.

    Q4_0   half d; uint8 qs[16]                       x = d·(q − 8)       4.5 bits per weight
    Q4_1   half d; half m; uint8 qs[16]               x = d·q + m         5
    Q5_0   half d; uint32 qh; uint8 qs[16]            x = d·(q − 16)      5.5
    Q5_1   half d; half m; uint32 qh; uint8 qs[16]    x = d·q + m         6
    Q8_0   half d; int8 q[32]                         x = d·q             8.5

qs: byte j has the low 4 bits of codes j (low half) and j + 16 (high half). qh, little-endian: bit j is bit 4 of code j.

Search. Q4_0 and Q5_0 bring the weight of largest magnitude to each of a row of places, on both sides as d may be
negative; each leads to codes, codes to their best d, and the best of these is refined (`one_scale`). Q4_0 without
importance tries fewer, as it is to run at the speed of memory. Q4_1 and Q5_1 try ranges that begin and end within or
beyond the smallest and the largest weight, with the least-squares line of the codes each leads to. Q8_0 gives the
largest magnitude ±127. Weights that a type holds exactly come back exactly where Q8_0's largest code is ±127, and
elsewhere where the codes span most of the range and no column matters a millionth of others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.ggml import one_scale
from lowbit.numerics.ggml.one_scale import Tile, float_of_half_bits, half_bits, inverse_or_zero, nearest, ordered_sum
from lowbit.numerics.ggml.types import Blocks, GgmlType, per_column

BLOCK = 32


@dataclass(frozen=True)
class LegacyLayout:
    """bits of a code, what code 0 stands for, and whether m follows d."""

    bits: int
    lowest: int
    has_minimum: bool


LAYOUTS = {
    "Q4_0": LegacyLayout(4, -8, False),
    "Q4_1": LegacyLayout(4, 0, True),
    "Q5_0": LegacyLayout(5, -16, False),
    "Q5_1": LegacyLayout(5, 0, True),
    "Q8_0": LegacyLayout(8, 0, False),
}

# Targets for the weight of largest magnitude.
# fmt: off
ENDS_4 = (
    -10, -9.5, -9.1, -8.8, -8.55, -8.35, -8.2, -8.1, -8, -7.9, -7.8, -7.7, -7.6, -7.5, -7.4, -7.25, -7.1, -7,
    -6.75, -6.5, -6, -5.5, -5,
    5, 5.5, 6, 6.3, 6.55, 6.75, 6.9, 7, 7.1, 7.2, 7.3, 7.4, 7.5, 7.6, 7.8, 8, 8.3, 8.7, 9.2,
)
ENDS_5 = (
    -19, -18.25, -17.6, -17.1, -16.7, -16.4, -16.2, -16, -15.8, -15.6, -15.4, -15.2, -15, -14.7, -14.4, -14,
    -13.5, -13, -12, -11, -10,
    10, 11, 12, 12.8, 13.4, 13.9, 14.3, 14.65, 15, 15.2, 15.4, 15.6, 15.8, 16, 16.4, 16.9, 17.5, 18.25,
)
# fmt: on
QUICK_ENDS_4 = (-8.8, -8.3, -7.9, -7.5, 7.6, 7.1)
# Ends of the ranges tried, as fractions of (largest − smallest).
TRIMS = {
    "Q4_1": (-0.06, -0.03, 0, 0.03, 0.06, 0.09, 0.13, 0.18, 0.25),
    "Q5_1": (-0.06, -0.045, -0.03, -0.015, 0, 0.01, 0.025, 0.045, 0.08),
}
STEPS = 2


class IntegerGrid:
    """Integers lowest … highest; code 0 is the lowest."""

    per_step, scan_clamped = 1.0, True

    def __init__(self, lowest: int, highest: int):
        self.lowest, self.highest = lowest, highest

    def bounded(self, place: Tensor) -> Tensor:
        return place.clamp(self.lowest, self.highest)

    def value(self, place: Tensor) -> Tensor:
        return nearest(place)

    def code(self, place: Tensor) -> Tensor:
        return (nearest(place) - self.lowest).to(torch.uint8)


def encode(kind: GgmlType, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Weights [N, K] → blocks, uint8 [N, row bytes]; see `lowbit.numerics.ggml.encode`."""
    rows, layout = weight.shape[0], LAYOUTS[kind.name]
    if kind.name == "Q8_0":
        codes, stored = _encode_q8_0(weight)
        return pack(kind, codes, stored)
    tile = one_scale.load_tile(weight, importance, BLOCK)
    if layout.has_minimum:
        codes, stored = _encode_line(kind, tile, rows)
        return pack(kind, codes, stored)
    grid = IntegerGrid(layout.lowest, -layout.lowest - 1)
    if kind.name == "Q4_0" and importance is None:
        d = half_bits(one_scale.search_scale(grid, tile, QUICK_ENDS_4, 0).scale * tile.unit)
    else:
        ends = ENDS_4 if kind.name == "Q4_0" else ENDS_5
        d = one_scale.best_half(grid, tile, one_scale.search_scale(grid, tile, ends, STEPS).scale)
    codes = one_scale.codes(grid, tile, float_of_half_bits(d) * tile.per_unit, rows)
    return pack(kind, codes, {"d": one_scale.halves(d, rows)})


def _encode_q8_0(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    values = weight.float().reshape(weight.shape[0], -1, BLOCK)
    d = float_of_half_bits(half_bits(values.abs().amax(dim=2) / 127.0))
    inverse = torch.where(d > 0, 1.0 / d, torch.zeros_like(d))
    codes = nearest((values * inverse[..., None]).clamp(-127, 127)).to(torch.int8)
    return codes.flatten(1), {"d": d.half()}


@dataclass(frozen=True)
class _Moments:
    """Of a tile with its weighted mean subtracted: Σ w, its inverse, Σ w·y, float32 [B], and the mean."""

    per_weight: Tensor
    first: Tensor
    center: Tensor


def _encode_line(kind: GgmlType, tile: Tile, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes [rows, K] and halves d, m of x ≈ d·q + m.

    With y = x − mean and W = Σ w, the line through codes q is, by weighted least squares,
        d = (W·Σ w·q·y − Σ w·q·Σ w·y) / (W·Σ w·q·q − (Σ w·q)²),    m = (Σ w·y − d·Σ w·q) / W
    """
    highest = 2 ** LAYOUTS[kind.name].bits - 1
    grid = IntegerGrid(0, highest)
    per_weight = 1.0 / ordered_sum(tile.importance)
    center = ordered_sum(tile.importance * tile.value) * per_weight
    tile = Tile(tile.value - center, tile.importance, tile.unit, tile.per_unit)
    moments = _Moments(per_weight, ordered_sum(tile.importance * tile.value), center)

    low, high = tile.value.amin(dim=0), tile.value.amax(dim=0)
    span, per_range = high - low, inverse_or_zero(high - low) * float(highest)
    best = (torch.zeros_like(low), low, torch.zeros_like(low))
    trims = torch.tensor(TRIMS[kind.name], dtype=torch.float32)
    for begin in trims:
        for end in trims:
            inverse = per_range * (1.0 / (1.0 - begin - end))
            best = _better_line(_fit_line(grid, tile, moments, low + span * begin, inverse), best)
    for _ in range(STEPS):
        best = _better_line(_fit_line(grid, tile, moments, best[1], inverse_or_zero(best[0])), best)

    middle = half_bits(best[0] * tile.unit)
    d, m, least = _with_half_scale(grid, tile, moments, middle, best[1])
    for step in (-1, 1):
        half, minimum, error = _with_half_scale(grid, tile, moments, (middle + step).clamp(0, 0x7BFF), best[1])
        better = error < least
        d, m, least = (torch.where(better, a, b) for a, b in ((half, d), (minimum, m), (error, least)))

    inverse = inverse_or_zero(float_of_half_bits(d) * tile.per_unit)
    kept = float_of_half_bits(m) * tile.per_unit - center
    codes = grid.code(grid.bounded((tile.value - kept) * inverse)).T.reshape(rows, -1)
    return codes, {"d": one_scale.halves(d, rows), "m": one_scale.halves(m, rows)}


_Line = tuple[Tensor, Tensor, Tensor]  # scale, minimum and by how much they reduce Σ w·y·y, float32 [B]


def _fit_line(grid: IntegerGrid, tile: Tile, moments: _Moments, minimum: Tensor, inverse: Tensor) -> _Line:
    """The best line for the codes that result from a minimum and an inverse scale."""
    q = nearest(grid.bounded((tile.value - minimum) * inverse))
    weighed = tile.importance * q
    q1, q2, qy = ordered_sum(weighed), ordered_sum(weighed * q), ordered_sum(weighed * tile.value)
    slope = qy - q1 * moments.per_weight * moments.first
    spread = q2 - q1 * moments.per_weight * q1
    # if all codes are equal, the spread is rounding error and there is no slope
    scale = torch.where(spread > q2 * 1e-5, slope * inverse_or_zero(spread), torch.zeros_like(slope))
    return scale, (moments.first - scale * q1) * moments.per_weight, scale * slope


def _better_line(line: _Line, best: _Line) -> _Line:
    better = line[2] > best[2]
    return (
        torch.where(better, line[0], best[0]),
        torch.where(better, line[1], best[1]),
        torch.where(better, line[2], best[2]),
    )


def _with_half_scale(
    grid: IntegerGrid, tile: Tile, moments: _Moments, half: Tensor, minimum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A scale as bits of a half; the bits of the best minimum for the resulting codes; the error with both."""
    scale = float_of_half_bits(half) * tile.per_unit
    inverse = inverse_or_zero(scale)
    q = nearest(grid.bounded((tile.value - minimum) * inverse))
    rest = ordered_sum(tile.importance * (tile.value - scale * q))
    minimum_half = half_bits((rest * moments.per_weight + moments.center) * tile.unit)
    above = tile.value - (float_of_half_bits(minimum_half) * tile.per_unit - moments.center)
    off = above - scale * nearest(grid.bounded(above * inverse))
    return half, minimum_half, ordered_sum(tile.importance * off * off)


def unpack(kind: GgmlType, blocks: Tensor) -> Blocks:
    """Codes uint8 (Q8_0: int8), `stored` d and m as halves [N, B]."""
    layout, rows = LAYOUTS[kind.name], blocks.shape[0]
    parts = blocks.reshape(rows, -1, kind.size)
    stored = {"d": parts[..., 0:2].contiguous().view(torch.float16)[..., 0]}
    if layout.has_minimum:
        stored["m"] = parts[..., 2:4].contiguous().view(torch.float16)[..., 0]
    at = 2 * len(stored)
    if layout.bits == 8:
        codes = parts[..., at:].contiguous().view(torch.int8).flatten(1)
    else:
        codes = one_scale.unpack_nibbles(parts[..., -16:])
        if layout.bits == 5:
            fifth = (parts[..., at : at + 4, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            codes = codes | (fifth.reshape(rows, -1) << 4)
    offset = stored["m"].float() if layout.has_minimum else None
    return Blocks(codes, stored["d"].float(), offset, stored)


def pack(kind: GgmlType, codes: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """The inverse of `unpack`: uint8 [N, row bytes]."""
    layout, rows = LAYOUTS[kind.name], codes.shape[0]
    params = [stored[name][..., None].view(torch.uint8) for name in ("d", "m") if name in stored]
    if layout.bits == 8:
        return torch.cat([*params, codes.contiguous().view(torch.uint8).reshape(rows, -1, BLOCK)], dim=2).flatten(1)
    if layout.bits == 5:
        fifth = (codes >> 4).reshape(rows, -1, BLOCK // 8, 8) << torch.arange(8, dtype=torch.uint8)
        params.append(fifth.sum(dim=-1, dtype=torch.uint8))
    return torch.cat([*params, one_scale.pack_nibbles(codes & 15, BLOCK)], dim=2).flatten(1)


def value(kind: GgmlType, codes: Tensor) -> Tensor:
    """Codes → unscaled values, float32."""
    return codes.float() + LAYOUTS[kind.name].lowest


def round(kind: GgmlType, weight: Tensor, blocks: Blocks, importance: Tensor | None = None) -> Tensor:
    """Nearest codes of weights [N, k] given scale and offset; see `lowbit.numerics.ggml.types`."""
    layout, columns = LAYOUTS[kind.name], weight.shape[1]
    above = weight.float() if blocks.offset is None else weight.float() - per_column(blocks.offset, columns)
    place = above * inverse_or_zero(per_column(blocks.scale, columns))
    if layout.bits == 8:
        return nearest(place.clamp(-128, 127)).to(torch.int8)
    return IntegerGrid(layout.lowest, layout.lowest + 2**layout.bits - 1).code(
        place.clamp(layout.lowest, layout.lowest + 2**layout.bits - 1)
    )
