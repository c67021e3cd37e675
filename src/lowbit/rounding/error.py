"""What rounding a weight cost, in weight space."""

from __future__ import annotations

from torch import Tensor

from lowbit import kernels
from lowbit.numerics.codebook import CodebookGrid
from lowbit.numerics.integer import IntGrid
from lowbit.numerics.minifloat import MinifloatGrid
from lowbit.tensors import QuantizedTensor


def squared_error(weight: Tensor, quantized: QuantizedTensor) -> tuple[float, float, float]:
    """(Σ (w − ŵ)², Σ w², max |w − ŵ|) of rows of a weight; not finite where the weight is not."""
    grid, (params, columns) = quantized.grid, quantized.grouped()
    if isinstance(grid, IntGrid | MinifloatGrid | CodebookGrid):
        number = None if isinstance(grid, IntGrid) else grid.format
        return kernels.squared_error(weight, quantized.codes, columns, params.scale, params.zero_point, number)
    original = weight.to(dtype=params.scale.dtype)
    error = original - quantized.decode()
    return error.square().sum().item(), original.square().sum().item(), error.abs().max().item()


def squared_error_of(weight: Tensor, decoded: Tensor) -> tuple[float, float, float]:
    """The same three sums of a float32 weight and what its codes decode to."""
    error = weight - decoded
    return error.square().sum().item(), weight.square().sum().item(), error.abs().max().item()
