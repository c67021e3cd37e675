"""K-means tables against the exact optimum, logarithmic tables by hand, nearest values against all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.numerics.fitted_grids import STEPS, KMeansGrid, LogGrid, log_codebook, log_steps, log_tables
from lowbit.numerics.kmeans import fit_tables
from lowbit.tensors import GroupParams, RangeSearch

ABSMAX, MSE = RangeSearch("absmax"), RangeSearch("mse", steps=8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def optimum(weights: list[float], masses: list[float], levels: int) -> float:
    """The least error of so many values, by dynamic programming over all borders."""
    pairs = sorted(zip(weights, masses, strict=True))

    def cost(first: int, last: int) -> float:
        part = pairs[first:last]
        mass = sum(m for _, m in part)
        mean = sum(w * m for w, m in part) / mass if mass else 0.0
        return sum(m * (w - mean) ** 2 for w, m in part)

    best = [cost(0, end) for end in range(len(pairs) + 1)]
    for _ in range(levels - 1):
        best = [min(best[start] + cost(start, end) for start in range(end + 1)) for end in range(len(pairs) + 1)]
    return best[-1]


def error(weight: Tensor, table: Tensor, mass: Tensor) -> Tensor:
    return (mass * (weight[:, :, None] - table[:, None].double()).abs().amin(dim=2).square()).sum(dim=1)


@pytest.mark.parametrize("power", [1, 3])
def test_tables_are_within_a_few_percent_of_the_optimum(power):
    """Of normal weights and of heavy tails, whose largest weights Lloyd's steps alone do not find."""
    weight, mass = random(4, 30) ** power, random(4, 30, seed=1).abs()
    found = error(weight, fit_tables(weight, 5, mass), mass)
    for row in range(4):
        assert found[row] <= 1.05 * optimum(weight[row].tolist(), mass[row].tolist(), 5)


def test_no_step_of_lloyd_moves_a_table():
    weight = random(3, 200)
    table = fit_tables(weight, 8).double()
    nearest = (weight[:, :, None] - table[:, None]).abs().argmin(dim=2)
    for row in range(3):
        means = torch.stack([weight[row][nearest[row] == code].mean() for code in range(8)])
        torch.testing.assert_close(means, table[row], rtol=0, atol=1e-6)


def test_a_row_of_few_distinct_weights_is_held_exactly():
    weight = torch.tensor([[3.0, -1.0, 3.0, 0.5, 0.5, 0.5], [0.0] * 6, [7.0] * 6])
    assert fit_tables(weight, 4).tolist() == [[-1.0, 0.5, 3.0, 3.0], [0.0] * 4, [7.0] * 4]


def test_weights_without_mass_have_no_influence():
    weight = torch.tensor([[1.0, 2.0, 100.0, 1.0]])
    assert fit_tables(weight, 2, torch.tensor([1.0, 1.0, 0.0, 1.0])).tolist() == [[1.0, 2.0]]
    assert torch.equal(fit_tables(weight, 2, torch.zeros(4)), fit_tables(weight, 2))


def test_rows_do_not_depend_on_each_other():
    weight = random(600, 20)  # more than are fitted at once
    assert torch.equal(fit_tables(weight, 4)[590:], fit_tables(weight[590:], 4))


def test_values_are_those_that_16_bits_hold():
    weight = random(4, 64).float()
    table = KMeansGrid(3, "bfloat16_in_float16").fit(weight, 64, ABSMAX).table
    assert torch.equal(table.to(torch.bfloat16).float(), table)
    assert torch.equal(table.to(torch.float16).float(), table)
    assert KMeansGrid(3).storable(torch.tensor([1e9, -1e9])).tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("columns", [1, 31, 32, 70])
def test_every_code_is_the_nearest_and_comes_back(columns):
    """Of groups that do not divide the columns, too."""
    weight = random(5, columns).float()
    for grid in (KMeansGrid(3), LogGrid(4)):
        params = grid.fit(weight, 32, MSE)
        codes = grid.round(weight, params, 32)
        decoded = grid.decode(codes, params, 32)
        values = (params.table * params.scale[..., None]).repeat_interleave(32, dim=1)[:, :columns]
        assert torch.equal((decoded - weight).abs(), (values - weight[:, :, None]).abs().amin(dim=2))
        assert torch.equal(grid.decode(grid.round(decoded, params, 32), params, 32), decoded)
        wanted = torch.nn.functional.pad((decoded - weight).square(), (0, -columns % 32)).reshape(5, -1, 32).sum(dim=2)
        torch.testing.assert_close(grid.error(weight, params, 32), wanted)


def test_halfway_between_two_values_the_smaller_one():
    params = GroupParams(torch.ones(1, 1), table=torch.tensor([[[-1.0, 0.0, 1.0, 3.0]]]))
    assert KMeansGrid(2).round(torch.tensor([[-0.5, 0.5, 2.0, 9.0]]), params, 4).tolist() == [[0, 1, 2, 3]]


def test_logarithmic_values_by_hand():
    """Base 2: sign, then 0 or an exponent; base √2 halves every second step."""
    half = [0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    assert log_codebook(4, 8).values == (*half, *(0.0 - value for value in half))
    assert log_codebook(4, 4).values[1:8:2] == (1 / 8, 1 / 4, 1 / 2, 1.0)


def test_steps_and_tables_are_inverse():
    steps = torch.tensor([STEPS])
    assert log_steps(log_tables(4, steps)).tolist() == [list(STEPS)]


def test_each_group_takes_its_own_base():
    """Powers of 2 and of 2^(3/8), which that base alone holds without error."""
    groups = [torch.tensor(log_codebook(4, step).values) * 0.75 for step in (8, 3)]
    weight = torch.cat(groups)[None]
    params = LogGrid(4).fit(weight, 16, ABSMAX)
    assert log_steps(params.table).tolist() == [[8, 3]]
    assert torch.equal(LogGrid(4).decode(LogGrid(4).round(weight, params, 16), params, 16), weight)


def test_a_group_of_zeros_has_scale_1_and_codes_of_0():
    params = LogGrid(4).fit(torch.zeros(1, 16), 16, MSE)
    assert params.scale.tolist() == [[1.0]]
    assert LogGrid(4).round(torch.zeros(1, 16), params, 16).tolist() == [[0] * 16]


def test_the_spread_grid_of_a_range_covers_it():
    table = KMeansGrid(2).params_from_range(torch.tensor([[-3.0]]), torch.tensor([[6.0]])).table
    assert table.tolist() == [[[-3.0, 0.0, 3.0, 6.0]]]
