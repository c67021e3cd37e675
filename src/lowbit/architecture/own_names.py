"""Files under the names of transformers' modules, for models of which the hub joins or cuts what transformers holds.

    file of the hub                               under own names
    …self_attn.q_conv1d.weight, k_, v_            …self_attn.conv1d.weight, one below the other
    …attn.gqkv_proj.weight                        …self_attn.gate_proj.weight, q_proj, k_proj, v_proj, its quarters

transformers converts the names of the hub while it loads, and its converters do not fit quantized tensors: of what they
join they lose all that is not packed, and they cut `weight_shape` like a weight. Tensors that have the names of its
modules already are put in their places as they are. So `--loader transformers` writes such models under own names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.architecture.cache import discover_once
from lowbit.architecture.structure import Architecture, Part, Placement
from lowbit.checkpoint.base import Checkpoint, CheckpointView, find_tensor, row_range
from lowbit.errors import CheckpointError


def discover_named(
    names: Collection[str], config: dict[str, Any], folder: str, trust_remote_code: bool, split_experts: bool
) -> Architecture:
    """The architecture under the names that files have: the hub's, or those of transformers' modules.

    names   stored names; of a quantized linear, of any of its tensors
    """
    architecture = discover_once(config, folder, trust_remote_code, split_experts)
    held = {*names, *(f"{name.rpartition('.')[0]}.weight" for name in names)}

    def is_own(parameter: str, placed: Placement) -> bool:
        return placed.converted and parameter in held and not any(name in held for name, _, _ in placed.pieces())

    if not any(is_own(parameter, placed) for parameter, placed in architecture.layout.items()):
        return architecture
    own = discover_once(config, folder, trust_remote_code, split_experts, own_names=True)
    found, hub = (sum(name in held for name in each.parameters) for each in (own, architecture))
    return own if own.own_names and found > hub else architecture


def under_own_names(
    checkpoint: Checkpoint, architecture: Architecture, trust_remote_code: bool, split_experts: bool
) -> tuple[Architecture, Checkpoint]:
    """(architecture, checkpoint) under own names, of a checkpoint that has the architecture's; the same objects where
    the model has none, or has them already.

    CheckpointError for a quantized checkpoint, whose codes are not joined or cut.
    """
    folder = str(checkpoint.folder)
    own = discover_once(checkpoint.config(), folder, trust_remote_code, split_experts, own_names=True)
    if architecture.own_names or not own.own_names:
        return architecture, checkpoint
    if checkpoint.schemes:
        raise CheckpointError(
            f"{checkpoint.source} is quantized, and its codes cannot be put under transformers' names",
            "start from the 16-bit checkpoint",
        )
    return own, _OwnNames(checkpoint, _sources(checkpoint, architecture, own))


@dataclass(frozen=True)
class _Joined:
    """A tensor of the output: the parameter's shape, or that of one stored tensor; and what it is made of."""

    shape: tuple[int, ...]
    pieces: tuple[tuple[str, Part, int | None], ...]


def _sources(checkpoint: Checkpoint, hub: Architecture, own: Architecture) -> dict[str, _Joined]:
    """Own name → what it is made of."""
    found: dict[str, _Joined] = {}
    used: set[str] = set()
    for parameter, placed in hub.layout.items():
        pieces = tuple(placed.pieces())
        used.update(name for name, _, _ in pieces)
        if any(name not in checkpoint.tensors for name, _, _ in pieces):
            continue  # tied
        there = own.layout.get(parameter)
        if there is None or not there.converted:
            found[parameter if there is None else there.parts[0].name] = _Joined(placed.shape, pieces)
        else:
            for (name, _, _), (mine, part, _) in zip(there.pieces(), pieces, strict=True):
                found[name] = _Joined(part.shape_in(placed.shape), ((mine, Part(name), None),))
    for name, info in checkpoint.tensors.items():
        if name not in used:
            found[name] = _Joined(tuple(info.shape), ((name, Part(name), None),))
    return found


class _OwnNames(CheckpointView):
    """See the module docstring; reads rows of what it joins from the checkpoint, slab by slab."""

    def __init__(self, stored: Checkpoint, sources: Mapping[str, _Joined]):
        super().__init__(stored)
        self.sources = sources
        self.tensors = {}
        for name, joined in sources.items():
            info = stored.tensors[joined.pieces[0][0]]
            nbytes = math.prod(joined.shape) * info.dtype.itemsize
            self.tensors[name] = replace(info, name=name, shape=joined.shape, nbytes=nbytes)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        info = find_tensor(self.tensors, name, self.source)
        pieces = self.sources[name].pieces
        if len(pieces) == 1 and pieces[0][1].whole and not pieces[0][1].transposed:
            return self.stored.read(pieces[0][0], start, stop)
        start, stop, shape = row_range(info, start, stop)
        if all(_in_rows(part, expert) for _, part, expert in pieces):
            rows = [self.stored.read(each, *found) for each, found in _rows(pieces, start, stop)]
            return torch.cat(rows).to(info.dtype)
        whole = torch.empty(info.shape, dtype=info.dtype)
        for each, part, expert in pieces:
            part.of(whole if expert is None else whole[expert]).copy_(part.of_stored(self.stored.read(each)))
        return whole[start:stop].reshape(shape)

    def _stored_name(self, name: str) -> str:
        return self.sources[name].pieces[0][0]

    def release(self, name: str) -> None:
        for each, _, _ in self.sources[name].pieces:
            self.stored.release(each)


def _in_rows(part: Part, expert: int | None) -> bool:
    """True for consecutive rows of one matrix."""
    return expert is None and part.rows is not None and not part.transposed and (part.dim, part.step, part.stride) == (
        0, 1, 1,
    )  # fmt: skip


def _rows(
    pieces: tuple[tuple[str, Part, int | None], ...], start: int, stop: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    """(stored name, its rows) that rows start … stop of a joined tensor consist of, in order."""
    for name, part, _ in sorted(pieces, key=lambda piece: piece[1].start):
        assert part.rows is not None
        first, last = max(start, part.start), min(stop, part.start + part.rows)
        if first < last:
            yield name, (first - part.start + part.at, last - part.start + part.at)
