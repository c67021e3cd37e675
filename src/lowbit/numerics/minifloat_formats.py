"""Minifloats: floating-point formats of at most eight bits, as data.

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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MinifloatFormat:
    """One format. Codes occupy the low `bits` bits of a byte.

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
        """How many of the codes with sign 0 are finite; they are 0 .. finite_magnitudes − 1, in order of value."""
        return self.sign_bit - len(self.nan_codes) - (self.inf_code is not None)

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value's binade: floor(log2(max_value)), "emax" in the MX specification."""
        return ((self.finite_magnitudes - 1) >> self.mantissa_bits) - self.bias


E4M3 = MinifloatFormat("e4m3", 4, 3, 7, 448.0, nan_codes=(0x7F,))
E5M2 = MinifloatFormat("e5m2", 5, 2, 15, 57344.0, inf_code=0x7C, nan_codes=(0x7D, 0x7E, 0x7F))
E2M1 = MinifloatFormat("e2m1", 2, 1, 1, 6.0)
E3M2 = MinifloatFormat("e3m2", 3, 2, 3, 28.0)
E2M3 = MinifloatFormat("e2m3", 2, 3, 1, 7.5)

FORMATS: dict[str, MinifloatFormat] = {fmt.name: fmt for fmt in (E4M3, E5M2, E2M1, E3M2, E2M3)}


def value_of(fmt: MinifloatFormat, code: int) -> float:
    """The number that one code 0 .. 2^bits − 1 stands for."""
    magnitude_code = code & (fmt.sign_bit - 1)
    sign = -1.0 if code & fmt.sign_bit else 1.0
    if magnitude_code == fmt.inf_code:
        return sign * float("inf")
    if magnitude_code in fmt.nan_codes:
        return float("nan")
    exponent, mantissa = divmod(magnitude_code, 1 << fmt.mantissa_bits)
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - fmt.bias - fmt.mantissa_bits)
    return sign * (1.0 + mantissa / (1 << fmt.mantissa_bits)) * 2.0 ** (exponent - fmt.bias)


def values(fmt: MinifloatFormat) -> Tensor:
    """The value table, float32 [2^bits]: index with a code, get its value. Every entry is exact."""
    import torch

    return torch.tensor([value_of(fmt, code) for code in range(1 << fmt.bits)], dtype=torch.float32)
