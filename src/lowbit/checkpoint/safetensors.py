"""Safetensors folders: one file, an index with shards, or several files without an index.

The files of the model, by transformers' rules: `model.safetensors`; else the shards that
`model.safetensors.index.json` names; else `model-00001-of-0000N.safetensors`, all N of them; else every
`*.safetensors`. Files left out (such as Mistral's `consolidated.safetensors`) are listed in the notes.

Refused: a shard outside the folder, a missing shard, an index that disagrees with its shards, a tensor that occurs
twice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.base import TensorInfo, find_tensor, read_json_object, row_range
from lowbit.checkpoint.companions import ADAPTER_WEIGHTS
from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.checkpoint.safetensors_header import ITEM_SIZE, HeaderEntry, read_header
from lowbit.checkpoint.stated import StatedConfig
from lowbit.errors import CheckpointError
from lowbit.files.regular import refuse_irregular

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")

TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
assert TORCH_DTYPE.keys() == ITEM_SIZE.keys()


class SafetensorsCheckpoint(StatedConfig):
    """The `Checkpoint` of a safetensors folder. `read` does not copy; see `raw` for the stored bytes."""

    kind = "safetensors"

    def __init__(self, folder: Path, source: str | None = None):
        self.folder = folder
        self.source = str(folder) if source is None else source
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, Any] = {}
        self.notes: list[str] = []
        self._files: dict[Path, MappedFile] = {}
        self._stored: dict[str, HeaderEntry] = {}
        self._open(*_find_files(folder))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop, aliasing the mapped file where it is aligned."""
        info, file, first_byte, last_byte, shape = self._locate(name, start, stop)
        return file.tensor(info.dtype, shape, first_byte, last_byte)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The stored bytes of rows start..stop, not copied."""
        _, file, first_byte, last_byte, _ = self._locate(name, start, stop)
        return file.view(first_byte, last_byte)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory."""
        info = find_tensor(self.tensors, name, self.source)
        stored = self._stored[name]
        self._files[info.file].release(stored.start, stored.stop)

    def position(self, name: str) -> tuple[Path, int]:
        """The file of a tensor, and the place of its first byte in it."""
        return find_tensor(self.tensors, name, self.source).file, self._stored[name].start

    def holders(self, file: str, first: int, last: int) -> list[str]:
        """Tensors that have bytes between two positions of a file."""
        return [name for name, stored in self._stored.items()
                if self.tensors[name].file.name == file and stored.start < last and stored.stop > first]  # fmt: skip

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _locate(self, name: str, start: int, stop: int | None):
        """(info, file, first byte, last byte, shape) of rows start..stop."""
        info = find_tensor(self.tensors, name, self.source)
        stored = self._stored[name]
        start, stop, shape = row_range(info, start, stop)
        rows = info.shape[0] if info.shape else 1
        row_bytes = info.nbytes // rows if rows else 0
        file = self._files[info.file]
        return info, file, stored.start + start * row_bytes, stored.start + stop * row_bytes, shape

    def _open(self, paths: list[Path], weight_map: dict[str, str] | None) -> None:
        """Read every header, then check them against the index."""
        refuse_irregular(self.folder)
        for path in paths:
            file = self._files[path] = MappedFile(path)
            stored_tensors, metadata = read_header(file)
            self.metadata.update(metadata)
            for stored in stored_tensors:
                self._add(path, stored, weight_map)
        for name, shard in (weight_map or {}).items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{self.folder / INDEX}: names tensor {name!r} in {shard}, which does not hold it",
                    "download the model again, or rebuild the index",
                )
        # an adapter beside the model has a note of its own (companions)
        left_out = sorted(path.name for path in self.folder.glob("*.safetensors")
                          if path not in self._files and path.name != ADAPTER_WEIGHTS)  # fmt: skip
        if left_out:
            self.notes.append(f"not part of the model and left out: {', '.join(left_out)}")

    def _add(self, path: Path, stored: HeaderEntry, weight_map: dict[str, str] | None) -> None:
        name = stored.name
        if weight_map is not None and weight_map.get(name) != path.name:
            found = f"puts it in {weight_map[name]}" if name in weight_map else "does not name it"
            raise CheckpointError(
                f"{path}: holds tensor {name!r}, but {INDEX} {found}", "download the model again, or rebuild the index"
            )
        if name in self.tensors:
            raise CheckpointError(
                f"{path}: tensor {name!r} is also in {self.tensors[name].file.name}",
                "keep the files of one model in the folder",
            )
        self._stored[name] = stored
        self.tensors[name] = TensorInfo(
            name=name,
            shape=stored.shape,
            dtype=TORCH_DTYPE[stored.dtype],
            stored=stored.dtype,
            nbytes=stored.stop - stored.start,
            file=path,
        )


def open_safetensors(folder: str | Path, source: str | None = None) -> SafetensorsCheckpoint:
    """Open a folder that holds *.safetensors; `source` is what the user typed, where that differs."""
    return SafetensorsCheckpoint(Path(folder), source)


def _find_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """(files of the model, the index's tensor → file map or None)."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE], None
    if (folder / INDEX).exists():
        weight_map = _read_index(folder / INDEX)
        return [folder / shard for shard in sorted(set(weight_map.values()))], weight_map
    files = sorted(folder.glob("*.safetensors"))
    if any(path.name.startswith("model") for path in files):
        files = [path for path in files if path.name.startswith("model")]
    if not files:
        raise CheckpointError(f"{folder}: there is no *.safetensors file")
    _require_all_shards(files)
    return files, None


def _read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index, with every shard known to be a file of the same folder."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: a weight_map of tensor names to files is needed")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\:\0"):
            raise CheckpointError(f"{path}: puts tensor {name!r} in {shard!r}, which is not a file of this folder")
    for shard in sorted(set(weight_map.values())):
        if not (path.parent / shard).exists():
            raise CheckpointError(f"{path}: shard {shard} is missing", "download the model again; it is incomplete")
    return weight_map


def _require_all_shards(files: list[Path]) -> None:
    """Every -00001-of-0000N must be there for all N."""
    present = {path.name for path in files}
    for match in filter(None, (_SHARD.fullmatch(path.name) for path in files)):
        numbers = range(1, int(match["count"]) + 1)
        names = (f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors" for number in numbers)
        missing = next((name for name in names if name not in present), None)
        if missing is not None:
            raise CheckpointError(
                f"{files[0].parent}: shard {missing} is missing", "download the model again; it is incomplete"
            )
