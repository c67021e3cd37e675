"""Rewritten tensors: the tensors of one block, and a checkpoint with some of its tensors replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.calibrate.blocks import BlockRunner
from lowbit.checkpoint.base import Checkpoint, TensorInfo, find_tensor, row_range
from lowbit.tensors import QuantizedTensor


class StoredTensors:
    """The stored tensors of a block as float32, linears as [N, K]; rewritten ones replace those of the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, runner: BlockRunner, index: int, linears: dict[str, Linear]):
        self._checkpoint, self._linears = checkpoint, linears
        prefix = runner.architecture.blocks[index] + "."
        self.names = [name for name in runner.architecture.parameters if name.startswith(prefix)]
        self._rewritten: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        if name in self._rewritten:
            return self._rewritten[name]
        values = self._checkpoint.read(name).float()
        self._checkpoint.release(name)
        return self.turned(name, values).contiguous()

    def replace(self, name: str, values: Tensor) -> None:
        self._rewritten[name] = values

    def in_file(self, name: str) -> Tensor:
        """In the file's orientation."""
        return self.turned(name, self.read(name))

    def turned(self, name: str, values: Tensor) -> Tensor:
        """[N, K] ↔ the file's orientation, which differs for transposed linears."""
        linear = self._linears.get(name.removesuffix(".weight"))
        turn = linear is not None and linear.transposed and name.endswith(".weight")
        return values.t() if turn and name not in self._checkpoint.schemes else values


@dataclass(frozen=True)
class Replacement:
    """read() returns the whole tensor in the file's orientation; dtype is the tensor's dtype in the checkpoint."""

    read: Callable[[], Tensor]
    dtype: torch.dtype


class OverlaidCheckpoint(Checkpoint):
    """A `Checkpoint` with some tensors replaced: rewritten by transforms, or decoded from their codes."""

    def __init__(self, base: Checkpoint, replaced: dict[str, Replacement]):
        self.base, self._replaced = base, replaced
        self.source, self.kind, self.metadata, self.notes = base.source, base.kind, base.metadata, base.notes
        self.schemes, self.rotations = base.schemes, base.rotations
        self.kv_cache, self.int8_threshold = base.kv_cache, base.int8_threshold
        self.tensors: dict[str, TensorInfo] = {
            name: replace(info, dtype=replaced[name].dtype) if name in replaced else info
            for name, info in base.tensors.items()
        }

    @property
    def folder(self) -> Any:
        return self.base.folder

    def config(self) -> dict[str, Any]:
        return self.base.config()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        info = find_tensor(self.tensors, name, self.source)
        if name not in self._replaced:
            return self.base.read(name, start, stop)
        start, stop, shape = row_range(info, start, stop)
        return self._replaced[name].read()[start:stop].to(info.dtype).reshape(shape).contiguous()

    def release(self, name: str) -> None:
        self.base.release(name)

    def close(self) -> None:
        self.base.close()

    @property
    def files(self) -> Any:
        return self.base.files

    @property
    def input_scales(self) -> dict[str, float]:
        return self.base.input_scales

    @property
    def input_zero_points(self) -> dict[str, int]:
        return self.base.input_zero_points

    def read_quantized(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor:
        return self.base.read_quantized(name, start, stop)

    def row_multiple(self, name: str) -> int:
        return self.base.row_multiple(name)

    def scale_dtype(self, name: str) -> torch.dtype:
        return self.base.scale_dtype(name)

    def says_quantized(self, linear: str) -> bool:
        return self.base.says_quantized(linear)
