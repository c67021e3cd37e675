"""Number formats of at most eight bits other than integers, as data for the kernels.

Minifloats, floating-point formats whose code is the bit pattern:

    code    S EEE… MMM…      sign, exponent field e, mantissa field f, most significant bit first
    value   (−1)^S · 2^(1 − bias − m) · f                   e = 0: subnormals and zero
            (−1)^S · 2^(e − bias) · (1 + f / 2^m)           otherwise, where m = mantissa_bits

| name | layout   | bias | largest | smallest | non-finite codes                                   |
|------|----------|------|---------|----------|----------------------------------------------------|
| e4m3 | SEEEEMMM | 7    | 448     | 2^−9     | S1111111 NaN; no inf (OCP "E4M3", torch e4m3fn)    |
| e5m2 | SEEEEEMM | 15   | 57344   | 2^−16    | S1111100 inf; S11111xx otherwise NaN (as IEEE)     |
| e2m1 | SEEM     | 1    | 6       | 0.5      | none: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives |
| e3m2 | SEEEMM   | 3    | 28      | 2^−4     | none                                               |
| e2m3 | SEEMMM   | 1    | 7.5     | 2^−3     | none                                               |

Encoding saturates at ±max_value and never makes a non-finite code.

Codebooks, whose code is an index into values within −1 .. 1; the scale of a group multiplies them:

| name | values                                                                                                     |
|------|------------------------------------------------------------------------------------------------------------|
| nf4  | quantiles of a normal distribution (Dettmers et al. 2023, "QLoRA"), ascending, with an exact 0             |
| fp4  | sign, two exponent bits, one mantissa bit as bitsandbytes numbers them, over 12: 0, 1/192, 8/12, 1, 4/12 … |

Codes of fp4 are not in the order of their values, and 0 and 8 are both zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isnan
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class ValueTable(Protocol):
    """A format whose codes, the low `bits` bits of a byte, stand for `values`."""

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> int: ...

    @property
    def values(self) -> tuple[float, ...]:
        """2^bits numbers, each of them a float32: index with a code, get its value."""
        ...


@dataclass(frozen=True)
class MinifloatFormat:
    """One minifloat.

    max_value  largest finite magnitude
    inf_code   magnitude code of +inf, or None
    nan_codes  magnitude codes (sign bit clear) that are NaN
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_value: float
    inf_code: int | None = None
    nan_codes: tuple[int, ...] = ()

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign_bit(self) -> int:
        """The code of −0.0; added to the code of a positive value it gives that of its negative."""
        return 1 << (self.bits - 1)

    @property
    def finite_magnitudes(self) -> int:
        """Number of finite codes with sign 0; they are 0 .. finite_magnitudes − 1, in order of value."""
        return self.sign_bit - len(self.nan_codes) - (self.inf_code is not None)

    @property
    def values(self) -> tuple[float, ...]:
        magnitudes = []
        for code in range(self.sign_bit):
            exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
            if code == self.inf_code:
                magnitudes.append(float("inf"))
            elif code in self.nan_codes:
                magnitudes.append(float("nan"))
            elif exponent == 0:
                magnitudes.append(mantissa * 2.0 ** (1 - self.bias - self.mantissa_bits))
            else:
                magnitudes.append((1.0 + mantissa / (1 << self.mantissa_bits)) * 2.0 ** (exponent - self.bias))
        return (*magnitudes, *(magnitude if isnan(magnitude) else -magnitude for magnitude in magnitudes))


@dataclass(frozen=True)
class Codebook:
    """One codebook; values[code] is the value of a code at scale 1."""

    name: str
    values: tuple[float, ...]

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()


E4M3 = MinifloatFormat("e4m3", 4, 3, 7, 448.0, nan_codes=(0x7F,))
E5M2 = MinifloatFormat("e5m2", 5, 2, 15, 57344.0, inf_code=0x7C, nan_codes=(0x7D, 0x7E, 0x7F))
E2M1 = MinifloatFormat("e2m1", 2, 1, 1, 6.0)
E3M2 = MinifloatFormat("e3m2", 3, 2, 3, 28.0)
E2M3 = MinifloatFormat("e2m3", 2, 3, 1, 7.5)

MINIFLOATS: dict[str, MinifloatFormat] = {fmt.name: fmt for fmt in (E4M3, E5M2, E2M1, E3M2, E2M3)}

NF4 = Codebook("nf4", (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))  # fmt: skip
_FP4_MAGNITUDES = tuple(magnitude / 12.0 for magnitude in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = Codebook("fp4", (*_FP4_MAGNITUDES, *(0.0 - magnitude for magnitude in _FP4_MAGNITUDES)))

CODEBOOKS: dict[str, Codebook] = {book.name: book for book in (NF4, FP4)}


@lru_cache
def values(fmt: ValueTable) -> Tensor:
    """The table, float32 [2^bits]: index with a code, get its value. Shared: never write into it."""
    import torch

    return torch.tensor(fmt.values, dtype=torch.float32)


@lru_cache
def steps(book: Codebook) -> tuple[Tensor, Tensor]:
    """Tables for rounding: midpoints float32 [2^bits − 1] between neighbouring values, ascending, and the code uint8
    [2^bits] of each value in that order; equal values keep the order of their codes. Shared: never write into them."""
    import torch

    ascending = torch.argsort(values(book), stable=True)
    ordered = values(book)[ascending]
    return (ordered[:-1] + ordered[1:]) / 2, ascending.to(torch.uint8)
