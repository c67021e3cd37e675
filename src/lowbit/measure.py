"""Wall time and memory of this process: what a run cost, what is left, and the error where that is too little."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from lowbit.errors import UsageError

SHARE_OF_FREE = 0.8  # of the free memory, where no limit is given


class Meter:
    """Wall seconds and peak resident bytes since its construction.

    On Linux the kernel's high-water mark is reset first, so that several runs in one process do not hide each other;
    elsewhere the peak is that of the whole process.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def peak_bytes(self) -> int:
        return peak_memory()


def peak_memory() -> int:
    """Peak resident bytes of this process since the last reset."""
    return _status_kib("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RUSAGE_UNIT


def resident_memory() -> int:
    """Resident bytes of this process now (its peak where the system does not say)."""
    return _status_kib("VmRSS") or peak_memory()


def return_freed_memory() -> None:
    """Make glibc return freed blocks of a megabyte or more at once; for processes of our own only.

    By default it keeps the blocks of freed tensors of changing sizes: a third of the memory of an evaluation.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def trim_memory() -> None:
    """Return all memory that glibc holds free to the system; takes a millisecond or two."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


_M_MMAP_THRESHOLD = -3
# "No limit" in version 1 of control groups is a number near 2^63.
_NO_LIMIT = 1 << 60
_RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024


def _status_kib(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def available_memory() -> int | None:
    """Bytes that this process can allocate without swapping or being killed; None if unknown.

    The least of MemAvailable (/proc/meminfo) and of what the control groups of the process allow: memory.max −
    memory.current, page cache that can go counted as free; version 1 of control groups likewise.
    """
    found = [_meminfo_available(), _left_in_control_groups()]
    known = [count for count in found if count is not None]
    if known:
        return min(known)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def too_little_memory(
    what: str, needed: Mapping[str, int], allowed: int, given: bool, instead: str, why: str = ""
) -> UsageError:
    """The error of a run that needs more memory than it may take.

    what     runs: "the run", "distill"
    needed   part → bytes, the program among them
    allowed  bytes in all; `given`: by --max-memory
    instead  what to do where no more can be allowed
    why      no other way of running needs less
    """
    parts = ", ".join(f"{part} {human_bytes(count)}" for part, count in needed.items())
    limit = "--max-memory allows" if given else "there are"
    because = f", and {why}" if why else ""
    return UsageError(f"{what} needs {human_bytes(sum(needed.values()))} ({parts}); {limit} {human_bytes(allowed)}"
                      f"{because}", f"allow more, or {instead}")  # fmt: skip


def human_bytes(count: float) -> str:
    """1234567 → "1.23 MB"; decimal, as disks and hubs count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _meminfo_available(path: Path = Path("/proc/meminfo")) -> int | None:
    for line in _lines(path):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_in_control_groups(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes left under the tightest memory limit of the process's control groups and their parents; None without one.

    A line of /proc/self/cgroup is `0::/path` (version 2) or `n:controllers:/path` (version 1).
    """
    left = []
    for line in _lines(groups):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = base / path.strip().lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None and limit < _NO_LIMIT:
                left.append(max(0, limit - max(0, used - _inactive_file(folder / "memory.stat"))))
    return min(left, default=None)


def _inactive_file(path: Path) -> int:
    """Page cache that the kernel would drop first."""
    for line in _lines(path):
        if line.startswith(("inactive_file ", "total_inactive_file ")):
            return int(line.split()[1])
    return 0


def _number(path: Path) -> int | None:
    """None for a file that is not there, and for "max"."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
