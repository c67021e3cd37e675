"""Weights, correlated inputs and targets that the tests of GPTQ share."""

from dataclasses import replace
from functools import lru_cache

import torch

from lowbit.numerics import grid_for
from lowbit.rounding.rtn import measure_range
from lowbit.rounding.target import GridTarget
from lowbit.schemes import SCHEMES
from lowbit.tensors import LayerStats, RangeSearch

GRIDS = ["W4A16", "W4A16_ASYM", "W3A16", "W2A16", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP4",
         "MXFP8", "NF4", "FP4", "INT8"]  # fmt: skip


@lru_cache
def problem(rows: int = 40, columns: int = 128) -> tuple[torch.Tensor, LayerStats]:
    """A weight, and an input whose columns are strongly correlated."""
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(columns // 8, columns, generator=generator)
    x = torch.randn(4 * columns, columns // 8, generator=generator) @ mixing
    x = (x + torch.randn(x.shape, generator=generator)) * (0.3 + torch.rand(columns, generator=generator))
    return 0.05 * torch.randn(rows, columns, generator=generator), stats_of(x)


def stats_of(x: torch.Tensor, float_x: torch.Tensor | None = None, ridge: float = 0.01) -> LayerStats:
    hessian = x.T @ x
    damped = hessian + ridge * hessian.diagonal().mean() * torch.eye(len(hessian))
    drift = None if float_x is None else torch.linalg.solve(damped, x.T @ (float_x - x)).T
    return LayerStats(len(x), x.abs().amax(0), x.square().mean(0), x.abs().mean(0), hessian, drift)


def with_hessian(hessian: torch.Tensor) -> LayerStats:
    diagonal = hessian.diagonal()
    return LayerStats(len(hessian), diagonal.sqrt(), diagonal, diagonal, hessian)


def target_of(scheme: str, weight: torch.Tensor, group_size: int = 32, nested: bool = False) -> GridTarget:
    chosen = SCHEMES[scheme]
    if chosen.weight.group_size_is_free:
        chosen = chosen.with_group_size(group_size)
    spec = replace(chosen.weight, scale_format="nested") if nested else chosen.weight
    return GridTarget(spec, grid_for(spec, "bfloat16"), RangeSearch("mse", steps=12), measure_range(weight, spec))
