"""k-means codebooks."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import UsageError
from lowbit.numerics.integer import IntGrid
from lowbit.numerics.learned_codebook import LearnedCodebookGrid
from lowbit.rounding.kmeans import KmeansOptions, _Rows, kmeans
from lowbit.tensors import LayerStats


def weight(rows: int = 12, columns: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03


def stats_of(importance: torch.Tensor) -> LayerStats:
    return LayerStats(100, importance.sqrt() * 3, importance, importance.sqrt())


def importance(columns: int = 200) -> torch.Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(9)).square() + 0.01


def loss(w, decoded, h):
    return ((w - decoded).square() * h).sum().item()


def lloyd_reference(w, h, values, iterations):
    """Weighted Lloyd on one row, as it is written in a textbook."""
    for _ in range(iterations):
        nearest = (w[:, None] - values[None]).abs().argmin(1)
        for i in range(len(values)):
            if h[nearest == i].sum() > 0:
                values[i] = (h * w)[nearest == i].sum() / h[nearest == i].sum()
    return values


def test_equals_ten_lines_of_torch():
    w, h = weight(3, 60).double(), importance(60).double()
    rows = _Rows(w.float(), h.float())
    found = rows.lloyd(rows.even_steps(8), 25)
    for row in range(3):
        start = torch.linspace(w[row].float().min(), w[row].float().max(), 8).double()
        expected = lloyd_reference(w[row].float().double(), h.float().double(), start, 25)
        assert torch.allclose(found[row], expected, atol=2e-4, rtol=1e-3)


def test_error_from_sums_is_the_error():
    w, h = weight(5, 64), importance(64)
    rows = _Rows(w, h)
    values = rows.quantiles(8)
    nearest = (w.double()[:, :, None] - values[:, None, :]).square().amin(2)
    assert torch.allclose(rows.error(values), (nearest * h.double()).sum(1), rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_the_even_grid_and_plain_kmeans_in_weighted_error(bits):
    w, h = weight(), importance()
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    params = IntGrid(bits, symmetric=False, scale_format="float32").params_from_range(low, high)
    grid = IntGrid(bits, symmetric=False, scale_format="float32")
    even = grid.decode(grid.round(w, params, 200), params, 200)
    found = kmeans(w, bits, stats_of(h))
    assert loss(w, found.decoded, h) < 0.9 * loss(w, even, h)
    assert loss(w, found.decoded, h) < loss(w, kmeans(w, bits).decoded, h)


def test_what_is_stored():
    found = kmeans(weight(), 4, stats_of(importance()))
    grid = found.stored.grid
    assert isinstance(grid, LearnedCodebookGrid)
    assert torch.equal(grid.table, grid.table.half().float())
    assert (grid.table.diff(dim=1) >= 0).all()
    assert torch.equal(found.decoded, found.stored.decode())
    assert found.notes == ("5.280 bits per weight with a codebook for each row",)


def test_without_statistics_it_says_so():
    assert "nothing was calibrated" in kmeans(weight(), 3).notes[0]


def test_importance_of_every_weight():
    w = weight(2, 50)
    fisher = torch.ones_like(w)
    fisher[0, :3], fisher[1, 10:12] = 1e6, 1e6
    found = kmeans(w, 3, importance=fisher).decoded
    assert torch.allclose(found[0, :3], w[0, :3], atol=5e-5)
    assert torch.allclose(found[1, 10:12], w[1, 10:12], atol=5e-5)


def test_degenerate_rows():
    w = weight(5, 40)
    w[0], w[1], w[2, :20] = 0.0, 0.125, 0.5
    w[3] = torch.tensor([-1.0, 2.0]).repeat(20)
    for h in (importance(40), torch.zeros(40)):
        decoded = kmeans(w, 3, stats_of(h)).decoded
        assert torch.equal(decoded[0], w[0])
        assert torch.equal(decoded[1], w[1])
        assert torch.equal(decoded[3], w[3])
        assert decoded.isfinite().all()


def test_fewer_weights_than_values_and_dead_columns():
    w, h = weight(3, 5), torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])
    decoded = kmeans(w, 4, stats_of(h)).decoded
    assert torch.allclose(decoded[:, [0, 2, 4]], w[:, [0, 2, 4]], atol=5e-5)


def test_is_deterministic_and_takes_bfloat16():
    w = weight().bfloat16()
    first, second = (kmeans(w, 4, stats_of(importance()), options=KmeansOptions(iterations=7)) for _ in range(2))
    assert torch.equal(first.stored.codes, second.stored.codes)
    assert torch.equal(first.decoded, second.decoded)


@pytest.mark.parametrize("bits", [0, 9])
def test_other_bits_are_refused(bits):
    with pytest.raises(UsageError, match="cannot be learned"):
        kmeans(weight(), bits)
