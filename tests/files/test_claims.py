"""One run at a time, and what dead ones left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from lowbit.errors import OutputError
from lowbit.files import claim
from lowbit.files.claim import Claim, Owner, claimed, read_owner, refuse_claimed
from lowbit.files.rename import exchange, rename_new

# A run that dies where a line says so: it claims its output, and is killed.
DIES = """
import os, sys
from pathlib import Path
from lowbit.files.claim import Claim
from lowbit.files.rename import exchange, rename_new
output = Path(sys.argv[1])
claim = Claim(output)
work = claim.new_partial()
(work / "x.report").write_text("new")
(work / output.name).write_text("new")
"""
PLACES = (
    DIES
    + """
files = [work / "x.report", work / output.name]
claim.note(placing={path.name: path.stat().st_ino for path in files})
place = output.with_name("x.report")
exchange(files[0], place) if output.exists() else rename_new(files[0], place)
"""
)


def killed(script, output):
    process = subprocess.run([sys.executable, "-c", script + "\nos.kill(os.getpid(), 9)\n", str(output)], check=False)
    assert process.returncode == -9


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_second_run_is_refused_at_once(tmp_path):
    output = tmp_path / "out"
    refuse_claimed(output)
    assert names_in(tmp_path) == []
    with claimed(output):
        for attempt in (Claim, refuse_claimed):
            with pytest.raises(OutputError, match=f"written by another run .process {os.getpid()} on"):
                attempt(output)
    refuse_claimed(output)
    assert names_in(tmp_path) == []


def test_what_a_killed_run_was_writing_is_removed_and_nothing_else(tmp_path):
    output = tmp_path / "x.gguf"
    killed(DIES, output)
    (tmp_path / ".x.gguf.partial-of-mine").mkdir()
    assert len(names_in(tmp_path)) == 3
    with claimed(output):
        assert names_in(tmp_path) == [".x.gguf.lowbit-work", ".x.gguf.partial-of-mine"]
    assert names_in(tmp_path) == [".x.gguf.partial-of-mine"]


def test_reports_that_a_killed_run_had_placed_without_their_file(tmp_path):
    output = tmp_path / "x.gguf"
    killed(PLACES, output)
    assert (tmp_path / "x.report").read_text() == "new"
    with claimed(output):
        assert names_in(tmp_path) == [".x.gguf.lowbit-work"]


def test_earlier_files_come_back_after_a_kill_between_two_names(tmp_path):
    output = tmp_path / "x.gguf"
    for name in ("x.gguf", "x.report"):
        (tmp_path / name).write_text("old")
    killed(PLACES, output)
    assert ((tmp_path / "x.report").read_text(), output.read_text()) == ("new", "old")
    with claimed(output):
        assert ((tmp_path / "x.report").read_text(), output.read_text()) == ("old", "old")
    assert names_in(tmp_path) == ["x.gguf", "x.report"]


def test_all_files_placed_and_then_killed_is_a_complete_output(tmp_path):
    output = tmp_path / "x.gguf"
    killed(PLACES + "rename_new(files[1], output)\n", output)
    with claimed(output):
        assert ((tmp_path / "x.report").read_text(), output.read_text()) == ("new", "new")
    assert names_in(tmp_path) == ["x.gguf", "x.report"]


def test_an_output_that_was_moved_aside_comes_back(tmp_path):
    output = tmp_path / "x"
    output.mkdir()
    killed(DIES + "claim.note(earlier='.x.earlier-01234567'); os.rename(output, '.'.join([str(output.parent) + '/', "
           "'x', 'earlier-01234567']))\n", output)  # fmt: skip
    assert not output.exists()
    with claimed(output):
        assert output.is_dir()


def test_a_run_on_another_machine_is_believed(tmp_path):
    folder = tmp_path / ".out.lowbit-work"
    folder.mkdir()
    other = Owner(1, "elsewhere", "another boot", 0.0)
    (folder / "owner.json").write_text(json.dumps(asdict(other)))
    with pytest.raises(OutputError, match="process 1 on elsewhere"):
        Claim(tmp_path / "out")
    (folder / "owner.json").unlink()
    with claimed(tmp_path / "out"):
        pass


@pytest.mark.parametrize("field", [{"partial": "../x"}, {"partial": "precious"}, {"placing": {"../x": 1}}, {"no": 1}])
def test_a_record_that_no_run_made_names_nothing_to_remove(tmp_path, field):
    folder = tmp_path / ".out.lowbit-work"
    folder.mkdir()
    (tmp_path / "precious").mkdir()
    (folder / "owner.json").write_text(json.dumps(asdict(Owner.myself()) | field))
    assert read_owner(folder) is None
    with claimed(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").is_dir()


def test_without_locks_a_living_process_is_believed(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(95, "not supported")

    monkeypatch.setattr(claim.fcntl, "flock", no_locks)
    folder = tmp_path / ".out.lowbit-work"
    folder.mkdir()
    myself = asdict(Owner.myself())
    (folder / "owner.json").write_text(json.dumps(myself | {"pid": os.getppid()}))
    with pytest.raises(OutputError, match="another run"):
        Claim(tmp_path / "out")
    (folder / "owner.json").write_text(json.dumps(myself | {"pid": 2**22 + 1}))
    with claimed(tmp_path / "out"):
        pass


def test_names_are_taken_once_and_exchanged(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("a")
    second.write_text("b")
    with pytest.raises(FileExistsError):
        rename_new(first, second)
    if exchange(first, second):
        assert (first.read_text(), second.read_text()) == ("b", "a")
    rename_new(first, tmp_path / "c")
    assert names_in(tmp_path) == ["b", "c"]
