"""Folders, and files with a report beside them, that appear complete or not at all, and replace nothing of others.

Output goes into a hidden folder beside the target, is flushed to disk and gets its name at the end. After an error,
Ctrl-C or a full disk the hidden folder is removed; after a kill or a power cut the next run of that name removes it, or
`lowbit clean`. What appeared under the name meanwhile is kept, and the run fails. On --overwrite the names of the new
and the earlier output are exchanged in one step, so that there is one at every moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit.checkpoint.base import HTML_NAME, REPORT_NAME, read_json_object
from lowbit.checkpoint.companions import is_companion
from lowbit.errors import CheckpointError, OutputError
from lowbit.files.claim import Claim, claimed, hidden, refuse_claimed, remove_tree
from lowbit.files.rename import exchange, rename_new
from lowbit.files.system import flush, flush_folder, translated_os_errors


def refuse_existing(target: Path, overwrite: bool = False) -> None:
    """OutputError if the target exists and is not an empty folder; with `overwrite`, unless all in it is lowbit's."""
    with translated_os_errors(target):
        there, real_folder = os.path.lexists(target), target.is_dir() and not target.is_symlink()
        if not there or (real_folder and not any(target.iterdir())):
            return
        ours = real_folder and (target / REPORT_NAME).is_file()
    if not overwrite:
        raise _taken(target, ours)
    if not ours:
        raise OutputError(
            f"{target} exists already, and lowbit did not write it",
            f"--overwrite replaces only folders that hold a {REPORT_NAME}; choose another name with -o",
        )
    foreign = foreign_files(target)
    if foreign:
        raise OutputError(
            f"{target} holds what lowbit did not write: {', '.join(foreign[:3])}{' …' if len(foreign) > 3 else ''}",
            "--overwrite would delete it: move it elsewhere, or choose another name with -o",
        )


def _taken(place: Path, ours: bool, target: Path | None = None) -> OutputError:
    """The error for a name that something has; `ours` if lowbit wrote it.

    target  the file that `place` belongs to, where that is another; a Modelfile is called so whatever the target's name
    """
    replace = ", or replace it with --overwrite" if ours else ", or remove it first"
    another = "name" if target is None or place.name.startswith(target.stem) else "folder"
    return OutputError(f"{place} exists already", f"choose another {another} with -o{replace}")


def foreign_files(folder: Path) -> list[str]:
    """Files of an earlier output that its report does not list, relative to the folder.

    Reports of lowbit 0.1 list the weight files only; then all files of the kinds that a model consists of are taken for
    lowbit's.
    """
    try:
        output = read_json_object(folder / REPORT_NAME).get("output")
    except CheckpointError:
        output = None
    output = output if isinstance(output, dict) else {}
    known, beside = {REPORT_NAME, HTML_NAME}, output.get("beside")
    for files in (output.get("files"), beside):
        known |= {str(file["name"]) for file in files or () if isinstance(file, dict) and "name" in file}
    found = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    listed = isinstance(beside, list)
    return [
        name
        for path, name in ((path, path.relative_to(folder).as_posix()) for path in found)
        if name not in known and (listed or not (is_companion(path) or path.suffix == ".safetensors"))
    ]


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False, claim: Claim | None = None) -> Iterator[Path]:
    """A new folder to write into; it becomes `target` when the block ends without an exception.

    overwrite  an earlier output of that name is removed once the new one has its name
    claim      the run's claim on the target; None: one for the block alone
    """
    with _claimed(target, claim) as claim:
        target = claim.output
        refuse_existing(target, overwrite)
        earlier = target.lstat().st_ino if target.is_dir() and any(target.iterdir()) else None
        with translated_os_errors(target):
            work = claim.new_partial()
            yield work
            flush_folder(work)
            if earlier is None:
                _take_free_name(work, target)
            else:
                _take_name_of(target, work, claim, earlier)
            flush(target.parent)
            remove_tree(work)


def _take_free_name(work: Path, target: Path) -> None:
    try:
        os.rename(work, target)  # fails where anything but an empty folder is there
    except OSError as error:
        if not os.path.lexists(target):
            raise
        raise _appeared(target) from error


def _take_name_of(target: Path, work: Path, claim: Claim, earlier: int) -> None:
    """Replace the earlier output, an inode, provided that it is still that and nothing was added to it."""
    if target.lstat().st_ino != earlier:
        raise _appeared(target)
    if exchange(work, target):
        if work.lstat().st_ino == earlier and not foreign_files(work):
            return
        exchange(work, target)
        raise _appeared(target)
    aside = hidden(target, f".earlier-{work.name[-8:]}")
    claim.note(earlier=aside.name)
    os.rename(target, aside)
    if foreign_files(aside):
        os.rename(aside, target)
        raise _appeared(target)
    _take_free_name(work, target)
    remove_tree(aside)


# In the first lines of every page, and of every diagnosis as JSON.
PAGE_MARK, DIAGNOSIS_MARK = '<meta name="generator" content="lowbit">', '{\n  "verdict": '
_HEAD = 4096


def refuse_existing_document(path: Path, overwrite: bool, mark: str) -> None:
    """OutputError if something has the name of a document; with `overwrite`, unless it is one of lowbit's. And if its
    folder does not exist.

    mark  what documents of this kind begin with
    """
    with translated_os_errors(path):
        if not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written: {path.parent} is no folder", "choose a folder that exists")
        if not os.path.lexists(path):
            return
        if path.is_symlink() or not path.is_file():
            raise OutputError(f"{path} exists and is no file", "choose another -o")
        if not overwrite:
            raise OutputError(f"{path} exists", "choose another -o, or pass --overwrite to replace it")
        with path.open("rb") as file:
            ours = mark.encode() in file.read(_HEAD)
        if not ours:
            raise OutputError(f"{path} exists, and is no such document of lowbit",
                              "--overwrite would delete it: choose another -o")  # fmt: skip


def refuse_existing_file(output: Path, overwrite: bool, is_ours: Callable[[Path], bool], what: str) -> None:
    """OutputError where something has the name of a single file without a report, unless it may be replaced;
    or where another run writes to it.

    is_ours  True for a file of that kind; what: its name, such as "imatrix"
    """
    with translated_os_errors(output):
        there = os.path.lexists(output)
        if not there:
            return refuse_claimed(output)
        ours = not output.is_symlink() and is_ours(output)
    if not overwrite:
        replace = ", or replace it with --overwrite" if ours else ", or remove it first"
        raise OutputError(f"{output} exists already", f"choose another name with -o{replace}")
    if not ours:
        raise OutputError(f"{output} exists already, and is no {what}", "choose another name with -o")
    return refuse_claimed(output)


def refuse_existing_files(target: Path, places: list[Path], overwrite: bool = False) -> None:
    """OutputError if something already has one of the names of a file output, the file's or those of its reports;
    with `overwrite`, unless a report that describes the file is there.

    target  the file; places  every file that will be written
    """
    report = next(place for place in places if place.name.endswith(REPORT_NAME))
    with translated_os_errors(target):
        present = [place for place in places if os.path.lexists(place)]
        if not present:
            return
        ours = report.is_file() and all(place.is_file() and not place.is_symlink() for place in present)
        changed = next((place for place in present if ours and not _is_as_reported(place, report)), None)
    if not overwrite:
        raise _taken(present[0], ours, target)
    if not ours:
        raise OutputError(
            f"{present[0]} exists already, and lowbit did not write it",
            f"--overwrite replaces only files with a {report.name} beside them; choose another name with -o",
        )
    if changed is not None:
        raise OutputError(f"{changed} is not a file that {report.name} describes: it is not named there, or has "
                          f"another size",
                          "move it elsewhere, or choose another name with -o")  # fmt: skip


def _is_as_reported(place: Path, report: Path) -> bool:
    """False if the report does not name a file, or gives another size than it has; True where the report cannot be
    read, and of reports."""
    try:
        output: Any = read_json_object(report).get("output")
        sizes = {file["name"]: file["bytes"] for file in (*output["files"], *output.get("beside", ()))}
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return True
    return place.name.endswith((REPORT_NAME, HTML_NAME)) or place.stat().st_size == sizes.get(place.name)


@contextmanager
def atomic_files(target: Path, overwrite: bool = False, claim: Claim | None = None) -> Iterator[Path]:
    """A hidden folder for a file `target` and the files beside it. When the block ends without an exception the files
    get their places in reverse order of names: the first part of a split model, which readers open, appears last."""
    with _claimed(target, claim) as claim, translated_os_errors(target):
        target, parent = claim.output, claim.output.parent
        before = {path.name: _identity(path) for path in parent.iterdir()} if overwrite else {}
        work = claim.new_partial()
        yield work
        flush_folder(work)
        files = sorted(work.iterdir(), key=lambda path: (path.suffix != target.suffix, path.name), reverse=True)
        claim.note(placing={path.name: path.stat().st_ino for path in files})
        for path in files:
            _place(path, parent / path.name, before.get(path.name))
        flush(parent)
        remove_tree(work)


def _place(ours: Path, place: Path, earlier: tuple[int, ...] | None) -> None:
    """Give a file its name, where nothing is, or the `earlier` file that may be replaced. `Claim` undoes it."""
    try:
        if earlier is None or not os.path.lexists(place):
            rename_new(ours, place)
        elif exchange(ours, place):
            if _identity(ours) != earlier:
                exchange(ours, place)
                raise _appeared(place)
        else:
            if _identity(place) != earlier:
                raise _appeared(place)
            os.rename(place, ours.with_name(ours.name + ".earlier"))
            rename_new(ours, place)
    except FileExistsError as error:
        raise _appeared(place) from error


def _identity(path: Path) -> tuple[int, ...]:
    found = path.lstat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _appeared(target: Path) -> OutputError:
    return OutputError(
        f"{target} appeared, or was changed, while the output was written; it was kept, and the output was removed",
        "choose another name with -o",
    )


@contextmanager
def _claimed(target: Path, claim: Claim | None) -> Iterator[Claim]:
    if claim is not None:
        yield claim
        return
    with claimed(target) as claim:
        yield claim


def reserve(descriptor: int, size: int) -> None:
    """Allocate `size` bytes where the file system can; else make a sparse file of that size."""
    import errno

    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def write_all(descriptor: int, data: memoryview, position: int) -> None:
    """pwrite until nothing is left."""
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written
