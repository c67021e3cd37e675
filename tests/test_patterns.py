"""Patterns of users and checkpoints: what `re` finds, in time that does not explode."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit import patterns
from lowbit.patterns import PatternError, compiled, up_to_a_dot

NAME = "model.layers.0.self_attn.q_proj"
LONG = ".".join([NAME] * 40)


@pytest.mark.parametrize("text", [
    "q_proj$", r"^model\.layers\.(0|1)\.", "(?i)Q_PROJ", "(?!.*mlp).*q_proj", r"(?<=attn\.)q_proj", r"(\d)\.\1",
    "[[:alpha:]]", r"layers\.[0-9]+\.(self_attn|mlp)", "mlp", r".*\.q_proj\Z", "x{2,1001}", "é", "",
])  # fmt: skip
@pytest.mark.parametrize("name", [NAME, "model.layers.1.mlp.up_proj", "0.0", "q_proj\n", "é", ""])
def test_finds_what_re_finds(text, name):
    pattern = compiled(text)
    assert pattern.match(name) == bool(re.match(text, name))
    assert pattern.search(name) == bool(re.search(text, name))


@given(st.text("ab.*+?()[]|^$\\d", max_size=8), st.text("ab1.", max_size=6))
def test_any_pattern_finds_what_re_finds(text, name):
    try:
        expected = bool(re.match(text, name)), bool(re.search(text, name))
    except (re.error, FutureWarning):
        return
    assert (compiled(text).match(name), compiled(text).search(name)) == expected


@pytest.mark.parametrize("text", ["(([a-z0-9._])+)+X", "(a|a)*b|(.*)*Y", "(.*a){20}Z", "(x+x+)+y"])
def test_patterns_that_explode_are_matched(text):
    """For minutes, by `re`."""
    assert not compiled(text).match(LONG)


def test_what_no_engine_matches_in_time_is_refused(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    with pytest.raises(PatternError, match="takes too long"):
        compiled(r"(?!b)(a|a)*\1[bc]$").match("a" * 60)


@pytest.mark.parametrize("text", ["(", "[", "a{2,1}", r"\p{L}", "*", "x" * 20_000, "(" * 5000 + ")" * 5000])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(PatternError):
        compiled(text)


@pytest.mark.parametrize(("entry", "matches"), [
    ("model.layers.0", True), ("model.layers", True), ("model.layer", False), ("model.layers.", True),
    ("lm_head", False),
])  # fmt: skip
def test_an_entry_ends_at_a_dot_or_at_the_end(entry, matches):
    assert up_to_a_dot(entry).match(NAME) is matches
