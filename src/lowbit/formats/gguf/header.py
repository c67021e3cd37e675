"""The header of a GGUF file (versions 2 and 3, little-endian), read as hostile input.

    "GGUF"  u32 version  u64 tensor count  u64 key-value count
    key-values   string key, u32 type, value
    tensors      string name, u32 n_dims, u64 dims[n_dims] (fastest first), u32 ggml type, u64 offset
    padding      to general.alignment (32); offsets count from here
    strings are u64 length + UTF-8; arrays u32 type, u64 count, items

Every count is checked against the bytes that are left before anything is allocated. Refused: other versions and byte
order; unknown value types, nested or oversized arrays; a key or tensor name that occurs twice; more than 8 dimensions;
element counts beyond 64 bits; rows that are not whole blocks; tensors that are unaligned, outside the file or overlap.
A ggml type that is not known has no size to check; it is refused when that tensor is read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType

from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.errors import CheckpointError, brief_name
from lowbit.formats.gguf.stored_types import STORED_TYPES, StoredType, type_name, why_unreadable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_STRING_BYTES = 1 << 26
MAX_STRINGS_IN_ARRAY = 1 << 24
MAX_ENTRIES = 1 << 20  # tensors, and key-values: models have thousands, and every one costs memory
MAX_ELEMENTS = 2**63 - 1
MAX_DIMS = 8  # ggml has 4; kernels of 3-D convolutions, which image models store as they are, have 5

_SCALAR_DTYPE = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4", GGUFValueType.FLOAT64: "<f8", GGUFValueType.BOOL: "<u1",
}  # fmt: skip
_SMALLEST_KEY_VALUE = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 4 + 8


@dataclass(frozen=True)
class GGUFTensor:
    """One row of the tensor table; start and stop are byte positions in the file.

    shape      as torch sees it: GGUF's dimensions reversed
    type_id    ggml's number
    type_name  "Q4_1"; of a type that only a fork of llama.cpp has its name there, "type 99" where nobody is known to
               have it; such a tensor has no size, and stop is start
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    start: int
    stop: int


@dataclass(frozen=True)
class GGUFHeader:
    """The parsed header.

    metadata   str, int, float, bool; arrays of numbers as numpy arrays, arrays of strings as lists
    key_spans  where each key-value lies in the file: (start, stop)
    """

    version: int
    metadata: dict[str, Any]
    tensors: list[GGUFTensor]
    key_spans: dict[str, tuple[int, int]]
    data_start: int


def read_header(file: MappedFile) -> GGUFHeader:
    """Parse and check everything before the tensor data."""
    return _Parser(file).parse()


class _Parser:
    def __init__(self, file: MappedFile):
        self.file = file
        self.path = file.path
        self.position = 0

    def parse(self) -> GGUFHeader:
        version = self._preamble()
        tensor_count = self._count("tensors", _SMALLEST_TENSOR, MAX_ENTRIES)
        key_count = self._count("key-values", _SMALLEST_KEY_VALUE, MAX_ENTRIES)
        metadata, spans = self._key_values(key_count)
        rows = [self._tensor_row() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {brief_name(alignment)}; a power of two is needed")
        data_start = -(-self.position // alignment) * alignment
        tensors = [self._place(row, data_start, alignment) for row in rows]
        self._check_distinct(tensors)
        return GGUFHeader(version, metadata, tensors, spans, data_start)

    def _preamble(self) -> int:
        if self.file.size < 24:
            raise self._error(f"{self.file.size} bytes; a GGUF file has at least 24", "download the file again")
        magic = self._take(4, "the magic")
        if magic != MAGIC:
            raise self._error(f"starts with {bytes(magic)!r}, a GGUF file with {MAGIC!r}")
        version = self._number("<I", "the version")
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in VERSIONS and swapped in (1, *VERSIONS):
            raise self._error("is a big-endian GGUF file", "convert it with gguf_convert_endian.py of llama.cpp")
        if version not in VERSIONS:
            raise self._error(f"is GGUF version {version}; versions 2 and 3 are read", "convert the model again")
        return version

    def _key_values(self, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        metadata: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(count):
            start = self.position
            key = self._string("a metadata key")
            if key in metadata:
                raise self._error(f"metadata key {key!r} occurs twice")
            what = f"metadata {key!r}"
            metadata[key] = self._value(self._value_type(what), what)
            spans[key] = (start, self.position)
        return metadata, spans

    def _value_type(self, what: str) -> GGUFValueType:
        number = self._number("<I", what)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._error(f"{what} has unknown value type {number}") from None

    def _value(self, kind: GGUFValueType, what: str) -> Any:
        if kind is GGUFValueType.STRING:
            return self._string(what)
        if kind is GGUFValueType.ARRAY:
            return self._array(what)
        value = self._numbers(kind, 1, what)[0]
        return bool(value) if kind is GGUFValueType.BOOL else value.item()

    def _array(self, what: str) -> np.ndarray | list[str]:
        kind = self._value_type(what)
        if kind is GGUFValueType.ARRAY:
            raise self._error(f"{what} is an array of arrays, which no model uses")
        smallest = 8 if kind is GGUFValueType.STRING else np.dtype(_SCALAR_DTYPE[kind]).itemsize
        count = self._count(f"items of {what}", smallest)
        if kind is not GGUFValueType.STRING:
            return self._numbers(kind, count, what)
        if count > MAX_STRINGS_IN_ARRAY:
            raise self._error(f"{what} has {count} strings; at most {MAX_STRINGS_IN_ARRAY} are read")
        return [self._string(what) for _ in range(count)]

    def _numbers(self, kind: GGUFValueType, count: int, what: str) -> np.ndarray:
        dtype = np.dtype(_SCALAR_DTYPE[kind])
        values = np.frombuffer(self._take(count * dtype.itemsize, what), dtype)
        return values != 0 if kind is GGUFValueType.BOOL else values.copy()

    def _tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape as torch sees it, ggml type number, offset)."""
        name = self._string("a tensor name")
        what = f"tensor {brief_name(name)}"
        dim_count = self._number("<I", what)
        if dim_count > MAX_DIMS:
            raise self._error(f"{what} has {dim_count} dimensions; at most {MAX_DIMS} are allowed")
        dims = struct.unpack(f"<{dim_count}Q", self._take(8 * dim_count, what))
        type_id = self._number("<I", what)
        return name, tuple(reversed(dims)), type_id, self._number("<Q", what)

    def _place(self, row: tuple[str, tuple[int, ...], int, int], data_start: int, alignment: int) -> GGUFTensor:
        """Check where a tensor lies and how many bytes it has."""
        name, shape, type_id, offset = row
        what = f"tensor {brief_name(name)}"
        if offset % alignment:
            raise self._error(f"{what} has offset {offset}, not a multiple of the alignment {alignment}")
        elements = 1
        for size in shape:
            elements *= max(size, 1)
            if elements > MAX_ELEMENTS:
                raise self._error(f"{what}: shape {list(shape)} overflows 64 bits")
        kind = STORED_TYPES.get(type_id)
        nbytes = 0
        if kind is not None:
            columns = shape[-1] if shape else 1
            if columns % kind.weights:
                raise self._error(f"{what}: rows of {columns} are not whole blocks of {kind.weights} ({kind.name})")
            nbytes = 0 if 0 in shape else elements // kind.weights * kind.size
        start = data_start + offset
        if start + nbytes > self.file.size:
            raise self._error(
                f"{what} ends at byte {start + nbytes}, the file at {self.file.size}",
                "the file is truncated: download it again",
            )
        return GGUFTensor(name, shape, type_id, type_name(type_id), start, start + nbytes)

    def _check_distinct(self, tensors: list[GGUFTensor]) -> None:
        names: set[str] = set()
        for tensor in tensors:
            if tensor.name in names:
                raise self._error(f"tensor {brief_name(tensor.name)} occurs twice")
            names.add(tensor.name)
        ordered = sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop))
        for before, after in pairwise(ordered):
            if after.start < before.stop:
                raise self._error(f"tensor {brief_name(after.name)} overlaps {brief_name(before.name)}")

    def _count(self, what: str, smallest: int, most: int = MAX_ELEMENTS) -> int:
        """A u64 count of things of at least `smallest` bytes each, of which `most` are read."""
        count = self._number("<Q", f"the number of {what}")
        left = self.file.size - self.position
        if count > left // smallest:
            raise self._error(f"claims {count} {what}, but only {left} bytes are left in the file")
        if count > most:
            raise self._error(f"claims {count} {what}; at most {most} are read")
        return count

    def _string(self, what: str) -> str:
        length = self._number("<Q", what)
        if length > MAX_STRING_BYTES:
            raise self._error(f"{what} claims a string of {length} bytes; at most {MAX_STRING_BYTES} are read")
        try:
            return str(self._take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"{what} is not valid UTF-8 ({error.reason})") from error

    def _number(self, layout: str, what: str) -> int:
        return struct.unpack(layout, self._take(struct.calcsize(layout), what))[0]

    def _take(self, length: int, what: str) -> memoryview:
        """The next `length` bytes."""
        start = self.position
        if length > self.file.size - start:
            raise self._error(
                f"ends after {self.file.size} bytes, inside {what}", "the file is truncated: download it again"
            )
        self.position = start + length
        return self.file.view(start, self.position)

    def _error(self, message: str, hint: str = "") -> CheckpointError:
        separator = " " if message.startswith(("starts", "is ", "claims", "ends")) else ": "
        return CheckpointError(f"{self.path}{separator}{message}", hint)


def ggml_type(tensor: GGUFTensor, where: str) -> StoredType:
    """The type of a tensor; CheckpointError where llama.cpp has no such type, with the fork's name for it."""
    kind = STORED_TYPES.get(tensor.type_id)
    if kind is None:
        what, hint = why_unreadable(tensor.type_id)
        raise CheckpointError(f"{where}: tensor {brief_name(tensor.name)} {what}", hint)
    return kind
