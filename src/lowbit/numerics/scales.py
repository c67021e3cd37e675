"""The scales that a format can store, and rounding to them.

A scale is rounded to its stored form *before* codes are chosen, so that codes are nearest for the scale that the engine
multiplies with.

    bfloat16, float16, float32   nearest even; never rounded to 0 (the smallest positive value instead)
    bfloat16_in_float16          a bfloat16 that float16 holds exactly: for formats with float16 scales (GPTQ, AWQ),
                                 which an engine then casts to a bfloat16 model's dtype; such a scale survives both
    float32_over_127             a float32 divided by 127: bitsandbytes' INT8 stores the numerator
    e8m0      2^(u − 127), u in 0..254        the smallest power of two ≥ the wanted scale (nothing saturates)
    e4m3      float8 e4m3fn × global_scale    nearest even, within 2^-9 .. 448 of the global scale
    qoq       m × the step of the row         m in 1..16, nearest even (QoQ: Lin et al. 2024, arXiv 2405.04532)

The step of a row is its largest |w| / 119, rounded up to four significant bits. A code of four bits times m is an int8,
so that a kernel multiplies int8 by int8 and the step once per row; 119 is the paper's protective range: the group with
the largest weight gets m = 16. m and step together have eight significant bits, which bfloat16 holds.

Double quantization: the float32 scales of a weight, themselves quantized to 8 bits (Dettmers et al. 2023, "QLoRA").

    scale = table[code] · absmax[block] + offset          all float32; blocks are of 256 scales in row-major order

The table is Dettmers' dynamic map of 256 values: the leading bits of a code choose one of seven decades, the rest a
fraction of it, so that small and large values have similar relative precision.

    decade 10^(i − 6), i = 0 .. 6:  2^i values, the middles of 2^i equal parts of [0.1, 1], times ±1;   and 0, and 1

Rounding is bitsandbytes': (scale − offset) · (1 / absmax), the reciprocal rounded to float32 first, then the nearest
table value, halfway the smaller one. Two differences: no code is chosen that would make a scale zero or negative, and a
group without weights takes the offset as its scale (its codes decode to 0 whatever it is), so that it does not stretch
the range of the 255 others.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.tensors import NestedScale

E8M0_BIAS = 127
E4M3_MAX = 448.0
INT8_MAX = 127.0
E2M1_MAX = 6.0
E4M3_SMALLEST = 2.0**-9

SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Eight significant bits above float16's smallest subnormal, so that a bfloat16 from here on is a float16 too.
_SMALLEST_IN_BOTH = 2.0**-17
NESTED_BLOCK = 256
QOQ_RANGE = 119.0  # |w| over the step of its row
QOQ_LARGEST = 16
_SMALLEST_STEP = 2.0**-20  # four significant bits times m are then normal numbers of bfloat16, and float16 holds them
_SMALLEST_ABSMAX = 1e-38  # bitsandbytes' guard against division by 0, where all scales of a block equal the offset


def storable_scale(wanted: Tensor, scale_format: str, global_scale: float | Tensor = 1.0) -> Tensor:
    """Float32 scales that `scale_format` stores exactly, nearest to `wanted` (float32, any shape; of qoq [N, G]), with
    its sign: "smallest" and "largest" below are of magnitudes.

    global_scale (1 but for two-level grids; of qoq the steps, [N, 1]) where `wanted` is 0: an all-zero group. NaN where
    it is NaN or inf, so that bad weights stay visible.
    """
    scale = torch.copysign(_nearest(wanted.abs(), scale_format, global_scale), wanted)
    scale = torch.where(wanted.isfinite(), scale, math.nan)
    return torch.where(wanted == 0, global_scale, scale)


def row_steps(absmax: Tensor) -> Tensor:
    """Float32 steps of the scales of rows (qoq), of their largest |w|, float32 of any shape; 1 for a row of zeros."""
    fraction, exponent = torch.frexp(absmax / QOQ_RANGE)
    step = torch.ldexp((fraction * 16).ceil() / 16, exponent)
    return torch.where(absmax > 0, step.clamp(min=_SMALLEST_STEP), torch.ones_like(step))


def _nearest(wanted: Tensor, scale_format: str, global_scale: float | Tensor) -> Tensor:
    if scale_format == "bfloat16_in_float16":
        largest = 65280.0  # of bfloat16's numbers that float16 holds
        return wanted.clamp(min=_SMALLEST_IN_BOTH, max=largest).to(torch.bfloat16).to(torch.float32)
    if scale_format == "float32_over_127":
        return (_nearest(wanted, "float32", global_scale) * 127.0) / 127.0
    if scale_format in SCALE_DTYPES:
        dtype = SCALE_DTYPES[scale_format]
        info = torch.finfo(dtype)
        # smallest_normal, not the subnormal below it: some kernels flush subnormal scales to zero
        return wanted.clamp(min=info.smallest_normal, max=info.max).to(dtype).to(torch.float32)
    if scale_format == "e8m0":
        return torch.exp2(torch.ceil(torch.log2(wanted)).clamp(-E8M0_BIAS + 1, E8M0_BIAS))
    if scale_format == "e4m3":
        relative = (wanted / global_scale).clamp(E4M3_SMALLEST, E4M3_MAX)
        return relative.to(torch.float8_e4m3fn).to(torch.float32) * global_scale
    if scale_format == "qoq":
        return (wanted / global_scale).round().clamp(1, QOQ_LARGEST) * global_scale
    raise ValueError(f"unknown scale format {scale_format!r}")


def e8m0_codes(scale: Tensor) -> Tensor:
    """Biased exponents, uint8, of scales that are powers of two."""
    return (torch.log2(scale).round() + E8M0_BIAS).to(torch.uint8)


def e8m0_values(codes: Tensor) -> Tensor:
    """Float32 powers of two of biased exponents (uint8); 255 is the format's NaN."""
    values = torch.exp2(codes.to(torch.float32) - E8M0_BIAS)
    return torch.where(codes == 255, torch.full_like(values, math.nan), values)


def global_scale_for(largest_group_scale: float) -> float:
    """The float32 second-level scale of a tensor whose largest first-level scale is given.

    A power of two, the smallest that brings every group scale within E4M3. compressed-tensors stores its reciprocal
    and ModelOpt the value itself: of a power of two both are exact, so every format decodes to the same bits. It costs
    nothing: E4M3 spans 17 binades, and a power of two leaves mantissas as they are.
    """
    if not largest_group_scale > 0:
        return 1.0
    return 2.0 ** math.ceil(math.log2(largest_group_scale / E4M3_MAX))


@lru_cache
def dynamic_map() -> Tensor:
    """The table, float32 [256], ascending. Shared: never write into it."""
    magnitudes: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        magnitudes += (10 ** (decade - 6) * middles).tolist()
    table = [*(-magnitude for magnitude in magnitudes), 0.0, *magnitudes, 1.0]
    return torch.tensor(sorted(table), dtype=torch.float32)


def quantize_scales(scale: Tensor, offset: float, unused: Tensor | None = None) -> NestedScale:
    """Scales float32 [N, G] > 0, of rows that begin where a block begins, as 8-bit codes.

    offset   about the mean scale of the whole tensor
    unused   bool [N, G]: groups of zeros, whose scale does not matter
    """
    offset = torch.tensor(offset, dtype=torch.float32).item()
    centred = scale - offset
    if unused is not None:
        centred = torch.where(unused, torch.zeros_like(centred), centred)
    flat = centred.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    table = dynamic_map().to(scale.device)
    midpoints = (table[1:] + table[:-1]) / 2
    per_block = absmax.clamp(min=_SMALLEST_ABSMAX)[:, None]
    relative = (blocks * (1.0 / per_block)).clamp(-1.0, 1.0)
    # the smallest code of each block that decodes to a scale above 0; the last one where none does
    least_positive = (table[None] * absmax[:, None] + offset <= 0).sum(dim=1).clamp(max=len(table) - 1)
    codes = torch.maximum(torch.bucketize(relative, midpoints), least_positive[:, None])
    flat = codes.reshape(-1)[: scale.numel()].to(torch.uint8)
    return NestedScale(flat.reshape(scale.shape), absmax, offset, NESTED_BLOCK)


def decode_scales(nested: NestedScale) -> Tensor:
    """The scales that codes are multiplied with, float32 [N, G]."""
    table = dynamic_map().to(nested.codes.device)
    per_scale = nested.absmax.repeat_interleave(nested.block)[: nested.codes.numel()]
    flat = table[nested.codes.reshape(-1).to(torch.int64)] * per_scale + nested.offset
    return flat.reshape(nested.codes.shape)
