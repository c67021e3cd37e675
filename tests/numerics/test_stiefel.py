"""Descent along the Cayley transform keeps matrices orthogonal, and is the paper's algorithm."""

from __future__ import annotations

import torch

from lowbit.numerics.hadamard import make_rotation
from lowbit.numerics.stiefel import cayley_step, orthogonality_error


def reference_step(x, gradient, m, rate, decay, iterations):
    """Algorithm 1 of arXiv 2002.01113, with its fixed-point iteration, for matrices that need not be square."""
    m = decay * m - gradient
    w_hat = m @ x.T - 0.5 * x @ (x.T @ m @ x.T)
    w = w_hat - w_hat.T
    m = w @ x
    alpha = min(rate, 1 / torch.linalg.matrix_norm(w, 1).item())
    y = x + alpha * m
    for _ in range(iterations):
        y = x + alpha / 2 * w @ (x + y)
    return y, m


def test_a_step_is_the_fixed_point_of_the_papers_iteration():
    generator = torch.Generator().manual_seed(0)
    x = make_rotation(12).matrix()
    gradient, m = (torch.randn(12, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    for rate in (0.01, 10.0):  # below the bound by ‖W‖, and above it
        expected = reference_step(x, gradient, m, rate, 0.9, 60)
        for found, wanted in zip(cayley_step(x, gradient, m, rate, 0.9), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_hundreds_of_steps_stay_orthogonal_and_find_the_nearest_rotation():
    generator = torch.Generator().manual_seed(1)
    wanted = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    x = make_rotation(16).matrix()
    if torch.det(x) * torch.det(wanted) < 0:  # a descent stays on its half of the group
        wanted[0] *= -1
    momentum = torch.zeros_like(x)
    for _ in range(400):
        x, momentum = cayley_step(x, x - wanted, momentum, 0.2, 0.5)
    assert orthogonality_error(x) < 1e-12
    torch.testing.assert_close(x, wanted, atol=1e-6, rtol=0)


def test_without_a_gradient_nothing_moves():
    x = make_rotation(8).matrix()
    found, momentum = cayley_step(x, torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.float64), 1.5)
    torch.testing.assert_close(found, x)
    assert not momentum.any()
