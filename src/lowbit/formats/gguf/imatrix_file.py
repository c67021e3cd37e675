"""Files of importance matrices: llama.cpp's GGUF form and its old .dat form, told apart by their first bytes.

    general.type = "imatrix"
    imatrix.datasets     strings    the texts
    imatrix.chunk_count  u32        windows of text
    imatrix.chunk_size   u32        tokens in a window
    "NAME.in_sum2"  F32 [E, K]      Σ x² of each input channel, of each expert
    "NAME.counts"   F32 [E, 1]      tokens that each expert multiplied

NAME is the tensor's GGUF name; tensors are sorted by it; trailing dimensions of one are dropped, as ggml does.
llama.cpp weighs errors with in_sum2 / counts, and with 1 where counts is 0. A file of llama-imatrix, read and written
again, has the same bytes.

Refused, beside what `GGUF` headers are refused for: a file that is no imatrix, a tensor with sums but no counts or the
other way round, types other than F32, counts that are not whole, and what `importance.check_values` refuses.

The old form of llama.cpp's importance matrix, .dat: what `llama-imatrix --output-format dat` writes.

    i32 entries
    each:  i32 length  name (UTF-8)  i32 ncall  i32 n  f32[n]      values = mean x² · ncall
    i32 chunks   i32 length  name of the text (UTF-8)              both may be missing

All little-endian. ncall counts windows of text: the most tokens that any expert saw over the tokens of a window,
rounded up. Neither the tokens of a window nor the number of experts is in the file: a tensor of E experts is n = E·K
values, and an expert that no token reached has ncall in every channel, a mean of 1, which is what llama.cpp then takes.

Read as hostile input: every length is checked against the bytes that are left. Refused: truncated files, lengths that
are negative or beyond the file, repeated names, names that are not UTF-8, bytes behind the end.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import CheckpointError, OutputError
from lowbit.files.regular import open_regular, read_regular
from lowbit.formats.gguf.header import MAGIC
from lowbit.formats.gguf.importance import ImportanceEntry, ImportanceMatrix, check_values
from lowbit.formats.gguf.raw import RawGGUF, open_raw_gguf

Form = Literal["gguf", "dat"]
FORMS: tuple[Form, ...] = ("gguf", "dat")

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
# ggml keeps names in 64 bytes, with the zero at their end
MAX_TENSOR_NAME = 63
MAX_DAT_BYTES = 1 << 34


def is_imatrix(path: str | Path) -> bool:
    """True for a file that can only be importance: a GGUF that says so, or any other file called .dat or .imatrix."""
    path = Path(path)
    if not path.is_file():
        return False
    if not _is_gguf(path):
        return path.suffix in (".dat", ".imatrix")
    raw = open_raw_gguf(path)
    try:
        return _says_imatrix(raw)
    finally:
        raw.close()


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read either form; raises CheckpointError."""
    path = Path(path)
    try:
        if _is_gguf(path):
            matrix = _read_gguf(path)
        elif path.stat().st_size > MAX_DAT_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes; at most {MAX_DAT_BYTES} are read")
        else:
            matrix = unpack_dat(read_regular(path), path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})", "give an imatrix file") from error
    check_values(matrix, str(path))
    return matrix


def write_imatrix(matrix: ImportanceMatrix, path: str | Path, form: Form = "gguf") -> None:
    """Write a file that llama.cpp reads. Raises CheckpointError, OutputError."""
    check_values(matrix, "the imatrix")
    if form == "dat":
        Path(path).write_bytes(pack_dat(matrix))
    else:
        _write_gguf(matrix, Path(path))


def _is_gguf(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(4) == MAGIC


def _says_imatrix(raw: RawGGUF) -> bool:
    named = any(tensor.name.endswith(SUMS) for tensor in raw.tensors)
    return raw.metadata.get("general.type") == "imatrix" or (CHUNK_COUNT in raw.metadata and named)


def _read_gguf(path: Path) -> ImportanceMatrix:
    raw = open_raw_gguf(path)
    try:
        if not _says_imatrix(raw):
            kind = raw.metadata.get("general.architecture") or raw.metadata.get("general.type")
            raise CheckpointError(
                f"{path}: a GGUF file of {str(kind)[:80]!r} is no imatrix", "give the file that llama-imatrix wrote"
            )
        tensors = {tensor.name: tensor for tensor in raw.tensors}
        names = {name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)}
        lonely = names ^ {name.removesuffix(COUNTS) for name in tensors if name.endswith(COUNTS)}
        if lonely:
            raise CheckpointError(f"{path}: {min(lonely)!r} has sums or counts but not both")
        entries = {name: _read_entry(raw, name, tensors) for name in sorted(names)}
        datasets = raw.metadata.get(DATASETS, [])
        return ImportanceMatrix(
            entries,
            tuple(name for name in datasets if name) if isinstance(datasets, list) else (),
            _count(raw.metadata, CHUNK_COUNT, path),
            _count(raw.metadata, CHUNK_SIZE, path),
        )
    finally:
        raw.close()


def _read_entry(raw: RawGGUF, name: str, tensors: dict[str, Any]) -> ImportanceEntry:
    stored = [tensors[name + suffix] for suffix in (SUMS, COUNTS)]
    for tensor in stored:
        if tensor.type_name != "F32":
            raise CheckpointError(f"{raw.path}: {tensor.name!r} is stored as {tensor.type_name}; importance is F32")
    sums, counts = (raw.decode(tensor).clone() for tensor in stored)
    counts = counts.flatten()
    if not counts.numel() or not sums.numel() or sums.numel() % counts.numel():
        raise CheckpointError(f"{raw.path}: {name!r} has {sums.numel()} sums and {counts.numel()} counts")
    sums = sums.reshape(counts.numel(), -1)
    wrong = ~(torch.isfinite(counts) & (counts >= 0) & (counts < 2**53))
    if wrong.any():
        raise CheckpointError(f"{raw.path}: {name!r} has a count of {counts[wrong][0]:g}; tokens are counted from 0 on")
    # float32 holds whole numbers up to 2²⁴; larger ones are whole anyway
    fractional = counts != counts.round()
    if fractional.any():
        raise CheckpointError(f"{raw.path}: {name!r} has a count of {counts[fractional][0]:g}; tokens are whole")
    without = (counts == 0) & sums.any(dim=1)
    if without.any():
        raise CheckpointError(
            f"{raw.path}: {name!r} has sums and was measured on no tokens (expert {int(without.nonzero()[0])})"
        )
    return ImportanceEntry.of_sums(sums, counts)


def _count(metadata: dict[str, Any], key: str, path: Path) -> int:
    value = metadata.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"{path}: {key} is {str(value)[:80]}; a whole number is needed")
    return value


def _write_gguf(matrix: ImportanceMatrix, path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "imatrix")
    writer.kv_data[0].clear()  # general.architecture, which an imatrix has none of
    writer.add_type("imatrix")
    writer.add_array(DATASETS, list(matrix.datasets) or [""])
    writer.add_uint32(CHUNK_COUNT, matrix.chunks)
    most_tokens = max(int(entry.counts.max()) for entry in matrix.entries.values())
    writer.add_uint32(CHUNK_SIZE, matrix.chunk_tokens or max(1, most_tokens // max(1, matrix.chunks)))
    for name, entry in sorted(matrix.entries.items()):
        if len((name + SUMS).encode()) > MAX_TENSOR_NAME:
            raise OutputError(
                f"{path}: {name + SUMS!r} is longer than the {MAX_TENSOR_NAME} bytes that llama.cpp reads",
                "use the .dat form",
            )
        writer.add_tensor(name + SUMS, _as_ggml(entry.sums))
        writer.add_tensor(name + COUNTS, _as_ggml(entry.counts[:, None]))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _as_ggml(values: Tensor) -> np.ndarray:
    """float32 [E, n] without leading dimensions of one, which ggml does not store."""
    return (values[0] if len(values) == 1 else values).numpy().astype(np.float32)


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
    # llama.cpp leaves out tensors that no token reached
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
