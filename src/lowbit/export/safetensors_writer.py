"""Safetensors, written out of order and in parallel.

The plan fixes dtypes and shapes, hence headers, shards and offsets: files are created at their final size (a full disk
shows at once) and slabs of rows are written in place, from any thread, in any order.

    [u64 header length][JSON header, padded with spaces to 8][tensor bytes, no holes]

Values that are not contiguous in the file (rows of alternating gate and up projections, strips of columns of a
transposed weight) are copied into a mapping of the file. Tensors up to `ASSEMBLED_BYTES` are assembled from strips in
memory and written when they are complete, which takes a fraction of the page faults.

Within a shard wide dtypes come first, so that every tensor is aligned to its own item size.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from lowbit.checkpoint.safetensors import TORCH_DTYPE
from lowbit.errors import OutputError
from lowbit.export import Piece
from lowbit.export.atomic import reserve, write_all
from lowbit.files.hashes import FileHashes

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPE.items()}
# 64 MB hold the 4-bit codes of a matrix of 8192 × 16384.
ASSEMBLED_BYTES = 1 << 26


@dataclass(frozen=True)
class StoredTensor:
    """Name, dtype and shape of a tensor of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first dimension."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes


@dataclass
class _Shard:
    path: Path
    tensors: list[StoredTensor]
    header: bytes
    offsets: dict[str, int]
    size: int
    descriptor: int = -1
    hashes: FileHashes | None = None

    def write(self, data: memoryview, position: int) -> None:
        """Write at a position of the file, and count it for the hashes."""
        write_all(self.descriptor, data, position)
        if self.hashes is not None:
            self.hashes.wrote(position, len(data))


class SafetensorsWriter:
    """Creates the files of `tensors` in `folder` and fills them slab by slab.

    shard_size  bytes of tensors per file at most (one tensor larger than that gets a file of its own)

    `close` refuses (OutputError) if any byte of any tensor was never written.
    """

    def __init__(self, folder: Path, tensors: list[StoredTensor], shard_size: int):
        self._folder = folder
        self._shards = list(_plan_shards(folder, tensors, shard_size))
        self._by_name = {tensor.name: (shard, tensor) for shard in self._shards for tensor in shard.tensors}
        self._missing = {tensor.name: tensor.nbytes for tensor in tensors}
        self._lock = Lock()
        self._assembled: dict[str, Tensor] = {}
        self.digests: dict[str, bytes] = {}
        for shard in self._shards:
            shard.descriptor = os.open(shard.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            reserve(shard.descriptor, shard.size)
            write_all(shard.descriptor, memoryview(shard.header), 0)
            shard.hashes = FileHashes(shard.descriptor, shard.size, [(0, len(shard.header))])

    @property
    def files(self) -> list[Path]:
        return [shard.path for shard in self._shards]

    def write(self, piece: Piece) -> None:
        """Write values to their place; thread-safe for disjoint parts."""
        name, values, row, column, index = piece.name, piece.values, piece.row, piece.column, piece.index
        shard, stored = self._by_name[name]
        if values.dtype != stored.dtype:
            raise AssertionError(f"{name}: {values.dtype} where {stored.dtype} was planned")
        if index:
            self._write_apart(shard, stored, values, index)
            return
        if len(stored.shape) == 2 and values.dim() == 2 and values.shape[1] != stored.shape[1]:
            strip = (slice(row, row + values.shape[0]), slice(column, column + values.shape[1]))
            whole = self._with_strip(stored, values, strip)
            if whole is None:
                self._write_apart(shard, stored, values, strip)
            elif whole.numel():
                shard.write(_bytes_of(whole), shard.offsets[name])
            return
        data = _bytes_of(values)
        offset = row * stored.row_bytes
        if column or offset + len(data) > stored.nbytes:
            raise AssertionError(f"{name}: {list(values.shape)} at ({row}, {column}) overruns {list(stored.shape)}")
        with self._lock:
            self._missing[name] -= len(data)
        shard.write(data, shard.offsets[name] + offset)

    def _with_strip(self, stored: StoredTensor, values: Tensor, strip: tuple[slice, slice]) -> Tensor | None:
        """The complete tensor after its last strip, an empty one before; None for tensors above ASSEMBLED_BYTES."""
        if stored.nbytes > ASSEMBLED_BYTES:
            return None
        with self._lock:
            whole = self._assembled.setdefault(stored.name, torch.empty(stored.shape, dtype=stored.dtype))
        _copy_into(whole, values, strip, stored)
        with self._lock:
            self._missing[stored.name] -= values.numel() * stored.dtype.itemsize
            if self._missing[stored.name] == 0:
                return self._assembled.pop(stored.name)
        return torch.empty(0)

    def _write_apart(self, shard: _Shard, stored: StoredTensor, values: Tensor, index: tuple[int | slice, ...]) -> None:
        """Copy to stored[index], which is not contiguous, through a mapping of the file.

        A system call for each run of bytes would release the interpreter's lock and wait for it every time.
        """
        first, last = 0, stored.shape[0]
        if isinstance(index[0], int):  # only this one needs to be mapped
            first, last, index = index[0], index[0] + 1, (0, *index[1:])
        if not 0 <= first < last <= stored.shape[0]:
            raise AssertionError(f"{stored.name}: {first} is not in {list(stored.shape)}")
        begin = shard.offsets[stored.name] + first * stored.row_bytes
        lead = begin % mmap.ALLOCATIONGRANULARITY
        shape = (last - first, *stored.shape[1:])
        length = (last - first) * stored.row_bytes
        with mmap.mmap(shard.descriptor, lead + length, offset=begin - lead) as region:
            count = length // stored.dtype.itemsize
            whole = torch.frombuffer(region, dtype=stored.dtype, count=count, offset=lead).view(shape)
            _copy_into(whole, values, index, stored)
            del whole  # a mapping that is in use cannot be closed
        with self._lock:
            self._missing[stored.name] -= values.numel() * stored.dtype.itemsize

    def close(self) -> None:
        """Check completeness, hash, write the index where there are several shards, and close the files."""
        incomplete = [name for name, missing in self._missing.items() if missing != 0]
        if incomplete:
            raise OutputError(f"{len(incomplete)} tensors were not written completely, the first {incomplete[0]}",
                              "this is a bug of lowbit; please report it")  # fmt: skip
        self.digests = {shard.path.name: shard.hashes.digests() for shard in self._shards if shard.hashes is not None}
        if len(self._shards) > 1:
            total = sum(tensor.nbytes for shard in self._shards for tensor in shard.tensors)
            weight_map = {tensor.name: shard.path.name for shard in self._shards for tensor in shard.tensors}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        self.abandon()

    def abandon(self) -> None:
        """Close the files as they are."""
        for shard in self._shards:
            if shard.descriptor >= 0:
                os.close(shard.descriptor)
                shard.descriptor = -1


def _bytes_of(values: Tensor) -> memoryview:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _copy_into(whole: Tensor, values: Tensor, index: tuple[int | slice, ...], stored: StoredTensor) -> None:
    target = whole[index]
    if target.shape != values.shape:
        raise AssertionError(f"{stored.name}: {list(values.shape)} overruns {list(target.shape)}, which {index} is")
    target.copy_(values)


def file_sizes(tensors: list[StoredTensor], shard_size: int) -> list[int]:
    """Bytes of each safetensors file, with headers; the JSON index is not among them."""
    return [shard.size for shard in _plan_shards(Path(), tensors, shard_size)]


def _plan_shards(folder: Path, tensors: list[StoredTensor], shard_size: int) -> Iterator[_Shard]:
    contents: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if contents[-1] and filled + tensor.nbytes > shard_size:
            contents.append([])
            filled = 0
        contents[-1].append(tensor)
        filled += tensor.nbytes
    count = len(contents)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    for name, inside in zip(names, contents, strict=True):
        yield _layout(folder / name, inside)


def _layout(path: Path, tensors: list[StoredTensor]) -> _Shard:
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # stable: model order within a dtype
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    begins: dict[str, int] = {}
    for tensor in ordered:
        begins[tensor.name] = begin
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
        begin += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return _Shard(path, ordered, head, {name: len(head) + at for name, at in begins.items()}, len(head) + begin)
