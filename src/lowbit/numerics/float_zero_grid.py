"""Integers whose zero point is a float, between codes, as HQQ finds it: x ≈ (code − zero) · scale, codes 0 .. 2^b − 1.

Decoding subtracts and multiplies in the dtype of the scales, rounding twice, as HQQ's own `Quantizer.dequantize` does:
the float32 values that come out are those of a 16-bit model. Fitting covers the range of a group, which need not hold
0; rounding is to the nearest code, ties to even. A group of equal weights gets the scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.scalar_grids import SearchedGrid
from lowbit.tensors import GroupParams, RangeSearch


@dataclass(frozen=True)
class FloatZeroGrid(SearchedGrid):
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

    def clip_ratios(self, search: RangeSearch) -> list[float]:
        step = (1.0 - search.smallest) / search.steps
        return [1.0 - step * index for index in range(1, search.steps + 1)]

    def round(self, weight: Tensor, params: GroupParams, group_size: int) -> Tensor:
        scale, zero = (_per_column(each, weight.shape[1], group_size) for each in (params.scale, params.zero_point))
        return (weight.float() / scale + zero).round().clamp(0, (1 << self.bits) - 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams, group_size: int) -> Tensor:
        dtype, columns = self._torch_dtype, codes.shape[1]
        scale, zero = (_per_column(each, columns, group_size).to(dtype) for each in (params.scale, params.zero_point))
        return ((codes.to(dtype) - zero) * scale).float()

    def error(
        self, weight: Tensor, params: GroupParams, group_size: int, importance: Tensor | None = None,
        by_magnitude: bool = False,
    ) -> Tensor:  # fmt: skip
        weight = weight.float()
        squares = (weight - self.decode(self.round(weight, params, group_size), params, group_size)).square()
        squares = squares if importance is None else squares * importance
        squares = squares * weight.abs() if by_magnitude else squares
        padded = torch.nn.functional.pad(squares, (0, -squares.shape[1] % group_size))
        return padded.reshape(len(padded), -1, group_size).sum(dim=2)

    @property
    def _torch_dtype(self) -> torch.dtype:
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[self.dtype]


def _per_column(values: Tensor | None, columns: int, group_size: int) -> Tensor:
    """[N, G] → [N, columns]"""
    assert values is not None, "a grid with zero points"
    return values.repeat_interleave(group_size, dim=1)[:, :columns]
