"""Hadamard matrices by construction, and `Rotation`: a randomized Hadamard transform of any size.

    Q = D (S ⊗ B) / sqrt(n)        n = 2^k · m;  D: random signs;  S: Sylvester's matrix of order 2^k;  B: order m

The base B is a Hadamard matrix of the smallest possible order m = n / 2^k:

    Paley I    q + 1      q prime, q ≡ 3 (mod 4)    12, 20, 24, 32, 44, 48, 60, 68, 72, 80, 84, 104 …
    Paley II   2 (q + 1)  q prime, q ≡ 1 (mod 4)    12, 28, 36, 60, 76 …

from the quadratic residues of q (Paley 1933). Sizes without one (odd ones; 2^k · 29 …) use a random orthogonal B: still
n log n, but with entries of different magnitude. The same seed gives the same rotation.

    columns(W) = W Q        rows(W) = Qᵀ W        sandwich(H) = Qᵀ H Q        n log n + n m operations per row
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_BASE = 512  # larger ones cost more than the fast transform saves


@dataclass(frozen=True)
class Rotation:
    """An orthogonal Q [n, n], applied without being formed. Rows and columns may hold several blocks of n (heads).

    signs     float64 [n], ±1
    base      float64 [m, m], orthogonal
    hadamard  whether the base is a Hadamard matrix / sqrt(m), so that all entries of Q have one magnitude
    """

    signs: Tensor
    base: Tensor
    hadamard: bool

    @property
    def reason(self) -> str:
        """Why codes of rotated columns are no codes of the weight."""
        return "its codes are of rotated columns, for an engine that rotates the input (transform_config)"

    @property
    def size(self) -> int:
        return len(self.signs)

    def columns(self, values: Tensor) -> Tensor:
        """[..., blocks · n] → values Q, in their dtype."""
        shape, m = values.shape, len(self.base)
        turned = values.reshape(-1, self.size) * self.signs.to(values)
        if m > 1:
            turned = turned.reshape(-1, m) @ self.base.to(values)
        return (walsh(turned.reshape(-1, self.size // m, m)) / math.sqrt(self.size // m)).reshape(shape)

    def rows(self, values: Tensor) -> Tensor:
        """[blocks · n, ...] → Qᵀ values; vectors (biases) too."""
        return self.columns(values) if values.dim() == 1 else self.columns(values.t().contiguous()).t().contiguous()

    def sandwich(self, values: Tensor) -> Tensor:
        """[blocks · n, blocks · n] → Qᵀ values Q."""
        return self.rows(self.columns(values))

    def back(self, values: Tensor) -> Tensor:
        """[..., blocks · n] → values Qᵀ, which undoes `columns`; in their dtype."""
        shape, m = values.shape, len(self.base)
        turned = walsh(values.reshape(-1, self.size // m, m)) / math.sqrt(self.size // m)
        if m > 1:
            turned = turned.reshape(-1, m) @ self.base.t().to(values)
        return (turned.reshape(-1, self.size) * self.signs.to(values)).reshape(shape)

    def inputs(self, values: Tensor) -> Tensor:
        """An input x → x Q, in its dtype: as weights, since Q is orthogonal."""
        return self.columns(values)

    def inputs_back(self, values: Tensor) -> Tensor:
        """x Q → x."""
        return self.back(values)

    def matrix(self) -> Tensor:
        """Q, float64 [n, n]."""
        return self.columns(torch.eye(self.size, dtype=torch.float64))


LARGEST_SYLVESTER = 1 << 15  # of the kernels that engines have (HadaCore)


def sylvester(size: int) -> Rotation:
    """S / sqrt(n) of a power of two, without signs: symmetric, its own inverse. Kernels for online rotations compute it
    without reading a matrix."""
    assert size == size & -size, "Sylvester's matrices have powers of two for sizes"
    return Rotation(torch.ones(size, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), True)


def make_rotation(size: int, seed: int = 0) -> Rotation:
    """The rotation of a size (> 0) and seed."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    odd = size // (size & -size)
    order = odd
    while order <= min(size, LARGEST_BASE):
        base = hadamard_matrix(order)
        if base is not None:
            return Rotation(signs, base.double() / math.sqrt(order), True)
        order *= 2
        if size % order:
            break
    normal = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
    return Rotation(signs, torch.linalg.qr(normal).Q, False)


def walsh(values: Tensor) -> Tensor:
    """Sylvester's Hadamard matrix along dimension 1 of [b, 2^k, m]; not normalised."""
    length, half = values.shape[1], 1
    while half < length:
        pairs = values.reshape(values.shape[0], length // (2 * half), 2, half, values.shape[2])
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        values = torch.stack((first + second, first - second), dim=2).reshape(values.shape)
        half *= 2
    return values


def hadamard_matrix(order: int) -> Tensor | None:
    """A matrix [order, order] of ±1 with H Hᵀ = order · I, by Paley's constructions; None if they have none."""
    if order == 1:
        return torch.ones(1, 1)
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and _is_prime(order - 1):
        return torch.eye(order) + _bordered(order - 1, -1.0)
    half = order // 2
    if (half - 1) % 4 == 1 and _is_prime(half - 1):
        conference = _bordered(half - 1, 1.0)
        plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(conference, plus) + torch.kron(torch.eye(half), minus)
    return None


def _bordered(prime: int, sign: float) -> Tensor:
    """Paley's conference matrix [q + 1, q + 1]: χ(i − j), bordered with 1 above and `sign` at the left."""
    index = torch.arange(prime)
    character = -torch.ones(prime)
    character[index.square() % prime] = 1.0
    character[0] = 0.0
    matrix = torch.zeros(prime + 1, prime + 1)
    matrix[0, 1:], matrix[1:, 0] = 1.0, sign
    matrix[1:, 1:] = character[(index[:, None] - index[None, :]) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
