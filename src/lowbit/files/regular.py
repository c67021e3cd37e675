"""Opening only what is a file: a pipe would be waited for, a device might do anything.

Paths of users and of checkpoints are opened through `open_regular`, or looked at with `refuse_irregular` where a
library opens them.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import BinaryIO, TextIO

from lowbit.errors import CheckpointError

_NONBLOCK = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def open_regular(path: Path) -> BinaryIO:
    """A file, open for reading bytes; CheckpointError where it is a folder, a pipe, a socket or a device."""
    descriptor = os.open(path, os.O_RDONLY | _NONBLOCK)  # which opens a pipe without waiting for its writer
    try:
        _refuse(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def open_text(path: Path) -> TextIO:
    """The same, for reading UTF-8."""
    return io.TextIOWrapper(open_regular(path), encoding="utf-8")


def read_regular(path: Path) -> bytes:
    """All bytes of a file; CheckpointError as above."""
    with open_regular(path) as file:
        return file.read()


def refuse_irregular(folder: Path) -> None:
    """CheckpointError where a folder holds a pipe, a socket or a device, which a library might wait for."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir() and os.path.exists(entry.path):  # a link to nothing is not opened
            _refuse(Path(entry.path), entry.stat().st_mode)


def _refuse(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            f"{path} is {kind_of(mode)}, and a file is needed", "give a file; copy what a pipe carries into one"
        )


def kind_of(mode: int) -> str:
    """What a path is by its `st_mode`: "a folder", "a pipe" …"""
    kinds = {"a file": stat.S_ISREG, "a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK,
             "a device": stat.S_ISCHR}  # fmt: skip
    return next((name for name, test in kinds.items() if test(mode)), "no regular file")
