"""A file mapped into memory: bytes without copies, and without staying resident.

The mapping is private and writable (copy-on-write), so that torch accepts it as a buffer; it is never written to. It
reserves no swap, so that a file larger than the machine's memory can be mapped. `release` drops pages: they are
clean, so the next access reads them from the file again.
"""

from __future__ import annotations

import contextlib
import mmap
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.errors import CheckpointError
from lowbit.files.regular import open_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The `mmap` module names it from Python 3.13 on. Without it Linux refuses private mappings larger than memory.
_LINUX_NORESERVE = {"x86_64": 0x4000, "aarch64": 0x4000, "riscv64": 0x4000}
_NORESERVE = getattr(
    mmap, "MAP_NORESERVE", _LINUX_NORESERVE.get(platform.machine(), 0) if sys.platform == "linux" else 0
)


class MappedFile:
    """One open file. Tensors and views made from it keep the mapping alive after `close`."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open_regular(path) as file:
                self.size = file.seek(0, 2)
                self._map = _map_privately(file.fileno(), self.size) if self.size else None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror or error})") from error
        self._view = memoryview(self._map) if self._map is not None else memoryview(bytearray())

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes start..stop, not copied."""
        return self._view[start:stop]

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Bytes start..stop as a tensor: aliases the file, or a copy where `start` is not a multiple of the item size.

        Aligned access is not only speed: vectorised kernels may fault on unaligned data.
        """
        import torch

        if start == stop:
            return torch.empty(shape, dtype=dtype)
        data: memoryview | bytearray = self._view[start:stop]
        if start % dtype.itemsize:
            data = bytearray(data)
        if dtype is torch.bool:
            # A byte other than 0 and 1 behind a torch.bool is undefined behaviour.
            return torch.frombuffer(data, dtype=torch.uint8).ne(0).reshape(shape)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    def release(self, start: int, stop: int) -> None:
        """Drop the pages that hold bytes start..stop, rounded outwards: a neighbour on the same page faults back in."""
        if self._map is None or start >= stop or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start -= start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, min(stop, self.size) - start)

    def close(self) -> None:
        """Unmap the file, as soon as nothing made from it is in use."""
        self._view.release()
        self._view = memoryview(bytearray())
        if self._map is not None:
            with contextlib.suppress(BufferError):  # a tensor still aliases it; the last one unmaps
                self._map.close()
            self._map = None


def _map_privately(descriptor: int, size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
