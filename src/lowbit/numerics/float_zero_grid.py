"""Integers whose zero point is a float, between codes, as HQQ finds it: x ≈ (code − zero) · scale, codes 0 .. 2^b − 1.

Decoding subtracts and multiplies in the dtype of the scales, rounding twice, as HQQ's own `Quantizer.dequantize` does:
the float32 values that come out are those of a 16-bit model. Fitting covers the range of a group, which need not hold
0; rounding is to the nearest code, ties to even. A group of equal weights gets the scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.scalar_grids import DecodedError, SearchedGrid
from lowbit.numerics.scales import SCALE_DTYPES
from lowbit.tensors import GroupParams


@dataclass(frozen=True)
class FloatZeroGrid(DecodedError, SearchedGrid):
    """codes uint8. `GroupParams.zero_point` is float32. dtype: of the arithmetic, and of stored scales and zeros"""

    bits: int
    dtype: str = "bfloat16"
    symmetric = False

    @property
    def name(self) -> str:
        return f"int{self.bits}_float_zero"

    def params_from_range(self, low: Tensor, high: Tensor, global_scale: float | Tensor = 1.0) -> GroupParams:
        scale = ((high - low) / ((1 << self.bits) - 1)).to(self._torch_dtype).float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return GroupParams(scale, (-low / scale).to(self._torch_dtype).float())

    def round(self, weight: Tensor, params: GroupParams, group_size: int) -> Tensor:
        scale, zero = (_per_column(each, weight.shape[1], group_size) for each in (params.scale, params.zero_point))
        return (weight.float() / scale + zero).round().clamp(0, (1 << self.bits) - 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams, group_size: int) -> Tensor:
        dtype, columns = self._torch_dtype, codes.shape[1]
        scale, zero = (_per_column(each, columns, group_size).to(dtype) for each in (params.scale, params.zero_point))
        return ((codes.to(dtype) - zero) * scale).float()

    @property
    def _torch_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.dtype]


def _per_column(values: Tensor | None, columns: int, group_size: int) -> Tensor:
    """[N, G] → [N, columns]"""
    assert values is not None, "a grid with zero points"
    return values.repeat_interleave(group_size, dim=1)[:, :columns]
