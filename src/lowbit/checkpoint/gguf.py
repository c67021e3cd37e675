"""GGUF files (one, or a split set) as a `Checkpoint` with Hugging Face names, layouts, config and tokenizer.

`read` decodes only the rows that are asked for: F32, F16, BF16 and integers as they are, every other ggml type that
the gguf package can decode to float32. Names and layouts: `gguf_to_hf`; config and tokenizer: `gguf_folder`, made when
first asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from lowbit.checkpoint.base import TensorInfo
from lowbit.checkpoint.gguf_folder import rebuild_folder
from lowbit.checkpoint.gguf_header import GGUFHeader, GGUFTensor, ggml_type, read_header
from lowbit.checkpoint.gguf_rope import rope_parameters
from lowbit.checkpoint.gguf_to_hf import MappedModel, MappedTensor, map_to_hf
from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.checkpoint.rows import find_tensor, read_config, row_range
from lowbit.errors import CheckpointError

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

MAX_HEAD_DIM = 65536

# Types that hold plain numbers; everything else is decoded to float32.
NATIVE_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
}  # fmt: skip


class GGUFCheckpoint:
    """The `Checkpoint` of a GGUF file or of all parts of a split one."""

    kind = "gguf"

    def __init__(self, path: Path, source: str | None = None):
        self.source = str(path) if source is None else source
        self.tensors: dict[str, TensorInfo] = {}
        self.notes: list[str] = []
        self._folder: Path | None = None
        parts = find_parts(path)
        self._files = [MappedFile(part) for part in parts]
        headers = [read_header(file) for file in self._files]
        self._header: GGUFHeader = headers[0]
        self.metadata: dict[str, Any] = self._header.metadata
        self._file_of = _files_by_tensor(self._files, headers)
        stored = [tensor for header in headers for tensor in header.tensors]
        self._model: MappedModel = map_to_hf(self.metadata, stored, str(parts[0]))
        self._mapped = {mapped.name: mapped for mapped in self._model.tensors}
        for mapped in self._model.tensors:
            self.tensors[mapped.name] = self._describe(mapped)
        rope, rope_notes = rope_parameters(self.metadata, self._rope_divisors())
        self._config_overrides = self._model.config | rope
        self.notes += [*_stored_types_note(stored), *_derived_note(self._model.derived), *rope_notes]

    @property
    def folder(self) -> Path:
        """config.json, generation_config.json, tokenizer and chat template, rebuilt by transformers and cached."""
        if self._folder is None:
            self._folder = rebuild_folder(self._files[0], self._header, self._config_overrides)
        return self._folder

    def config(self) -> dict[str, Any]:
        """The rebuilt config.json, parsed."""
        return read_config(self.folder)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop in Hugging Face's layout; plain types alias the file, the others are decoded."""
        info = find_tensor(self.tensors, name, self.source)
        start, stop, shape = row_range(info, start, stop)
        mapped = self._mapped[name]
        rows = slice(start, stop) if mapped.hf_row_to_stored is None else mapped.hf_row_to_stored(start, stop)
        values = self._decode(mapped.stored, rows).reshape(shape)
        return values.to(info.dtype) - 1 if mapped.minus_one else values

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory."""
        find_tensor(self.tensors, name, self.source)
        stored = self._mapped[name].stored
        self._file_of[stored.name].release(stored.start, stored.stop)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _rope_divisors(self) -> Tensor | None:
        stored = next((tensor for tensor in self._model.derived if tensor.name == "rope_freqs.weight"), None)
        if stored is None:
            return None
        if len(stored.shape) != 1 or stored.shape[0] > MAX_HEAD_DIM:
            raise CheckpointError(
                f"{self._file_of[stored.name].path}: tensor {stored.name!r} has shape {list(stored.shape)}; "
                f"one number per rotary pair is needed"
            )
        return self._decode(stored, None)

    def _describe(self, mapped: MappedTensor) -> TensorInfo:
        stored = mapped.stored
        # w + 1 is undone in float32: rounding w to 16 bits again would add an error that the file does not have
        dtype = torch.float32 if mapped.minus_one else NATIVE_DTYPE.get(stored.type_name, torch.float32)
        return TensorInfo(
            name=mapped.name,
            shape=stored.shape,
            dtype=dtype,
            stored=stored.type_name,
            nbytes=stored.stop - stored.start,
            file=self._file_of[stored.name].path,
        )

    def _decode(self, stored: GGUFTensor, rows: slice | np.ndarray | None) -> Tensor:
        """Stored rows of a tensor, all for None: [rows, …] in the native dtype, or float32."""
        file = self._file_of[stored.name]
        kind = ggml_type(stored, str(file.path))
        dtype = NATIVE_DTYPE.get(kind.name)
        row_count = stored.shape[0] if stored.shape else 1
        rows = slice(0, row_count) if rows is None else rows
        row_bytes = (stored.stop - stored.start) // row_count if row_count else 0
        if dtype is not None and isinstance(rows, slice):
            first, last = stored.start + rows.start * row_bytes, stored.start + rows.stop * row_bytes
            return file.tensor(dtype, (rows.stop - rows.start, *stored.shape[1:]), first, last)
        data = np.frombuffer(file.view(stored.start, stored.stop), np.uint8)
        if dtype is None and len(stored.shape) < 2:  # blocks run along the only dimension: there are no rows to select
            return torch.from_numpy(_dequantize(data[None], kind, stored, file.path)[0][rows])
        data = data.reshape(row_count, row_bytes)[rows]
        if dtype is not None:
            return torch.from_numpy(data).reshape(-1).view(dtype).reshape(len(data), *stored.shape[1:])
        return torch.from_numpy(_dequantize(data, kind, stored, file.path)).reshape(len(data), *stored.shape[1:])


def open_gguf(path: str | Path, source: str | None = None) -> GGUFCheckpoint:
    """Open a GGUF file; of a split one, any part. `source` is what the user typed, where that differs."""
    return GGUFCheckpoint(Path(path), source)


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


def _dequantize(data: np.ndarray, kind: GGMLQuantizationType, stored: GGUFTensor, path: Path) -> np.ndarray:
    """uint8 [rows, row bytes] → float32 [rows, columns]."""
    if not data.size:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        return np.empty((data.shape[0], data.shape[1] // block_bytes * block), np.float32)
    try:
        return dequantize(np.ascontiguousarray(data), kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: tensor {stored.name!r} is stored as {kind.name}, which cannot be decoded",
            "get the model in another type",
        ) from error


def _stored_types_note(tensors: list[GGUFTensor]) -> list[str]:
    counts = Counter(tensor.type_name for tensor in tensors)
    quantized = [name for name in counts if name not in NATIVE_DTYPE]
    if not quantized:
        return []
    listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
    return [f"the source is already quantized: its tensors are stored as {listed} and decoded to float32"]


def _derived_note(tensors: list[GGUFTensor]) -> list[str]:
    if not tensors:
        return []
    return [f"not in the Hugging Face model and left out: {', '.join(tensor.name for tensor in tensors)}"]
