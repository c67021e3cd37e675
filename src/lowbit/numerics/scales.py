"""Which scales a format can store, and the nearest of them to a wanted one.

A scale is rounded to its stored form *before* codes are chosen, so that codes are nearest for the scale the engine
will really multiply with.

    bfloat16, float16, float32   nearest even; never rounded to 0 (the smallest positive value instead)
    bfloat16_in_float16          a bfloat16 that float16 holds exactly: for formats with float16 scales (GPTQ, AWQ),
                                 which an engine then casts to a bfloat16 model's dtype; such a scale survives both
    float32_over_127             a float32 divided by 127: bitsandbytes' INT8 stores the numerator
    e8m0      2^(u − 127), u in 0..254        the smallest power of two ≥ the wanted scale (nothing saturates)
    e4m3      float8 e4m3fn × global_scale    nearest even, within 2^-9 .. 448 of the global scale
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

E8M0_BIAS = 127
E4M3_MAX = 448.0
INT8_MAX = 127.0
E2M1_MAX = 6.0
E4M3_SMALLEST = 2.0**-9

SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Eight significant bits above float16's smallest subnormal, so that a bfloat16 from here on is a float16 too.
_SMALLEST_IN_BOTH = 2.0**-17


def storable_scale(wanted: Tensor, scale_format: str, global_scale: float = 1.0) -> Tensor:
    """Float32 scales that `scale_format` stores exactly, nearest to `wanted` (float32, any shape).

    global_scale (1 but for two-level grids) where `wanted` is 0: an all-zero group. NaN where it is NaN or inf, so that
    bad weights stay visible.
    """
    scale = _nearest(wanted, scale_format, global_scale)
    scale = torch.where(wanted.isfinite(), scale, torch.full_like(scale, math.nan))
    return torch.where(wanted == 0, torch.full_like(scale, global_scale), scale)


def _nearest(wanted: Tensor, scale_format: str, global_scale: float) -> Tensor:
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
