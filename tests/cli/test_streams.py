"""Data on stdout, everything else on stderr; readable at eighty columns, in a pipe and without colour."""

from __future__ import annotations

import json
import re

import pytest

from checkpoint.checkpoint_files import write_tiny_gguf
from commands import GUARD, start

ESCAPE = "\x1b"


@pytest.fixture
def reporting(tiny_llama, quantized, text_file, tmp_path):
    """Command line → of every command that reports."""
    measured = ["--text", text_file, "--windows", "2", "--window-tokens", "64"]
    return {
        "quantize": ["quantize", tiny_llama, "-o", tmp_path / "out"],
        "dry run": ["quantize", tiny_llama, "--dry-run"],
        "inspect": ["inspect", quantized],
        "inspect GGUF": ["inspect", write_tiny_gguf(tmp_path / "tiny.gguf")],
        "verify": ["verify", quantized, "--reference", tiny_llama],
        "evaluate": ["evaluate", quantized, *measured],
        "generate": ["generate", quantized, "-p", "hello", "--max-tokens", "4"],
    }


NAMES = ["quantize", "dry run", "inspect", "inspect GGUF", "verify", "evaluate", "generate"]


@pytest.mark.parametrize("name", NAMES)
def test_json_is_alone_on_stdout(lowbit, reporting, name):
    outcome = lowbit(*reporting[name], "--json")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.stdout)
    assert outcome.stderr == ""


@pytest.mark.parametrize("name", NAMES)
def test_text_has_no_escapes_where_nobody_sees_colours(lowbit, reporting, name):
    outcome = lowbit(*reporting[name])
    assert outcome.code == 0, outcome
    assert outcome.stdout.strip()
    assert ESCAPE not in outcome.stdout + outcome.stderr


@pytest.mark.parametrize("name", NAMES)
def test_no_color_is_respected_even_on_a_terminal(lowbit, reporting, name):
    outcome = lowbit(*reporting[name], NO_COLOR="1", FORCE_COLOR="1", COLUMNS="80")
    assert outcome.code == 0, outcome
    assert not re.search(r"\x1b\[(3\d|4\d|9\d)", outcome.stdout)


@pytest.mark.parametrize("name", ["dry run", "inspect", "evaluate", "quantize"])
def test_tables_fit_eighty_columns(lowbit, reporting, name):
    """Where stdout is a terminal that wide, no line is wider and no name is cut or folded."""
    outcome = lowbit(*reporting[name], NO_COLOR="1", FORCE_COLOR="1", COLUMNS="80")
    lines = re.sub(r"\x1b\[[\d;]*m", "", outcome.stdout).splitlines()
    assert max(len(line) for line in lines if line.startswith(("┃", "│", " "))) <= 80
    if name in ("dry run", "inspect"):
        assert any("model.layers.0.self_attn.q_proj.weight " in line for line in lines)


def test_a_reader_that_leaves_early_is_no_error(tiny_llama):
    process = start("inspect", tiny_llama, "--json", PYTHONUNBUFFERED="1")
    process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(GUARD) in (0, 1, 141)
    assert "Traceback" not in stderr
    assert "Exception" not in stderr


def test_help_goes_to_stdout_and_names_every_command(lowbit):
    outcome = lowbit("--help")
    assert outcome.code == 0
    for command in ("quantize", "inspect", "verify", "evaluate", "generate", "demo"):
        assert command in outcome.stdout
        assert lowbit(command, "--help").code == 0


def test_no_command_shows_the_help(lowbit):
    outcome = lowbit()
    assert outcome.code == 2
    assert "Commands" in outcome.stdout
