"""What a run cost: wall time and peak resident memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
import time
from pathlib import Path


class Meter:
    """Wall seconds since it was made, and peak resident bytes since then.

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
    """Have glibc give every freed block of a megabyte or more back at once; for processes of our own only.

    Left alone it keeps what tensors of changing sizes free, in pieces: a third of what an evaluation held.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def trim_memory() -> None:
    """Have glibc give what is free now back to the system, once; a millisecond or two."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


_M_MMAP_THRESHOLD = -3
_RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024


def _status_kib(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
