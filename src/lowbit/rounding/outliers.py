"""Outlier columns of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).

    y = x[:, O] · W[:, O]ᵀ  in 16 bits   +   int8(x[:, R]) · int8(W[:, R])ᵀ          O: max |x| ≥ 6,  R: the others

A few input channels carry values far above the rest. One of them sets the step of all int8 values of a token, so
bitsandbytes' INT8 multiplies those columns in 16 bits, and chooses them for every batch at run time. Nothing is stored;
this module reports how many channels it affects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.tensors import LayerStats

THRESHOLD = 6.0


@dataclass(frozen=True)
class Outliers:
    """columns  int64, ascending; share of the K columns; energy: the share of Σ x² that they carry"""

    columns: Tensor
    share: float
    energy: float


def outlier_columns(stats: LayerStats, threshold: float = THRESHOLD) -> Outliers:
    """The input channels whose |x| reached the threshold in calibration."""
    columns = (stats.absmax >= threshold).nonzero()[:, 0]
    energy, total = stats.mean_sq[columns].sum(dtype=torch.float64), stats.mean_sq.sum(dtype=torch.float64)
    return Outliers(columns, len(columns) / max(1, len(stats.absmax)), (energy / total).item() if total > 0 else 0.0)


def outlier_note(stats: LayerStats) -> str:
    """How much of an input LLM.int8() would keep in 16 bits, for the report."""
    outliers = outlier_columns(stats)
    return (
        f"{len(outliers.columns)} of {len(stats.absmax)} input channels reach {THRESHOLD:g}, with "
        f"{100 * outliers.energy:.1f} % of their squares; bitsandbytes multiplies those in 16 bits"
    )
