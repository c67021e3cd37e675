"""docs/questions.md: each block prints what stands below it; what is left out is what the map says."""

from __future__ import annotations

import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from lowbit.cli.main import app
from test_docs import ROOT

TEXT = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.M | re.S)
# (language, code, what it prints)
SHOWN = [
    (language, code, text)
    for (language, code), (following, text) in pairwise(FENCED)
    if language in ("python", "sh") and following == "text"
]
TITLES = re.findall(r"^### (.+)$", TEXT, flags=re.M)


def as_shown(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


@pytest.mark.parametrize("block", range(len(SHOWN)))
def test_a_block_prints_what_stands_below_it(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    language, code, shown = SHOWN[block]
    if language == "sh":
        done = CliRunner().invoke(app, shlex.split(code)[1:], env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
        printed = done.stdout
    else:
        with redirect_stdout(out := StringIO()):
            exec(compile(code, "docs/questions.md", "exec"), {"__name__": "document"})
        printed = out.getvalue()
    assert as_shown(printed) == as_shown(shown)


def test_every_python_block_shows_its_output():
    assert sum(language == "python" for language, _, _ in SHOWN) == TEXT.count("```python")
    assert len(SHOWN) >= 12


def test_the_hand_calculation_is_that_of_the_block():
    """The figures worked out in words stand in the output of lowbit, too."""
    by_hand = [code for language, code in FENCED if not language][:2]
    printed = SHOWN[0][2]
    assert "codes [7, -4, 2, 0]" in printed
    assert "clamped to 7;   -4;   round(2.4) = 2;" in by_hand[0]
    codes = re.search(r"= (-8, -2, 7, -4) ", by_hand[1])
    assert codes is not None
    assert f"codes [{codes[1]}]" in printed
    assert "zero point -4" in printed


@pytest.mark.parametrize(
    "words",
    [
        "by hand", "must rounding lose", "Symmetric or asymmetric", "Per tensor, channel, group",
        "outliers",
        "decoding, but prefill less", "stay in FP16", "KV cache", "GPTQ or AWQ", "SmoothQuant and AWQ", "QAT or PTQ",
        "FP8 or INT8", "NVFP4 or MXFP4", "NF4", "K-quant", "answers badly",
    ],
)  # fmt: skip
def test_a_question_of_the_field_is_answered(words):
    assert any(words in title for title in TITLES)


def test_what_is_left_out_is_what_the_map_says():
    rows = re.findall(r"^\| .* \|$", TEXT[TEXT.index("## What lowbit leaves out") :], flags=re.M)[1:]
    text = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    theirs = re.findall(r"^\| .* \|$", text[text.index("## Left out, with the reason") :], flags=re.M)[1:]
    assert rows == theirs
