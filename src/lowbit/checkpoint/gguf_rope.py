"""What a GGUF file says about stretched rotary embeddings, as transformers' `rope_parameters`.

    key-values {arch}.rope.scaling.{type,factor,original_context_length}   linear and yarn
    tensor     rope_freqs.weight [head_dim / 2]                            Llama 3: divisors of the frequencies

The divisors of Llama 3 are a function of four numbers (Llama 3.1 model card; transformers' `llama3`):

    wavelength = 2π θ^(2i/d)
    divisor = 1                                        wavelength < original / high
              factor                                   wavelength > original / low
              1 / ((1 - s) / factor + s)               between, s = (original / wavelength - low) / (high - low)

The file keeps the divisors only. Every published model has low 1, high 4, original 8192; if those reproduce the
tensor, the config says so, else a note does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_parameters(metadata: dict[str, Any], divisors: Tensor | None) -> tuple[dict[str, Any], list[str]]:
    """({"rope_parameters": …} to merge into config.json or {}, notes about what cannot be expressed).

    divisors  [head_dim / 2], the tensor rope_freqs.weight where the file has one
    """
    arch = metadata["general.architecture"]
    if divisors is not None:
        theta = metadata.get(f"{arch}.rope.freq_base", 10000.0)
        return _from_divisors(divisors.float(), theta if isinstance(theta, float) else math.nan)
    return _from_key_values(metadata, f"{arch}.rope.scaling")


def _from_key_values(metadata: dict[str, Any], prefix: str) -> tuple[dict[str, Any], list[str]]:
    kind = metadata.get(f"{prefix}.type", "none")
    if isinstance(kind, str) and kind == "none":
        return {}, []
    factor = metadata.get(f"{prefix}.factor")
    if str(kind) not in ("linear", "yarn") or not isinstance(factor, float) or not math.isfinite(factor):
        found = f"{str(kind)[:40]!r} by {str(factor)[:40]}"
        return {}, [f"rope scaling {found} cannot be expressed in config.json: the context is not extended"]
    parameters: dict[str, Any] = {"rope_type": str(kind), "factor": factor}
    original = metadata.get(f"{prefix}.original_context_length")
    if type(original) is int:
        parameters["original_max_position_embeddings"] = original
    return {"rope_parameters": parameters}, []


def _from_divisors(divisors: Tensor, theta: float) -> tuple[dict[str, Any], list[str]]:
    factor = divisors.max().item() if divisors.numel() else 1.0
    if divisors.eq(1).all():
        return {}, []
    if torch.allclose(llama3_divisors(theta, 2 * divisors.numel(), factor), divisors, rtol=1e-4):
        return {"rope_parameters": {"rope_type": "llama3", "factor": factor} | LLAMA3}, []
    return {}, ["rope_freqs.weight is no Llama 3 scaling, so config.json cannot express it: long contexts will differ"]


def llama3_divisors(theta: float, head_dim: int, factor: float) -> Tensor:
    """float32 [head_dim / 2]; see the module's docstring."""
    original, low, high = LLAMA3["original_max_position_embeddings"], LLAMA3["low_freq_factor"], 4.0
    wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisors = torch.where(wavelength > original / low, torch.full_like(between, factor), between)
    return torch.where(wavelength < original / high, torch.ones_like(between), divisors).float()
