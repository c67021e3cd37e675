"""SHA-256 of each MiB of a file: what says later that no bit has changed, and where one did.

A writer hands every run of bytes to `FileHashes.wrote`; the thread that completes a MiB hashes it while it is still in
the page cache. So it costs no second pass, and no lock is held meanwhile. What was written through a mapping is hashed
at the end.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from lowbit.workers import run_all

CHUNK = 1 << 20
DIGEST = 32  # bytes


class FileHashes:
    """The hashes of a file while it is written, by any thread in any order."""

    def __init__(self, descriptor: int, size: int, written: Iterable[tuple[int, int]] = ()):
        """written  (position, length) of what needs no writing: headers, and the zeros between tensors"""
        self._descriptor, self._size, self._lock = descriptor, size, Lock()
        self._missing = [min(CHUNK, size - start) for start in range(0, size, CHUNK)]
        self._digests: list[bytes | None] = [None] * len(self._missing)
        for position, length in written:
            self._count(position, length)

    def wrote(self, position: int, length: int) -> None:
        """Count bytes that are in the file now, and hash the chunks that they complete."""
        for index in self._count(position, length):
            self._hash(index)

    def digests(self) -> bytes:
        """The digests of all chunks, one after the other."""
        left = [index for index, digest in enumerate(self._digests) if digest is None]
        run_all(((self._hash, index) for index in left), os.cpu_count() or 1)
        return b"".join(digest or b"" for digest in self._digests)

    def _count(self, position: int, length: int) -> list[int]:
        """Chunks that are complete with these bytes."""
        complete, end = [], position + length
        with self._lock:
            for index in range(position // CHUNK, -(-end // CHUNK)):
                begin = index * CHUNK
                self._missing[index] -= min(end, begin + CHUNK) - max(position, begin)
                if self._missing[index] == 0:
                    complete.append(index)
        return complete

    def _hash(self, index: int) -> None:
        self._digests[index] = _chunk_digest(self._descriptor, index)


def file_digests(path: Path) -> bytes:
    """The digests of a file's chunks, by as many threads as there are cores."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return FileHashes(descriptor, os.fstat(descriptor).st_size).digests()
    finally:
        os.close(descriptor)


def as_text(digests: bytes) -> str:
    """Digests as a report keeps them."""
    return base64.b64encode(digests).decode("ascii")


def from_text(text: str) -> bytes:
    """Digests of a report; ValueError for text that is none."""
    digests = base64.b64decode(text, validate=True)
    if len(digests) % DIGEST:
        raise ValueError("no whole number of SHA-256 digests")
    return digests


def _chunk_digest(descriptor: int, index: int) -> bytes:
    data = os.pread(descriptor, CHUNK, index * CHUNK)
    while len(data) < CHUNK and (more := os.pread(descriptor, CHUNK - len(data), index * CHUNK + len(data))):
        data += more
    return hashlib.sha256(data).digest()
