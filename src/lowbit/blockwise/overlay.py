"""A checkpoint as it looks with some tensors replaced: rewritten by transforms, or decoded from their codes.

read(name)  the replacement where there is one, else the source's rows
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.blockwise.store import BlockStore
from lowbit.checkpoint.base import Checkpoint, TensorInfo
from lowbit.checkpoint.rows import find_tensor, row_range


@dataclass(frozen=True)
class Replacement:
    """rows(first, last) gives them in the file's orientation; dtype is what `read` returns."""

    rows: Callable[[int, int], Tensor]
    dtype: torch.dtype


class OverlaidCheckpoint:
    """See `lowbit.checkpoint.base.Checkpoint`. What is asked for beyond that protocol, the source answers."""

    def __init__(self, base: Checkpoint, replaced: dict[str, Replacement]):
        self.base, self._replaced = base, replaced
        self.source, self.kind, self.metadata, self.notes = base.source, base.kind, base.metadata, base.notes
        self.tensors: dict[str, TensorInfo] = {
            name: replace(info, dtype=replaced[name].dtype) if name in replaced else info
            for name, info in base.tensors.items()
        }

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # not there yet: a copy that is being made
            raise AttributeError(name)
        return getattr(self.base, name)

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
        return self._replaced[name].rows(start, stop).to(info.dtype).reshape(shape).contiguous()

    def release(self, name: str) -> None:
        self.base.release(name)

    def close(self) -> None:
        self.base.close()


class DecidedBlocks:
    """Packed ggml blocks in place of weights, for a GGUF's sources to read: rows of bytes, under the weights' names."""

    def __init__(self, store: BlockStore):
        self._store = store
        self.tensors = _Shapes(store)
        self.schemes = self.tensors  # rows are [N, bytes] also where the source has the weight turned round

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._store.blocks(name.removesuffix(".weight"), start, stop)


class _Shapes:
    """name → something with the shape of a matrix, for every decided weight."""

    def __init__(self, store: BlockStore):
        self._store = store

    def __contains__(self, name: str) -> bool:
        return name in self._store

    def __getitem__(self, name: str) -> Tensor:
        return self._store.blocks(name.removesuffix(".weight"), 0, 1)
