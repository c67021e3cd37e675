"""A checkpoint with an adapter merged into it, tensor by tensor, as it is read.

    rows of W, float64  →  + s·B·A of these rows  →  DoRA: every row gets its norm  →  float32

Nothing is kept: memory holds the rows that were asked for, and the two small matrices. The sum is rounded once, to
float32, and does not depend on how a tensor is cut into slabs: in float64 the order of summation changes nothing that
float32 would show. What is not quantized is written in the dtype of the base (`TensorInfo.written`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lowbit.architecture.structure import Part
from lowbit.checkpoint.adapter import Adapter, LowRank
from lowbit.checkpoint.base import Checkpoint, find_tensor, row_range


@dataclass(frozen=True)
class Update:
    """s·B·A as it is added to one tensor.

    scale    s
    turned   the tensor holds the transpose, [K, N] (Conv1D, embeddings, experts of some models)
    experts  matrices that A and B stack; expert: the one that is meant, None for all of them (a 3-D tensor)
    part     of the fused parameter that A and B were trained on; None for all of it
    """

    pair: LowRank
    scale: float
    turned: bool = False
    experts: int = 1
    expert: int | None = None
    part: Part | None = None

    def factors(self, adapter: Adapter, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """(left [rows, r], right [r, columns]) in float64, whose product is added to the tensor (of one expert)."""
        a, b = adapter.read(self.pair.a).double(), adapter.read(self.pair.b).double()
        if self.experts > 1:
            number = self.expert if expert is None else expert
            a = a.reshape(self.experts, -1, a.shape[1])[number]
            b = b.reshape(b.shape[0], -1, self.experts)[:, :, number]
        left, right = (a.t(), b.t()) if self.turned else (b, a)
        if self.part is not None and self.part.transposed:
            left, right = right.t(), left.t()
        if self.part is not None and self.part.rows is not None:
            left = replace(self.part, transposed=False).of(left)
        return self.scale * left, right


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor.

    source     the base's tensor; another name than its own where the model ties the two
    replaced   the adapter's tensor that stands in its place
    updates    what is added
    magnitude  the adapter's norms of the rows of the sum (of the columns where the tensor is stored transposed)
    shift      (the adapter's vector, its factor) that is added to a bias
    """

    source: str
    replaced: str | None = None
    updates: tuple[Update, ...] = ()
    magnitude: str | None = None
    shift: tuple[str, float] | None = None

    @property
    def computes(self) -> bool:
        return bool(self.updates) or self.shift is not None


class MergedCheckpoint(Checkpoint):
    """A `Checkpoint`; what the adapter does not change is the base's own.

    stored     the base, under the names of its architecture
    config     stands for config.json; None: the base's
    companions folder of config.json, tokenizer and so on, which is removed with the checkpoint
    """

    def __init__(
        self,
        stored: Checkpoint,
        adapter: Adapter,
        changes: dict[str, Change],
        companions: TemporaryDirectory[str],
        config: dict[str, Any] | None = None,
    ):
        self.stored, self.adapter, self.changes, self._companions = stored, adapter, changes, companions
        self.source, self.kind, self.metadata, self.notes = stored.source, stored.kind, stored.metadata, [*stored.notes]
        self._config = config
        self.tensors = dict(stored.tensors)
        for name, change in changes.items():
            base = stored.tensors[change.source]
            info = base if change.replaced is None else adapter.tensors[change.replaced]
            info = replace(info, name=name, written=base.dtype)
            if change.computes:
                info = replace(
                    info, dtype=torch.float32, file=base.file, nbytes=base.nbytes, stored=f"{base.stored} + LoRA"
                )
            self.tensors[name] = info

    @property
    def folder(self) -> Path:
        return Path(self._companions.name)

    def config(self) -> dict[str, Any]:
        return self.stored.config() if self._config is None else self._config

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        info = find_tensor(self.tensors, name, self.source)
        change = self.changes.get(name)
        if change is None:
            return self.stored.read(name, start, stop)
        if not change.computes:
            return self._base(change, start, stop)
        start, stop, _ = row_range(info, start, stop)
        if change.shift is not None:
            vector, factor = change.shift
            values = self._base(change, start, stop).double() + factor * self.adapter.read(vector)[start:stop].double()
            return values.float()
        if len(info.shape) == 3:
            base = self._base(change, start, stop)
            experts = [self._sum(base[e - start].double(), change, e) for e in range(start, stop)]
            return torch.stack(experts) if experts else base.float()
        turned = change.magnitude is not None and change.updates[0].turned
        if turned:  # norms of columns need the whole tensor
            return self._sum(self._base(change, 0, None).double(), change)[start:stop]
        return self._sum(self._base(change, start, stop).double(), change, rows=slice(start, stop))

    def release(self, name: str) -> None:
        change = self.changes.get(name)
        self.stored.release(name if change is None else change.source)

    @property
    def files(self) -> Any:
        return self.stored.files

    def close(self) -> None:
        self.stored.close()
        self.adapter.close()
        self._companions.cleanup()

    def _base(self, change: Change, start: int, stop: int | None) -> Tensor:
        """What is added to: rows of the base's tensor, or of the adapter's that stands for it."""
        if change.replaced is None:
            return self.stored.read(change.source, start, stop)
        return self.adapter.read(change.replaced)[start:stop].contiguous()

    def _sum(self, values: Tensor, change: Change, expert: int | None = None, rows: slice = slice(None)) -> Tensor:
        """values [n, columns], rows of a matrix in float64, with everything added; float32."""
        for update in change.updates:
            left, right = update.factors(self.adapter, expert)
            values = torch.addmm(values, left[rows], right)
        if change.magnitude is not None:
            magnitude = self.adapter.read(change.magnitude).double().flatten()
            if change.updates[0].turned:
                values = values * (magnitude / values.norm(dim=0))
            else:
                values = values * (magnitude[rows] / values.norm(dim=1))[:, None]
        return values.float().contiguous()
