"""The sign test, and a judge: verdicts that hold, that flip with the side, and that cannot be read."""

from __future__ import annotations

import math
import re

import pytest
from chat_servers import chatting, prompt_of

from lowbit.blind.result import AnswerPair, Judged, judge_sentence, sign_test
from lowbit.blind.run import ask_judge, combine, compare_blind, read_verdict
from lowbit.errors import EngineFailure
from lowbit.tasks.endpoint import Endpoint


def reference_sign_test(wins, losses):
    """Adds up all outcomes that are no more likely than this one, as scipy.stats.binomtest does."""
    n = wins + losses
    chances = [math.comb(n, k) / 2**n for k in range(n + 1)]
    return min(1.0, sum(chance for chance in chances if chance <= chances[wins] * (1 + 1e-7)))


@pytest.mark.parametrize("n", [0, 1, 2, 5, 12, 24, 101])
def test_the_sign_test_is_the_exact_binomial_one(n):
    for wins in range(n + 1):
        assert sign_test(wins, n - wins) == pytest.approx(reference_sign_test(wins, n - wins), rel=1e-9)


def test_known_values_of_the_sign_test():
    assert sign_test(9, 1) == pytest.approx(22 / 1024)
    assert sign_test(10, 0) == pytest.approx(2 / 1024)
    assert sign_test(0, 0) == 1


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Short and right. [[A]]", "A"),
        ("[[B]]", "B"),
        ("[[C]] because both … [[C]]", "C"),
        ("<think>first [[A]], no</think> [[B]]", "B"),
        ("A is better", None),
        ("[[A]] or [[B]]", None),
        ("[[D]]", None),
        ("[A]", None),
        ("", None),
        (None, None),
        (["[[A]]"], None),
    ],
)
def test_a_verdict_is_read_or_not_and_never_guessed(reply, verdict):
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("A", "B", "a"), ("B", "A", "b"), ("C", "C", "tie"), ("A", "A", "flip"), ("B", "B", "flip"), ("A", "C", "half"),
        ("C", "A", "half"), (None, "A", "unreadable"), ("B", None, "unreadable"), (None, None, "unreadable"),
    ],
)  # fmt: skip
def test_two_verdicts_make_one(first, second, verdict):
    assert combine(first, second) == verdict


PAIRS = (
    AnswerPair("honest", "", "long answer", "no", "a"),
    AnswerPair("second", "", "no", "longer answer", "b"),
    AnswerPair("biased", "", "yes", "no", "a"),
    AnswerPair("mute", "", "yes", "no", "b"),
    AnswerPair("equal", "", "same", "same", "a"),
    AnswerPair("drawn", "", "yes", "nah", "a"),
)


def opinion(body):
    """Prefers the longer answer, the first one of "biased", and says nothing to "mute"."""
    parts = re.split(r"\[(?:Question|Answer of assistant [AB]|End)\]", prompt_of(body))
    question, first, second = (part.strip() for part in parts[1:4])
    if question == "mute":
        return "I would rather not say."
    if question == "biased":
        return "[[A]]"
    return "[[C]]" if len(first) == len(second) else "[[A]]" if len(first) > len(second) else "[[B]]"


def test_every_pair_that_differs_is_judged_on_both_sides():
    with chatting(opinion, ("critic",)) as (url, asked):
        found, forget = ask_judge(PAIRS, Endpoint(url))
        forget()
    assert found.verdicts == ("a", "b", "flip", "unreadable", None, "tie")
    assert len(asked) == 2 * 5
    assert {body["temperature"] for body in asked} == {0}
    values = found.to_dict()
    assert (values["wins_a"], values["wins_b"], values["ties"], values["flips"]) == (1, 1, 2, 1)
    assert (values["pairs"], values["unreadable"], values["p"]) == (5, 1, 1.0)
    assert values["share_of_flips"] == 1 / 4


def test_a_judge_that_never_answers_in_the_form_says_nothing_of_the_models():
    with chatting(lambda body: "Both are nice.") as (url, _):
        found, _ = ask_judge(PAIRS, Endpoint(url))
    assert found.count("unreadable") == 5
    assert found.share_of_flips is None
    assert judge_sentence(found, "A", "B") == "no verdict of the judge can be read, so nothing is said of the models"


def test_the_sentence_prefers_only_what_chance_does_not_explain():
    def words(a, b):
        return judge_sentence(Judged("j", "u", ("a",) * a + ("b",) * b), "A", "B")

    assert "neither is preferred" in words(5, 2)
    assert "A is preferred" in words(12, 1)
    assert "B is preferred" in words(1, 12)


def test_a_judging_goes_on_where_a_dying_judge_stopped_it():
    broken = ["biased"]

    def say(body):
        return ("gone", 503) if any(word in prompt_of(body) for word in broken) else opinion(body)

    with chatting(say) as (url, asked):
        with pytest.raises(EngineFailure, match="answers 503"):
            ask_judge(PAIRS, Endpoint(url))
        broken.clear()
        before = len(asked)
        found, _ = ask_judge(PAIRS, Endpoint(url))
    assert len(asked) - before == 6
    assert found.verdicts == ("a", "b", "flip", "unreadable", None, "tie")
    assert found.notes == ("4 replies of the judge are from a run that was stopped",)


def test_a_judge_that_is_one_of_the_models_is_said(prompts):
    with chatting(lambda body: prompt_of(body)[:3]) as (a, _), chatting(lambda body: "[[C]]") as (b, _):
        found = compare_blind(a, b, prompts, judge=b)
    assert "the judge is one of the two models, and models prefer their own words" in found.notes
    assert found.judged.count("tie") == 3


def test_a_judge_by_name(prompts):
    with chatting(opinion, ("x", "critic")) as (url, asked), chatting(lambda body: prompt_of(body)) as (a, _):
        found = compare_blind(a, a, prompts, judge=url, judge_model="critic")
        assert not asked  # the answers are the same
    assert found.judged.model == "critic"
    assert found.judged.verdicts == (None,) * 3
