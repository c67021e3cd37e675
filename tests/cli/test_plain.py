"""Names that others chose are shown, and not obeyed; messages and progress reach who should see them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.cli import console
from lowbit.cli.plain import one_line, plain
from models import make_model

HOSTILE = "a\x1b[31m\x1b]0;owned\x07[/red][bold]b\u202ec\x9b2J"


def test_what_a_terminal_obeys_is_shown_as_its_code():
    assert plain(HOSTILE) == r"a\x1b[31m\x1b]0;owned\x07[/red][bold]b\u202ec\x9b2J"
    assert plain("ü × → 字\tx\n") == "ü × → 字\tx\n"
    assert one_line("a\nb\tc\u2028d") == r"a\nb\tc\u2028d"
    assert plain("\ud800").encode() == rb"\ud800"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A model with a tensor, and in a folder, of hostile names."""
    model = make_model(tmp_path_factory.mktemp("hostile") / "m\x1b[1m[bold]", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {HOSTILE: tensors["model.norm.weight"].clone()}, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["quantize", "--dry-run"], ["verify"]])
def test_no_command_prints_an_escape_or_fails_at_markup(lowbit, hostile, arguments):
    outcome = lowbit(arguments[0], hostile, *arguments[1:])
    said = outcome.stdout + outcome.stderr
    assert "\x1b" not in said
    assert "\x9b" not in said
    assert "Traceback" not in said
    if arguments[0] == "inspect":
        assert "[/red][bold]" in said
    if "--json" in arguments:
        assert HOSTILE in [tensor["name"] for tensor in json.loads(outcome.stdout)["tensors"]]


def test_error_messages_are_plain(lowbit, tmp_path):
    outcome = lowbit("inspect", tmp_path / "no\x1b[31m[/red]")
    assert outcome.code == 1
    assert r"no\x1b[31m[/red]" in outcome.stderr


def test_a_line_feed_in_a_name_makes_no_line_of_its_own(lowbit, tmp_path):
    """A tensor that would print a verdict below itself: one line stays one, in tables of names too."""
    model = make_model(tmp_path / "m", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors") | {"x\nok    all is well": torch.ones(4, 4)}
    save_file(tensors, model / "model.safetensors")
    for command in ("verify", "inspect"):
        said = lowbit(command, model).stdout
        assert r"x\nok    all is well" in said
        assert not [line for line in said.splitlines() if line.startswith("ok    all is")]


def test_a_log_file_gets_messages_with_times_and_is_appended_to(lowbit, tmp_path, tiny_llama):
    log = tmp_path / "run.log"
    (tmp_path / ".out.lowbit-work").mkdir()
    (tmp_path / ".out.lowbit-work" / "owner.json").write_text("{}")
    for _ in range(2):
        assert lowbit("inspect", tiny_llama, "--log-file", log).code == 0
    log.write_text("thesis")
    outcome = lowbit("inspect", tiny_llama, "--log-file", log)
    assert (outcome.code, "is no log of lowbit" in outcome.stderr) == (2, True)
    assert log.read_text() == "thesis"


def test_a_long_run_says_a_line_a_minute_where_nobody_sees_a_bar(monkeypatch, caplog):
    clock = iter([0.0, 30.0, 60.0, 61.0, 150.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    heartbeat = console._Heartbeat("model → out", logging.WARNING)
    with caplog.at_level(logging.INFO, "lowbit"):
        monkeypatch.setattr(logging.getLogger("lowbit"), "propagate", True)
        for done in (1, 2, 3, 5):
            heartbeat.tell(done, 10)
    assert list(dict.fromkeys(caplog.messages)) == [  # two handlers may have seen each
        "model → out: 20 %, 1 min, about 4 min left",
        "model → out: 50 %, 2 min, about 2 min left",
    ]


def test_nothing_is_foretold_at_the_beginning_of_a_stage_nor_at_its_end(monkeypatch, caplog):
    clock = iter([0.0, 60.0, 120.0, 180.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    heartbeat = console._Heartbeat("evaluate x", logging.WARNING)
    with caplog.at_level(logging.INFO, "lowbit"):
        monkeypatch.setattr(logging.getLogger("lowbit"), "propagate", True)
        for done, total in ((2, 2), (2, 4), (4, 4)):
            heartbeat.tell(done, total)
    assert list(dict.fromkeys(caplog.messages)) == ["evaluate x: 100 %, 1 min", "evaluate x: 50 %, 0 s"]


def test_less_than_a_minute_is_said_in_seconds():
    said = [console._duration(seconds) for seconds in (0.2, 20, 59.4, 59.5, 5399, 5400)]
    assert said == ["0 s", "20 s", "59 s", "1 min", "90 min", "1.5 h"]


def test_the_time_left_is_that_of_the_stage(monkeypatch, caplog):
    clock = iter([0.0, 60.0, 600.0, 660.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    heartbeat = console._Heartbeat("model → out", logging.WARNING)
    with caplog.at_level(logging.INFO, "lowbit"):
        monkeypatch.setattr(logging.getLogger("lowbit"), "propagate", True)
        for done, total in ((1, 2), (0, 24), (1, 24)):
            heartbeat.tell(done, total)
    assert list(dict.fromkeys(caplog.messages)) == [
        "model → out: 50 %, 1 min, about 1 min left",
        "model → out: 0 %, 0 s",
        "model → out: 4 %, 1 min, about 23 min left",
    ]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(("where", "code"), [("> /dev/full", 1), (">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0)])
def test_streams_that_are_full_or_closed(tiny_llama, where, code):
    line = f"{sys.executable} -m lowbit inspect {tiny_llama} --json {where}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if code:
        assert done.stderr.startswith("error: standard output: No space left")
