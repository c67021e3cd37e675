"""A GGUF file (one, or a split set) as it is: key-values, the table of tensors, bytes, decoded rows. Any architecture.

`decode` gives F64, F32, F16, BF16 and integers as they are and everything else in float32. A tensor is seen as
[rows, K]: K is its last dimension, rows the product of the others.

Refused: a split set with a part missing, in the wrong place or with a tensor that is in another part too; a type that
cannot be decoded, when it is.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from lowbit.checkpoint.gguf_header import GGUFHeader, GGUFTensor, ggml_type, read_header
from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.errors import CheckpointError
from lowbit.numerics import ggml

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

# Types that hold plain numbers; everything else is decoded to float32.
NATIVE_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
}  # fmt: skip


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, K) of a tensor of this shape; a scalar is one row of one."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


class RawGGUF:
    """All parts of a GGUF file.

    files     the mapped parts
    headers   theirs; `headers[0].key_spans` says where in files[0] each key-value lies, for copying it verbatim
    metadata  key-values of the first part, which has the model's
    tensors   of all parts, in file order
    """

    def __init__(self, path: Path):
        parts = find_parts(path)
        self.files = [MappedFile(part) for part in parts]
        self.headers: list[GGUFHeader] = [read_header(file) for file in self.files]
        self.metadata: dict[str, Any] = self.headers[0].metadata
        self.tensors: list[GGUFTensor] = [tensor for header in self.headers for tensor in header.tensors]
        self._file_of = _files_by_tensor(self.files, self.headers)

    @property
    def path(self) -> Path:
        """The first part."""
        return self.files[0].path

    @property
    def header(self) -> GGUFHeader:
        """Of the first part."""
        return self.headers[0]

    def file_of(self, tensor: GGUFTensor) -> MappedFile:
        return self._file_of[tensor.name]

    def bytes(self, tensor: GGUFTensor) -> memoryview:
        """The stored bytes, not copied."""
        return self.file_of(tensor).view(tensor.start, tensor.stop)

    def key_value_bytes(self, key: str) -> memoryview:
        """A key-value of the first part as it is stored: key, type, value."""
        start, stop = self.header.key_spans[key]
        return self.files[0].view(start, stop)

    def decode(self, tensor: GGUFTensor, first: int = 0, last: int | None = None) -> Tensor:
        """Rows first..last, [rows, K], in the native dtype or float32. Plain types alias the file."""
        rows, columns = rows_and_columns(tensor.shape)
        last = rows if last is None else last
        if not 0 <= first <= last <= rows:
            raise IndexError(f"rows {first}..{last} of {tensor.name}, which has {rows}")
        dtype = NATIVE_DTYPE.get(ggml_type(tensor, str(self.file_of(tensor).path)).name)
        if dtype is None or not rows:
            return self._decoded(tensor, slice(first, last))
        start, row_bytes = tensor.start, columns * dtype.itemsize
        file = self.file_of(tensor)
        return file.tensor(dtype, (last - first, columns), start + first * row_bytes, start + last * row_bytes)

    def decode_rows(self, tensor: GGUFTensor, rows: np.ndarray) -> Tensor:
        """The rows of these numbers, int64 [n] → [n, K], copied."""
        return self._decoded(tensor, rows)

    def release(self, tensor: GGUFTensor, first: int = 0, last: int | None = None) -> None:
        """Drop the pages of rows first..last from resident memory."""
        rows, _ = rows_and_columns(tensor.shape)
        row_bytes = (tensor.stop - tensor.start) // rows if rows else 0
        stop = tensor.stop if last is None else tensor.start + last * row_bytes
        self.file_of(tensor).release(tensor.start + first * row_bytes, stop)

    def close(self) -> None:
        for file in self.files:
            file.close()

    def _decoded(self, tensor: GGUFTensor, chosen: slice | np.ndarray) -> Tensor:
        path = self.file_of(tensor).path
        kind = ggml_type(tensor, str(path))
        rows, columns = rows_and_columns(tensor.shape)
        data = np.frombuffer(self.bytes(tensor), np.uint8)
        data = data.reshape(rows, -1 if rows and data.size else 0)[chosen]
        dtype = NATIVE_DTYPE.get(kind.name)
        if dtype is not None:
            return torch.from_numpy(np.ascontiguousarray(data)).reshape(-1).view(dtype).reshape(len(data), columns)
        return torch.from_numpy(_dequantize(data, kind, tensor, path)).reshape(len(data), columns)


def open_raw_gguf(path: str | Path) -> RawGGUF:
    """Open a GGUF file of any architecture; of a split one, any part."""
    return RawGGUF(Path(path))


def split_name(path: Path) -> str:
    """What the parts of one split set have in common; the file name itself where it is not split."""
    match = _SPLIT.fullmatch(path.name)
    return path.name if match is None else f"{match['stem']} of {match['count']}"


def find_parts(path: Path) -> list[Path]:
    """The file itself, or every part of the split set that it belongs to, in order."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    names = [f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]
    missing = next((name for name in names if not (path.parent / name).exists()), None)
    if missing is not None or not names:
        raise CheckpointError(
            f"{path}: part {missing or path.name} is missing", "all parts of a split GGUF must be in one folder"
        )
    return [path.parent / name for name in names]


def _files_by_tensor(files: list[MappedFile], headers: list[GGUFHeader]) -> dict[str, MappedFile]:
    """Which file holds each tensor; the parts must add up to one model."""
    found: dict[str, MappedFile] = {}
    for part, (file, header) in enumerate(zip(files, headers, strict=True)):
        for tensor in header.tensors:
            if tensor.name in found:
                raise CheckpointError(f"{file.path}: tensor {tensor.name!r} is also in {found[tensor.name].path.name}")
            found[tensor.name] = file
        for key, number in (("split.no", part), ("split.count", len(files))):
            claimed = str(header.metadata.get(key, number))
            unsplit = key == "split.count" and claimed == "0" and len(files) == 1
            if claimed != str(number) and not unsplit:
                raise CheckpointError(
                    f"{file.path}: {key} is {claimed[:80]}, but by its name it is {number}",
                    "keep the names that the parts were published under",
                )
    total = str(headers[0].metadata.get("split.tensors.count", len(found)))
    if total != str(len(found)):
        raise CheckpointError(f"{files[0].path}: split.tensors.count is {total[:80]}, the parts hold {len(found)}")
    return found


def _dequantize(data: np.ndarray, kind: GGMLQuantizationType, tensor: GGUFTensor, path: Path) -> np.ndarray:
    """uint8 [rows, row bytes] → float32 [rows, columns]; by the gguf package where the type is none of ours."""
    if not data.size:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        return np.empty((data.shape[0], data.shape[1] // block_bytes * block), np.float32)
    if kind.name in ggml.TYPES:
        return ggml.decode(kind.name, torch.from_numpy(np.ascontiguousarray(data))).numpy()
    try:
        return dequantize(np.ascontiguousarray(data), kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r} is stored as {kind.name}, which cannot be decoded",
            "get the model in another type",
        ) from error
