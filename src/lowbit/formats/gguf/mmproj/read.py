"""`TowerFile`: an mmproj file under the names and in the layouts of the Hugging Face model that it is said to be of.

The way back of `mmproj/model.py`, for comparison: frames, thirds and rotary pairs are put together again.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lowbit.architecture import describe_checkpoint
from lowbit.checkpoint.base import Checkpoint, TensorInfo
from lowbit.formats.gguf.header import GGUFTensor
from lowbit.formats.gguf.layout import rotary_rows
from lowbit.formats.gguf.mmproj.model import tower_config
from lowbit.formats.gguf.mmproj.row import TowerLayout, TowerTarget
from lowbit.formats.gguf.mmproj.table import require_tower
from lowbit.formats.gguf.raw import RawGGUF


class TowerFile:
    """tensors  name in the Hugging Face model → what there is of it: [1, N] for the embedding of one token

    source   the Hugging Face model, under the names of its architecture
    unknown  tensors of the file that come from nothing in it
    """

    def __init__(self, raw: RawGGUF, source: Checkpoint):
        architecture, self.source = describe_checkpoint(source, split_experts=True)
        config = self.source.config()
        tower = require_tower(config, self.source.source)
        facts = tower_config(config, self.source.folder, self.source.source)
        stored, extra = {tensor.name: tensor for tensor in raw.tensors}, tower.extra(facts)
        self._raw, self._heads = raw, int(facts.vision("num_attention_heads") or 1)
        self._parts: dict[str, tuple[TowerTarget, list[GGUFTensor]]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name in architecture.parameters:
            target = tower.find(name, extra)
            if target is not None and name in self.source.tensors and all(each in stored for each in target.names):
                info = self.source.tensors[name]
                shape = (1, *info.shape[1:]) if target.place.layout is TowerLayout.TOKEN else info.shape
                self._parts[name] = (target, [stored[each] for each in target.names])
                self.tensors[name] = replace(info, shape=shape, stored=self._parts[name][1][0].type_name)
        known = {part.name for _, parts in self._parts.values() for part in parts}
        self.unknown = sorted(stored.keys() - known)

    def first_row(self, name: str) -> int:
        """The row of the source that is row 0 here: the number of a token, else 0."""
        place = self._parts[name][0].place
        return place.number or 0 if place.layout is TowerLayout.TOKEN else 0

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, in Hugging Face's layout; float32, or the file's 16-bit type."""
        target, parts = self._parts[name]
        values = [self._raw.decode(part).reshape(part.shape) for part in parts]
        layout, shape = target.place.layout, self.tensors[name].shape
        if layout is TowerLayout.FRAMES and len(values) > 1:
            whole = torch.stack(values, dim=2)
        elif layout is TowerLayout.THIRDS:
            whole = torch.cat(values)
        elif layout is TowerLayout.PLUS_ONE:
            whole = values[0].float() - 1
        elif layout is TowerLayout.ROTARY:
            whole = values[0][torch.from_numpy(np.argsort(rotary_rows(shape[0], self._heads)))]
        else:
            whole = values[0]
        return whole.reshape(shape)[start:stop]

    def release(self, name: str) -> None:
        for part in self._parts[name][1]:
            self._raw.release(part)
        self.source.release(name)
