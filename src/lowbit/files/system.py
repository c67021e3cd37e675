"""Errors of the file system in words, free space, and bytes that are on the disk when a call returns."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lowbit.errors import OutputError

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Whoever locks the same folder waits until this ends; nothing where the system has no locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def translated_os_errors(target: Path) -> Iterator[None]:
    """Turn OSErrors of full disks, quotas, limits, permissions and names into OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(existing_parent(target)).free
            raise OutputError(
                f"{target}: no space left on the disk ({free / 1e6:,.1f} MB free)",
                "free some space or write to another disk; nothing was left under that name",
            ) from error
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"{target}: a file became larger than this shell, or this file system, allows",
                "`ulimit -f` shows the limit in blocks; --shard-size makes smaller files",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"{target}: {error.strerror}", "choose a folder that you may write to") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP,
                           errno.ENOTEMPTY, errno.EILSEQ):  # fmt: skip
            shown = str(target) if len(str(target)) < 300 else f"{str(target)[:200]}…"
            raise OutputError(f"{shown}: {error.strerror}", "choose another name with -o") from error
        if error.errno in (errno.EIO, errno.ESTALE):
            raise OutputError(f"{target}: {error.strerror}", "the disk, or the network it hangs on, fails") from error
        raise


def check_disk(output: Path, needed: int, largest_file: int = 0) -> None:
    """OutputError where the disk has less free space than `needed` bytes, or the shell's limit is below a file's."""
    free = shutil.disk_usage(existing_parent(output.absolute().parent)).free
    if free < needed:
        raise OutputError(
            f"{output}: needs {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB free",
            "free some space or write to another disk",
        )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] if resource else -1
    if resource and limit != resource.RLIM_INFINITY and limit < largest_file:
        raise OutputError(
            f"{output}: needs a file of {largest_file / 1e6:,.1f} MB, and this shell allows {limit / 1e6:,.1f} MB",
            "raise the limit (ulimit -f), or make smaller files: --shard-size",
        )


def refuse_sources(places: Iterable[Path], sources: Iterable[Path]) -> None:
    """OutputError where an output is a file or folder that the run reads, under whatever name, or holds one.

    places  final names of what is written; sources  what is read; names of either that do not exist are passed over
    """
    found = [(path, os.path.realpath(path)) for path in map(Path.expanduser, sources) if _exists(path)]
    for place in (place for place in places if _exists(place)):
        inside = os.path.realpath(place) + os.sep
        for path, real in found:
            if os.path.samefile(place, path) or real.startswith(inside):
                what = "the model itself, or a file that the run reads" if not real.startswith(inside) else (
                    f"a folder that holds {path}, which the run reads")  # fmt: skip
                raise OutputError(f"{place} is {what}", "choose another name with -o")


def _exists(path: Path) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # a zero byte
        return False


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


def flush_folder(folder: Path) -> None:
    """fsync every file in a folder, and the folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
