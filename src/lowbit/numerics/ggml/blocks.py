"""`Blocks`: what a run of ggml blocks holds, unpacked, and what a family of types does with it.

    x = scale · value(code) + offset     scalar types: one column per code
                                         vector types: value(code) is a point of 8 or 4 columns

Each family module has, for its types (`kind`):

    unpack(kind, blocks) → Blocks          from bytes, uint8 [N, row bytes]
    pack(kind, Blocks) → blocks            reads `codes` and `stored`, nothing else; pack(unpack(b)) is b, byte for byte
    value(kind, codes) → float32           [N, C] codes → [N, C · columns_per_code], the unscaled values
    round(kind, weight, Blocks, importance=None) → codes
                                           nearest code of each weight [N, k] (of each 8 or 4) given scale and offset;
                                           `codes` of the Blocks is not read. k columns share k / G' scales in order,
                                           where G' is the width of `scale`: use `per_column(scale, k)`, so that part of
                                           a sub-block, down to one column, can be rounded

scale · value + offset in float32 is what the decoder computes, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows of weights [N, K], unpacked; B = K / block weights, G = K / group (`GgmlType.group`).

    codes   uint8, int8, int16 or int32 [N, K / columns_per_code]   in the order of the columns; plain types: the bits
    scale   float32 [N, G]          effective: rounded as the decoder rounds d · sub-scale
    offset  float32 [N, G] or None  added on decode (−dmin · m of K-quants, m of Q4_1); None where the type has none
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
