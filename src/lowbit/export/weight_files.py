"""The weight files of an output while they are filled, of safetensors and of GGUF alike.

A plan fixes headers and offsets, so files are created at their final size (a full disk shows at once), and bytes are
written in place, from any thread, in any order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Generic, Protocol, TypeVar

from lowbit.errors import OutputError
from lowbit.export.atomic import reserve, write_all
from lowbit.files.hashes import FileHashes


class Placed(Protocol):
    """A tensor of a file."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Placed)


@dataclass
class WeightFile(Generic[T]):
    """One file.

    offsets  tensor → its first byte in the file
    size     in bytes, header included
    zeros    (position, length) of what stays zero: padding behind tensors
    """

    path: Path
    tensors: list[T]
    header: bytes
    offsets: dict[str, int]
    size: int
    zeros: tuple[tuple[int, int], ...] = ()
    descriptor: int = -1
    hashes: FileHashes | None = None

    def create(self) -> None:
        """Create the file at its final size, with its header."""
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        reserve(self.descriptor, self.size)
        write_all(self.descriptor, memoryview(self.header), 0)
        self.hashes = FileHashes(self.descriptor, self.size, [(0, len(self.header)), *self.zeros])


class WeightFiles(Generic[T]):
    """All files of an output. `close` refuses (OutputError) if any byte of any tensor was never written.

    digests  after `close`: file name → SHA-256 of each MiB, one after the other
    """

    def __init__(self, parts: list[WeightFile[T]]):
        self._parts = parts
        self._by_name = {tensor.name: (part, tensor) for part in parts for tensor in part.tensors}
        self._missing = {name: tensor.nbytes for name, (_, tensor) in self._by_name.items()}
        self._lock = Lock()
        self.digests: dict[str, bytes] = {}
        for part in parts:
            part.create()

    @property
    def files(self) -> list[Path]:
        return [part.path for part in self._parts]

    def write_bytes(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Write bytes of a tensor from an offset within it; thread-safe for disjoint parts."""
        part, tensor = self._by_name[name]
        if offset + len(data) > tensor.nbytes:
            raise AssertionError(f"{name}: {len(data)} bytes at {offset} overrun {tensor.nbytes}")
        if len(data):
            position = part.offsets[name] + offset
            write_all(part.descriptor, data, position)
            if part.hashes is not None:
                part.hashes.wrote(position, len(data))
        self.count(name, len(data))

    def count(self, name: str, nbytes: int) -> None:
        """Count bytes of a tensor as written."""
        with self._lock:
            self._missing[name] -= nbytes

    def close(self) -> None:
        """Check completeness, hash and close the files."""
        incomplete = [name for name, nbytes in self._missing.items() if nbytes]
        if incomplete:
            raise OutputError(f"{len(incomplete)} tensors were not written in full, the first {incomplete[0]}",
                              "this is a bug of lowbit; please report it")  # fmt: skip
        self.digests = {part.path.name: part.hashes.digests() for part in self._parts if part.hashes is not None}
        self.abandon()

    def abandon(self) -> None:
        """Close the files as they are."""
        for part in self._parts:
            if part.descriptor >= 0:
                os.close(part.descriptor)
                part.descriptor = -1


def split_by_size(tensors: list[T], most: int | None) -> list[list[T]]:
    """The tensors of each file, in order: `most` bytes at most, or a single tensor that is larger; None: one file."""
    groups: list[list[T]] = [[]]
    filled = 0
    for tensor in tensors:
        if most is not None and groups[-1] and filled + tensor.nbytes > most:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups
