"""The ggml types: what a block of each holds, as ggml-common.h lays it out, and the modules that read and write them.

A row of K weights is K / `weights` blocks of `size` bytes. Sub-blocks of `group` weights share a scale. Unpacked, they
are `Blocks`:

    x = scale · value(code) + offset     scalar types: one column per code
                                         vector types: value(code) is a point of 8 or 4 columns

Each family of types is a module, in torch, which for its types (`kind`) has

    encode(kind, weight, importance) → blocks
                                           the specification of `lowbit.numerics.ggml.encode`
    unpack(kind, blocks) → Blocks          from bytes, uint8 [N, row bytes]
    pack(kind, codes, stored) → blocks     codes and `stored` as of Blocks: the inverse of unpack, byte for byte
    value(kind, codes) → float32           [N, C] codes → [N, C · columns_per_code], the unscaled values
    round(kind, weight, Blocks, importance=None) → codes
                                           nearest code of each weight [N, k] (of each 8 or 4) given scale and offset;
                                           `codes` of the Blocks is not read. k columns share k / G' scales in order,
                                           where G' is the width of `scale`: use `per_column(scale, k)`, so that part of
                                           a sub-block, down to one column, can be rounded

scale · value + offset in float32 is what every decoder computes, bit for bit.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Literal

from torch import Tensor

from lowbit.errors import UsageError, did_you_mean

LARGEST_HALF = 65504.0  # of numbers in half precision, in which most types keep their scales

Family = Literal["plain", "legacy", "low", "k", "codebook", "ternary", "i"]


@dataclass(frozen=True)
class GgmlType:
    """One type.

    number      ggml's own, in files
    weights     per block
    size        bytes per block
    group       weights that share a scale
    formula     of one decoded weight
    """

    name: str
    number: int
    weights: int
    size: int
    group: int
    family: Family
    formula: str

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size / self.weights

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; columns divide by the block."""
        return columns // self.weights * self.size


TYPES: dict[str, GgmlType] = {
    kind.name: kind
    for kind in (
        GgmlType("F32", 0, 1, 4, 1, "plain", "x"),
        GgmlType("F16", 1, 1, 2, 1, "plain", "x"),
        GgmlType("BF16", 30, 1, 2, 1, "plain", "x"),
        GgmlType("Q4_0", 2, 32, 18, 32, "legacy", "d·(q − 8)"),
        GgmlType("Q4_1", 3, 32, 20, 32, "legacy", "d·q + m"),
        GgmlType("Q5_0", 6, 32, 22, 32, "legacy", "d·(q − 16)"),
        GgmlType("Q5_1", 7, 32, 24, 32, "legacy", "d·q + m"),
        GgmlType("Q8_0", 8, 32, 34, 32, "legacy", "d·q"),
        GgmlType("Q1_0", 41, 128, 18, 128, "low", "±d"),
        GgmlType("Q2_0", 42, 64, 18, 64, "low", "d·(q − 1)"),
        GgmlType("Q2_K", 10, 256, 84, 16, "k", "d·s·q − dmin·m, s and m of 4 bits"),
        GgmlType("Q3_K", 11, 256, 110, 16, "k", "d·(s − 32)·(q − 4), s of 6 bits"),
        GgmlType("Q4_K", 12, 256, 144, 32, "k", "d·s·q − dmin·m, s and m of 6 bits"),
        GgmlType("Q5_K", 13, 256, 176, 32, "k", "d·s·q − dmin·m, s and m of 6 bits"),
        GgmlType("Q6_K", 14, 256, 210, 16, "k", "d·s·(q − 32), s of 8 bits"),
        GgmlType("IQ4_NL", 20, 32, 18, 32, "codebook", "d·value[q], 16 values"),
        GgmlType("IQ4_XS", 23, 256, 136, 32, "codebook", "d·(s − 32)·value[q], 16 values, s of 6 bits"),
        GgmlType("MXFP4", 39, 32, 17, 32, "codebook", "2^(e − 128)·value[q], E2M1 doubled"),
        GgmlType("NVFP4", 40, 64, 36, 16, "codebook", "s·value[q], E2M1, s an unsigned E4M3"),
        GgmlType("TQ1_0", 34, 256, 54, 256, "ternary", "d·(q − 1), five q in a byte"),
        GgmlType("TQ2_0", 35, 256, 66, 256, "ternary", "d·(q − 1)"),
        GgmlType("IQ1_S", 19, 256, 50, 32, "i", "d·(2·s + 1)·(grid[q] ± 1/8), 8 at a time"),
        GgmlType("IQ1_M", 29, 256, 56, 16, "i", "d·(2·s + 1)·(grid[q] ± 1/8), 8 at a time"),
        GgmlType("IQ2_XXS", 16, 256, 66, 32, "i", "d·(1/2 + s)/4·±grid[q], 8 at a time"),
        GgmlType("IQ2_XS", 17, 256, 74, 16, "i", "d·(1/2 + s)/4·±grid[q], 8 at a time"),
        GgmlType("IQ2_S", 22, 256, 82, 16, "i", "d·(1/2 + s)/4·±grid[q], 8 at a time"),
        GgmlType("IQ3_XXS", 18, 256, 98, 32, "i", "d·(1/2 + s)/2·±grid[q], 4 at a time"),
        GgmlType("IQ3_S", 21, 256, 110, 32, "i", "d·(2·s + 1)·±grid[q], 4 at a time"),
    )
}


# Type → its largest value in units of its scale in half precision; of K-quants with the largest sub-scale.
_SPANS = {
    "F16": 1, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127, "Q1_0": 1, "Q2_0": 2, "Q2_K": 15 * 3,
    "Q3_K": 32 * 4, "Q4_K": 63 * 15, "Q5_K": 63 * 31, "Q6_K": 128 * 32, "IQ4_NL": 127, "IQ4_XS": 32 * 127, "TQ1_0": 1,
    "TQ2_0": 1, "IQ1_S": 15 * 2, "IQ1_M": 15 * 2, "IQ2_XXS": 4 * 43, "IQ2_XS": 4 * 43, "IQ2_S": 4 * 43,
    "IQ3_XXS": 8 * 62, "IQ3_S": 31 * 15,
}  # fmt: skip
_SMALLEST_HALF = 2.0**-24


# Half of the smallest scale of a block, times the scale of the whole matrix where there is one.
_SMALLEST_NVFP4 = 2.0**-10


def smallest_step(name: str) -> float:
    """Blocks of a type whose values are all below half of this become zero: their scale, in half precision, is then
    below half of its smallest number. 0 for types whose scales reach further down. Of NVFP4 in units of the scale of
    the whole matrix."""
    return _SMALLEST_NVFP4 if name == "NVFP4" else _SMALLEST_HALF * _SPANS.get(name, 0)


def largest_value(name: str) -> float:
    """The largest magnitude that a type holds, at the largest scale in half precision."""
    return LARGEST_HALF * _SPANS[name] if name in _SPANS else math.inf


def find_type(name: str) -> GgmlType:
    """The ggml type called `name`, case-insensitively; UsageError names the nearest ones."""
    kind = TYPES.get(name.upper())
    if kind is not None:
        return kind
    hint = did_you_mean(name.upper(), TYPES, f"choose one of {', '.join(TYPES)}", 3, 0.5)
    raise UsageError(f"there is no ggml type {name!r}", hint)


_FAMILIES: dict[Family, str] = {"plain": "plain", "legacy": "legacy", "low": "low_bits", "k": "kquants",
                                "codebook": "codebooks", "ternary": "ternary", "i": "iquants"}  # fmt: skip


def family(kind: GgmlType) -> ModuleType:
    """The module of the type's family."""
    return importlib.import_module(f"lowbit.numerics.ggml.{_FAMILIES[kind.family]}")


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows of weights [N, K], unpacked; B = K / block weights, G = K / group (`GgmlType.group`).

    codes   uint8, int8, int16 or int32 [N, K / columns_per_code]   in the order of the columns; plain types: the bits
    scale   float32 [N, G]          effective: rounded as the decoder rounds d · sub-scale
    offset  float32 [N, G] or None  added on decode (−dmin · m of K-quants, m of Q4_1); None if the type has none
    stored  name → tensor [N, B · n]  what the file keeps of the parameters (half-precision d and dmin, integer
            sub-scales, …), one value per block or n per block, in the order of the columns; all but the codes
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    stored: dict[str, Tensor] = field(default_factory=dict)

    def with_codes(self, codes: Tensor) -> Blocks:
        """The same parameters with other codes."""
        return replace(self, codes=codes)


def per_column(values: Tensor, columns: int) -> Tensor:
    """[N, G'] → [N, columns]: each value repeated for the columns / G' columns that share it."""
    return values.repeat_interleave(columns // values.shape[1], dim=1)


def weights_of(kind: GgmlType, codes: Tensor, params: Blocks) -> Tensor:
    """scale · value(codes) + offset, float32 [N, k]."""
    values = family(kind).value(kind, codes)
    weight = per_column(params.scale, values.shape[1]) * values
    return weight if params.offset is None else weight + per_column(params.offset, values.shape[1])
