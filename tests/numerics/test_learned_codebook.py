"""Grids with a table for each row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import ShapeError
from lowbit.numerics.grid import RangeSearch
from lowbit.numerics.learned_codebook import LearnedCodebookGrid
from lowbit.tensors import Granularity, QuantizedTensor

TABLE = torch.tensor([[-1.0, 0.0, 0.5, 4.0], [-8.0, -4.0, -2.0, -1.0]])


def test_value_table():
    grid = LearnedCodebookGrid(TABLE)
    codes = torch.arange(4, dtype=torch.uint8).expand(2, 4)
    assert torch.equal(grid.decode(codes, grid.fit(TABLE, 4, RangeSearch()), 4), TABLE)
    assert (grid.bits, grid.name, grid.symmetric, grid.columns_per_code) == (2, "lut2", True, 1)


def test_nearest_value_of_the_row_and_ties_to_the_smaller():
    grid = LearnedCodebookGrid(TABLE)
    weight = torch.tensor([[-9.0, -0.5, 0.25, 2.25, 2.26, 99.0], [-6.0, -5.9, -1.5, -1.4, -99.0, 0.0]])
    codes = grid.round(weight, grid.fit(weight, 6, RangeSearch()), 6)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[0, 0, 1, 2, 3, 3], [0, 1, 2, 3, 0, 3]]


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 33))
def test_rounding_is_nearest_and_keeps_table_values(seed, bits, columns):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(3, 1 << bits, generator=generator).half().float().sort(dim=1).values
    weight = torch.randn(3, columns, generator=generator) * 2
    grid = LearnedCodebookGrid(table)
    params = grid.fit(weight, columns, RangeSearch())
    decoded = grid.decode(grid.round(weight, params, columns), params, columns)
    nearest = (weight[:, :, None] - table[:, None, :]).abs().amin(dim=2)
    assert torch.allclose((weight - decoded).abs(), nearest, atol=1e-6)
    assert torch.equal(grid.decode(grid.round(decoded, params, columns), params, columns), decoded)


def test_slices_of_columns_round_as_the_whole():
    grid, weight = LearnedCodebookGrid(TABLE), torch.linspace(-9, 5, 14).reshape(2, 7)
    params = grid.fit(weight, 7, RangeSearch())
    parts = [grid.round(weight[:, columns], params, 7) for columns in (slice(0, 3), slice(3, 7))]
    assert torch.equal(torch.cat(parts, dim=1), grid.round(weight, params, 7))


def test_error_is_weighed_and_by_group():
    grid, weight = LearnedCodebookGrid(TABLE), torch.tensor([[0.1, 0.2, 3.0], [-1.0, -3.0, -8.5]])
    params, importance = grid.fit(weight, 2, RangeSearch()), torch.tensor([1.0, 10.0, 2.0])
    assert params.scale.shape == (2, 2)
    expected = torch.tensor([[0.01 + 0.4, 2.0], [10.0, 0.5]])
    assert torch.allclose(grid.error(weight, params, 2, importance), expected)
    magnitude = torch.tensor([[0.001 + 0.08, 6.0], [30.0, 4.25]])
    assert torch.allclose(grid.error(weight, params, 2, importance, by_magnitude=True), magnitude)


def test_within_a_quantized_tensor():
    grid = LearnedCodebookGrid(TABLE)
    codes = torch.tensor([[3, 0, 1], [0, 3, 2]], dtype=torch.uint8)
    stored = QuantizedTensor(codes, torch.ones(2, 1), grid, Granularity.CHANNEL, 3)
    assert stored.decode().tolist() == [[4.0, -1.0, 0.0], [-8.0, -1.0, -2.0]]


def test_bits_per_weight_count_the_table():
    assert LearnedCodebookGrid(torch.zeros(2, 16)).bits_per_weight(576) == pytest.approx(4.4444, abs=1e-4)


def test_equal_tables_are_equal_grids():
    assert LearnedCodebookGrid(TABLE) == LearnedCodebookGrid(TABLE.clone())
    assert LearnedCodebookGrid(TABLE) != LearnedCodebookGrid(TABLE + 1)
    assert hash(LearnedCodebookGrid(TABLE)) == hash(LearnedCodebookGrid(TABLE.clone()))


def test_bad_tables_and_other_rows_are_refused():
    with pytest.raises(ShapeError, match="has 5"):
        LearnedCodebookGrid(torch.zeros(2, 5))
    grid = LearnedCodebookGrid(TABLE)
    with pytest.raises(ShapeError, match="3 rows"):
        grid.round(torch.zeros(3, 4), grid.fit(torch.zeros(3, 4), 4, RangeSearch()), 4)
