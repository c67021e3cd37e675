"""Outlier channels, static ranges, and how far one text's statistics are from another's."""

import json

import pytest
import torch

from lowbit.calibrate.summary import (
    InputSummary,
    coverage_notes,
    distance,
    effective_rank,
    is_kept,
    mismatch,
    pack_vocabulary,
    summaries_of,
    summarize,
    unpack_vocabulary,
    unseen_share,
)
from lowbit.diagnosis.inputs import (
    InputStats,
    Mismatch,
    calibration_mismatch,
    clipped_inputs,
    is_mismatch,
    outlier_inputs,
)
from lowbit.errors import CheckpointError
from lowbit.schemes import SCHEMES
from lowbit.tensors import LayerStats


def stats_of(mean_sq, tokens=100):
    return LayerStats(tokens, mean_sq.sqrt(), mean_sq, mean_sq.sqrt())


def input_stats(absmax, mean_sq=None, halves=()):
    mean_sq = absmax.square() if mean_sq is None else mean_sq
    return InputStats("model.layers.0.x", 0, ("model.layers.0.x_proj",), absmax, mean_sq, halves)


def test_a_summary_keeps_mean_squares_to_a_thirtieth_of_a_doubling():
    mean_sq = torch.exp2(torch.linspace(-12, 10, 500))
    summary = summarize("x", 3, stats_of(mean_sq))
    assert (summary.name, summary.block, summary.tokens) == ("x", 3, 100)
    error = (summary.log2_mean_sq - mean_sq.log2()).abs().max().item()
    assert error <= summary.step / 2 + 1e-5
    assert error < 0.05
    assert mismatch(summary, stats_of(mean_sq)) < 0.05


def test_distance_is_in_doublings_and_leaves_dead_channels_out():
    mean_sq = torch.tensor([1.0, 2.0, 4.0, 0.0])
    summary = summarize("x", None, stats_of(mean_sq))
    assert summary.log2_mean_sq[3] == -torch.inf
    assert distance(summary, mean_sq * 4) == pytest.approx(2, abs=0.02)
    assert distance(summary, torch.tensor([2.0, 1.0, 4.0, 9.0])) == pytest.approx((2 / 3) ** 0.5, abs=0.02)


def test_constant_and_dead_inputs_have_summaries():
    assert distance(summarize("x", 0, stats_of(torch.ones(4))), torch.ones(4)) == 0
    assert distance(summarize("x", 0, stats_of(torch.zeros(4))), torch.ones(4)) == 0


def test_the_effective_rank_counts_directions_whatever_their_size():
    assert effective_rank(torch.diag(torch.tensor([1.0, 100.0, 1e-4, 0.0]))) == pytest.approx(3)
    one = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 6))
    assert effective_rank(one) == pytest.approx(1)
    assert effective_rank(torch.block_diag(one, one)) == pytest.approx(2)
    assert effective_rank(torch.zeros(4, 4)) == 0
    wide = torch.randn(4000, 600, generator=torch.Generator().manual_seed(0))  # more than one slab of rows
    correlations = (wide.T @ wide) / wide.norm(dim=0) / wide.norm(dim=0)[:, None]
    assert effective_rank(wide.T @ wide) == pytest.approx(600**2 / correlations.square().sum().item(), rel=1e-4)


def test_the_effective_rank_is_in_the_summary_where_a_hessian_was_measured():
    mean_sq = torch.ones(4)
    assert summarize("x", 0, stats_of(mean_sq)).effective_rank is None
    stats = LayerStats(100, mean_sq, mean_sq, mean_sq, 100 * torch.eye(4))
    assert summarize("x", 0, stats).effective_rank == pytest.approx(4)


def test_too_few_tokens_for_the_channels_are_said():
    assert coverage_notes(4 * 1536, 1536) == []
    (note,) = coverage_notes(4 * 1536 - 1, 1536)
    assert note.startswith("6,143 tokens of calibration text are few for inputs of 1,536 channels, whose statistics")
    assert "take 6,144: give more" in note


def test_statistics_of_another_model_are_refused():
    summary = summarize("x", 0, stats_of(torch.ones(4)))
    with pytest.raises(CheckpointError, match="4 channels; this model has 5"):
        distance(summary, torch.ones(5))
    with pytest.raises(CheckpointError, match="not base64"):
        InputSummary(name="x", block=0, tokens=1, low=0.0, step=0.1, codes="§").log2_mean_sq  # noqa: B018


def test_at_most_eight_blocks_are_kept_with_the_first_and_the_last():
    for blocks in (1, 2, 7, 8, 9, 30, 80):
        kept = [block for block in range(blocks) if is_kept(block, blocks)]
        assert len(kept) == min(8, blocks)
        assert (kept[0], kept[-1]) == (0, blocks - 1)


def test_single_experts_are_left_out():
    stats = {"model.layers.0.mlp_input": stats_of(torch.ones(2)), "l.experts.3.hidden": stats_of(torch.ones(2))}
    assert list(summaries_of(stats, 0, 4)) == ["model.layers.0.mlp_input"]
    assert summaries_of(stats, 1, 100) == {}


def test_vocabulary_round_trip():
    ids = torch.tensor([[0, 3], [8, 3]])
    seen = unpack_vocabulary(pack_vocabulary(ids), 20)
    assert seen.nonzero()[:, 0].tolist() == [0, 3, 8]
    assert unseen_share(torch.tensor([3, 4, 8, 25]), seen) == 0.5


@pytest.mark.parametrize("text", ["§", "AAAA", pack_vocabulary(torch.tensor([10**6]))])
def test_a_hostile_vocabulary_is_refused(text):
    with pytest.raises(CheckpointError):
        unpack_vocabulary(text, 100)


def test_outlier_channels_are_large_and_far_above_the_median():
    absmax = torch.ones(100)
    assert outlier_inputs([input_stats(absmax)]) == []
    assert outlier_inputs([input_stats(absmax * 50)]) == []  # large altogether
    absmax[[7, 70]] = torch.tensor([19.0, 25.0])
    (found,) = outlier_inputs([input_stats(absmax)])
    assert found.channels == (70,)
    assert (found.largest, found.ratio) == (25, 25)
    assert outlier_inputs([input_stats(absmax / 5)]) == []  # under 6


def test_static_ranges_that_the_text_exceeds():
    scheme = SCHEMES["W8A8_STATIC"]
    name = "model.layers.0.x_proj.weight"
    stats = [input_stats(torch.tensor([1.0, 30.0]))]
    assert clipped_inputs(stats, {name: scheme}, {name: 20 / 127}) == []
    (found,) = clipped_inputs(stats, {name: scheme}, {name: 10 / 127})
    assert (found.tensor, found.largest) == (name, 30)
    assert found.reach == pytest.approx(10)
    lopsided = clipped_inputs(stats, {name: scheme}, {name: 10 / 127}, {name: -100})
    assert lopsided == []  # it reaches 10 / 127 · 227 on one side


def test_the_nearer_stream_counts_and_halves_are_the_null():
    mean_sq = torch.exp2(torch.linspace(-3, 3, 64))
    near = input_stats(mean_sq, mean_sq * 2, (mean_sq, mean_sq * 4))
    far = input_stats(mean_sq, mean_sq * 16, (mean_sq, mean_sq))
    recorded = [summarize(near.name, 0, stats_of(mean_sq))]
    found = calibration_mismatch(recorded, [{near.name: far}, {near.name: near}])
    assert found is not None
    assert (found.distance, found.halves) == (pytest.approx(1, abs=0.05), pytest.approx(2))
    assert calibration_mismatch(recorded, [{}]) is None


@pytest.mark.parametrize(
    ("distance_", "halves", "unseen", "found"),
    [(1.2, 0.4, 0.5, True), (1.2, 0.4, 0.05, False), (1.2, 1.0, 0.5, False), (0.5, 0.1, 0.5, False),
     (0.7, 0.3, None, False), (1.0, 0.3, None, True)],
)  # fmt: skip
def test_rule_of_a_mismatch(distance_, halves, unseen, found):
    assert is_mismatch(Mismatch(distance_, halves, "x", 1), unseen) is found


def test_tokens_that_never_occurred_are_a_mismatch_whatever_was_measured():
    assert is_mismatch(None, 1.0)
    assert is_mismatch(Mismatch(0.1, 0.5, "x", 1), 0.95)
    assert not is_mismatch(None, 0.5)
    assert not is_mismatch(None, None)


def test_summaries_are_plain_values():
    """They go through JSON in the folder of a run."""
    (summary,) = summaries_of({"x": stats_of(torch.rand(8))}, 0, 1).values()
    assert json.loads(json.dumps(summary)) == summary
    assert InputSummary(**summary).tokens == 100
