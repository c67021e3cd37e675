"""The Hessian of GPTQ: summed over batches, damped, factored; each against a few lines of float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from lowbit.calibrate.block_modules import BlockInput
from lowbit.calibrate.statistics import InputKeeper, InputStatistics
from lowbit.errors import NonFiniteError
from lowbit.rounding.hessian import Factor, InputData, PreparedHessian, prepare
from lowbit.tensors import LayerStats

SOURCE = BlockInput("block.attention", ())


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated columns of different size, float32 [tokens, columns]."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=random) / columns**0.5
    x = torch.randn(tokens, columns, generator=random) @ (mixing + torch.eye(columns))
    return x * (0.2 + torch.rand(columns, generator=random))


def summed(
    batches: list[Tensor], unquantized: list[Tensor] | None = None, lost: list[Tensor] | None = None,
    shrinkage: float = 0.0,
) -> LayerStats:  # fmt: skip
    keeper = None if unquantized is None else InputKeeper()
    statistics = InputStatistics(torch.float32, unquantized=keeper, shrinkage=shrinkage)
    for index, batch in enumerate(batches):
        if keeper is not None and unquantized is not None:
            keeper.look(SOURCE, unquantized[index])
        if lost is not None:
            statistics.lost = partial(lost.__getitem__, index)
        statistics.look(SOURCE, batch)
    if keeper is not None:
        statistics.end_of_unquantized()
    return statistics.take()[SOURCE.name]


def prepared(hessian: Tensor, damping: float = 0.01) -> PreparedHessian:
    diagonal = hessian.diagonal().clamp(min=0)
    return prepare(LayerStats(1, diagonal.sqrt(), diagonal, diagonal, hessian.float()), damping)


def factor_of(hessian: PreparedHessian, **order) -> Factor:
    factor = hessian.factor(**order)
    assert factor is not None
    return factor


def upper_root(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """U of (H + damping · mean(diag H) · 1)⁻¹ = Uᵀ U, float64, for columns that are all alive."""
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian)).double()
    return torch.linalg.cholesky(damped[order][:, order].inverse(), upper=True)


# Sums


@pytest.mark.parametrize("columns", [48, 600])  # 600: more than one tile
def test_batches_add_up_to_the_product_of_all_tokens(columns):
    x = inputs(700, columns)
    batches = [x[:1], x[1:300], x[300:300], x[300:]]
    stats = summed(batches)
    exact = x.double().T @ x.double()
    assert stats.hessian is not None
    torch.testing.assert_close(stats.hessian.double(), exact, rtol=1e-5, atol=1e-5 * exact.diagonal().max().item())
    assert torch.equal(stats.hessian, stats.hessian.T)
    assert stats.tokens == 700
    torch.testing.assert_close(stats.mean_sq, x.square().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.mean_abs, x.abs().mean(0), rtol=1e-5, atol=0)
    assert torch.equal(stats.absmax, x.abs().amax(0))


def test_an_input_that_is_not_finite_is_refused_and_named():
    x = inputs(20, 48)
    x[3, 7] = torch.inf
    with pytest.raises(NonFiniteError, match=r"block\.attention is not finite in 1 of 48 channels .* channel 7"):
        summed([x])


# The factor


@pytest.mark.parametrize("columns", [1, 7, 128, 129, 300])
def test_the_factor_is_that_of_the_damped_inverse(columns):
    x = inputs(2 * columns + 50, columns)
    hessian = x.T @ x
    prepared_hessian = prepared(hessian)
    for by_importance in (True, False):
        factor = factor_of(prepared_hessian, by_importance=by_importance)
        stored = torch.arange(columns)
        expected = hessian.diagonal().argsort(descending=True, stable=True) if by_importance else stored
        assert torch.equal(factor.order, expected)
        upper = upper_root(hessian, factor.order, 0.01)
        spread = upper / upper.diagonal()[:, None]
        torch.testing.assert_close(factor.spread.double(), spread, rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(factor.cost.double(), upper.diagonal() ** -2, rtol=1e-3, atol=0)
        assert factor.damping == 0.01


def test_columns_that_are_rounded_together_divide_by_their_block():
    """spread = D⁻¹ U with D the block diagonal of U; the cost of column j is row j of a block's inverse, squared."""
    x = inputs(200, 24)
    hessian = x.T @ x
    factor = factor_of(prepared(hessian), run=8, step=4)
    upper = upper_root(hessian, factor.order, 0.01)
    for start in range(0, 24, 4):
        rows = slice(start, start + 4)
        inverse = upper[rows, rows].inverse()
        torch.testing.assert_close(factor.spread[rows].double(), inverse @ upper[rows], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(factor.cost[rows].double(), inverse.square().sum(1), rtol=1e-3, atol=0)


def test_orders_of_runs_and_steps():
    """Runs by their falling sum, steps within them likewise, ties as stored, dead columns last."""
    diagonal = torch.tensor([1.0, 2, 3, 1, 9, 0, 4, 4, 0, 0, 2, 2])
    hessian = prepared(diagonal.diag())

    def order(**of):
        return factor_of(hessian, **of).order.tolist()

    assert order() == [4, 6, 7, 2, 1, 10, 11, 0, 3, 5, 8, 9]
    assert order(run=4) == [4, 6, 7, 5, 2, 1, 0, 3, 10, 11, 8, 9]
    assert order(run=4, step=2) == [4, 5, 6, 7, 2, 3, 0, 1, 10, 11, 8, 9]
    assert order(run=4, step=4) == [4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11]
    assert order(run=8) == [4, 6, 7, 2, 1, 0, 3, 5, 10, 11, 8, 9]  # the last run is short
    assert order(by_importance=False) == list(range(12))


def test_factors_are_made_once():
    hessian = prepared(torch.eye(8))
    assert hessian.factor() is hessian.factor()
    assert hessian.factor(run=4) is not hessian.factor()


def test_coordinate_descent_moves_columns_by_the_damped_hessian():
    x = inputs(100, 20)
    hessian = prepared(x.T @ x, 0.1)
    factor = factor_of(hessian)
    damped = (x.T @ x)[factor.order][:, factor.order]
    damped.diagonal().add_(0.1 * damped.diagonal().mean())
    expected = (damped / damped.diagonal()).fill_diagonal_(0)
    torch.testing.assert_close(hessian.descent(factor), expected)
    assert hessian.descent(factor) is hessian.descent(factor)


# Damping and dead columns


def test_damping_is_a_part_of_the_mean_over_live_columns():
    """Of diag(2, 6) the mean is 4, whatever stands beside it: half of it makes 4 and 8 of 2 and 6.

    A dead column counts neither as its 0 nor as the 1 that stands in for it: damping would then depend on how many
    there are, and on the unit of the inputs.
    """
    hessian = prepared(torch.tensor([2.0, 0.0, 6.0, 0.0]).diag(), damping=0.5)
    factor = factor_of(hessian, by_importance=False)
    assert factor.cost.tolist() == pytest.approx([2 + 2, 1 + 2, 6 + 2, 1 + 2])
    assert hessian.diagonal.tolist() == [2, 0, 6, 0]
    assert hessian.dead.tolist() == [False, True, False, True]
    assert hessian.hessian.diagonal().tolist() == [2, 1, 6, 1]
    assert prepared(torch.zeros(3, 3), damping=0.5).factor() is not None, "no live column at all: the mean counts as 1"


def test_live_columns_are_factored_as_if_the_dead_ones_were_not_there():
    x = inputs(150, 40)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[0, 13, 14, 39]] = True
    with_dead = x.clone()
    with_dead[:, dead] = 0
    factor = factor_of(prepared(with_dead.T @ with_dead), by_importance=False)
    alone = factor_of(prepared(x[:, ~dead].T @ x[:, ~dead]), by_importance=False)
    torch.testing.assert_close(factor.spread[~dead][:, ~dead], alone.spread, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factor.cost[~dead], alone.cost, rtol=1e-4, atol=0)
    assert torch.equal(factor.spread[dead], torch.eye(40)[dead]), "a dead column hands on nothing"
    assert torch.equal(factor.spread[:, dead], torch.eye(40)[:, dead]), "and receives nothing"


def test_what_correlates_with_a_dead_column_is_cleared():
    """A diagonal of 0 beside entries that are not: rounding of sums, or a file of someone else's."""
    hessian = torch.tensor([[2.0, 0.3, 0.5], [0.3, 0.0, 0.1], [0.5, 0.1, 1.0]])
    assert prepared(hessian).hessian.tolist() == torch.tensor([[2, 0, 0.5], [0, 1, 0], [0.5, 0, 1]]).tolist()


def test_the_unit_of_the_inputs_does_not_matter():
    x = inputs(100, 30)
    x[:, 4] = 0
    factor, scaled = (factor_of(prepared(hessian)) for hessian in (x.T @ x, 2.0**20 * (x.T @ x)))
    live = factor.order != 4
    torch.testing.assert_close(scaled.spread, factor.spread)
    torch.testing.assert_close(scaled.cost[live], 2.0**20 * factor.cost[live])


def test_float64_is_tried_before_more_damping():
    """Eigenvalues down to 2e-9 of the largest: float32 finds no factor at this damping, float64 does."""
    columns = 64
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=torch.Generator().manual_seed(1)).double())[0]
    hessian = (basis * torch.logspace(0, -10, columns).double()) @ basis.T
    damping = 1e-7
    damped = hessian.float() + damping * hessian.diagonal().mean().float() * torch.eye(columns)
    assert torch.linalg.cholesky_ex(damped).info > 0, "or there is nothing to see here"
    factor = factor_of(prepared(hessian, damping))
    assert factor.damping == damping
    upper = upper_root(hessian.float(), factor.order, damping)
    torch.testing.assert_close(factor.cost.double(), upper.diagonal() ** -2, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("least", "damping", "took"), [(-0.005, 0.01, 0.01), (-0.05, 0.01, 0.1), (-0.5, 0.01, 1.0), (-0.0005, 0.0, 1e-3)]
)
def test_damping_is_raised_tenfold_until_there_is_a_factor(least, damping, took):
    """An eigenvalue of `least` parts of the mean needs more damping than that; none at all is raised from 1e-4."""
    columns = 32
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=torch.Generator().manual_seed(3)).double())[0]
    values = torch.ones(columns).double()
    values[0] = least
    factor = factor_of(prepared((basis * values) @ basis.T, damping))
    assert factor.damping == pytest.approx(took)


def test_no_factor_at_the_largest_damping_is_none():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 100.0
    assert prepared(hessian).factor() is None
    assert prepared(hessian).factor(run=4, step=4) is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_hessian_that_is_not_finite_is_refused(bad):
    hessian = torch.eye(8)
    hessian[2, 2] = bad
    with pytest.raises(NonFiniteError, match="8 columns over 1 tokens"):
        prepared(hessian)


# Shrinkage


@pytest.mark.parametrize("dead", [False, True])
def test_shrinkage_takes_back_off_diagonals_and_keeps_every_diagonal(dead):
    x = inputs(200, 24)
    if dead:
        x[:, 5] = 0
    diagonal = x.square().sum(0)
    hessian = prepare(LayerStats(200, diagonal.sqrt(), diagonal, diagonal, x.T @ x), 0.01, 0.25)
    wanted = 0.75 * (x.T @ x) + 0.25 * diagonal.diag()
    if dead:
        wanted[5, 5] = 1.0
    factor = factor_of(hessian)
    wanted.diagonal().add_(0.01 * diagonal[diagonal > 0].mean())
    wanted = wanted[factor.order][:, factor.order]
    upper = torch.linalg.cholesky(wanted.double().inverse(), upper=True)
    torch.testing.assert_close(factor.spread.double(), upper / upper.diagonal()[:, None], rtol=2e-3, atol=2e-4)
    descent = (wanted / wanted.diagonal()).fill_diagonal_(0)
    torch.testing.assert_close(hessian.descent(factor), descent, rtol=1e-4, atol=1e-6)


def test_all_shrunk_leaves_nothing_to_correct():
    x = inputs(200, 24)
    hessian = prepare(summed([x]), shrinkage=1.0)
    factor = factor_of(hessian)
    torch.testing.assert_close(factor.spread, torch.eye(24))
    assert not hessian.descent(factor).any()


def test_the_drift_is_foretold_by_the_shrunk_hessian():
    x, difference = inputs(300, 24), inputs(300, 24, seed=1)
    hessian = (x.T @ x).double()
    shrunk = 0.75 * hessian + 0.25 * hessian.diagonal().diag()
    shrunk.diagonal().add_(0.01 * hessian.diagonal().mean())
    expected = (difference.T @ x).double() @ shrunk.inverse()
    drift = summed([x], [x + difference], shrinkage=0.25).drift
    assert drift is not None
    torch.testing.assert_close(drift.double(), expected, rtol=1e-3, atol=1e-5)


# The correction for what came before


def test_drift_is_the_regression_of_what_was_lost_on_the_input():
    """D = C (H + λ)⁻¹ with C = Σ (x₀ − x) xᵀ, λ a hundredth of the mean of diag H."""
    unquantized = inputs(300, 48)
    x = unquantized + 0.1 * inputs(300, 48, seed=1)
    stats = summed([x[:100], x[100:]], [unquantized[:100], unquantized[100:]])
    x, unquantized = x.double(), unquantized.double()
    damped = x.T @ x
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    expected = torch.linalg.solve(damped, x.T @ (unquantized - x)).T
    assert stats.drift is not None
    torch.testing.assert_close(stats.drift.double(), expected, rtol=1e-3, atol=1e-5)


def test_the_corrected_weight_makes_the_unquantized_output_of_the_quantized_input():
    """W* = argmin ‖W* x − W x₀‖² + λ ‖W* − W‖², of which a fraction is taken."""
    unquantized = inputs(300, 48)
    x = unquantized + 0.1 * inputs(300, 48, seed=1)
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    hessian = prepare(summed([x], [unquantized]))
    wide, target = x.double(), unquantized.double() @ weight.double().T
    ridge = (0.01 * (wide.T @ wide).diagonal().mean()).sqrt()
    left = torch.cat([wide, ridge * torch.eye(48).double()])
    right = torch.cat([target, ridge * weight.double().T])
    best = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(hessian.corrected(weight, 1.0).double(), best, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        hessian.corrected(weight, 0.25), weight + 0.25 * (hessian.corrected(weight, 1.0) - weight)
    )
    assert torch.equal(hessian.corrected(weight, 0.0), weight)
    assert torch.equal(prepare(summed([x])).corrected(weight, 1.0), weight)


def test_the_corrected_weight_makes_up_for_what_the_stream_lost():
    """W* = argmin ‖(r + W* x) − (r₀ + W x₀)‖² + λ ‖W* − W‖², of which a fraction is taken; rows by themselves."""
    unquantized, lost = inputs(300, 48), inputs(300, 5, seed=3)
    x = unquantized + 0.1 * inputs(300, 48, seed=1)
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    hessian = prepare(summed([x[:200], x[200:]], [unquantized[:200], unquantized[200:]], [lost[:200], lost[200:]]))
    wide, target = x.double(), unquantized.double() @ weight.double().T + lost.double()
    ridge = (0.01 * (wide.T @ wide).diagonal().mean()).sqrt()
    left = torch.cat([wide, ridge * torch.eye(48).double()])
    best = torch.linalg.lstsq(left, torch.cat([target, ridge * weight.double().T])).solution.T
    torch.testing.assert_close(hessian.corrected(weight, 1.0, 1.0).double(), best, rtol=1e-3, atol=1e-4)
    half = hessian.corrected(weight[2:4], 0.5, 0.5, slice(2, 4))
    torch.testing.assert_close(half, weight[2:4] + 0.5 * (hessian.corrected(weight, 1.0, 1.0) - weight)[2:4])


def test_what_the_unquantized_model_was_not_run_on_does_not_count_as_drift():
    """Batches after `end_of_unquantized` add to H alone."""
    unquantized, x = inputs(100, 48), inputs(100, 48) + 0.1 * inputs(100, 48, seed=1)
    keeper = InputKeeper()
    statistics = InputStatistics(torch.float32, unquantized=keeper)
    keeper.look(SOURCE, unquantized)
    statistics.look(SOURCE, x)
    statistics.end_of_unquantized()
    statistics.look(SOURCE, inputs(50, 48, seed=5))
    stats, compared = statistics.take()[SOURCE.name], summed([x], [unquantized])
    assert stats.drift is not None
    assert compared.drift is not None
    assert torch.equal(stats.drift, compared.drift)
    assert stats.tokens == 150


# Threads


def test_threads_change_no_bit():
    x = inputs(700, 520)
    stats = LayerStats(
        700, x[0], x[0], x[0], x.T @ x, torch.randn(520, 520, generator=torch.Generator().manual_seed(0))
    )
    weight = torch.randn(300, 520, generator=torch.Generator().manual_seed(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            hessian = prepare(stats)
            factor = factor_of(hessian)
            results.append((factor.spread, factor.cost, factor.order, hessian.corrected(weight, 0.5)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for ours, theirs in zip(result, results[0], strict=True):
            assert torch.equal(ours, theirs)


def test_the_energy_of_a_small_error_behind_a_massive_channel_is_exact_and_never_negative():
    """Bfloat16 products of this H are off by more than the error itself."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator, dtype=torch.float64)
    x[:, 3] *= 1400
    x[:, 7] = x[:, 3] / 1400 + 1e-3 * x[:, 7]
    error = torch.zeros(4, 64, dtype=torch.float64)
    error[:, 3], error[:, 7] = 1.0, -1400.0  # cancels in the output but for a thousandth of channel 7
    hessian = x.t() @ x
    stats = LayerStats(512, *torch.zeros(3, 64), hessian.float())
    expected = (error @ hessian * error).sum().item()
    found = InputData(stats).energy(error.float())
    assert found >= 0
    assert found == pytest.approx(expected, rel=0.2)
    assert InputData(stats).energy(torch.zeros(2, 64)) == 0
