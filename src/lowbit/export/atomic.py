"""Folders, and files with a report beside them, that appear complete or not at all.

Output goes into a hidden folder beside the target, is flushed to disk and renamed at the end. After an error, Ctrl-C or
a full disk the hidden folder is removed; a power cut may leave `.NAME.partial-…`, never an incomplete NAME.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowbit.checkpoint.base import REPORT_NAME
from lowbit.errors import OutputError


def refuse_existing(target: Path, overwrite: bool = False) -> None:
    """OutputError if the target exists and is not an empty folder; with `overwrite`, unless lowbit wrote it."""
    real_folder = target.is_dir() and not target.is_symlink()
    if real_folder and (not any(target.iterdir()) or (overwrite and (target / REPORT_NAME).is_file())):
        return
    if target.exists() or target.is_symlink():
        hint = "choose another name with -o, or remove it first"
        if overwrite:
            hint = f"--overwrite replaces only folders that hold a {REPORT_NAME}; remove this one by hand"
        raise OutputError(f"{target} exists already", hint)


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into; it becomes `target` when the block ends without an exception.

    With `overwrite`, an earlier output of that name is removed once the new one is complete, just before the rename.
    """
    target = Path(os.path.abspath(target))  # `.` and `..` have no name to put the hidden folder beside
    refuse_existing(target, overwrite)
    with _hidden_folder(target) as work:
        yield work
        flush_folder(work)
        earlier = work.with_name(work.name + ".earlier")  # moved aside, not removed, until the new one has its name
        if target.is_dir():
            os.rename(target, earlier)
        os.rename(work, target)
        shutil.rmtree(earlier, ignore_errors=True)


def refuse_existing_file(target: Path, report: Path, overwrite: bool = False) -> None:
    """OutputError if something already has the name of a file; with `overwrite`, only if no report is there."""
    if not (target.exists() or target.is_symlink()):
        return
    if overwrite and target.is_file() and report.is_file():
        return
    hint = "choose another name with -o, or remove it first"
    if overwrite:
        hint = f"--overwrite replaces only files with a {report.name} beside them; remove this one by hand"
    raise OutputError(f"{target} exists already", hint)


@contextmanager
def atomic_files(target: Path) -> Iterator[Path]:
    """A hidden folder for a file `target` and the files beside it. When the block ends without an exception the files
    get their places in reverse order of names: the first part of a split model, which readers open, appears last."""
    target = Path(os.path.abspath(target))
    with _hidden_folder(target) as work:
        yield work
        flush_folder(work)
        in_order = sorted(work.iterdir(), key=lambda path: (path.suffix != target.suffix, path.name))
        for path in reversed(in_order):
            os.replace(path, target.parent / path.name)
        work.rmdir()


@contextmanager
def _hidden_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that the block moves or empties; an exception removes it."""
    work = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        with translated_os_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir()
            yield work
            _flush(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def check_disk(output: Path, needed: int) -> None:
    """OutputError where the disk has less free space than `needed` bytes."""
    free = shutil.disk_usage(_existing_parent(output.absolute().parent)).free
    if free < needed:
        raise OutputError(
            f"{output}: needs {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB free",
            "free some space or write to another disk",
        )


@contextmanager
def translated_os_errors(target: Path) -> Iterator[None]:
    """Turn OSErrors of full disks, quotas, permissions and names into OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing_parent(target)).free
            raise OutputError(
                f"{target}: no space left on the disk ({free / 1e6:,.1f} MB free)",
                "free some space or write to another disk; nothing was left under that name",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"{target}: {error.strerror}", "choose a folder that you may write to") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise OutputError(f"{target}: {error.strerror}", "choose another name with -o") from error
        raise


def flush_folder(folder: Path) -> None:
    """fsync every file in a folder, and the folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing_parent(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def reserve(descriptor: int, size: int) -> None:
    """Allocate `size` bytes where the file system can; else make a sparse file of that size."""
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
