"""Hadamard matrices by construction, and the fast rotation against its matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.numerics.hadamard import hadamard_matrix, make_rotation, walsh


@pytest.mark.parametrize("order", [1, 4, 12, 20, 24, 28, 36, 44, 60, 76, 84, 104, 180])
def test_paley_matrices_are_hadamard_matrices(order):
    matrix = hadamard_matrix(order)
    assert matrix is not None
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


@pytest.mark.parametrize("order", [2, 3, 6, 9, 52, 92])
def test_orders_that_paley_does_not_give_are_none(order):
    """2 is Sylvester's; 52 and 92 exist, but not for a prime q."""
    assert hadamard_matrix(order) is None


def test_walsh_is_sylvesters_matrix():
    sylvester = torch.tensor([[1.0]])
    for _ in range(4):
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    assert torch.equal(walsh(torch.eye(16)[:, :, None])[:, :, 0], sylvester)


# Hidden sizes and head sizes of real models.
@pytest.mark.parametrize("size", [1, 2, 64, 80, 96, 128, 576, 768, 896, 960, 1152, 1536, 2304, 2560, 2880, 3584, 6656])
def test_every_size_of_a_real_model_has_a_hadamard_rotation(size):
    rotation = make_rotation(size)
    assert rotation.hadamard
    row = rotation.columns(torch.eye(size, dtype=torch.float64)[:2])
    torch.testing.assert_close(row.abs(), torch.full_like(row, size**-0.5))


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 120), seed=st.integers(0, 5), blocks=st.integers(1, 3))
def test_fast_products_equal_products_with_an_orthogonal_matrix(size, seed, blocks):
    rotation = make_rotation(size, seed)
    matrix = rotation.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    whole = torch.block_diag(*[matrix] * blocks)
    values = torch.randn(blocks * size, blocks * size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.columns(values), values @ whole)
    torch.testing.assert_close(rotation.rows(values), whole.T @ values)
    torch.testing.assert_close(rotation.rows(values[0]), whole.T @ values[0])
    torch.testing.assert_close(rotation.sandwich(values), whole.T @ values @ whole)


def test_sizes_without_a_hadamard_matrix_get_another_rotation_and_say_so():
    rotation = make_rotation(2 * 29 * 29)
    assert not rotation.hadamard
    assert rotation.size == 1682


def test_the_same_seed_gives_the_same_rotation_and_another_another():
    assert torch.equal(make_rotation(58, 1).matrix(), make_rotation(58, 1).matrix())
    assert not torch.equal(make_rotation(64, 1).matrix(), make_rotation(64, 2).matrix())


def test_an_outlier_is_spread_over_all_channels():
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    x[:, 7] += 40.0
    turned = make_rotation(256).columns(x)

    def kurtosis(values: torch.Tensor) -> float:
        centred = values - values.mean()
        return float(centred.pow(4).mean() / centred.square().mean().square())

    assert kurtosis(x) > 100
    assert kurtosis(turned) < 6
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
