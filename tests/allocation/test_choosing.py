"""The mix of least cost within so many bytes."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from lowbit.allocation.choose import choose_within

options = st.dictionaries(st.sampled_from("abcde"), st.tuples(st.integers(1, 40), st.floats(0, 10)), min_size=1)
tensors = st.dictionaries(st.sampled_from(["q", "k", "v", "o"]), options, min_size=1)


def cost_of(mix, offered):
    return sum(offered[name][kind][1] for name, kind in mix.items())


def bytes_of(mix, offered):
    return sum(offered[name][kind][0] for name, kind in mix.items())


def best_of_all(offered, budget):
    """Every mix, tried."""
    mixes = (dict(zip(offered, kinds, strict=True)) for kinds in product(*offered.values()))
    return min(cost_of(mix, offered) for mix in mixes if bytes_of(mix, offered) <= budget)


@given(tensors, st.integers(0, 160))
def test_no_mix_of_its_bytes_costs_less(offered, budget):
    mix = choose_within(offered, budget)
    least = sum(min(size for size, _ in its.values()) for its in offered.values())
    assert (mix is None) == (least > budget)
    if mix is None:
        return
    assert mix.keys() == offered.keys()
    used = bytes_of(mix, offered)
    assert used <= budget
    largest = max(cost for its in offered.values() for _, cost in its.values())
    best = best_of_all(offered, budget)
    assert best <= cost_of(mix, offered) <= best + largest + 1e-9  # short of it by a step of one tensor


def test_the_bytes_go_where_they_save_most():
    offered = {"q": {"low": (1, 5.0), "high": (2, 1.0)}, "k": {"low": (1, 5.0), "high": (2, 4.0)}}
    assert choose_within(offered, 3) == {"q": "high", "k": "low"}
    assert choose_within(offered, 4) == {"q": "high", "k": "high"}
    assert choose_within(offered, 1) is None


def test_a_type_above_the_hull_is_passed_over():
    """More bytes at no less cost, or a step that saves less than the next: neither is worth its bytes."""
    offered = {"q": {"a": (1, 9.0), "worse": (2, 9.5), "dent": (3, 8.9), "b": (4, 1.0)}}
    assert choose_within(offered, 3) == {"q": "a"}
    assert choose_within(offered, 4) == {"q": "b"}


def test_a_step_that_no_longer_fits_leaves_room_for_a_smaller_one():
    offered = {"q": {"low": (1, 100.0), "high": (50, 0.0)}, "k": {"low": (1, 1.0), "high": (2, 0.9)}}
    assert choose_within(offered, 10) == {"q": "low", "k": "high"}
