"""GGUF files, written out of order and in parallel.

    "GGUF" u32 version 3, u64 tensors, u64 key-values, key-values, tensor table, padding, tensor data

The plan fixes types and shapes, hence the header and all offsets: files are created at their final size (a full disk
shows at once) and runs of blocks are written in place, from any thread, in any order. Each tensor begins at a multiple
of 32 bytes, with zeros between.

A model may be split: NAME-00001-of-0000N.gguf. The first part carries the key-values of the model; every part has
split.no, split.count and split.tensors.count. llama.cpp opens the first and finds the others.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from gguf.constants import GGUFValueType

from lowbit.errors import CheckpointError, OutputError
from lowbit.export import Piece
from lowbit.export.atomic import reserve, write_all
from lowbit.files.hashes import FileHashes

VERSION = 3
ALIGNMENT = 32

# key → packed value: type and bytes as they lie in the file
KeyValues = dict[str, bytes]

_SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H", GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i", GGUFValueType.UINT64: "<Q", GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f", GGUFValueType.FLOAT64: "<d", GGUFValueType.BOOL: "<?",
}  # fmt: skip


@dataclass(frozen=True)
class StoredBlocks:
    """A tensor of the file. shape in torch's order; nbytes of all its blocks"""

    name: str
    shape: tuple[int, ...]
    type_number: int
    nbytes: int


def packed(value: Any, kind: GGUFValueType, items: GGUFValueType | None = None) -> bytes:
    """A value with its type, packed; `items` is the type of an array's items."""
    return struct.pack("<I", kind) + _packed_value(value, kind, items)


def _packed_value(value: Any, kind: GGUFValueType, items: GGUFValueType | None = None) -> bytes:
    if kind is GGUFValueType.STRING:
        text = value if isinstance(value, bytes) else str(value).encode("utf-8")
        return struct.pack("<Q", len(text)) + text
    if kind is not GGUFValueType.ARRAY:
        return struct.pack(_SCALARS[kind], value)
    if items is None:
        raise AssertionError("an array needs the type of its items")
    head = struct.pack("<IQ", items, len(value))
    if items is GGUFValueType.STRING:
        return head + b"".join(_packed_value(item, items) for item in value)
    return head + np.asarray(value).astype(np.dtype(_SCALARS[items].replace("?", "u1"))).tobytes()


def packed_key_values(values: dict[str, tuple[Any, ...]]) -> KeyValues:
    """(value, type) or (value, type, type of items) of each key; CheckpointError where a number does not fit."""
    done: KeyValues = {}
    for key, (value, kind, *rest) in values.items():
        items = [each for each in rest if each is not None]
        numbers = np.asarray(value) if kind is not GGUFValueType.STRING and items != [GGUFValueType.STRING] else None
        try:
            done[key] = packed(value, kind, *items)
            fits = True
            if numbers is not None and numbers.dtype.kind == "f" and not key.startswith("tokenizer."):
                fits = bool(np.isfinite(numbers.astype(np.float32)).all())
        except (struct.error, OverflowError, TypeError, ValueError):
            fits = False
        if fits and numbers is not None and numbers.dtype.kind in "iu" and items:
            fits = np.array_equal(numbers, numbers.astype(np.dtype(_SCALARS[items[0]].replace("?", "u1"))))
        if not fits:
            wanted = (items[0] if items else kind).name.lower()
            raise CheckpointError(
                f"config.json or the tokenizer makes {key} {str(value)[:60]}, which {wanted} cannot hold",
                "config.json is damaged, or of another model",
            )
    return done


@dataclass
class _Part:
    path: Path
    tensors: list[StoredBlocks]
    header: bytes
    offsets: dict[str, int]
    size: int
    descriptor: int = -1
    hashes: FileHashes | None = None

    @property
    def blank(self) -> list[tuple[int, int]]:
        """(position, length) of the header, and of the zeros behind each tensor."""
        ends = [self.offsets[tensor.name] + tensor.nbytes for tensor in self.tensors]
        return [(0, len(self.header)), *((end, _aligned(end) - end) for end in ends)]


class GGUFWriter:
    """Creates the file, or the parts, of `tensors` in `folder` and fills them block by block.

    name        of the file, "x.gguf"; parts are called "x-00001-of-0000N.gguf"
    shard_size  bytes of tensors per part at most (one tensor larger than that gets a part of its own); None: one file

    `close` refuses (OutputError) if any byte of any tensor was never written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        tensors: list[StoredBlocks],
        key_values: KeyValues,
        shard_size: int | None = None,
    ):
        self._parts = plan_parts(folder, name, tensors, key_values, shard_size)
        self._by_name = {tensor.name: (part, tensor) for part in self._parts for tensor in part.tensors}
        self._missing = {tensor.name: tensor.nbytes for tensor in tensors}
        self._lock = Lock()
        self.digests: dict[str, bytes] = {}
        for part in self._parts:
            part.descriptor = os.open(part.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            reserve(part.descriptor, part.size)
            write_all(part.descriptor, memoryview(part.header), 0)
            part.hashes = FileHashes(part.descriptor, part.size, part.blank)

    @property
    def files(self) -> list[Path]:
        return [part.path for part in self._parts]

    def write(self, piece: Piece) -> None:
        """Consecutive rows of blocks, uint8 [rows, row bytes], or numbers of a vector from a column on; thread-safe for
        disjoint parts."""
        part, stored = self._by_name[piece.name]
        data = piece.values.contiguous().reshape(-1).view(torch.uint8).numpy().data
        rows = math.prod(stored.shape[:-1])
        offset = piece.row * (stored.nbytes // rows if rows else 0) + piece.column * piece.values.element_size()
        if offset + len(data) > stored.nbytes:
            raise AssertionError(f"{piece.name}: {len(data)} bytes at {offset} overrun {stored.nbytes}")
        if len(data):
            position = part.offsets[piece.name] + offset
            write_all(part.descriptor, data, position)
            if part.hashes is not None:
                part.hashes.wrote(position, len(data))
        with self._lock:
            self._missing[piece.name] -= len(data)

    def close(self) -> None:
        """Hash and close the files; OutputError if something was never written."""
        missing = [name for name, nbytes in self._missing.items() if nbytes]
        if missing:
            raise OutputError(f"{self._parts[0].path}: {len(missing)} tensors were not written in full: {missing[0]} …")
        self.digests = {part.path.name: part.hashes.digests() for part in self._parts if part.hashes is not None}
        self.abandon()

    def abandon(self) -> None:
        """Close the files as they are."""
        for part in self._parts:
            if part.descriptor >= 0:
                os.close(part.descriptor)
                part.descriptor = -1


def plan_parts(
    folder: Path, name: str, tensors: list[StoredBlocks], key_values: KeyValues, shard_size: int | None
) -> list[_Part]:
    """The parts with their headers and offsets; nothing is written."""
    groups = _split(tensors, shard_size)
    parts = []
    for number, (group, part) in enumerate(zip(groups, _names(name, len(groups)), strict=True)):
        values, path = dict(key_values) if number == 0 else {}, folder / part
        if len(groups) > 1:
            values["split.no"] = packed(number, GGUFValueType.UINT16)
            values["split.count"] = packed(len(groups), GGUFValueType.UINT16)
            values["split.tensors.count"] = packed(len(tensors), GGUFValueType.INT32)
        parts.append(_planned_part(path, group, values))
    return parts


def part_names(name: str, tensors: list[StoredBlocks], shard_size: int | None) -> list[str]:
    """File names of the parts."""
    return _names(name, len(_split(tensors, shard_size)))


def _names(name: str, count: int) -> list[str]:
    stem = name.removesuffix(".gguf")
    return [name] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def part_sizes(tensors: list[StoredBlocks], key_values: KeyValues, shard_size: int | None) -> list[int]:
    """Bytes of every file, headers included."""
    return [part.size for part in plan_parts(Path(), "x.gguf", tensors, key_values, shard_size)]


def _split(tensors: list[StoredBlocks], shard_size: int | None) -> list[list[StoredBlocks]]:
    groups: list[list[StoredBlocks]] = [[]]
    filled = 0
    for tensor in tensors:
        if shard_size is not None and groups[-1] and filled + tensor.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups


def _planned_part(path: Path, tensors: list[StoredBlocks], key_values: KeyValues) -> _Part:
    offsets, position = {}, 0
    rows = []
    for tensor in tensors:
        offsets[tensor.name] = position
        dims = tuple(reversed(tensor.shape))
        row = _packed_value(tensor.name, GGUFValueType.STRING) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        rows.append(row + struct.pack("<IQ", tensor.type_number, position))
        position = _aligned(position + tensor.nbytes)
    table = b"".join(rows)
    values = b"".join(_packed_value(key, GGUFValueType.STRING) + value for key, value in key_values.items())
    header = b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(key_values)) + values + table
    header = header.ljust(_aligned(len(header)), b"\0")
    placed = {name: len(header) + offset for name, offset in offsets.items()}
    return _Part(path, tensors, header, placed, len(header) + position)


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
