"""A GGUF file or split set of any architecture, under its own names: key-values, tensor table, bytes, decoded rows.

`decode` returns F64, F32, F16, BF16 and integers in their own dtype, all other types in float32. A tensor counts as
[rows, K]: K is its last dimension, rows the product of the others.

Refused: a split set with a missing or misplaced part, or with a tensor in two parts; decoding a type that has no
decoder.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.checkpoint.base import SPLIT, Checkpoint, TensorInfo
from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.formats.gguf.header import GGUFHeader, GGUFTensor, StoredType, ggml_type, read_header
from lowbit.formats.gguf.weight_scales import SCALE, scale_name
from lowbit.numerics import ggml

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
    headers   theirs; `headers[0].key_spans` has the position of each key-value in files[0], for verbatim copies
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

    @cached_property
    def weight_scales(self) -> dict[str, GGUFTensor]:
        """Name of an NVFP4 weight → the scale of the whole matrix, float32 [1] or one per expert, that lies beside it.

        Other types have such tensors too, as parameters of the model (BitNet, Gemma 4): these are not meant here.
        """
        scales = {tensor.name: tensor for tensor in self.tensors if tensor.name.endswith(SCALE)}
        found = {}
        for tensor in self.tensors:
            scale = scales.get(scale_name(tensor.name)) if tensor.type_name == "NVFP4" else None
            if scale is not None:
                found[tensor.name] = self.checked_scale(tensor, scale)
        return found

    def checked_scale(self, weight: GGUFTensor, scale: GGUFTensor) -> GGUFTensor:
        """The scale, if it is one number, or one per stacked expert; CheckpointError otherwise."""
        count = weight.shape[0] if len(weight.shape) == 3 else 1
        if scale.shape not in ((count,), (1,)) or scale.type_name not in NATIVE_DTYPE:
            raise CheckpointError(
                f"{self.file_of(scale).path}: tensor {scale.name!r} is {scale.type_name} {list(scale.shape)}; "
                f"{count} numbers are needed, the scale of {weight.name}",
                "download the file again, or get the model in another type",
            )
        return scale

    def scales(self, weight: GGUFTensor) -> Tensor | None:
        """The numbers of a weight's scale, float32 [1], or [E] of stacked experts; None where it has none."""
        scale = self.weight_scales.get(weight.name)
        if scale is None:
            return None
        count = weight.shape[0] if len(weight.shape) == 3 else 1
        return self.decode(scale)[0].float().expand(count)

    def file_of(self, tensor: GGUFTensor) -> MappedFile:
        return self._file_of[tensor.name]

    def bytes(self, tensor: GGUFTensor) -> memoryview:
        """The stored bytes, not copied."""
        return self.file_of(tensor).view(tensor.start, tensor.stop)

    def blocks(self, tensor: GGUFTensor, first: int, last: int) -> Tensor:
        """The stored bytes of rows first..last, uint8 [rows, row bytes], not copied."""
        rows, _ = rows_and_columns(tensor.shape)
        row_bytes = (tensor.stop - tensor.start) // rows if rows else 0
        start, stop = tensor.start + first * row_bytes, tensor.start + last * row_bytes
        return self.file_of(tensor).tensor(torch.uint8, (last - first, row_bytes), start, stop)

    def key_value_bytes(self, key: str) -> memoryview:
        """A key-value of the first part as it is stored: key, type, value."""
        start, stop = self.headers[0].key_spans[key]
        return self.files[0].view(start, stop)

    def weights(self, tensor: GGUFTensor, first: int = 0, last: int | None = None) -> Tensor:
        """As `decode`, but multiplied by the scale of the whole matrix, where one lies beside it: what llama.cpp
        computes with."""
        decoded, scales = self.decode(tensor, first, last), self.scales(tensor)
        if scales is None or not len(decoded):
            return decoded
        rows = torch.arange(first, first + len(decoded)) // (rows_and_columns(tensor.shape)[0] // len(scales))
        return decoded * scales[rows][:, None]

    def decode(self, tensor: GGUFTensor, first: int = 0, last: int | None = None) -> Tensor:
        """Rows first..last, [rows, K], in the native dtype or float32. Plain types alias the file."""
        rows, columns = rows_and_columns(tensor.shape)
        last = rows if last is None else last
        if not 0 <= first <= last <= rows:
            raise IndexError(f"rows {first}..{last} of {tensor.name}, which has {rows}")
        dtype = NATIVE_DTYPE.get(ggml_type(tensor, str(self.file_of(tensor).path)).name)
        if dtype is None or not rows:
            return self.decode_rows(tensor, slice(first, last))
        start, row_bytes = tensor.start, columns * dtype.itemsize
        file = self.file_of(tensor)
        return file.tensor(dtype, (last - first, columns), start + first * row_bytes, start + last * row_bytes)

    def decode_rows(self, tensor: GGUFTensor, chosen: slice | np.ndarray) -> Tensor:
        """The rows of a slice, or of these numbers, int64 [n] → [n, K], copied."""
        path = self.file_of(tensor).path
        kind = ggml_type(tensor, str(path))
        rows, columns = rows_and_columns(tensor.shape)
        data = np.frombuffer(self.bytes(tensor), np.uint8)
        data = data.reshape(rows, -1 if rows and data.size else 0)[chosen]
        dtype = NATIVE_DTYPE.get(kind.name)
        if dtype is not None:
            return torch.from_numpy(np.ascontiguousarray(data)).reshape(-1).view(dtype).reshape(len(data), columns)
        return torch.from_numpy(_dequantize(data, kind, tensor, path)).reshape(len(data), columns)

    def release(self, tensor: GGUFTensor, first: int = 0, last: int | None = None) -> None:
        """Drop the pages of rows first..last from resident memory."""
        rows, _ = rows_and_columns(tensor.shape)
        row_bytes = (tensor.stop - tensor.start) // rows if rows else 0
        stop = tensor.stop if last is None else tensor.start + last * row_bytes
        self.file_of(tensor).release(tensor.start + first * row_bytes, stop)

    def holders(self, file: str, first: int, last: int) -> list[str]:
        """Tensors that have bytes between two positions of a file."""
        return [tensor.name for tensor in self.tensors
                if self.file_of(tensor).path.name == file and tensor.start < last and tensor.stop > first]  # fmt: skip

    def close(self) -> None:
        for file in self.files:
            file.close()


class RawCheckpoint(Checkpoint):
    """A GGUF file of any architecture as a `Checkpoint` under its own names, without config.json and tokenizer."""

    kind = "gguf"
    hub_names = False

    def __init__(self, raw: RawGGUF, source: str):
        self.raw, self.source, self.metadata, self.folder = raw, source, raw.metadata, raw.path.parent
        self.notes = stored_types_note(raw.tensors)
        self._stored = {tensor.name: tensor for tensor in raw.tensors}
        self.tensors = {
            tensor.name: TensorInfo(
                tensor.name, tensor.shape, NATIVE_DTYPE.get(tensor.type_name, torch.float32), tensor.type_name,
                tensor.stop - tensor.start, raw.file_of(tensor).path,
            )
            for tensor in raw.tensors
        }  # fmt: skip

    def config(self) -> dict[str, Any]:
        return {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop, [rows, K]: K is the last dimension, rows the product of the others; of NVFP4 weights with
        the scale that lies beside them."""
        return self.raw.weights(self._stored[name], start, stop)

    def release(self, name: str) -> None:
        self.raw.release(self._stored[name])

    def close(self) -> None:
        self.raw.close()


# GGUF files that hold no model, by general.type or general.architecture: (what it is, what to do with it).
_NO_MODELS = {
    "adapter": (
        "a LoRA adapter",
        "give llama.cpp both: -m MODEL.gguf --lora FILE; to merge it, take it as PEFT saved it: "
        "lowbit quantize MODEL -o OUT --adapter FOLDER",
    ),
    "imatrix": ("an importance matrix", "give it beside the model: lowbit quantize MODEL -o OUT.gguf --imatrix FILE"),
    "controlvector": ("a control vector", "give llama.cpp both: -m MODEL.gguf --control-vector FILE"),
}


def refuse_no_model(raw: RawGGUF, source: str) -> None:
    """ArchitectureError for a GGUF file that holds something else than a model."""
    kinds = [str(raw.metadata.get(f"general.{key}")) for key in ("type", "architecture")]
    kind = next((kind for kind in kinds if kind in _NO_MODELS), None)
    if kind is not None:
        what, instead = _NO_MODELS[kind]
        raise ArchitectureError(f"{source}: this is {what}, not a model", instead)
    if not raw.tensors:
        raise ArchitectureError(f"{source}: the file holds no tensors, only key-values such as a vocabulary",
                                "give the file of the model")  # fmt: skip


def stored_types_note(tensors: list[GGUFTensor]) -> list[str]:
    """A note on the stored types, if any is quantized."""
    counts = Counter(tensor.type_name for tensor in tensors)
    if all(name in NATIVE_DTYPE for name in counts):
        return []
    listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
    return [f"already quantized: its tensors are stored as {listed} and decoded to float32"]


def open_raw_gguf(path: str | Path) -> RawGGUF:
    """Open a GGUF file of any architecture; of a split one, any part."""
    return RawGGUF(Path(path))


def find_parts(path: Path) -> list[Path]:
    """The file, or all parts of its split set, in order."""
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    names = [f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]
    missing = [name for name in names if not (path.parent / name).exists()]
    if missing or not names:
        listed = ", ".join(missing[:3] or [path.name]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        parts, are = ("parts", "are") if len(missing) > 1 else ("part", "is")
        raise CheckpointError(
            f"{path}: {parts} {listed} {are} missing", "all parts of a split GGUF must be in one folder"
        )
    return [path.parent / name for name in names]


def _files_by_tensor(files: list[MappedFile], headers: list[GGUFHeader]) -> dict[str, MappedFile]:
    """Tensor → its file; CheckpointError where the parts do not make up one model."""
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
    for file, header in zip(files, headers, strict=True):
        total = str(header.metadata.get("split.tensors.count", len(found)))
        if total != str(len(found)):
            raise CheckpointError(f"{file.path}: split.tensors.count is {total[:80]}, the parts hold {len(found)}",
                                  "are all of them parts of this model?")  # fmt: skip
    return found


def _dequantize(data: np.ndarray, kind: StoredType, tensor: GGUFTensor, path: Path) -> np.ndarray:
    """uint8 [rows, row bytes] → float32 [rows, columns]."""
    if not data.size:
        return np.empty((data.shape[0], data.shape[1] // kind.size * kind.weights), np.float32)
    if kind.name in ggml.TYPES:
        return ggml.decode(kind.name, torch.from_numpy(np.ascontiguousarray(data))).numpy()
    raise CheckpointError(
        f"{path}: tensor {tensor.name!r} is stored as {kind.name}, which cannot be decoded",
        "get the model in another type",
    )
