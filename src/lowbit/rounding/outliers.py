"""Outlier columns of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).

    y = x[:, O] · W[:, O]ᵀ  in 16 bits   +   int8(x[:, R]) · int8(W[:, R])ᵀ          O: max |x| ≥ 6,  R: the others

A few input channels carry values far above the rest. One of them in a token sets the step of all its int8 values, so
bitsandbytes' INT8 multiplies those columns in 16 bits, chosen anew for every batch. Nothing of it is stored; what is
here says how much of a layer it concerns, for the report.
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


@dataclass(frozen=True)
class MixedError:
    """Σ (y − ŷ)² / Σ y² of a layer: with all columns in int8, and with outlier columns in 16 bits."""

    all_int8: float
    mixed: float


def outlier_columns(stats: LayerStats, threshold: float = THRESHOLD) -> Outliers:
    """The input channels of which some |x| reached the threshold in calibration."""
    columns = (stats.absmax >= threshold).nonzero()[:, 0]
    energy, total = stats.mean_sq[columns].sum(dtype=torch.float64), stats.mean_sq.sum(dtype=torch.float64)
    return Outliers(columns, len(columns) / max(1, len(stats.absmax)), (energy / total).item() if total > 0 else 0.0)


def mixed_error(weight: Tensor, decoded: Tensor, stats: LayerStats, columns: Tensor) -> MixedError:
    """What rounding the weights costs: tr(Δ H Δᵀ) / tr(W H Wᵀ), and the same with Δ = 0 in `columns`.

    weight, decoded [N, K]; where only the diagonal of H was measured, that stands for it.
    """
    weight = weight.float()
    difference = weight - decoded.float()
    kept = difference.clone()
    kept[:, columns] = 0.0
    total = _energy(weight, stats)
    if not total > 0:
        return MixedError(0.0, 0.0)
    return MixedError(_energy(difference, stats) / total, _energy(kept, stats) / total)


def mixed_product_error(weight: Tensor, decoded: Tensor, x: Tensor, columns: Tensor) -> MixedError:
    """The same with x [tokens, K] in int8 too, one scale for each token, as bitsandbytes multiplies."""
    weight, decoded, x = weight.float(), decoded.float(), x.float()
    exact = x @ weight.T
    total = exact.square().sum(dtype=torch.float64).item()
    if not total > 0:
        return MixedError(0.0, 0.0)
    rest = x.clone()
    rest[:, columns] = 0.0
    mixed = _int8_per_token(rest) @ decoded.T + x[:, columns] @ weight[:, columns].T
    errors = ((exact - y).square().sum(dtype=torch.float64).item() for y in (_int8_per_token(x) @ decoded.T, mixed))
    all_int8, kept = (error / total for error in errors)
    return MixedError(all_int8, kept)


def _energy(matrix: Tensor, stats: LayerStats) -> float:
    """tr(M H Mᵀ) in float64 sums, per token."""
    if stats.hessian is None:
        return (matrix.square() @ stats.mean_sq).sum(dtype=torch.float64).item()
    return ((matrix @ stats.hessian) * matrix).sum(dtype=torch.float64).item() / max(1, stats.tokens)


def _int8_per_token(x: Tensor) -> Tensor:
    """x after rounding to −127 .. 127 times absmax / 127 of each token; zero tokens stay zero."""
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127.0
    return (x / scale).round() * scale
