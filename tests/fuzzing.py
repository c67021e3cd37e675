"""Fuzzing of readers: valid files, mutated; each try bounded in time and memory.

A reader must open a file or raise LowbitError, whatever the file holds. The suite makes the same TRIES of all readers
together everywhere; LOWBIT_FUZZ_SECONDS says to look so long instead, LOWBIT_FUZZ_SEED where to start. Every try has a
number and can be repeated alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.errors import LowbitError
from lowbit.formats.gguf.header import read_header

TRIES = 2000
CPU_SECONDS_PER_FILE = 10.0  # a hang, on whatever machine
SPARE_BYTES = 1 << 30

# Numbers at which parsers trip, as u64; shorter fields take the low bytes.
EDGES = [
    0, 1, 2, 7, 8, 9, 12, 13, 31, 32, 33, 34, 39, 41, 99, 127, 128, 255, 256, 257, 4096, 65535, 65536,
    2**24, 2**26, 2**26 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32,
    2**64 - 1,
]  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A valid file. Mutations fall into the first `head` bytes, often onto `fields`: (position, size) of numbers."""

    name: str
    content: bytes
    head: int
    fields: Sequence[tuple[int, int]] = field(default=())


def gguf_sample(name: str, content: bytes, folder: Path) -> Sample:
    """With the numbers of the header as fields: lengths, counts, types, dimensions and offsets."""
    path = folder / "sample.gguf"
    path.write_bytes(content)
    header = read_header(MappedFile(path))
    fields = [(4, 4), (8, 8), (16, 8)]
    for key, (start, _) in header.key_spans.items():
        kind = start + 8 + len(key.encode())
        fields += [(start, 8), (kind, 4), (kind + 4, 4), (kind + 4, 8), (kind + 8, 8)]
    at = max((stop for _, stop in header.key_spans.values()), default=24)
    for tensor in header.tensors:
        dims = at + 8 + len(tensor.name.encode())
        fields += [(at, 8), (dims, 4)] + [(dims + 4 + 8 * i, 8) for i in range(len(tensor.shape))]
        at = dims + 4 + 8 * len(tensor.shape) + 12
        fields += [(at - 12, 4), (at - 8, 8)]
    return Sample(name, content, header.data_start, fields)


def mutate(sample: Sample, others: Sequence[Sample], rng: random.Random) -> bytes:
    """One to four changes of a sample."""
    content = bytearray(sample.content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        change = rng.choice((_flip, _flip, _edit_field, _edit_field, _edit_anywhere, _splice, _steal, _truncate))
        change(content, sample, others, rng)
    return bytes(content)


def _position(content: bytearray, sample: Sample, rng: random.Random) -> int:
    return rng.randrange(max(min(sample.head, len(content)), 1))


def _flip(content, sample, others, rng):
    if content:
        at = _position(content, sample, rng)
        content[at] = rng.choice((content[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))


def _edit_field(content, sample, others, rng):
    if sample.fields:
        at, size = rng.choice(sample.fields)
        now = int.from_bytes(content[at : at + size], "little")
        _write(content, at, size, rng.choice((*EDGES, now + 1, now - 1, 2 * now, len(content), rng.getrandbits(16))))


def _edit_anywhere(content, sample, others, rng):
    _write(content, _position(content, sample, rng), rng.choice((1, 2, 4, 8)), rng.choice(EDGES))


def _write(content, at, size, number):
    if at + size <= len(content):
        content[at : at + size] = struct.pack("<Q", number % 2**64)[:size]


def _splice(content, sample, others, rng):
    """Delete, double or overwrite a run of bytes."""
    start = _position(content, sample, rng)
    run = content[start : start + rng.choice((1, 4, 8, 24, 100))]
    at = _position(content, sample, rng)
    content[at : at + rng.choice((0, len(run)))] = rng.choice((run, b"", run * 2))


def _steal(content, sample, others, rng):
    """Go on as another sample does."""
    other = rng.choice(others)
    content[_position(content, sample, rng) :] = other.content[rng.randrange(other.head) :]


def _truncate(content, sample, others, rng):
    if rng.random() < 0.3:
        del content[rng.randrange(len(content) + 1) :]


class TooSlowError(BaseException):
    """A try used more CPU time than it may; a BaseException, so that no reader swallows it."""


@contextlib.contextmanager
def bounded_time(seconds: float) -> Iterator[None]:
    """CPU time of this process: a busy machine is not a hang."""

    def too_slow(*_):
        raise TooSlowError

    before = signal.signal(signal.SIGVTALRM, too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def bounded_memory(spare: int) -> Iterator[None]:
    """At most `spare` bytes of address space more than now, where the system can tell (Linux)."""
    if not sys.platform.startswith("linux"):
        yield
        return
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(
    samples: Sequence[Sample], read: Callable[[Path], None], folder: Path, suffix: str, share: float
) -> tuple[int, int]:
    """(files opened, files refused) in this share of the tries, or of the time.

    AssertionError names the try and keeps its file, if `read` fails otherwise.
    """
    seconds = os.environ.get("LOWBIT_FUZZ_SECONDS")
    seed = int(os.environ.get("LOWBIT_FUZZ_SEED", "0"))
    opened = refused = number = 0
    end = time.monotonic() + share * float(seconds or 0)
    with bounded_memory(SPARE_BYTES):
        while time.monotonic() < end if seconds else number < share * TRIES:
            rng = random.Random(f"{seed}/{number}")
            sample = rng.choice(samples)
            path = folder / f"fuzzed{suffix}"
            path.write_bytes(mutate(sample, samples, rng))
            try:
                with bounded_time(CPU_SECONDS_PER_FILE):
                    read(path)
                opened += 1
            except LowbitError:
                refused += 1
            except (Exception, TooSlowError) as error:
                kept = path.rename(folder / f"failure-{seed}-{number}{suffix}")
                raise AssertionError(f"{sample.name}, seed {seed}, try {number} ({kept}): {error!r}") from error
            number += 1
    print(f"{opened} files opened, {refused} refused (seed {seed})")
    return opened, refused
