"""Prompts: the packaged ones, and every way in which a file of them can be bad."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from lowbit.blind.prompts import LARGEST_FILE, BlindPrompt, read_prompts
from lowbit.errors import CheckpointError


def test_the_packaged_prompts_are_four_of_each_of_six_kinds():
    found, notes = read_prompts()
    assert Counter(prompt.kind for prompt in found) == dict.fromkeys(
        ("facts", "arithmetic", "code", "format", "languages", "dialogue"), 4
    )
    assert not notes


def test_a_text_has_a_prompt_on_each_line(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffone\r\n\n  two \n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt")[0] == [BlindPrompt("one"), BlindPrompt("two")]


def test_a_prompt_that_comes_again_is_asked_once_and_said(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\none\n")
    found, notes = read_prompts(tmp_path / "p.txt")
    assert [prompt.text for prompt in found] == ["one", "two"]
    assert notes == [f"1 of 3 prompts of {tmp_path / 'p.txt'} came again and were passed over"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", b"", "has no prompts"),
        ("p.txt", b"\n \n\t\n", "has no prompts"),
        ("p.txt", b"good\n\xff\xfe", "is not UTF-8: byte 5"),
        ("p.jsonl", b'{"prompt": "one"}\n{"prompt": ', "line 2 is not JSON"),
        ("p.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("p.jsonl", b'["one"]', 'line 1 has no "prompt"'),
        ("p.jsonl", b'{"text": "one"}', 'line 1 has no "prompt"'),
        ("p.jsonl", b'{"prompt": "  "}', 'line 1 has no "prompt"'),
        ("p.jsonl", b'{"prompt": "one", "kind": 3}', "line 1 has a kind that is no text"),
        ("p.jsonl", b'{"prompt": "one", "system": "be brief"}', "line 1 has system"),
        ("p.txt", b"x" * (LARGEST_FILE + 1), "is larger than"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_prompts(tmp_path / name)


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path / "absent", "No such file"),
        (tmp_path, "folder|directory"),
        (tmp_path / "pipe", "pipe"),
    ):
        with pytest.raises(CheckpointError, match=says):
            read_prompts(path)
