"""The old form of llama.cpp's importance matrix, .dat: what `llama-imatrix --output-format dat` writes.

    i32 entries
    each:  i32 length  name (UTF-8)  i32 ncall  i32 n  f32[n]      values = mean x² · ncall
    i32 chunks   i32 length  name of the text (UTF-8)              both may be missing

All little-endian. ncall counts windows of text: the most tokens that any expert saw over the tokens of a window,
rounded up. Neither the tokens of a window nor the number of experts is in the file: a tensor of E experts is n = E·K
values, and an expert that no token reached has ncall in every channel, a mean of 1, which is what llama.cpp then takes.

Read as if an enemy had written it: every length is checked against the bytes that are left. Refused: truncated files,
lengths that are negative or beyond the file, a name twice, names that are not UTF-8, bytes behind the end.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch

from lowbit.calibrate.importance import ImportanceEntry, ImportanceMatrix
from lowbit.errors import CheckpointError

# llama.cpp's names are shorter than 64 bytes; these leave room and still bound what an error message can hold.
MAX_NAME_BYTES = 1024
MAX_TEXT_NAME_BYTES = 1 << 16
SMALLEST_ENTRY = 4 + 1 + 4 + 4 + 4
# llama.cpp's windows, where the file is all that is known
DEFAULT_CHUNK_TOKENS = 512


def unpack_dat(data: bytes, path: Path) -> ImportanceMatrix:
    """The matrix in the bytes of a .dat file."""
    reader = _Reader(data, path)
    count = reader.integer("the number of entries")
    if not 1 <= count <= len(data) // SMALLEST_ENTRY:
        raise CheckpointError(f"{path}: {count} entries cannot be in a file of {len(data)} bytes")
    entries: dict[str, ImportanceEntry] = {}
    for index in range(count):
        what = f"entry {index + 1} of {count}"
        name = reader.text(f"the name of {what}", 1, MAX_NAME_BYTES)
        if name in entries:
            raise CheckpointError(f"{path}: {name!r} occurs twice")
        entries[name] = _entry(reader, name)
    chunks = reader.integer("the number of chunks") if reader.left else 0
    if chunks < 0:
        raise CheckpointError(f"{path}: it was made of {chunks} chunks")
    text = reader.text("the name of the text", 0, MAX_TEXT_NAME_BYTES) if reader.left else ""
    if reader.left:
        raise CheckpointError(f"{path}: {reader.left} bytes follow where the file should end")
    return ImportanceMatrix(dict(sorted(entries.items())), (text,) if text else (), chunks)


def pack_dat(matrix: ImportanceMatrix) -> bytes:
    """The bytes of a .dat file."""
    # llama.cpp leaves tensors out that nothing was seen of
    entries = {name: entry for name, entry in matrix.entries.items() if entry.counts.any()}
    chunk_tokens = matrix.chunk_tokens or DEFAULT_CHUNK_TOKENS
    pieces = [struct.pack("<i", len(entries))]
    for name, entry in sorted(entries.items()):
        calls = -(-int(entry.counts.max()) // chunk_tokens)
        means = torch.where(entry.counts[:, None] == 0, 1.0, entry.values)
        values = (means * calls).numpy().astype("<f4")
        encoded = name.encode()
        pieces += [struct.pack("<i", len(encoded)), encoded, struct.pack("<ii", calls, values.size), values.tobytes()]
    text = matrix.datasets[-1].encode() if matrix.datasets else b""
    pieces += [struct.pack("<ii", matrix.chunks, len(text)), text]
    return b"".join(pieces)


def _entry(reader: _Reader, name: str) -> ImportanceEntry:
    calls = reader.integer(f"the calls of {name!r}")
    size = reader.integer(f"the number of values of {name!r}")
    if calls < 0 or not 1 <= size <= reader.left // 4:
        raise CheckpointError(
            f"{reader.path}: {name!r} claims {size} values of {calls} calls; {reader.left} bytes are left"
        )
    stored = np.frombuffer(reader.take(4 * size, f"the values of {name!r}"), "<f4")
    values = torch.from_numpy(stored.astype(np.float32))[None] / max(calls, 1)
    if calls == 0 and stored.any():
        raise CheckpointError(f"{reader.path}: {name!r} has sums and was measured on no tokens")
    return ImportanceEntry.of_means(values, torch.tensor([calls * DEFAULT_CHUNK_TOKENS]))


class _Reader:
    def __init__(self, data: bytes, path: Path):
        self.data, self.path, self.position = data, path, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, size: int, what: str) -> bytes:
        if size > self.left:
            raise CheckpointError(f"{self.path}: it ends in {what}: {size} bytes are needed, {self.left} are left")
        self.position += size
        return self.data[self.position - size : self.position]

    def integer(self, what: str) -> int:
        return struct.unpack("<i", self.take(4, what))[0]

    def text(self, what: str, least: int, most: int) -> str:
        length = self.integer(f"the length of {what}")
        if not least <= length <= most:
            raise CheckpointError(f"{self.path}: {what} is {length} bytes long; {least} to {most} are allowed")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8 ({error})") from error
