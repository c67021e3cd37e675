"""Half-Quadratic Quantization (HQQ: Badri & Shaji 2023, mobiusml.github.io/hqq_blog): ranges without data.

    min over s, z of  Σ |w − ŵ|^p,   p < 1        ŵ = s · (q − z),  q = clamp(rint(w / s) + z)

A p below 1 tolerates large errors of few weights, so that outliers do not set the range. Half-quadratic splitting
introduces a variable e for the error and alternates two steps with closed solutions:

    e ← shrink(w − ŵ) = sign(x) · max(|x| − |x|^(p − 1) / β, 0)        β ← κ · β
    s, z ← argmin Σ ((w − e) − s · (q − z))²                            then q anew

The original fixes s and moves z, a float. Our files hold integer zero points, which such small moves would rarely
change, so both are solved for: z is the regression's zero point, rounded and clamped to the codes, then s is the best
scale for it. Symmetric grids have s alone. Grids with other values (FP4, FP8, NF4) use value(q) for q − z.

Errors are measured in steps of the grid; in units of the weights, as published, shrinkage depends on their size and for
typical weights gives e = 0. Scales are rounded to their stored form before codes are chosen. Every group keeps the best
of all iterations, including the start (the range search of the target), so no group gets worse.

Refused: scales that are not floats of their own (powers of two, E4M3, double quantization) or span rows; ggml types.
All-zero groups keep their scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.numerics.scalar_grids import IntGrid
from lowbit.numerics.scales import storable_scale
from lowbit.rounding.hessian import InputData
from lowbit.rounding.target import GridTarget, Rounded, Target
from lowbit.tensors import Granularity, Grid, GroupParams, QuantizedTensor

if TYPE_CHECKING:
    from lowbit.settings import Settings

_SCALE_FORMATS = ("bfloat16", "float16", "float32", "bfloat16_in_float16", "float32_over_127")


@dataclass(frozen=True)
class HqqOptions:
    """p of the norm, β of the first shrinkage and its growth κ: as published."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    @classmethod
    def of(cls, settings: Settings) -> HqqOptions:
        """The defaults: the user sets none of them."""
        return cls()


def hqq(weight: Tensor, target: Target, data: InputData | None = None, options: HqqOptions | None = None) -> Rounded:
    """Round a weight [N, K] (float32, bfloat16, float16); ignores `data`. UsageError for the refused grids."""
    options = options or HqqOptions()
    start = _checked(target).nearest(weight).stored
    assert isinstance(start, QuantizedTensor)
    params, group_size = start.grouped()
    best, best_loss = params, _loss(weight, params, group_size, start.grid, options.p)
    beta = options.beta
    for _ in range(options.iterations):
        params = _next_params(weight, params, group_size, start.grid, beta, options.p)
        beta *= options.kappa
        loss = _loss(weight, params, group_size, start.grid, options.p)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        zero_point = None
        if params.zero_point is not None and best.zero_point is not None:
            zero_point = torch.where(better, params.zero_point, best.zero_point)
        best = GroupParams(torch.where(better, params.scale, best.scale), zero_point, best.global_scale)
    codes = start.grid.round(weight, best, group_size)
    stored = replace(start, codes=codes, scale=best.scale, zero_point=best.zero_point)
    return Rounded(stored, stored.decode())


def _next_params(
    weight: Tensor, params: GroupParams, group_size: int, grid: Grid, beta: float, p: float
) -> GroupParams:
    """Both half-quadratic steps: the shrunk errors, then the params that are best for what is left."""
    codes = grid.round(weight, params, group_size)
    decoded = grid.decode(codes, params, group_size)
    scale = params.scale[..., None]
    error = (_grouped(weight.float(), group_size) - _grouped(decoded, group_size)) / scale
    shrunk = error.sign() * (error.abs() - error.abs().clamp(min=1e-12).pow(p - 1) / beta).clamp(min=0)
    left = _grouped(weight.float(), group_size) - shrunk * scale
    inside = _grouped(torch.ones_like(decoded), group_size)  # 0 where the last group is filled up
    if params.zero_point is None:
        values = _grouped(decoded, group_size) / scale
        return replace(params, scale=_scale_for(left, values, params, grid))
    assert isinstance(grid, IntGrid)
    q = _grouped(codes.float(), group_size)
    zero_point = _zero_point_for(left * inside, q * inside, inside, params.zero_point, grid)
    values = (q - zero_point[..., None]) * inside
    return replace(params, scale=_scale_for(left * inside, values, params, grid), zero_point=zero_point)


def _zero_point_for(left: Tensor, q: Tensor, inside: Tensor, fallback: Tensor, grid: IntGrid) -> Tensor:
    """The zero point of the line left ≈ s · (q − z) through each group, rounded; `fallback` if the fit fails."""
    count = inside.sum(-1)
    mean_left, mean_q = left.sum(-1) / count, q.sum(-1) / count
    covariance = (left * q).sum(-1) / count - mean_left * mean_q
    variance = q.square().sum(-1) / count - mean_q.square()
    slope = covariance / variance
    zero = torch.round(mean_q - mean_left / slope)
    lowest = grid.qmin if grid.lowest_zero_point is None else grid.lowest_zero_point
    usable = zero.isfinite() & (slope > 0)
    return torch.where(usable, zero.nan_to_num(0.0).clamp(lowest, grid.qmax), fallback.float()).to(torch.int32)


def _scale_for(left: Tensor, values: Tensor, params: GroupParams, grid: Grid) -> Tensor:
    """The stored scale nearest to argmin Σ (left − s · values)²; the old one if that is not finite, or of its sign."""
    wanted = (left * values).sum(-1) / values.square().sum(-1)
    usable = wanted.isfinite() & (wanted * params.scale.sign() > 0)
    stored = storable_scale(torch.where(usable, wanted, params.scale), grid.scale_format)  # type: ignore[attr-defined]
    return torch.where(usable, stored, params.scale)


def _loss(weight: Tensor, params: GroupParams, group_size: int, grid: Grid, p: float) -> Tensor:
    """Σ |w − ŵ|^p of every group, [N, G]."""
    decoded = grid.decode(grid.round(weight, params, group_size), params, group_size)
    return _grouped((weight.float() - decoded).abs().pow(p), group_size).sum(-1)


def _grouped(matrix: Tensor, group_size: int) -> Tensor:
    """[N, K] → [N, G, g]; the last group is filled up with zeros."""
    rows, columns = matrix.shape
    missing = -columns % group_size
    if missing:
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    return matrix.reshape(rows, -1, group_size)


def _checked(target: Target) -> GridTarget:
    if not isinstance(target, GridTarget):
        raise UsageError(f"HQQ cannot fit {target.name}, whose scales are codes inside its blocks",
                         "use --method rtn or gptq for types of GGUF files")  # fmt: skip
    scale_format = target.grid.scale_format  # type: ignore[attr-defined]
    own = target.spec.granularity in (Granularity.GROUP, Granularity.CHANNEL)
    if scale_format not in _SCALE_FORMATS or not own:
        kept = f"kept as {scale_format}" if own else f"one per {target.spec.granularity.value}"
        raise UsageError(f"HQQ cannot fit {target.name}: its scales are {kept}, not a float for each row or group",
                         "use an integer scheme such as W4A16, or --method gptq")  # fmt: skip
    return target
