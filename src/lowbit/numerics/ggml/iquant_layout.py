"""Block layouts of the i-quants: 256 weights, little-endian. v counts points, k sub-blocks, m = v % 4.

    IQ1_S    half d; u8 qs[32]; u16 qh[8]                       1.5625 bits per weight
             point v: qs[v] + 256 · bits 3m…3m+2 of qh[v // 4]
             scale k: bits 12-14 of qh[k]; shift of its 32 weights: bit 15
    IQ1_M    u8 qs[32]; u8 qh[16]; u16 scales[4]                1.75
             point v: qs[v] + 256 · bits 0-2 of nibble v of qh; shift of its 8 weights: bit 3 of it
             scale k: 3 bits of scales[k // 4] from 3 · (k % 4); half d: top nibbles of scales, first lowest
    IQ2_XXS  half d; {u8 q[4]; u32 s}[8]                        2.0625
             point v = q; signs of its 8 weights: bits 7m…7m+6 of s; scale: bits 28-31
    IQ2_XS   half d; u16 qs[32]; u8 scales[8]                   2.3125
             point v: bits 0-8; signs: bits 9-15; scale k: nibble k
    IQ2_S    half d; u8 qs[32]; u8 signs[32]; u8 qh[8]; u8 scales[8]      2.5625
             point v: qs[v] + 256 · bits 2m, 2m+1 of qh[v // 4]; scale k: nibble k
    IQ3_XXS  half d; u8 qs[64]; u32 s[8]                        3.0625
             point v = qs[v]; signs and scale as in IQ2_XXS
    IQ3_S    half d; u8 qs[64]; u8 qh[8]; u8 signs[32]; u8 scales[4]      3.4375
             point v: qs[v] + 256 · bit v % 8 of qh[v // 8]; scale k: nibble k

Signs are a bit per weight, set where negative. Where 7 bits are kept for 8 weights, the eighth makes their number even.

A point is one of a codebook ("grid") of 8 or 4 columns, from the gguf package, with coordinates of a small alphabet:

    IQ1_S, IQ1_M     2048 points of −1, 0, 1                  8 columns
    IQ2_XXS          256 points of 8, 25, 43                  8
    IQ2_XS, IQ2_S    512, 1024 points of 8, 25, 43            8
    IQ3_XXS          256 points of 4, 12, 20, …, 52, 62       4
    IQ3_S            512 points of 1, 3, …, 15                4

The compiled core gets each grid from here on first use of its type, and builds the same index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from gguf import quants
from torch import Tensor

from lowbit.numerics.ggml.types import GgmlType

if TYPE_CHECKING:
    from lowbit.kernels._core import Isa


@dataclass(frozen=True)
class Fields:
    """The fields of B blocks, unscaled.

    d      float16 [B]
    scale  int32 [B, sub-blocks]
    point  int32 [B, points]
    sign   int32 [B, 256 / 8]   8 bits, a weight each; IQ1: [B, shifts], 1 where points are shifted down
    """

    d: Tensor
    scale: Tensor
    point: Tensor
    sign: Tensor


def read(type_name: str, blocks: Tensor) -> Fields:
    """Fields of blocks, uint8 [B, size]."""
    return _LAYOUTS[type_name][0](blocks)


def write(type_name: str, fields: Fields) -> Tensor:
    """Blocks, uint8 [B, size]."""
    return _LAYOUTS[type_name][1](fields)


def even_sign(seven: Tensor) -> Tensor:
    """7 bits → 8, of which an even number is set."""
    parity = seven ^ (seven >> 4)
    parity = parity ^ (parity >> 2)
    return seven | (((parity ^ (parity >> 1)) & 1) << 7)


def _read_iq1_s(blocks: Tensor) -> Fields:
    high = _words(blocks[:, 34:50], torch.int16)
    point = blocks[:, 2:34].int() | (_bits(high, (0, 3, 6, 9), 7) << 8)
    return Fields(_half(blocks[:, :2]), high >> 12 & 7, point, high >> 15)


def _write_iq1_s(fields: Fields) -> Tensor:
    high = _join(fields.point >> 8, (0, 3, 6, 9)) | fields.scale << 12 | fields.sign << 15
    return torch.cat([_bytes_of_half(fields.d), fields.point.to(torch.uint8), _bytes(high, 2)], dim=1)


def _read_iq1_m(blocks: Tensor) -> Fields:
    scales = _words(blocks[:, 48:56], torch.int16)
    d = _join(scales >> 12, (0, 4, 8, 12)).to(torch.int16).view(torch.float16)[:, 0]
    high = _bits(blocks[:, 32:48], (0, 4), 15)
    return Fields(d, _bits(scales, (0, 3, 6, 9), 7), blocks[:, :32].int() | (high & 7) << 8, high >> 3)


def _write_iq1_m(fields: Fields) -> Tensor:
    d = fields.d.view(torch.int16).int()[:, None]
    scales = _join(fields.scale, (0, 3, 6, 9)) | _bits(d, (0, 4, 8, 12), 15) << 12
    high = _join(fields.point >> 8 | fields.sign << 3, (0, 4))
    return torch.cat([fields.point.to(torch.uint8), _bytes(high, 1), _bytes(scales, 2)], dim=1)


def _read_iq2_xxs(blocks: Tensor) -> Fields:
    parts = blocks[:, 2:].reshape(-1, 8, 8)
    sign, scale = _sign_word(parts[:, :, 4:].reshape(-1, 32))
    return Fields(_half(blocks[:, :2]), scale, parts[:, :, :4].reshape(-1, 32).int(), sign)


def _write_iq2_xxs(fields: Fields) -> Tensor:
    words = _bytes_of_sign_word(fields).reshape(-1, 8, 4)
    parts = torch.cat([fields.point.to(torch.uint8).reshape(-1, 8, 4), words], dim=2)
    return torch.cat([_bytes_of_half(fields.d), parts.reshape(-1, 64)], dim=1)


def _read_iq2_xs(blocks: Tensor) -> Fields:
    words = _words(blocks[:, 2:66], torch.int16)
    scale = _bits(blocks[:, 66:74], (0, 4), 15)
    return Fields(_half(blocks[:, :2]), scale, words & 511, even_sign(words >> 9))


def _write_iq2_xs(fields: Fields) -> Tensor:
    words = fields.point | (fields.sign & 127) << 9
    return torch.cat([_bytes_of_half(fields.d), _bytes(words, 2), _bytes(_join(fields.scale, (0, 4)), 1)], dim=1)


def _read_iq2_s(blocks: Tensor) -> Fields:
    point = blocks[:, 2:34].int() | _bits(blocks[:, 66:74], (0, 2, 4, 6), 3) << 8
    return Fields(_half(blocks[:, :2]), _bits(blocks[:, 74:82], (0, 4), 15), point, blocks[:, 34:66].int())


def _write_iq2_s(fields: Fields) -> Tensor:
    high = _join(fields.point >> 8, (0, 2, 4, 6))
    parts = (fields.point, fields.sign, high, _join(fields.scale, (0, 4)))
    return torch.cat([_bytes_of_half(fields.d), *(_bytes(part, 1) for part in parts)], dim=1)


def _read_iq3_xxs(blocks: Tensor) -> Fields:
    sign, scale = _sign_word(blocks[:, 66:98])
    return Fields(_half(blocks[:, :2]), scale, blocks[:, 2:66].int(), sign)


def _write_iq3_xxs(fields: Fields) -> Tensor:
    return torch.cat([_bytes_of_half(fields.d), _bytes(fields.point, 1), _bytes_of_sign_word(fields)], dim=1)


def _read_iq3_s(blocks: Tensor) -> Fields:
    point = blocks[:, 2:66].int() | _bits(blocks[:, 66:74], tuple(range(8)), 1) << 8
    return Fields(_half(blocks[:, :2]), _bits(blocks[:, 106:110], (0, 4), 15), point, blocks[:, 74:106].int())


def _write_iq3_s(fields: Fields) -> Tensor:
    parts = (fields.point, _join(fields.point >> 8, tuple(range(8))), fields.sign, _join(fields.scale, (0, 4)))
    return torch.cat([_bytes_of_half(fields.d), *(_bytes(part, 1) for part in parts)], dim=1)


_LAYOUTS = {
    "IQ1_S": (_read_iq1_s, _write_iq1_s),
    "IQ1_M": (_read_iq1_m, _write_iq1_m),
    "IQ2_XXS": (_read_iq2_xxs, _write_iq2_xxs),
    "IQ2_XS": (_read_iq2_xs, _write_iq2_xs),
    "IQ2_S": (_read_iq2_s, _write_iq2_s),
    "IQ3_XXS": (_read_iq3_xxs, _write_iq3_xxs),
    "IQ3_S": (_read_iq3_s, _write_iq3_s),
}


# Slices of a single block count as contiguous wherever they begin, hence the clones: a view needs alignment.
def _half(raw: Tensor) -> Tensor:
    return raw.clone(memory_format=torch.contiguous_format).view(torch.float16)[:, 0]


def _bytes_of_half(d: Tensor) -> Tensor:
    return d[:, None].contiguous().view(torch.uint8)


def _words(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [B, n · size] → unsigned words, int32 [B, n]."""
    return raw.clone(memory_format=torch.contiguous_format).view(dtype).int() & 0xFFFF


def _bytes(values: Tensor, size: int) -> Tensor:
    """[B, n] → the lowest `size` bytes of each, [B, n · size]."""
    return _bits(values, tuple(range(0, 8 * size, 8)), 255).to(torch.uint8)


def _bits(values: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """[B, n] → int32 [B, n · shifts]: the bits of each value from each shift on."""
    shifted = values.int()[:, :, None] >> torch.tensor(shifts, dtype=torch.int32, device=values.device)
    return (shifted & mask).reshape(len(values), -1)


def _join(values: Tensor, shifts: tuple[int, ...]) -> Tensor:
    """The inverse: [B, n · shifts] → int32 [B, n]."""
    parts = values.int().reshape(len(values), -1, len(shifts))
    return (parts << torch.tensor(shifts, dtype=torch.int32, device=values.device)).sum(dim=2, dtype=torch.int32)


def _sign_word(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes [B, 32] of IQ2_XXS's s[8] → signs [B, 32] and scales [B, 8]."""
    words = raw.clone(memory_format=torch.contiguous_format).view(torch.int32)
    return even_sign(_bits(words, (0, 7, 14, 21), 127)), words >> 28 & 15


def _bytes_of_sign_word(fields: Fields) -> Tensor:
    words = _join(fields.sign & 127, (0, 7, 14, 21)) | fields.scale << 28
    return words.contiguous().view(torch.uint8)


@cache
def grid(type_name: str) -> Tensor:
    """int8 [points, columns] of an i-quant."""
    codec = getattr(quants, type_name)
    codec.init_grid()
    return torch.from_numpy(codec.grid.reshape(codec.grid_shape)).to(torch.int8)


_handed_over: set[str] = set()


def hand_over(core: Isa, kind: GgmlType) -> None:
    """Give the grid of an i-quant to the compiled core; safe to repeat, from any thread."""
    if kind.name not in _handed_over:
        core.set_ggml_grid(kind.number, grid(kind.name))
        _handed_over.add(kind.name)


@dataclass(frozen=True)
class GridIndex:
    """A grid, ready for `iquant_search.nearest_points`.

    A point is two halves; a half of n columns is pattern Σ level[i] · levels^i, one of levels^n.

    levels   float32 [L], ascending
    first    int64 [A]       patterns of first halves, those with most second halves first
    second   int64 [A, most] patterns that complete them to a point, ascending; the last repeats
    entry    int32 [patterns, patterns] → number of the point, −1 where there is none
    """

    levels: Tensor
    first: Tensor
    second: Tensor
    entry: Tensor


@cache
def index_of(type_name: str) -> GridIndex:
    """The index of an i-quant's grid."""
    points = grid(type_name)
    levels = points.unique()
    half = points.shape[1] // 2
    digits = torch.searchsorted(levels, points).reshape(len(points), 2, half)
    patterns = (digits * len(levels) ** torch.arange(half)).sum(dim=2)
    entry = torch.full((len(levels) ** half,) * 2, -1, dtype=torch.int32)
    entry[patterns[:, 0], patterns[:, 1]] = torch.arange(len(points), dtype=torch.int32)
    second = [row.nonzero()[:, 0] for row in entry >= 0]
    first = sorted((a for a in range(len(second)) if len(second[a])), key=lambda a: -len(second[a]))
    most = len(second[first[0]])
    padded = torch.stack([torch.cat([second[a], second[a][-1:].expand(most - len(second[a]))]) for a in first])
    return GridIndex(levels.to(torch.float32), torch.tensor(first), padded, entry)
