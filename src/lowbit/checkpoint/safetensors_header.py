"""The header of a safetensors file, read as hostile input.

    8 bytes   N, unsigned little-endian
    N bytes   JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …}, padded with spaces;
              "__metadata__": {str: str} is optional
    the rest  tensor data; offsets count from its first byte

Refused: N above 100 MB or beyond the file; anything but one UTF-8 JSON object starting with `{`; a key that occurs
twice; an unknown dtype; shapes and offsets that are not non-negative integers, or overflow; a tensor whose size is not
shape × item size; tensors that overlap, leave a hole or do not fill the file. That is at least what the reference
implementation refuses.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.errors import CheckpointError, brief_name

MAX_HEADER_BYTES = 100_000_000
MAX_ELEMENTS = 2**63 - 1

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class HeaderEntry:
    """One row of the header; start and stop are byte positions in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: MappedFile) -> tuple[list[HeaderEntry], dict[str, str]]:
    """The tensors of a file, by position, and its `__metadata__`."""
    data_start, header = _parse_json(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file.path}: __metadata__ must map strings to strings, found {brief_name(metadata)}")
    tensors = [_parse_tensor(file, data_start, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_coverage(file, data_start, tensors)
    return tensors, metadata


def _parse_json(file: MappedFile) -> tuple[int, dict[str, Any]]:
    """(position of the first data byte, the header's JSON object)."""
    if file.size < 8:
        raise CheckpointError(
            f"{file.path}: {file.size} bytes; a safetensors file has at least 8", "download the file again"
        )
    (length,) = struct.unpack("<Q", file.view(0, 8))
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file.path}: the header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if 8 + length > file.size:
        raise CheckpointError(
            f"{file.path}: the header claims {length} bytes, but the file ends after {file.size}",
            "download the file again",
        )
    text = bytes(file.view(8, 8 + length))
    if not text.startswith(b"{"):
        raise CheckpointError(f"{file.path}: the header must start with '{{', found {text[:1]!r}")
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_non_negative,
        )
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no string
    except UnicodeError as error:
        raise CheckpointError(f"{file.path}: the header is not valid UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path}: the header is not valid JSON ({error})") from error
    return 8 + length, header


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _non_negative(digits: str) -> int:
    # "-0" too: the reference implementation reads sizes as unsigned
    if digits.startswith("-") or len(digits) > 20:
        raise ValueError(f"{digits[:24]} is out of range; sizes are unsigned 64-bit integers")
    return int(digits)


def _parse_tensor(file: MappedFile, data_start: int, name: str, entry: Any) -> HeaderEntry:
    where = f"{file.path}: tensor {brief_name(name)}"
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: dtype, shape and data_offsets are needed, found {brief_name(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise CheckpointError(f"{where}: unknown dtype {brief_name(dtype)}; known are {', '.join(ITEM_SIZE)}")
    if not _is_size_list(shape):
        raise CheckpointError(f"{where}: shape must be a list of non-negative integers, found {brief_name(shape)}")
    if not _is_size_list(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets must be two non-negative integers, found {brief_name(offsets)}")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where}: data_offsets begin at {begin}, after their end at {end}")
    if end > file.size - data_start:
        raise CheckpointError(
            f"{where}: data_offsets end at {end}, but the file holds {file.size - data_start} bytes of data",
            "the file is truncated: download it again",
        )
    needed = _count_elements(where, shape) * ITEM_SIZE[dtype]
    if needed != end - begin:
        raise CheckpointError(f"{where}: {dtype} {shape} needs {needed} bytes, data_offsets span {end - begin}")
    return HeaderEntry(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _is_size_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _count_elements(where: str, shape: list[int]) -> int:
    """Product of the shape. Zeros do not hide an overflow among the other dimensions: strides would overflow too."""
    elements = 1
    for size in shape:
        elements *= max(size, 1)
        if elements > MAX_ELEMENTS:
            raise CheckpointError(f"{where}: shape {brief_name(shape)} overflows 64 bits")
    return 0 if 0 in shape else elements


def _check_coverage(file: MappedFile, data_start: int, tensors: list[HeaderEntry]) -> None:
    """Tensors in file order must tile the data section: no overlap, no hole, nothing left over."""
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise CheckpointError(
                f"{file.path}: tensor {brief_name(tensor.name)} {what}: it begins at byte {tensor.start - data_start} "
                f"of the data, {position - data_start} was expected"
            )
        position = tensor.stop
    if position != file.size:
        raise CheckpointError(
            f"{file.path}: the tensors end at byte {position}, the file at {file.size}",
            "bytes that belong to no tensor are not allowed: download the file again",
        )
