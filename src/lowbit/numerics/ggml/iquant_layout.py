"""Where each i-quant keeps what: blocks of 256 weights, little-endian. v counts points, k sub-blocks, m = v % 4.

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
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fields:
    """What B blocks hold, unscaled.

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
    return _READERS[type_name](blocks)


def write(type_name: str, fields: Fields) -> Tensor:
    """Blocks, uint8 [B, size]."""
    return _WRITERS[type_name](fields)


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


_READERS = {
    "IQ1_S": _read_iq1_s,
    "IQ1_M": _read_iq1_m,
    "IQ2_XXS": _read_iq2_xxs,
    "IQ2_XS": _read_iq2_xs,
    "IQ2_S": _read_iq2_s,
    "IQ3_XXS": _read_iq3_xxs,
    "IQ3_S": _read_iq3_s,
}
_WRITERS = {
    "IQ1_S": _write_iq1_s,
    "IQ1_M": _write_iq1_m,
    "IQ2_XXS": _write_iq2_xxs,
    "IQ2_XS": _write_iq2_xs,
    "IQ2_S": _write_iq2_s,
    "IQ3_XXS": _write_iq3_xxs,
    "IQ3_S": _write_iq3_s,
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
