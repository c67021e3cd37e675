"""Codebooks: number formats of a few values, as data.

    value = values[code]        within −1 .. 1; the scale of a group multiplies it

| name | values                                                                                                     |
|------|------------------------------------------------------------------------------------------------------------|
| nf4  | quantiles of a normal distribution (Dettmers et al. 2023, "QLoRA"), ascending, with an exact 0             |
| fp4  | sign, two exponent bits, one mantissa bit as bitsandbytes numbers them, over 12: 0, 1/192, 8/12, 1, 4/12 … |

Codes of fp4 are not in the order of their values, and 0 and 8 are both zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Codebook:
    """One table. values[code] is what a code stands for at scale 1; 2^bits of them, each rounded to float32."""

    name: str
    values: tuple[float, ...]

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()


NF4 = Codebook("nf4", (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))  # fmt: skip
_FP4_MAGNITUDES = tuple(magnitude / 12.0 for magnitude in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = Codebook("fp4", (*_FP4_MAGNITUDES, *(0.0 - magnitude for magnitude in _FP4_MAGNITUDES)))

CODEBOOKS: dict[str, Codebook] = {book.name: book for book in (NF4, FP4)}


@lru_cache
def values(book: Codebook) -> Tensor:
    """The table, float32 [2^bits]: index with a code, get its value. Shared: never write into it."""
    import torch

    return torch.tensor(book.values, dtype=torch.float32)


@lru_cache
def steps(book: Codebook) -> tuple[Tensor, Tensor]:
    """What rounding needs: midpoints float32 [2^bits − 1] between neighbouring values, in ascending order, and the code
    uint8 [2^bits] of each value in that order. Equal values keep the order of their codes. Shared: never write into it.
    """
    import torch

    ascending = torch.argsort(values(book), stable=True)
    ordered = values(book)[ascending]
    return (ordered[:-1] + ordered[1:]) / 2, ascending.to(torch.uint8)
