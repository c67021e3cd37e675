"""The advice matrix: what the field's cheat-sheet says for eight sizes of model, and the page that shows it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def _maker():
    spec = importlib.util.spec_from_file_location("make_advice", DOCS / "make_advice.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()


@pytest.mark.parametrize("case", range(len(MAKER.CASES)), ids=[case[0] for case in MAKER.CASES])
@pytest.mark.parametrize("model", MAKER.MODELS)
def test_the_fields_advice(model, case):
    heading, arguments, expected = MAKER.CASES[case]
    _, answer = MAKER.asked(model, case)
    best = answer.best
    if expected[0] in answer.left_out:  # no folder in NF4 of a mixture is loaded
        assert "transformers-experts" in answer.left_out[expected[0]]
        assert (case, best.scheme) == (len(MAKER.CASES) - 1, "16 bits")
    elif best.memory.fits and answer.option(expected[0]).memory.fits:
        room = MAKER.ROOM.get(expected[0], expected[0])
        crowded = not answer.option(room).memory.fits  # a Mac of one size only
        assert best.scheme in expected or crowded, (heading, [(o.label, o.score) for o in answer.options[:3]])
    else:
        assert arguments["hardware"] == "M4-Max"


def test_the_page_is_what_the_code_says():
    assert MAKER.page() == MAKER.PAGE.read_text(encoding="utf-8"), "run python docs/make_advice.py"
