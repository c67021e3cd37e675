"""The cases that the default suite takes of a matrix."""

from __future__ import annotations

import pytest

from sampling import left_out

CASES = [f"tests/test_x.py::test_a[{number}]" for number in range(31)]


@pytest.mark.parametrize(("count", "part", "run"), [(31, 3, 11), (30, 3, 10), (2, 4, 1), (1, 4, 1), (31, 1, 31)])
def test_one_in_so_many_runs_rounded_up(count, part, run):
    assert count - len(left_out(CASES[:count], part)) == run


def test_a_new_case_changes_what_is_drawn_by_one_at_most():
    before, after = (set(cases) - left_out(cases, 3) for cases in (CASES[:-1], CASES))
    assert len(before - after) <= 1
    assert len(after - before) <= 1


def test_tests_that_share_draw_alike_and_others_do_not():
    others = [case.replace("test_a", "test_b") for case in CASES]
    assert left_out(others, 3, shared=True) == {c.replace("test_a", "test_b") for c in left_out(CASES, 3, shared=True)}
    assert left_out(others, 3) != {case.replace("test_a", "test_b") for case in left_out(CASES, 3)}


def test_what_is_kept_is_kept():
    case = sorted(left_out(CASES, 3))[0]
    word = case.partition("[")[2]
    assert case not in left_out(CASES, 3, keep=(word,))
