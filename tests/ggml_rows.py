"""Rows and importances that are hard on an encoder of ggml blocks, and the tensor on which llama.cpp was measured."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor


def hard_rows(columns: int, seed: int = 0) -> Tensor:
    """float32 [13, columns]: ordinary, heavy-tailed, zero, constant, subnormal, huge, sparse, of uneven sub-blocks."""
    random = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(columns, generator=random)

    spikes = (torch.arange(columns) % 45 == 7).float()
    steps = ((torch.arange(columns) // 32 % 5 - 2.0) * 15).exp()  # sub-blocks of very different size
    rows = [
        normal() * 0.02,
        normal() * 0.02 * (normal() * 1.5).exp(),
        torch.zeros(columns),
        torch.full((columns,), 0.3),
        torch.full((columns,), -1.7),
        normal() * 1e-7,
        normal() * 1e-37,
        normal() * 1e-41,
        normal() * 1e6,
        (normal() * 1e38).clamp(-3.4e38, 3.4e38),
        normal() * spikes,
        normal() * (0.02 + 3 * spikes),
        normal() * steps,
    ]
    return torch.stack(rows)


def importances(columns: int) -> dict[str, Tensor | None]:
    """None and importance vectors [columns]: ordinary, all zero, zero for whole sub-blocks, and of extreme sizes."""
    uniform = torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 3
    extreme = torch.where(torch.arange(columns) // 64 % 2 == 0, 1e38, 1e-42)
    return {
        "none": None,
        "ordinary": uniform,
        "zero": torch.zeros(columns),
        "zero sub-blocks": uniform * (torch.arange(columns) // 32 % 3 > 0),
        "extreme": uniform * extreme,
    }


def gguf_decode(name: str, blocks: Tensor) -> Tensor:
    """The gguf package's float32 weights of blocks."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]).astype(np.float32))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bits, any NaN being equal to any other."""
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def relative_error(weight: Tensor, decoded: Tensor, importance: Tensor | None) -> float:
    """Σ importance·(w − ŵ)² / Σ importance·w², in double precision."""
    by = torch.ones(weight.shape[1]).double() if importance is None else importance.double()
    weight = weight.double()
    return float((by * (weight - decoded.double()) ** 2).sum() / (by * weight**2).sum())


def measured_tensor() -> tuple[Tensor, Tensor]:
    """float32 [32, 1024] and importance [1024], from a generator whose numbers are fixed forever."""
    random = np.random.RandomState(4)
    weight = (random.standard_t(5, (32, 1024)) * 0.05).astype(np.float32)
    return torch.from_numpy(weight), torch.from_numpy(random.gamma(0.7, 1, 1024).astype(np.float32))
