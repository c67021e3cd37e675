"""`lowbit clean`: what killed runs left is listed, and removed when told; what lives or is not lowbit's stays."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from lowbit.files.claim import Owner, claimed

DEAD = Owner(2**22 + 1, Owner.myself().host, "", 0.0)


@pytest.fixture
def left(tmp_path):
    """A run that was killed, one that left blocks, an unfinished output of unknown origin, and other things."""
    for name in (".a.lowbit-work", ".a.partial-01234567", ".b.lowbit-work", ".c.partial-89abcdef", "d", ".e.partial-x"):
        (tmp_path / name).mkdir()
    owner = replace(DEAD, output="a", partial=".a.partial-01234567")
    (tmp_path / ".a.lowbit-work" / "owner.json").write_text(json.dumps(asdict(owner)))
    (tmp_path / ".b.lowbit-work" / "block-00000.safetensors").write_bytes(b"codes")
    (tmp_path / ".c.partial-89abcdef" / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_left_is_listed_and_nothing_is_removed(lowbit, left):
    before = names_in(left)
    outcome = lowbit("clean", left)
    assert outcome.code == 0
    assert "1 finished blocks, which --resume would go on from" in outcome.stderr
    assert "nothing was removed; --yes" in outcome.stderr
    assert names_in(left) == before


def test_yes_removes_it(lowbit, left):
    outcome = lowbit("clean", left, "--yes", "--json")
    assert {each["output"].rpartition("/")[2] for each in json.loads(outcome.stdout)} == {"a", "b", "c"}
    assert names_in(left) == [".e.partial-x", "d"]
    assert "nothing to remove" in lowbit("clean", left, "--yes").stderr


def test_what_a_run_uses_stays(lowbit, left):
    with claimed(left / "b"):
        outcome = lowbit("clean", left, "--yes")
        assert "written by another run" in outcome.stderr
        assert (left / ".b.lowbit-work" / "block-00000.safetensors").exists()
    assert (left / ".b.lowbit-work").is_dir()


def test_a_folder_with_other_files_stays(lowbit, left):
    (left / ".b.lowbit-work" / "thesis").write_text("mine")
    stays = "what lowbit did not write stays: thesis"
    assert f"1 finished blocks, which --resume would go on from; {stays}" in lowbit("clean", left).stderr
    assert "kept, since something else lies in it" in lowbit("clean", left, "--yes").stderr
    assert names_in(left / ".b.lowbit-work") == ["thesis"]
    assert f"nothing of lowbit's; {stays}" in lowbit("clean", left).stderr


def test_no_folder_is_refused(lowbit, tmp_path):
    outcome = lowbit("clean", tmp_path / "absent")
    assert outcome.code == 2
    assert "is no folder" in outcome.stderr
