"""Whole commands on damaged inputs; `tests/command_fuzzing.py` makes as many tries as there is time for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.checkpoint.base import read_config
from lowbit.checkpoint.companions import check_companions
from lowbit.errors import CheckpointError

TRIES = 60


@pytest.mark.slow
def test_no_command_fails_otherwise_than_with_a_message():
    """Every command on good inputs, then on damaged ones; LOWBIT_FUZZ_SECONDS and LOWBIT_FUZZ_SEED as for readers."""
    seconds = os.environ.get("LOWBIT_FUZZ_SECONDS")
    how = ["--seconds", seconds, "--tries", "1000000"] if seconds else ["--tries", str(TRIES), "--workers", "1"]
    fuzz("--undamaged", "--seed", os.environ.get("LOWBIT_FUZZ_SEED", "0"), *how)


def test_a_few_damaged_inputs_end_in_a_message():
    fuzz("--tries", "10", "--workers", "1")


def fuzz(*how: str) -> None:
    """In a process of its own, which forks."""
    script = Path(__file__).parents[1] / "command_fuzzing.py"
    done = subprocess.run([sys.executable, str(script), *how], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.parametrize(
    ("file", "key", "value", "wanted"),
    [
        ("generation_config.json", "eos_token_id", "2", "a token id, or a list of them"),
        ("generation_config.json", "eos_token_id", [2, None], "a token id, or a list of them"),
        ("generation_config.json", "temperature", "hot", "a number"),
        ("generation_config.json", "do_sample", 1, "true or false"),
        ("tokenizer_config.json", "model_max_length", "512", "a number"),
        ("tokenizer_config.json", "eos_token", 2, "a token"),
        ("tokenizer_config.json", "padding_side", "up", "left or right"),
    ],
)
def test_values_that_no_loader_computes_with(tmp_path, file, key, value, wanted):
    (tmp_path / file).write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=f"{key} is .*; {wanted} is needed"):
        check_companions(tmp_path, "model")
    (tmp_path / file).write_text(json.dumps({key: None}))
    check_companions(tmp_path, "model")


def test_half_of_a_surrogate_pair_in_the_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["\\ud800"]}')
    with pytest.raises(CheckpointError, match="surrogate"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "name": "\\ud83d\\ude00"}')
    assert read_config(tmp_path)["name"] == "\U0001f600"


@pytest.mark.parametrize(
    ("text", "found"), [("null", "null"), ("[]", "a list"), ('"x"', "a string"), ("1", "a number")]
)
def test_a_file_that_is_another_json_value_is_named_in_json_s_words(tmp_path, text, found):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"a JSON object is needed, found {found}"):
        check_companions(tmp_path, "model")
