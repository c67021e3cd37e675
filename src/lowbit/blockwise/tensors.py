"""The stored tensors of a block, as float32 and as the file has them."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.calibrate.blocks import BlockRunner
from lowbit.checkpoint.base import Checkpoint, is_decoded


class StoredTensors:
    """The stored tensors of a block as float32, linears as [N, K]; from the checkpoint, or as transforms rewrote
    them."""

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

    def all(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self.names}

    def replace(self, name: str, values: Tensor) -> None:
        self._rewritten[name] = values

    def in_file(self, name: str) -> Tensor:
        """In the file's orientation."""
        return self.turned(name, self.read(name))

    def turned(self, name: str, values: Tensor) -> Tensor:
        """[N, K] ↔ what the file holds; the same but for transposed linears."""
        linear = self._linears.get(name.removesuffix(".weight"))
        turn = linear is not None and linear.transposed and name.endswith(".weight")
        return values.t() if turn and not is_decoded(self._checkpoint, name) else values

    def stored(self, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        """As the output file holds it."""
        return self.turned(name, values).to(dtype)
