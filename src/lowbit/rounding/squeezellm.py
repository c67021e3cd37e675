"""Rounding to nearest by sensitivity (SqueezeLLM: Kim et al. 2023, arXiv 2306.07629).

    minimise over the values of a row  Σ_k F_k (w_k − ŵ_k)²          F_k = Σ x_k², or Σ g² x_k²

F is the diagonal of the Hessian of a linear's output error: the energy of each input channel. Weighed by the gradient g
of the loss by the linear's outputs (`--hessian guided`), it is the diagonal of the Fisher information, of one group of
output rows or of several. Each weight takes the value nearest to it; no error is fed back (`gptq` does that).

The values of k-means are its tables, and its outliers the weights of largest F w². On other grids F weighs the range
search; ggml types take it as llama-quantize takes an importance matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.rounding.hessian import InputData
from lowbit.rounding.target import GridTarget, Rounded, Target
from lowbit.tensors import QuantizedTensor

if TYPE_CHECKING:
    from lowbit.settings import Settings


@dataclass(frozen=True)
class SqueezeOptions:
    """The method has no settings of its own: it reads no off-diagonal of H, and corrects no error."""

    shrinkage: float = 0.0
    needs_drift: bool = False
    needs_lost: bool = False

    @classmethod
    def of(cls, settings: Settings) -> SqueezeOptions:
        return cls()


def squeezellm(weight: Tensor, target: Target, data: InputData, options: SqueezeOptions | None = None) -> Rounded:
    """Round a weight, float32 [N, K], to `target`; `data` holds the statistics of its input."""
    parts = [(rows, sensitivity(part)) for rows, part in data.by_rows(len(weight))]
    if len(parts) == 1:
        return target.nearest(weight, parts[0][1])
    if not (isinstance(target, GridTarget) and target.rows_are_apart):
        return target.nearest(weight, torch.stack([each for _, each in parts]).mean(dim=0))
    fitted = [(weight[rows], target.fit(weight[rows], each)) for rows, each in parts]
    codes = torch.cat([each.round(rows).codes for rows, each in fitted])
    stored = target.with_codes([[each] for _, each in fitted], codes)
    assert isinstance(stored, QuantizedTensor)
    return Rounded(stored, stored.decode())


def sensitivity(data: InputData) -> Tensor:
    """F, float32 [K], divided by its mean, so that float32 holds products with it; 1 of a text that says nothing."""
    assert data.stats is not None
    assert data.stats.hessian is not None
    diagonal = data.stats.hessian.diagonal().float()
    mean = diagonal.mean()
    return diagonal / mean if mean > 0 else torch.ones_like(diagonal)
