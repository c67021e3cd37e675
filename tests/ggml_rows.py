"""Rows and importances that are hard on an encoder of ggml blocks, and the tensors on which llama.cpp was measured."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor


def hard_rows(columns: int, seed: int = 0) -> dict[str, Tensor]:
    """Name → float32 [columns]."""
    random = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(columns, generator=random)

    at = torch.arange(columns)
    spikes = (at % 45 == 7).float()
    one = (at == columns * 2 // 5 + 6).float()
    return {
        "normal": normal() * 0.02,
        "heavy tails": normal() * 0.02 * (normal() * 1.5).exp(),
        "fifth powers": normal() ** 5,
        "zeros": torch.zeros(columns),
        "constant": torch.full((columns,), 0.3),
        "negative constant": torch.full((columns,), -1.7),
        "constant that no half is": torch.full((columns,), -0.1),
        "positive": torch.rand(columns, generator=random) + 1,
        "negative": -torch.rand(columns, generator=random) - 1,
        "zero sub-blocks": normal() * (at // 16 % 3 > 0),
        "half zeros": normal() * (at >= columns // 2),
        "subnormal": normal() * 1e-41,
        "smallest floats": normal() * 1e-37,
        "below every half": normal() * 1e-10,
        "smallest halves": normal() * 1e-7,
        "small halves": normal() * 3e-7,
        "subnormal halves": normal() * 1e-5,
        "small": normal() * 1e-3,
        "large": normal() * 1e6,
        "largest halves": normal() * 1e8,
        "huge": normal() * 1e37,
        "largest floats": (normal() * 1e38).clamp(-3.38e38, 3.38e38),
        "sparse": normal() * spikes,
        "spikes": normal() * (0.02 + 3 * spikes),
        "uneven sub-blocks": normal() * ((at // 32 % 5 - 2.0) * 15).exp(),
        "one outlier": one * 9 + 0.01,
        "alone": one,
        "ties": torch.randint(-3, 4, (columns,), generator=random).float(),
        "ternary": 0.75 * torch.randint(-1, 2, (columns,), generator=random).float(),
    }


def importances(columns: int) -> dict[str, Tensor | None]:
    """Name → float32 [columns], or None for equal importance."""
    random = torch.Generator().manual_seed(1)
    uneven = torch.rand(columns, generator=random) ** 4
    uneven[: columns // 8] = 0
    uneven[columns // 2 : columns // 2 + 10] = 0
    at = torch.arange(columns)
    return {
        "none": None,
        "uneven": uneven,
        "zero": torch.zeros(columns),
        "zero sub-blocks": torch.rand(columns, generator=random) ** 3 * (at // 32 % 3 > 0),
        "tiny": uneven * 1e-38,
        "huge": uneven * 1e38,
        "tiny and huge": uneven * torch.where(at // 64 % 2 == 0, 1e38, 1e-42),
    }


def low_bits_decode(name: str, blocks: Tensor) -> Tensor:
    """Q1_0 and Q2_0 by their formula: the gguf package has no decoder of them."""
    each = blocks.numpy().reshape(-1, 18)
    d = each[:, :2].copy().view(np.float16).astype(np.float32)
    bits = 1 if name == "Q1_0" else 2
    q = (each[:, 2:, None] >> np.arange(0, 8, bits, dtype=np.uint8)).reshape(len(each), -1) & (2**bits - 1)
    values = np.where(q == 1, d, -d) if bits == 1 else (q.astype(np.float32) - 1) * d
    return torch.from_numpy(values.astype(np.float32).reshape(len(blocks), -1))


def gguf_decode(name: str, blocks: Tensor) -> Tensor:
    """The gguf package's float32 weights of blocks."""
    if name in ("Q1_0", "Q2_0"):
        return low_bits_decode(name, blocks)
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


# Weights and importance, float32 [rows, 1024] and [1024], from generators whose numbers are fixed.
def student_case() -> tuple[Tensor, Tensor]:
    random = np.random.RandomState(4)
    weight = (random.standard_t(5, (32, 1024)) * 0.05).astype(np.float32)
    return torch.from_numpy(weight), torch.from_numpy(random.gamma(0.7, 1, 1024).astype(np.float32))


def small_student_case() -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(7)
    weight = (random.standard_t(5, size=(16, 1024)) * 0.02).astype(np.float32)
    importance = random.gamma(0.5, size=1024).astype(np.float32) + np.float32(0.01)
    return torch.from_numpy(weight), torch.from_numpy(importance)


def uneven_rows_case() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(20)
    weight = torch.randn(64, 1024, generator=random) * torch.rand(64, 1, generator=random)
    weight = weight * (1 + torch.rand(64, 1024, generator=random) ** 8 * 4)
    return weight, torch.rand(1024, generator=random) ** 4 + 0.01
