"""Files of importance: llama.cpp's GGUF form here, its old .dat form in `imatrix_dat.py`; their first bytes tell which.

    general.type = "imatrix"
    imatrix.datasets     strings    the texts
    imatrix.chunk_count  u32        windows of text
    imatrix.chunk_size   u32        tokens in a window
    "NAME.in_sum2"  F32 [E, K]      Σ x² of each input channel, of each expert
    "NAME.counts"   F32 [E, 1]      tokens that each expert multiplied

NAME is the tensor's GGUF name; tensors are sorted by it; trailing dimensions of one are dropped, as ggml does. A model
that llama.cpp quantizes is weighed with in_sum2 / counts, and with 1 where counts is 0. What llama-imatrix wrote, read
and written again, is the same bytes.

Refused, beside what `GGUF` headers are refused for: a file that is no imatrix, a tensor with sums but no counts or the
other way round, types other than F32, counts that are not whole, and what `importance.check_values` refuses.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lowbit.calibrate.imatrix_dat import pack_dat, unpack_dat
from lowbit.calibrate.importance import ImportanceEntry, ImportanceMatrix, check_fits, check_values
from lowbit.checkpoint.gguf_header import MAGIC
from lowbit.checkpoint.gguf_raw import RawGGUF, open_raw_gguf
from lowbit.errors import CheckpointError, OutputError

__all__ = ["ImportanceMatrix", "check_fits", "is_imatrix", "read_imatrix", "write_imatrix"]

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
            matrix = unpack_dat(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})", "give an imatrix file") from error
    check_values(matrix, str(path))
    return matrix


def write_imatrix(matrix: ImportanceMatrix, path: str | Path, form: Form = "gguf") -> None:
    """Write a file that llama.cpp reads; it has its name when it is complete. Raises CheckpointError, OutputError."""
    path = Path(os.path.abspath(path))
    check_values(matrix, "the imatrix")
    work = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        if form == "dat":
            work.write_bytes(pack_dat(matrix))
        else:
            _write_gguf(matrix, work)
        with work.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
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
    sums, counts = (_float32(raw, tensors[name + suffix]) for suffix in (SUMS, COUNTS))
    counts = counts.flatten()
    if not counts.numel() or not sums.numel() or sums.numel() % counts.numel():
        raise CheckpointError(f"{raw.path}: {name!r} has {sums.numel()} sums and {counts.numel()} counts")
    sums = sums.reshape(counts.numel(), -1)
    if not (torch.isfinite(counts).all() and (counts >= 0).all() and (counts < 2**53).all()):
        raise CheckpointError(f"{raw.path}: {name!r} has a count of {_worst(counts):g}; tokens are counted from 0 on")
    # float32 holds whole numbers up to 2²⁴, so that large ones are whole anyway
    if (counts != counts.round()).any():
        raise CheckpointError(f"{raw.path}: {name!r} has a count of {_fraction(counts):g}; tokens are whole")
    without = (counts == 0) & sums.any(dim=1)
    if without.any():
        raise CheckpointError(
            f"{raw.path}: {name!r} has sums and was measured on no tokens (expert {int(without.nonzero()[0])})"
        )
    return ImportanceEntry.of_sums(sums, counts)


def _float32(raw: RawGGUF, tensor: Any) -> Tensor:
    if tensor.type_name != "F32":
        raise CheckpointError(f"{raw.path}: {tensor.name!r} is stored as {tensor.type_name}; importance is F32")
    return raw.decode(tensor).clone()


def _worst(counts: Tensor) -> float:
    wrong = ~(torch.isfinite(counts) & (counts >= 0) & (counts < 2**53))
    return counts[wrong][0].item()


def _fraction(counts: Tensor) -> float:
    return counts[counts != counts.round()][0].item()


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
    writer.add_uint32(CHUNK_SIZE, matrix.chunk_tokens or max(1, _most_tokens(matrix) // max(1, matrix.chunks)))
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


def _most_tokens(matrix: ImportanceMatrix) -> int:
    return max(int(entry.counts.max()) for entry in matrix.entries.values())


def _as_ggml(values: Tensor) -> np.ndarray:
    """float32 [E, n] without leading dimensions of one, which ggml does not store."""
    return (values[0] if len(values) == 1 else values).numpy().astype(np.float32)
