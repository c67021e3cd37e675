"""`lowbit imatrix` end to end: files, statistics, merging, and errors with a hint and nothing left behind."""

from __future__ import annotations

import json
import shutil

import pytest

from lowbit.formats.gguf.imatrix_file import read_imatrix


@pytest.fixture(scope="module")
def measured(lowbit, tiny_llama, text_file, tmp_path_factory):
    file = tmp_path_factory.mktemp("imatrix") / "x.gguf"
    outcome = lowbit("imatrix", tiny_llama, "-o", file, "--calib", text_file, "--samples", 2, "--seqlen", 32)
    assert outcome.code == 0, outcome.stderr
    assert "14 tensors, 2 chunks, 64 tokens" in outcome.stdout
    assert "--imatrix" in outcome.stderr
    return file


def test_json_says_what_was_done(lowbit, tiny_llama, text_file, tmp_path):
    outcome = lowbit(
        "imatrix", tiny_llama, "-o", tmp_path / "x.gguf", "--calib", text_file, "--samples", 2, "--seqlen", 32,
        "--json", "--process-output", "--dtype", "bfloat16",
    )  # fmt: skip
    assert outcome.stderr == ""
    document = json.loads(outcome.stdout)
    assert document["bytes"] == (tmp_path / "x.gguf").stat().st_size
    assert {key: document[key] for key in ("tensors", "tokens", "chunks", "chunk_tokens", "unseen_experts")} == {
        "tensors": 15, "tokens": 64, "chunks": 2, "chunk_tokens": 32, "unseen_experts": {},
    }  # fmt: skip


def test_show_prints_a_row_for_each_tensor(lowbit, measured):
    outcome = lowbit("imatrix", measured, "--show")
    assert outcome.code == 0
    for name in read_imatrix(measured).entries:
        assert name in outcome.stdout
    rows = json.loads(lowbit("imatrix", measured, "--show", "--json").stdout)["statistics"]
    assert len(rows) == 14
    assert all(0.01 <= row["top_share"] <= 1 and 0 < row["entropy"] <= 1 for row in rows)


def test_two_files_are_merged_and_converted(lowbit, measured, tmp_path):
    outcome = lowbit("imatrix", measured, "-o", tmp_path / "x.dat", "--merge", measured, "--format", "dat")
    assert outcome.code == 0, outcome.stderr
    assert "nothing was measured" in outcome.stdout
    assert read_imatrix(tmp_path / "x.dat").chunks == 4


def test_a_file_is_replaced_only_when_told(lowbit, measured, tmp_path):
    target = tmp_path / "x.gguf"
    target.write_text("something else")
    outcome = lowbit("imatrix", measured, "-o", target)
    assert outcome.code == 1
    assert "exists already" in outcome.stderr
    assert target.read_text() == "something else"
    assert "is no imatrix" in lowbit("imatrix", measured, "-o", target, "--overwrite").stderr
    assert target.read_text() == "something else"
    shutil.copy(measured, target)
    assert lowbit("imatrix", measured, "-o", target, "--overwrite").code == 0
    assert "the model itself" in lowbit("imatrix", measured, "-o", measured, "--overwrite").stderr
    assert read_imatrix(target).chunks == 2


def test_errors_name_the_file_and_leave_nothing(lowbit, tiny_llama, text_file, measured, tmp_path):
    damaged, target = tmp_path / "damaged.dat", tmp_path / "out" / "x.gguf"
    damaged.write_bytes(b"\x01\0\0\0\xff\xff\xff\x7f")
    (tmp_path / "short.txt").write_text("few words")
    for arguments, message in (
        ((damaged, "--show"), "damaged.dat"),
        ((measured, "--show", "-o", target), "--show writes nothing"),
        ((measured,), "no output file was given"),
        ((measured, "-o", target, "--merge", damaged), "damaged.dat"),
        ((measured, "-o", tmp_path), "is a folder"),
        ((tiny_llama, "-o", target, "--calib", tmp_path / "short.txt"), "one window needs 512"),
        ((tiny_llama, "-o", target, "--calib", text_file, "--max-memory", "much"), "'much' is not a size"),
    ):
        outcome = lowbit("imatrix", *arguments)
        assert outcome.code in (1, 2), outcome.stderr
        assert message in outcome.stderr
        assert "hint: " in outcome.stderr
        assert "Traceback" not in outcome.stderr
        assert not target.exists()
