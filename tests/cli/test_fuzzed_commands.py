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

LIGHT = 300  # twenty milliseconds of CPU each


def test_no_command_that_plans_or_looks_fails_otherwise_than_with_a_message():
    """In a process of its own, which forks."""
    _fuzz("--light", "--tries", LIGHT)


@pytest.mark.slow
def test_no_command_fails_otherwise_than_with_a_message():
    """LOWBIT_FUZZ_SECONDS says how long to look instead, half of it at commands that plan or look; LOWBIT_FUZZ_SEED
    where to start."""
    seconds = os.environ.get("LOWBIT_FUZZ_SECONDS")
    for light, count in ((["--light"], 2000), ([], 60)):
        limit = ["--seconds", float(seconds) / 2, "--tries", 1_000_000] if seconds else ["--tries", count]
        _fuzz(*light, "--undamaged", "--seed", os.environ.get("LOWBIT_FUZZ_SEED", "0"), *limit)


@pytest.mark.slow
def test_classes_of_faults_that_were_once_counted_end_well():
    _script("fault_classes.py", "--tries", 20)


def _fuzz(*how: object) -> None:
    _script("command_fuzzing.py", "--workers", 1, *how)


def _script(name: str, *how: object) -> None:
    command = [sys.executable, Path(__file__).parents[1] / name, *how]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.parametrize(
    ("file", "key", "value", "wanted"),
    [
        ("generation_config.json", "eos_token_id", "2", "a token id, or a list of them"),
        ("generation_config.json", "eos_token_id", [2, None], "a token id, or a list of them"),
        ("generation_config.json", "eos_token_id", [], "a token id, or a list of them"),
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
