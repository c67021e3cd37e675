"""The arithmetic of calibration: bfloat16 products on hardware with fast bfloat16.

Statistics stay float32: with `fast_products` a float32 matrix product rounds its factors to bfloat16 (exact for
activations computed in bfloat16) and sums in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def squared_error_in_double(weight: Tensor, decoded: Tensor) -> tuple[float, float, float]:
    """(Σ (w − ŵ)², Σ w², max |w − ŵ|) in float64, for finite values whose squares float32 does not hold."""
    weight, decoded = weight.double().reshape(decoded.shape), decoded.double()
    error = weight - decoded
    return error.square().sum().item(), weight.square().sum().item(), error.abs().max().item()


def has_fast_bfloat16(device: str = "cpu") -> bool:
    """True on hardware that multiplies bfloat16 faster than float32: AMX, AVX512_BF16, CUDA."""
    if not device.startswith("cpu"):
        return True
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def compute_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """ "auto", "bfloat16", "float16" or "float32" → the dtype of forward passes."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return getattr(torch, name)


@contextmanager
def fast_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside, if `dtype` is bfloat16, float32 products round their factors to bfloat16; sums stay float32."""
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):  # torch before 2.9 has float32 products alone
        yield
        return
    before = matmul.fp32_precision
    if dtype is torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
