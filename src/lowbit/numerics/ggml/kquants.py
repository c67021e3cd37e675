"""K-quants: super-blocks of 256 weights whose sub-blocks have integer scales (and minima) of their own.

    Q2_K   uint8 scales[16]; uint8 qs[64]; half d, dmin                  x = d·s·q − dmin·m      2.625 bits per weight
    Q3_K   uint8 hmask[32]; uint8 qs[64]; uint8 scales[12]; half d       x = d·(s − 32)·(q − 4)  3.4375
    Q4_K   half d, dmin; uint8 scales[12]; uint8 qs[128]                 x = d·s·q − dmin·m      4.5
    Q5_K   half d, dmin; uint8 scales[12]; uint8 qh[32]; uint8 qs[128]   x = d·s·q − dmin·m      5.5
    Q6_K   uint8 ql[128]; uint8 qh[64]; int8 scales[16]; half d          x = d·s·(q − 32)        6.5625

Sub-blocks have 16 weights in Q2_K, Q3_K and Q6_K and 32 in Q4_K and Q5_K. Bits of a code are spread over *planes*:

    qs of Q2_K, Q3_K; qh of Q6_K   bits 2n, 2n + 1 of byte 32·h + i: weight 128·h + 32·n + i
    qs of Q4_K, Q5_K               nibble n of byte 32·h + i: weight 64·h + 32·n + i
    ql of Q6_K                     nibble n of byte 64·h + i: weight 128·h + 64·n + i
    hmask of Q3_K, qh of Q5_K      bit n of byte i: weight 32·n + i

How the parameters are found is in `kquants_search`. An all-zero super-block gets d = 0 and codes that decode to 0.
Values that a type holds come back exactly in most super-blocks of Q2_K, Q3_K and Q6_K; in Q4_K and Q5_K often not,
where a sub-block leaves out the outer codes: the second error is then a few hundredths of the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.ggml import kquants_search as search
from lowbit.numerics.ggml.types import Blocks, GgmlType, per_column

SUPER = 256


@dataclass(frozen=True)
class Plane:
    """Some bits of all codes: `bits` of them from bit `low` of the code on, in bytes from `start` on.

    A byte holds them for 8 / bits weights that lie `stride` apart.
    """

    start: int
    low: int
    bits: int
    stride: int


@dataclass(frozen=True)
class _Layout:
    planes: tuple[Plane, ...]
    scales: slice
    d: int  # first byte of d; dmin follows
    zero: int  # the code of the value 0


_LAYOUTS = {
    "Q2_K": _Layout((Plane(16, 0, 2, 32),), slice(0, 16), 80, 0),
    "Q3_K": _Layout((Plane(32, 0, 2, 32), Plane(0, 2, 1, 32)), slice(96, 108), 108, 4),
    "Q4_K": _Layout((Plane(16, 0, 4, 32),), slice(4, 16), 0, 0),
    "Q5_K": _Layout((Plane(48, 0, 4, 32), Plane(16, 4, 1, 32)), slice(4, 16), 0, 0),
    "Q6_K": _Layout((Plane(0, 0, 4, 64), Plane(128, 4, 2, 32)), slice(192, 208), 208, 32),
}


def encode(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """See `lowbit.numerics.ggml.encode`."""
    rows, columns = weight.shape
    if kind.name in search.AFFINE:
        found = search.AFFINE[kind.name]
        choice = search.fit_affine(found, *search.weighed(weight, importance, found.groups))
    else:
        found = search.SIGNED[kind.name]
        choice = search.fit_signed(found, *search.weighed(weight, importance, found.groups))
    codes = choice.codes.permute(1, 2, 0).reshape(rows, columns) + _LAYOUTS[kind.name].zero
    stored = {"d": choice.d.reshape(rows, -1), "scales": choice.scales.to(torch.int8).reshape(rows, -1)}
    if choice.dmin is not None and choice.minima is not None:
        stored["dmin"] = choice.dmin.reshape(rows, -1)
        stored["minima"] = choice.minima.to(torch.int8).reshape(rows, -1)
    return pack(kind, codes.to(torch.uint8), stored)


def unpack(kind: GgmlType, blocks: Tensor) -> Blocks:
    """codes uint8 [N, K], the q; stored: d and dmin, half [N, B], scales and minima, int8 [N, G], as they multiply."""
    rows = blocks.shape[0]
    each = blocks.reshape(-1, kind.size)
    layout = _LAYOUTS[kind.name]
    codes = torch.zeros((len(each), SUPER), dtype=torch.uint8, device=blocks.device)
    for plane in layout.planes:
        parts, stride = 8 // plane.bits, plane.stride
        held = each[:, plane.start : plane.start + SUPER // parts].reshape(-1, SUPER // parts // stride, 1, stride)
        bits = held >> _shifts(parts, plane.bits, blocks) & (2**plane.bits - 1)
        codes |= bits.reshape(-1, SUPER) << plane.low
    scales, minima = _unpack_scales(kind.name, each[:, layout.scales])
    stored = {"d": _halves(each, layout.d).reshape(rows, -1), "scales": scales.reshape(rows, -1)}
    if minima is not None:
        stored["dmin"] = _halves(each, layout.d + 2).reshape(rows, -1)
        stored["minima"] = minima.reshape(rows, -1)
    return Blocks(codes.reshape(rows, -1), *_effective(stored), stored)


def pack(kind: GgmlType, codes: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """The inverse of `unpack`: uint8 [N, row bytes]."""
    rows, layout = codes.shape[0], _LAYOUTS[kind.name]
    codes = codes.reshape(-1, SUPER).to(torch.uint8)
    each = torch.zeros((len(codes), kind.size), dtype=torch.uint8, device=codes.device)
    for plane in layout.planes:
        parts, stride = 8 // plane.bits, plane.stride
        bits = (codes >> plane.low & (2**plane.bits - 1)).reshape(-1, SUPER // parts // stride, parts, stride)
        held = (bits << _shifts(parts, plane.bits, codes)).sum(2, dtype=torch.uint8)
        each[:, plane.start : plane.start + SUPER // parts] = held.reshape(len(codes), -1)
    groups = SUPER // kind.group
    minima = stored["minima"].reshape(-1, groups).view(torch.uint8) if "minima" in stored else None
    each[:, layout.scales] = _pack_scales(kind.name, stored["scales"].reshape(-1, groups), minima)
    for name, start in (("d", layout.d), ("dmin", layout.d + 2)):
        if name in stored:
            each[:, start : start + 2] = stored[name].reshape(-1, 1).contiguous().view(torch.uint8)
    return each.reshape(rows, -1)


def value(kind: GgmlType, codes: Tensor) -> Tensor:
    """q − the code of 0."""
    return codes.to(torch.float32) - _LAYOUTS[kind.name].zero


def round(kind: GgmlType, weight: Tensor, blocks: Blocks, importance: Tensor | None = None) -> Tensor:
    """The nearest code, ties to even; the code of 0 where the scale is 0."""
    columns, zero = weight.shape[1], _LAYOUTS[kind.name].zero
    scale, x = per_column(blocks.scale, columns), weight.to(torch.float32)
    if blocks.offset is not None:
        x = x - per_column(blocks.offset, columns)
    most = 2 ** sum(plane.bits for plane in _LAYOUTS[kind.name].planes) - 1
    steps = torch.where(scale == 0, 0.0, x / scale)
    return (steps.clamp(-zero, most - zero).round() + zero).to(torch.uint8)


def _effective(stored: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Scale d · s and offset −(dmin · m), float32 [N, G]."""

    def product(half: Tensor, integers: Tensor) -> Tensor:
        return per_column(half.to(torch.float32), integers.shape[1]) * integers.to(torch.float32)

    scale = product(stored["d"], stored["scales"])
    return scale, -product(stored["dmin"], stored["minima"]) if "dmin" in stored else None


def _unpack_scales(name: str, held: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sub-scales and sub-minima, int8 [S, sub-blocks], of their bytes."""
    if name == "Q6_K":
        return held.contiguous().view(torch.int8), None
    if name == "Q2_K":
        return (held & 15).to(torch.int8), (held >> 4).to(torch.int8)
    first, second, third = held.split(4, dim=1)
    if name == "Q3_K":  # bytes 0–7: low four bits of scales i and 8 + i; bytes 8–11: high two bits of i, 4 + i, …
        low = torch.cat([first & 15, second & 15, first >> 4, second >> 4], dim=1)
        high = torch.cat([third >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)
        return (low | high << 4).to(torch.int8) - 32, None
    # bytes 0–3: six bits of scales 0–3, above them the high bits of 4–7; bytes 4–7: the same of minima; then low bits
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    return scales.to(torch.int8), minima.to(torch.int8)


def _pack_scales(name: str, scales: Tensor, minima: Tensor | None) -> Tensor:
    """The inverse: bytes of int8 sub-scales and uint8 sub-minima."""
    if name == "Q3_K":
        s = (scales + 32).view(torch.uint8)
        low, high = s & 15, s >> 4
        parts = [high[:, 4 * n : 4 * n + 4] << 2 * n for n in range(4)]
        return torch.cat([low[:, :8] | low[:, 8:] << 4, parts[0] | parts[1] | parts[2] | parts[3]], dim=1)
    s = scales.contiguous().view(torch.uint8)
    if minima is None:
        return s
    if name == "Q2_K":
        return s | minima << 4
    (s0, s1), (m0, m1) = s.split(4, dim=1), minima.split(4, dim=1)
    return torch.cat([s0 | s1 >> 4 << 6, m0 | m1 >> 4 << 6, s1 & 15 | (m1 & 15) << 4], dim=1)


def _halves(each: Tensor, start: int) -> Tensor:
    return each[:, start : start + 2].contiguous().view(torch.float16)


def _shifts(parts: int, bits: int, like: Tensor) -> Tensor:
    return (bits * torch.arange(parts, dtype=torch.uint8, device=like.device)).reshape(1, 1, parts, 1)
