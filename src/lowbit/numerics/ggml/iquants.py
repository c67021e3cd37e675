"""IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S: vectors of 8 or 4 weights are points of a codebook.

    IQ2_XXS, IQ2_XS, IQ2_S   x = d · (1/2 + s)/4 · ±grid[q]       8 weights at a time
    IQ3_XXS                  x = d · (1/2 + s)/2 · ±grid[q]       4
    IQ3_S                    x = d · (2·s + 1) · ±grid[q]         4
    IQ1_S, IQ1_M             x = d · (2·s + 1) · (grid[q] ± 1/8)  8

d is a half per block of 256, s an integer per sub-block of 32 (IQ1_M, IQ2_XS and IQ2_S: 16) weights. Where each lies in
a block and the grids are in `iquant_layout`, the search of the encoder in `iquant_search`.

A code is an int32, lowest bits first:

    IQ1_S     point 11                                    8 columns; the shift, of 32, is the offset
    IQ1_M     point 11, shift 1 (1: down)                 8
    IQ2_XXS   point 8, signs of the first 7 columns 7     8; the eighth makes their number even
    IQ2_XS    point 9, signs 7                            8
    IQ2_S     point 10, signs 8                           8
    IQ3_XXS   points 8 + 8, signs 7                       8
    IQ3_S     point 9, signs 4                            4

Encoding is not idempotent: blocks made by decoding come back close to the same values, not always at them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.choice import compiled
from lowbit.numerics.ggml import iquant_layout
from lowbit.numerics.ggml.iquant_layout import Fields, even_sign, grid, hand_over, index_of
from lowbit.numerics.ggml.iquant_search import BLOCK, SHIFT, Search, nearest_points, search
from lowbit.numerics.ggml.types import Blocks, GgmlType, per_column


@dataclass(frozen=True)
class _Code:
    """Columns of a code, bits of a point, bits of signs (or of the shift)."""

    columns: int
    point_bits: int
    sign_bits: int


_CODES = {
    "IQ1_S": _Code(8, 11, 0),
    "IQ1_M": _Code(8, 11, 1),
    "IQ2_XXS": _Code(8, 8, 7),
    "IQ2_XS": _Code(8, 9, 7),
    "IQ2_S": _Code(8, 10, 8),
    "IQ3_XXS": _Code(8, 8, 7),
    "IQ3_S": _Code(4, 9, 4),
}

_IQ1_GUESSES = (0.7, 0.85, 1.0, 1.15, 1.3, 1.5)
_SEARCH = {
    "IQ1_S": Search(32, 8, 1.0, "none", 32, _IQ1_GUESSES, 1),
    "IQ1_M": Search(16, 8, 1.0, "none", 8, _IQ1_GUESSES, 1),
    "IQ2_XXS": Search(32, 16, 1 / 8, "even", 0, (0.6, 0.75, 0.9, 1.1), 2),
    "IQ2_XS": Search(16, 16, 1 / 8, "even", 0, (0.6, 0.7, 0.8, 0.95, 1.1), 2),
    "IQ2_S": Search(16, 16, 1 / 8, "free", 0, (0.75, 1.0), 1),
    "IQ3_XXS": Search(32, 16, 1 / 4, "even", 0, (0.8, 1.0, 1.2), 2),
    "IQ3_S": Search(32, 16, 1.0, "free", 0, (0.85, 1.0, 1.15), 2),
}
# Type → unit of its scales, d · unit · (2·s + 1).
SCALE_UNITS = {name: how.unit for name, how in _SEARCH.items()}


def encode(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """See `lowbit.numerics.ggml.encode`."""
    rows, columns = weight.shape
    how = _SEARCH[kind.name]
    weighed = torch.ones(columns) if importance is None else importance.to(torch.float32)
    each = weighed.expand(rows, columns).reshape(-1, BLOCK)
    found = search(kind.name, how, weight.to(torch.float32).reshape(-1, BLOCK), each)
    blocks = len(each)
    if how.signs == "none":
        sign = (found.shift < 0).int().reshape(blocks, -1)[:, :: how.shift_columns // 8]
    else:
        sign = (found.negative.reshape(blocks, -1, 8).int() << torch.arange(8, dtype=torch.int32)).sum(dim=2).int()
    fields = Fields(found.d, found.sub_scale.int().reshape(blocks, -1), found.entry.reshape(blocks, -1), sign)
    return iquant_layout.write(kind.name, fields).reshape(rows, -1)


def unpack(kind: GgmlType, blocks: Tensor) -> Blocks:
    """codes int32, see the top; stored: d, half [N, B], scale, int32 [N, G]; IQ1_S: shift, int32 [N, G]."""
    rows = blocks.shape[0]
    fields = iquant_layout.read(kind.name, blocks.reshape(-1, kind.size))
    code, unit = _CODES[kind.name], _SEARCH[kind.name].unit
    scale = fields.d.to(torch.float32)[:, None] * (unit * (2 * fields.scale + 1).to(torch.float32))
    stored = {"d": fields.d.reshape(rows, -1), "scale": fields.scale.reshape(rows, -1)}
    offset = None
    if kind.name == "IQ1_S":
        offset = (scale * torch.where(fields.sign > 0, -SHIFT, SHIFT)).reshape(rows, -1)
        stored["shift"] = fields.sign.reshape(rows, -1)
    sign = fields.sign
    if kind.name == "IQ3_S":  # a code has the signs of 4 columns, the block keeps those of 8
        sign = torch.stack([sign & 15, sign >> 4], dim=2).flatten(1)
    codes = _join_code(code, fields.point, sign)
    return Blocks(codes.reshape(rows, -1), scale.reshape(rows, -1), offset, stored)


def pack(kind: GgmlType, codes: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """The inverse of `unpack`: uint8 [N, row bytes]."""
    rows, code = codes.shape[0], _CODES[kind.name]
    point, sign = _split_code(code, kind, codes.reshape(-1, BLOCK // code.columns).int())
    if kind.name == "IQ1_S":
        sign = stored["shift"].reshape(len(point), -1)
    elif kind.name == "IQ3_S":
        sign = sign[:, ::2] | sign[:, 1::2] << 4
    scale = stored["scale"].reshape(len(point), -1)
    fields = Fields(stored["d"].reshape(-1), scale, point, sign)
    return iquant_layout.write(kind.name, fields).reshape(rows, -1)


def value(kind: GgmlType, codes: Tensor) -> Tensor:
    """The signed (IQ1_M: shifted) points."""
    code, points = _CODES[kind.name], grid(kind.name).to(codes.device)
    point, sign = _split_code(code, kind, codes.int())
    values = points[point.long()].to(torch.float32).reshape(*codes.shape, code.columns)
    if kind.name == "IQ1_M":
        values = values + torch.where(sign > 0, -SHIFT, SHIFT)[:, :, None]
    elif code.sign_bits:
        bits = sign[:, :, None] >> torch.arange(code.columns, dtype=torch.int32, device=codes.device) & 1
        values = values * (1 - 2 * bits)
    return values.flatten(1)


def round(kind: GgmlType, weight: Tensor, blocks: Blocks, importance: Tensor | None = None) -> Tensor:
    """The codes of least Σ importance · error² for each 8 (IQ3_S: 4) columns, given scale and offset."""
    code = _CODES[kind.name]
    rows, columns = weight.shape
    x = weight.to(torch.float32)
    if blocks.offset is not None:
        x = x - per_column(blocks.offset, columns)
    scale = per_column(blocks.scale, columns)[:, :: code.columns].reshape(-1)
    weighed = torch.ones(columns, device=weight.device) if importance is None else importance.to(torch.float32)
    w = weighed.expand(rows, columns).reshape(-1, code.columns)
    x = x.reshape(-1, code.columns)
    if code.sign_bits in (0, 1):
        codes = _round_shifted(kind, x, w, scale)
    else:
        codes = _round_signed(kind, x, w, scale)
    return codes.reshape(rows, -1)


def _round_shifted(kind: GgmlType, x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """Codes [V] of IQ1_S, whose shift is off x already, and of IQ1_M, which has a choice."""
    index = index_of(kind.name)
    if kind.name == "IQ1_S":
        return _nearest(kind, x, w, scale[:, None] * index.levels)[0].int()
    up, up_cost = _nearest(kind, x, w, scale[:, None] * (index.levels + SHIFT))
    down, down_cost = _nearest(kind, x, w, scale[:, None] * (index.levels - SHIFT))
    return torch.where(down_cost < up_cost, down | 1 << 11, up).int()


def _round_signed(kind: GgmlType, x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """Codes [V]. Where an even number of signs has to be negative, each of the 8 flips is tried."""
    core = compiled(x.device)
    if core is not None:
        hand_over(core, kind)
        codes = torch.empty(len(x), dtype=torch.int32)
        core.iq_round(kind.number, x.contiguous(), w.contiguous(), scale.contiguous(), codes)
        return codes
    code, width = _CODES[kind.name], grid(kind.name).shape[1]
    x = torch.where(scale[:, None] < 0, -x, x)
    negative, magnitude = x < 0, x.abs()
    entry, _ = _nearest_magnitudes(kind, magnitude, w, scale)
    odd = ((negative.sum(dim=1) % 2 == 1) & (code.sign_bits == 7)).nonzero()[:, 0]
    if len(odd):
        flips = torch.eye(8, dtype=torch.bool, device=x.device).repeat(len(odd), 1)
        flipped = torch.where(flips, -1.0, 1.0) * magnitude[odd].repeat_interleave(8, dim=0)
        tried, cost = _nearest_magnitudes(
            kind, flipped, w[odd].repeat_interleave(8, dim=0), scale[odd].repeat_interleave(8)
        )
        best = cost.reshape(-1, 8).argmin(dim=1)
        entry[odd] = tried.reshape(len(odd), 8, -1)[torch.arange(len(odd)), best]
        negative[odd, best] ^= True
    bits = (negative.int() << torch.arange(code.columns, dtype=torch.int32, device=x.device)).sum(dim=1)
    return _join_code(code, entry.reshape(-1, code.columns // width).int(), bits[:, None].int())[:, 0]


def _nearest_magnitudes(kind: GgmlType, x: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(points [V, points of a code], cost [V]) of the nearest points."""
    index, width = index_of(kind.name), grid(kind.name).shape[1]
    each = x.shape[1] // width
    scaled = (scale.abs()[:, None] * index.levels).repeat_interleave(each, dim=0)
    entry, cost = _nearest(kind, x.reshape(-1, width), w.reshape(-1, width), scaled)
    return entry.reshape(-1, each), cost.reshape(-1, each).sum(dim=1)


def _nearest(kind: GgmlType, x: Tensor, w: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest_points`, in the compiled core where there is one: the same points."""
    core = compiled(x.device)
    if core is None:
        return nearest_points(index_of(kind.name), x, w, scaled)
    hand_over(core, kind)
    entry, cost = torch.empty(len(x), dtype=torch.int32), torch.empty(len(x))
    core.iq_nearest(kind.number, x.contiguous(), w.contiguous(), scaled.contiguous(), entry, cost)
    return entry, cost


def _join_code(code: _Code, point: Tensor, sign: Tensor) -> Tensor:
    """Points [B, P] and signs [B, C] → codes int32 [B, C]."""
    if code.sign_bits == 0:
        return point.int()
    points = point.shape[1] // sign.shape[1]
    parts = point.int().reshape(len(point), -1, points) << code.point_bits * torch.arange(points, dtype=torch.int32)
    kept = sign.int() & (1 << code.sign_bits) - 1
    return parts.sum(dim=2).int() | kept << code.point_bits * points


def _split_code(code: _Code, kind: GgmlType, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, C] → points [B, P], signs [B, C] of all the columns of a code."""
    points = code.columns // grid(kind.name).shape[1]
    shifts = code.point_bits * torch.arange(points, dtype=torch.int32, device=codes.device)
    point = (codes[:, :, None] >> shifts & (1 << code.point_bits) - 1).flatten(1)
    sign = codes >> code.point_bits * points
    return point, even_sign(sign) if code.sign_bits == 7 else sign
