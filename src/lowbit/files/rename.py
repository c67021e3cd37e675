"""Renames that replace nothing by accident.

    rename_new(a, b)   a gets the name b; FileExistsError if something has it already
    exchange(a, b)     a and b swap names in one step, so that at every moment something has each name

Linux has both as flags of renameat2, macOS as flags of renamex_np. File systems without them (and other systems) get
`rename_new` by a hard link, or by an empty place holder that is created exclusively; `exchange` is then refused by its
result, and the caller moves the old one aside first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path

_AT_FDCWD = -100
_LINUX_NOREPLACE, _LINUX_EXCHANGE = 1, 2
_MACOS_EXCHANGE, _MACOS_NOREPLACE = 2, 4
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def rename_new(source: Path, target: Path) -> None:
    """Give a file or folder a name that nothing has; FileExistsError where something has it."""
    if not _with_flag(source, target, _MACOS_NOREPLACE if sys.platform == "darwin" else _LINUX_NOREPLACE):
        _without_flags(source, target)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names; False where the file system cannot."""
    return _with_flag(first, second, _MACOS_EXCHANGE if sys.platform == "darwin" else _LINUX_EXCHANGE)


def _with_flag(source: Path, target: Path, flag: int) -> bool:
    """Rename with a flag; False where flags are not known here, OSError for anything else that fails."""
    call = _system_call()
    if call is None or call(os.fsencode(source), os.fsencode(target), flag) == 0:
        return call is not None
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


@cache
def _system_call():
    """(source, target, flag) → 0, or -1 with errno set; None on systems without it."""
    if sys.platform not in ("linux", "darwin"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        return getattr(library, "renamex_np", None)
    renameat2 = getattr(library, "renameat2", None)
    if renameat2 is None:  # an older C library
        return None
    return lambda source, target, flag: renameat2(_AT_FDCWD, source, _AT_FDCWD, target, flag)


def _without_flags(source: Path, target: Path) -> None:
    if source.is_dir():
        os.mkdir(target)  # FileExistsError; an empty folder of our own is then replaced
        os.replace(source, target)
        return
    try:
        os.link(source, target)
        os.unlink(source)
    except FileExistsError:
        raise
    except OSError:  # no hard links here: FAT, some network drives
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(source, target)
