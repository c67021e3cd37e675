"""Outputs appear complete or not at all, and nothing that lowbit did not write is replaced or removed."""

from __future__ import annotations

import errno
import json
import os

import pytest

from lowbit.errors import OutputError
from lowbit.export import atomic
from lowbit.export.atomic import atomic_files, atomic_folder, refuse_existing, refuse_existing_files
from lowbit.files import rename
from lowbit.files.claim import work_folder
from lowbit.files.system import check_disk, refuse_sources, translated_os_errors

NAMES = ("out.gguf", "out.lowbit-report.json", "out.report.html")


@pytest.fixture(params=["flags", "without flags"])
def any_file_system(request, monkeypatch):
    """With renameat2, and as on a file system that has no flags of rename."""
    if request.param == "without flags":
        monkeypatch.setattr(rename, "_system_call", lambda: None)


def an_earlier_output(folder, **beside):
    folder.mkdir()
    listed = [{"name": name, "bytes": len(text)} for name, text in beside.items()]
    for name, text in beside.items():
        (folder / name).write_text(text)
    (folder / "lowbit-report.json").write_text(json.dumps({"output": {"files": [], "beside": listed}}))
    return folder


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_only_when_complete(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as work:
        (work / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path, error):
    def write() -> None:
        with atomic_folder(tmp_path / "out") as work:
            (work / "file").write_text("x")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_and_kept(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists already"), atomic_folder(target, overwrite):
            pass
    assert (target / "precious").exists()


def test_overwrite_replaces_only_our_own_output(tmp_path, any_file_system):
    target = an_earlier_output(tmp_path / "out", model="old")
    with atomic_folder(target, overwrite=True) as work:
        (work / "new").write_text("x")
        assert names_in(target) == ["lowbit-report.json", "model"]
    assert names_in(target) == ["new"]
    assert names_in(tmp_path) == ["out"]


def test_overwrite_keeps_a_folder_in_which_someone_put_a_file(tmp_path):
    target = an_earlier_output(tmp_path / "out", model="old")
    (target / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"did not write: thesis\.tex"):
        refuse_existing(target, overwrite=True)


def test_failed_overwrite_keeps_the_old_output(tmp_path):
    target = an_earlier_output(tmp_path / "out")
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True):
        raise RuntimeError
    assert names_in(target) == ["lowbit-report.json"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path, any_file_system):
    target = tmp_path / "out"

    def write():
        with atomic_folder(target) as work:
            (work / "model").write_text("x")
            target.mkdir()
            (target / "thesis").write_text("mine")

    with pytest.raises(OutputError, match="appeared"):
        write()
    assert names_in(target) == ["thesis"]
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("what", ["a file added", "another folder"])
def test_overwrite_keeps_what_changed_meanwhile(tmp_path, any_file_system, what):
    target = an_earlier_output(tmp_path / "out", model="old")

    def write():
        with atomic_folder(target, overwrite=True) as work:
            (work / "model").write_text("new")
            if what == "another folder":
                target.rename(tmp_path / "elsewhere")
                target.mkdir()
            (target / "thesis").write_text("mine")

    with pytest.raises(OutputError, match="changed"):
        write()
    assert (target / "thesis").read_text() == "mine"
    assert not list(tmp_path.glob(".out*"))


def write_three(work, text="new"):
    for name in NAMES:
        (work / name).write_text(text)


@pytest.mark.parametrize("appears", NAMES)
def test_files_that_appear_meanwhile_are_kept_and_ours_taken_back(tmp_path, any_file_system, appears):

    def write():
        with atomic_files(tmp_path / "out.gguf") as work:
            write_three(work)
            (tmp_path / appears).write_text("mine")

    with pytest.raises(OutputError, match="appeared"):
        write()
    assert names_in(tmp_path) == [appears]
    assert (tmp_path / appears).read_text() == "mine"


def test_overwriting_files(tmp_path, any_file_system):
    write_three(tmp_path, "old")
    with atomic_files(tmp_path / "out.gguf", overwrite=True) as work:
        write_three(work)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(NAMES, "new")


def test_overwritten_files_come_back_where_one_changed_meanwhile(tmp_path, any_file_system):
    write_three(tmp_path, "old")

    def write():
        with atomic_files(tmp_path / "out.gguf", overwrite=True) as work:
            write_three(work)
            (tmp_path / "out.gguf").write_text("mine")

    with pytest.raises(OutputError, match="changed"):
        write()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"out.gguf": "mine", "out.lowbit-report.json": "old", "out.report.html": "old"}


@pytest.mark.parametrize("present", NAMES)
def test_reports_of_others_are_refused_at_the_start(tmp_path, present):
    (tmp_path / present).write_text("mine")
    places = [tmp_path / name for name in NAMES]
    with pytest.raises(OutputError, match=f"{present} exists already"):
        refuse_existing_files(places[0], places)


def test_overwrite_refuses_a_file_that_its_report_does_not_describe(tmp_path):
    write_three(tmp_path, "old")
    report = {"output": {"files": [{"name": "out.gguf", "bytes": 99}]}}
    (tmp_path / "out.lowbit-report.json").write_text(json.dumps(report))
    with pytest.raises(OutputError, match="another size"):
        refuse_existing_files(tmp_path / "out.gguf", [tmp_path / name for name in NAMES], overwrite=True)


def test_empty_folder_is_no_obstacle(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    refuse_existing(target)
    with atomic_folder(target) as work:
        (work / "file").write_text("x")
    assert names_in(target) == ["file"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EACCES, "Permission denied"),
        (errno.EFBIG, "shell"),
        (errno.EIO, "output error"),
    ],
)
def test_disk_errors_are_told_in_words(tmp_path, code, says):
    with pytest.raises(OutputError, match=says), translated_os_errors(tmp_path / "out"):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("name", ["x" * 256, "é" * 200])
def test_a_name_that_no_file_can_have(tmp_path, name):
    with pytest.raises(OutputError), atomic_folder(tmp_path / name):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_that_a_file_can_have(tmp_path):
    with atomic_folder(tmp_path / ("é" * 127)) as work:
        assert len(os.fsencode(work.name)) <= 255
    assert names_in(tmp_path) == ["é" * 127]


def test_a_file_larger_than_the_shell_allows(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1000, 1000))
    check_disk(tmp_path / "out", 10_000, 1000)
    with pytest.raises(OutputError, match="this shell allows"):
        check_disk(tmp_path / "out", 10_000, 1001)


def spellings(tmp_path):
    """A model under every name that it can have."""
    (tmp_path / "sub").mkdir()
    model = tmp_path / "model.gguf"
    model.write_text("weights")
    os.link(model, tmp_path / "hard.gguf")
    (tmp_path / "soft.gguf").symlink_to(model)
    return ["model.gguf", "./model.gguf", "sub/../model.gguf", str(model), "hard.gguf", "soft.gguf"]


def test_the_source_is_no_output_however_it_is_spelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spelling in spellings(tmp_path):
        for source in ("model.gguf", "soft.gguf"):
            with pytest.raises(OutputError, match="the model itself"):
                refuse_sources([atomic.Path(spelling)], [atomic.Path(source)])
    with pytest.raises(OutputError, match="holds"):
        refuse_sources([tmp_path], [atomic.Path("model.gguf")])
    refuse_sources([tmp_path / "new.gguf", tmp_path / "sub"], [atomic.Path("model.gguf"), atomic.Path("org/model")])


def test_work_folders_are_beside_the_output(tmp_path):
    assert work_folder(tmp_path / "out") == tmp_path / ".out.lowbit-work"
