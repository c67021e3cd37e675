"""Safetensors, written out of order and in parallel.

The plan fixes dtypes and shapes, hence headers, shards and offsets; rows are written in place (`weight_files`).

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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoint.safetensors import TORCH_DTYPE
from lowbit.export import Piece
from lowbit.export.weight_files import WeightFile, WeightFiles, split_by_size

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPE.items()}
# 64 MB hold the 4-bit codes of a matrix of 8192 × 16384.
ASSEMBLED_BYTES = 1 << 26


@dataclass(frozen=True)
class StoredTensor:
    """Name, dtype and shape of a tensor of the file. described: bytes that follow from the shapes, as of a JSON text,
    up to numbers that rounding finds; None of all others."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    described: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first dimension."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes


_Shard = WeightFile[StoredTensor]


class SafetensorsWriter(WeightFiles[StoredTensor]):
    """Creates the files of `tensors` in `folder` and fills them slab by slab.

    shard_size  bytes of tensors per file at most (one tensor larger than that gets a file of its own)
    """

    def __init__(self, folder: Path, tensors: list[StoredTensor], shard_size: int):
        self._folder = folder
        self._assembled: dict[str, tuple[Tensor, list[int]]] = {}  # from strips; bytes that are missing
        super().__init__(_plan_shards(folder, tensors, shard_size))

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
                self.write_bytes(name, _bytes_of(whole))
            return
        if column:
            raise AssertionError(f"{name}: {list(values.shape)} at ({row}, {column}) overruns {list(stored.shape)}")
        self.write_bytes(name, _bytes_of(values), row * stored.row_bytes)

    def _with_strip(self, stored: StoredTensor, values: Tensor, strip: tuple[slice, slice]) -> Tensor | None:
        """The complete tensor after its last strip, an empty one before; None for tensors above ASSEMBLED_BYTES."""
        if stored.nbytes > ASSEMBLED_BYTES:
            return None
        with self._lock:
            whole, left = self._assembled.setdefault(
                stored.name, (torch.empty(stored.shape, dtype=stored.dtype), [stored.nbytes])
            )
        _copy_into(whole, values, strip, stored)
        with self._lock:
            left[0] -= values.numel() * stored.dtype.itemsize
            return torch.empty(0) if left[0] else self._assembled.pop(stored.name)[0]

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
        self.count(stored.name, values.numel() * stored.dtype.itemsize)

    def close(self) -> None:
        """Check completeness, hash and close the files; write the index where there are several."""
        super().close()
        if len(self._parts) > 1:
            total = sum(tensor.nbytes for part in self._parts for tensor in part.tensors)
            weight_map = {tensor.name: part.path.name for part in self._parts for tensor in part.tensors}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


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


def _plan_shards(folder: Path, tensors: list[StoredTensor], shard_size: int) -> list[_Shard]:
    contents = split_by_size(tensors, shard_size)
    count = len(contents)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    return [_layout(folder / name, inside) for name, inside in zip(names, contents, strict=True)]


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
    return WeightFile(path, ordered, head, {name: len(head) + at for name, at in begins.items()}, len(head) + begin)
