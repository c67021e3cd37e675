"""Rewritten tensors: the tensors of one block, and a checkpoint with some of its tensors replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.calibrate.blocks import BlockRunner
from lowbit.checkpoint.base import Checkpoint, CheckpointView, find_tensor, row_range


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


class OverlaidCheckpoint(CheckpointView):
    """A `Checkpoint` with some tensors replaced: rewritten by transforms, or decoded from their codes."""

    def __init__(self, stored: Checkpoint, replaced: dict[str, Replacement]):
        super().__init__(stored)
        self._replaced = replaced
        self.tensors = {
            name: replace(info, dtype=replaced[name].dtype) if name in replaced else info
            for name, info in stored.tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        info = find_tensor(self.tensors, name, self.source)
        if name not in self._replaced:
            return self.stored.read(name, start, stop)
        start, stop, shape = row_range(info, start, stop)
        return self._replaced[name].read()[start:stop].to(info.dtype).reshape(shape).contiguous()
