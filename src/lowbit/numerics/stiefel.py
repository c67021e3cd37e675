"""Descent over orthogonal matrices X [n, n]: SGD with momentum along the Cayley transform (Li, Fuxin and Todorovic
2020, arXiv 2002.01113, algorithm 1).

    M ← β M − ∂L/∂X                              momentum
    W = ½ (M Xᵀ − X Mᵀ)                          skew: the part of M along which X stays orthogonal
    M ← W X
    α = min(rate, 1 / ‖W‖₁)
    X ← (I − α/2 W)⁻¹ (I + α/2 W) X              the Cayley transform of a skew matrix is orthogonal

The paper solves the last line by two fixed-point steps, which drift from the manifold; here it is solved exactly, in
float64, so that XᵀX = I to about 1e-13 after hundreds of steps. One step costs about 5 n³ operations.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cayley_step(
    matrix: Tensor, gradient: Tensor, momentum: Tensor, rate: float, decay: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(X, M) after one step.

    matrix, momentum  float64 [n, n], X orthogonal
    gradient          ∂L/∂X, of any float dtype
    rate, decay       the largest α, and β
    """
    momentum = decay * momentum - gradient.to(momentum)
    product = momentum @ matrix.t()
    skew = (product - product.t()) / 2
    size = torch.linalg.matrix_norm(skew, 1).item()
    half = min(rate, 1 / size if size > 0 else rate) / 2 * skew
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    turned = torch.linalg.solve(one - half, (one + half) @ matrix)
    return turned.contiguous(), skew @ matrix


def orthogonality_error(matrix: Tensor) -> float:
    """max |XᵀX − I|, in float64."""
    square = matrix.double().t() @ matrix.double()
    return (square - torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)).abs().max().item()
