"""The error of rounding a weight: in weight space, and in the outputs of its linear."""

from __future__ import annotations

from torch import Tensor

from lowbit import kernels
from lowbit.numerics.scalar_grids import CodebookGrid, IntGrid, MinifloatGrid
from lowbit.tensors import QuantizedTensor


def squared_error(weight: Tensor, quantized: QuantizedTensor) -> tuple[float, float, float]:
    """(Σ (w − ŵ)², Σ w², max |w − ŵ|) of rows of a weight; not finite where the weight is not."""
    grid = quantized.grid
    if not isinstance(grid, IntGrid | MinifloatGrid | CodebookGrid):  # fitted tables and float zeros have no kernel
        return squared_error_of(weight.float(), quantized.decode())
    params, columns = quantized.grouped()
    number = None if isinstance(grid, IntGrid) else grid.format
    return kernels.squared_error(weight, quantized.codes, columns, params.scale, params.zero_point, number)


def squared_error_of(weight: Tensor, decoded: Tensor) -> tuple[float, float, float]:
    """The same three sums for a float32 weight and its decoded codes."""
    error = weight - decoded
    return error.square().sum().item(), weight.square().sum().item(), error.abs().max().item()


def layer_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), in float64: the error's share of the output energy."""
    error = (weight - decoded).double()
    weight, hessian = weight.double(), hessian.double()
    lost, energy = (error @ hessian * error).sum().item(), (weight @ hessian * weight).sum().item()
    return max(0.0, lost) / energy if energy > 0 else 0.0  # of a text that says nothing, sums may be a hair below zero
