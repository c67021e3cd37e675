"""GGUF files, written out of order and in parallel.

    "GGUF" u32 version 3, u64 tensors, u64 key-values, key-values, tensor table, padding, tensor data

The plan fixes types and shapes, hence the header and all offsets; runs of blocks are written in place (`weight_files`).
Each tensor begins at a multiple of 32 bytes, with zeros between.

A model may be split: NAME-00001-of-0000N.gguf. The first part carries the key-values of the model; every part has
split.no, split.count and split.tensors.count. llama.cpp opens the first and finds the others.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGUFValueType

from lowbit.errors import CheckpointError
from lowbit.export import Piece
from lowbit.export.weight_files import WeightFile, WeightFiles, split_by_size

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


class GGUFWriter(WeightFiles[StoredBlocks]):
    """Creates the file, or the parts, of `tensors` in `folder` and fills them block by block.

    name        of the file, "x.gguf"; parts are called "x-00001-of-0000N.gguf"
    shard_size  bytes of tensors per part at most (one tensor larger than that gets a part of its own); None: one file
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        tensors: list[StoredBlocks],
        key_values: KeyValues,
        shard_size: int | None = None,
    ):
        super().__init__(plan_parts(folder, name, tensors, key_values, shard_size))

    def write(self, piece: Piece) -> None:
        """Consecutive rows of blocks, uint8 [rows, row bytes], or numbers of a vector from a column on; thread-safe for
        disjoint parts."""
        stored = self._by_name[piece.name][1]
        rows = math.prod(stored.shape[:-1])
        offset = piece.row * (stored.nbytes // rows if rows else 0) + piece.column * piece.values.element_size()
        self.write_bytes(piece.name, piece.values.contiguous().reshape(-1).view(torch.uint8).numpy().data, offset)


def plan_parts(
    folder: Path, name: str, tensors: list[StoredBlocks], key_values: KeyValues, shard_size: int | None
) -> list[WeightFile[StoredBlocks]]:
    """The parts with their headers and offsets; nothing is written."""
    groups = split_by_size(tensors, shard_size)
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
    return _names(name, len(split_by_size(tensors, shard_size)))


def _names(name: str, count: int) -> list[str]:
    stem = name.removesuffix(".gguf")
    return [name] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def part_sizes(tensors: list[StoredBlocks], key_values: KeyValues, shard_size: int | None) -> list[int]:
    """Bytes of every file, headers included."""
    return [part.size for part in plan_parts(Path(), "x.gguf", tensors, key_values, shard_size)]


def _planned_part(path: Path, tensors: list[StoredBlocks], key_values: KeyValues) -> WeightFile[StoredBlocks]:
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
    ends = [placed[tensor.name] + tensor.nbytes for tensor in tensors]
    zeros = tuple((end, _aligned(end) - end) for end in ends)
    return WeightFile(path, tensors, header, placed, len(header) + position, zeros)


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
