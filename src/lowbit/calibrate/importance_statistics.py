"""What an importance matrix says of a model: which channels carry the energy of each input.

    total    Σ_k mean x[k]²           the energy of the input
    top 1 %  share of `total` in the 1 % of channels with most of it: 0.01 where all are alike, 1 where outliers rule
    entropy  −Σ p log₂ p / log₂ n      p = mean x² / total, of n channels: 1 where all are alike, 0 where one rules

over the channels of all experts that were seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowbit.calibrate.importance import ImportanceEntry, ImportanceMatrix


@dataclass(frozen=True)
class Statistics:
    """Of one tensor. experts, unseen  how many there are, and the numbers of those that no token reached"""

    name: str
    channels: int
    tokens: int
    total: float
    mean: float
    smallest: float
    largest: float
    top_share: float
    entropy: float
    experts: int
    unseen: tuple[int, ...]


def statistics(matrix: ImportanceMatrix) -> list[Statistics]:
    """One row per tensor, in the order of blocks."""
    return [_of(name, matrix.entries[name]) for name in sorted(matrix.entries, key=_in_order)]


def _in_order(name: str) -> tuple[int, str]:
    parts = name.split(".")
    in_block = len(parts) > 1 and parts[0] == "blk" and parts[1].isdigit()
    return (int(parts[1]) if in_block else 1 << 30, name)


def _of(name: str, entry: ImportanceEntry) -> Statistics:
    values = (entry.sums.double() / entry.counts.clamp(min=1)[:, None])[entry.counts > 0].flatten()
    total = values.sum().item()
    shares = values / total if total > 0 else values
    top = max(1, len(values) // 100)
    bits = -torch.special.xlogy(shares, shares).sum().item() / math.log(2)
    return Statistics(
        name=name,
        channels=entry.sums.shape[1],
        tokens=int(entry.counts.max()),
        total=total,
        mean=values.mean().item() if len(values) else 0.0,
        smallest=values.min().item() if len(values) else 0.0,
        largest=values.max().item() if len(values) else 0.0,
        top_share=shares.topk(min(top, len(shares))).values.sum().item(),
        entropy=bits / math.log2(len(values)) if len(values) > 1 else 1.0,
        experts=len(entry.counts),
        unseen=entry.unseen,
    )
