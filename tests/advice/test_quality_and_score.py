"""Expected quality has sources and a sane order; the score is what its module says."""

from __future__ import annotations

import math

import pytest

from lowbit.advice.quality import ANCHORS, OURS, PUBLISHED, SUMS, expected
from lowbit.advice.score import GOALS, SECOND, WORKLOADS, Goal, Ratios, Workload, find_goal, find_workload, score
from lowbit.engines import all_engines
from lowbit.engines.engine import SIXTEEN
from lowbit.engines.llama_cpp import GGUF_TYPES
from lowbit.errors import UsageError


@pytest.mark.parametrize("figure", PUBLISHED.values(), ids=PUBLISHED)
def test_every_published_figure_has_a_source_and_a_model(figure):
    assert figure.loss >= 0
    assert figure.model
    assert figure.metric
    assert any(word in figure.source for word in ("github.com/", "huggingface.co/", "arXiv"))


def test_every_scheme_of_the_engine_table_has_an_expectation():
    schemes = {scheme for engine in all_engines() for row in engine.support for scheme in row.schemes}
    for scheme in schemes:
        found = expected(scheme)
        assert found is not None, scheme
        assert found.source
        assert found.model


@pytest.mark.parametrize(("scheme", "anchor"), ANCHORS.items())
def test_scaled_figures_follow_our_measurements_and_never_beat_their_anchor(scheme, anchor):
    found = expected(scheme)
    ratio = OURS[scheme].kld / OURS[anchor].kld
    assert found.scaled_from == anchor
    assert found.loss == pytest.approx(PUBLISHED[anchor].loss * max(1.0, ratio))
    assert anchor in found.says


@pytest.mark.parametrize(("scheme", "parts"), SUMS.items())
def test_two_errors_add_up(scheme, parts):
    assert expected(scheme).loss == pytest.approx(sum(PUBLISHED[part].loss for part in parts))


def test_more_bits_lose_less():
    by_bits = ["Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_XXS", "Q2_K"]
    losses = [expected(name).loss for name in by_bits]
    assert losses == sorted(losses)
    assert expected("W8A16").loss < expected("FP8_DYNAMIC").loss < expected("W4A16").loss
    assert expected(SIXTEEN).loss == 0


def test_gguf_figures_are_of_one_table():
    assert len({PUBLISHED[name].source for name in GGUF_TYPES}) == 1
    assert PUBLISHED["Q4_K_M"].loss == pytest.approx(100 * math.log(6.382937 / 6.231636))


def test_fine_tuning_makes_up_for_nf4_alone():
    assert expected("NF4", finetuned=True).loss == 0
    assert expected("NF4").loss > 0
    assert expected("FP4", finetuned=True) == expected("FP4")


def test_sixteen_bits_score_nothing():
    for goal in GOALS.values():
        for workload in WORKLOADS.values():
            assert score(Ratios(1, 1, 1), 0.0, goal, workload) == 0


def test_the_score_is_gain_less_cubed_loss():
    goal, workload = Goal("g", 5.0, False, ""), Workload("w", 0.6, 0.4, "")
    found = score(Ratios(2.0, 3.0, 4.0), 1.0, goal, workload)
    assert found == pytest.approx(0.6 * math.log(2) + 0.4 * math.log(3) - 0.2**3)
    cached = score(Ratios(2.0, 3.0, 4.0), 1.0, goal, workload, cache_loss=2.0, second=True)
    assert cached == pytest.approx(found - 0.4**3 - SECOND)  # apart from the loss of the weights
    guessed = score(Ratios(2.0, 3.0, 4.0), 1.0, goal, workload, guessed=True)
    assert 0 < found - guessed < 0.05


def test_memory_is_the_gain_of_goal_memory_and_of_fine_tuning():
    ratios = Ratios(2.0, 3.0, 4.0)
    assert score(ratios, 0.0, GOALS["memory"], WORKLOADS["serve"]) == pytest.approx(math.log(4))
    assert score(ratios, 0.0, GOALS["balanced"], WORKLOADS["finetune"]) == pytest.approx(math.log(4))


@pytest.mark.parametrize(("fewer", "more"), [(1.0, 4.9), (0.2, 3.0)])
def test_goal_memory_takes_the_smaller_however_little_within_the_tolerance(fewer, more):
    """W8A16 of a small model used to win over W4A16: overhead and cache made 4 bits "hardly" smaller."""
    goal, workload = GOALS["memory"], WORKLOADS["serve"]
    assert score(Ratios(1, 1, 2.01), more, goal, workload) > score(Ratios(9, 9, 2.0), fewer, goal, workload)
    beyond = score(Ratios(1, 1, 2.5), goal.tolerance + 0.1, goal, workload)
    assert beyond < score(Ratios(1, 1, 1.5), fewer, goal, workload)


def test_a_loss_as_large_as_the_tolerance_costs_a_speed_up_by_e():
    goal = GOALS["balanced"]
    assert score(Ratios(math.e, 1, 1), goal.tolerance, goal, WORKLOADS["chat"]) == pytest.approx(0.0)


def test_goals_and_workloads_are_found_or_named():
    assert find_goal(None).name == "balanced"
    assert find_goal("Quality").name == "quality"
    assert find_workload("PREFILL").name == "prefill"
    with pytest.raises(UsageError, match="goal"):
        find_goal("cheap")
    with pytest.raises(UsageError, match="workload"):
        find_workload("train")
