"""Move scales from an input to the linears that read it. For scales s [K] at a scaling point:

    norm      w' = w / s    b' = b / s          (Gemma, which multiplies with 1 + w: w' = (1 + w) / s − 1)
    linear    W'[rows] = W[rows] / s[:, None]   b'[rows] = b[rows] / s
    readers   W' = W · s                        columns
    stats     x' = x / s, so H'_ij = H_ij / (s_i s_j), mean |x'_j| = mean |x_j| / s_j, …

Norms are written as 16-bit floats, so w / s is rounded. The readers are therefore multiplied with the ratio that the
stored norm really divides by, r = w / round(w / s), which is within 2⁻⁸ of s in bfloat16 (less close if the norm adds
1). The float output stays the same to float32's accuracy; only a norm's bias has a rounding error, half a unit in its
last place.

Channels where this fails (the norm's weight is 0, or its quotient rounds to 0 or to inf) stay as they are: r = 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.tensors import LayerStats
from lowbit.transform.block import BlockTensors
from lowbit.transform.facts import ScalingPoint


def fold(block: BlockTensors, point: ScalingPoint, scales: Tensor) -> Tensor:
    """Fold scales [K] > 0 into a block; returns the effective scales, [K].

    Columns of one channel must have one scale (`ScalingPoint.share`).
    """
    assert scales.shape == (point.columns,), f"{point.feeder}: {tuple(scales.shape)} scales, {point.columns} columns"
    assert bool((torch.isfinite(scales) & (scales > 0)).all()), f"{point.feeder}: scales must be finite and positive"
    folded = _divide_norm(block, point, scales) if point.kind == "norm" else _divide_linear(block, point, scales)
    for reader in point.readers:
        name = f"{reader.name}.weight"
        block.tensors[name] = block.tensors[name] * folded
    for source in point.sources:
        if source in block.stats:
            block.stats[source] = scaled_stats(block.stats[source], folded)
    return folded


def scaled_stats(stats: LayerStats, scales: Tensor) -> LayerStats:
    """Statistics of x / scales; exact."""
    both = scales[:, None] * scales[None, :]
    return replace(
        stats,
        absmax=stats.absmax / scales,
        mean_sq=stats.mean_sq / scales.square(),
        mean_abs=stats.mean_abs / scales,
        hessian=None if stats.hessian is None else stats.hessian / both,
        drift=None if stats.drift is None else stats.drift * (scales[None, :] / scales[:, None]),
        lost=None if stats.lost is None else stats.lost * scales,
    )


def _divide_norm(block: BlockTensors, point: ScalingPoint, scales: Tensor) -> Tensor:
    weight_name, bias_name = f"{point.feeder}.weight", f"{point.feeder}.bias"
    weight, one = block.tensors[weight_name], float(point.plus_one)
    scales = scales.to(weight.dtype)
    written = block.as_written(weight_name, (weight + one) / scales - one)
    ratio = (weight + one) / (written + one)
    works = torch.isfinite(ratio) & (ratio > 0)
    block.tensors[weight_name] = torch.where(works, written, weight)
    ratio = torch.where(works, ratio, torch.ones_like(ratio))
    if bias_name in block.tensors:
        block.tensors[bias_name] = block.as_written(bias_name, block.tensors[bias_name] / ratio)
    return ratio


def _divide_linear(block: BlockTensors, point: ScalingPoint, scales: Tensor) -> Tensor:
    weight = block.tensors[f"{point.feeder}.weight"]
    scales = scales.to(weight.dtype)
    shared = point.share(scales)
    assert torch.allclose(shared, scales, rtol=1e-5), f"{point.feeder}: columns of one channel differ in their scale"
    channels = point.of_channels(scales)
    rows = slice(None) if point.rows is None else point.rows.to(weight.device)
    for name in (f"{point.feeder}.weight", f"{point.feeder}.bias"):
        if name in block.tensors:
            values = block.tensors[name].clone()
            values[rows] = (values[rows].T / channels).T if values.dim() == 2 else values[rows] / channels
            block.tensors[name] = values
    return shared
