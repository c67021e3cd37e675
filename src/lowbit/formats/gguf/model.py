"""A Hugging Face model mapped to GGUF: tensors, their sources and layouts, key-values.

    model.layers.0.self_attn.q_proj.weight            →  blk.0.attn_q.weight         [N, K], rows by rotary pair
    model.layers.0.mlp.experts.*.gate_proj.weight     →  blk.0.ffn_gate_exps.weight  [E, N, K]
    transformer.h.0.attn.c_attn.weight [K, N]         →  blk.0.attn_qkv.weight       [N, K]
    rope_parameters of Llama 3, Phi-3                 →  rope_freqs.weight, rope_factors_long.weight, …
    lm_head.weight, tied                              →  nothing, or output.weight once more where llama.cpp needs it

Every tensor is read in rows, whatever its layout: rows of a head come from one span of the source, stacked experts
from one source each. The mapping of each architecture is a row of `lowbit.formats.gguf.table`.

Refused: a model type without a row, a model that llama.cpp would compute differently, a tensor without a place, a
missing tensor. Left out with a note: buffers, multi-token prediction, vision.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, GGUFValueType
from torch import Tensor

from lowbit.architecture.inspection import MASKS
from lowbit.architecture.structure import Architecture
from lowbit.checkpoint.base import Checkpoint, is_decoded, read_json_object
from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.formats.gguf.general import general_key_values
from lowbit.formats.gguf.keys import KeyValues, key_values
from lowbit.formats.gguf.mmproj.table import tower_of
from lowbit.formats.gguf.raw import rows_and_columns
from lowbit.formats.gguf.rope import rope_key_values
from lowbit.formats.gguf.row import GGUFArchitecture, Lookup, RowLayout, RowTarget, head_dim, hf_rows
from lowbit.formats.gguf.table import row_of_model, target_of
from lowbit.numerics.ggml import TYPES

if TYPE_CHECKING:
    from lowbit.calibrate.store import BlockStore
    from lowbit.rounding.target import Target

T = MODEL_TENSOR

# Causal masks that old GPT-2 and GPT-NeoX files store.


@dataclass(frozen=True)
class GGUFTensorSource:
    """One tensor of the file and its sources. `read` treats it as [rows, K]: K is the last dimension.

    name        "blk.0.attn_q.weight"
    shape       in torch's order: [N, K], [E, N, K] for stacked experts, [n] for a vector
    sources     its Hugging Face tensors: one, or one per expert; none for a computed tensor
    role        of the architecture: a linear's role, "norm", "embedding", "bias" …
    layout      how rows differ from the sources'
    heads, dim  number of heads and rows of each, for layouts that go by head; else 0
    values      float32, of a computed tensor
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    block: int | None
    role: str
    layout: RowLayout = RowLayout.SAME
    heads: int = 0
    dim: int = 0
    values: Tensor | None = field(default=None, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return self.sources

    def read(self, checkpoint: Checkpoint, first: int, last: int) -> Tensor:
        """Rows first..last, [last - first, K], in the source's dtype (float32 where something is added)."""
        rows, columns = rows_and_columns(self.shape)
        if not 0 <= first <= last <= rows:
            raise IndexError(f"rows {first}..{last} of {self.name}, which has {rows}")
        if self.values is not None:
            return self.values.reshape(rows, columns)[first:last]
        if first == last:
            return torch.empty((0, columns), dtype=checkpoint.tensors[self.sources[0]].dtype)
        per_source = rows // len(self.sources)
        pieces = []
        for index in range(first // per_source, -(-last // per_source)):
            start = index * per_source
            piece = self._rows(checkpoint, self.sources[index], max(first - start, 0), min(last - start, per_source))
            pieces.append(piece.reshape(-1, columns))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def read_calibrated(self, store: BlockStore, target: Target, first: int, last: int) -> Tensor:
        """The blocks that calibration chose, row by row as the weights would be read; uint8 [rows, row bytes]."""
        row_bytes = TYPES[target.name].row_bytes(self.shape[-1])
        blocks = replace(self, shape=(*self.shape[:-1], row_bytes))
        return blocks.read(CalibratedBlocks(store), first, last)  # type: ignore[arg-type]

    def repack(self, checkpoint: Checkpoint, target: Target, first: int, last: int) -> Tensor:
        raise AssertionError("only GGUF files store ggml types")

    def _rows(self, checkpoint: Checkpoint, name: str, first: int, last: int) -> Tensor:
        """Rows of one source, in this tensor's order; a vector is one row."""
        if len(checkpoint.tensors[name].shape) < 2:
            values = checkpoint.read(name)
            if self.layout is RowLayout.PLUS_ONE:
                values = values.float() + 1
            if self.layout.reorders:
                values = values[torch.from_numpy(hf_rows(self.layout, np.arange(len(values)), self.heads, self.dim))]
            return values.reshape(1, -1)[first:last]
        if self.layout is RowLayout.TRANSPOSED and not is_decoded(checkpoint, name):
            return checkpoint.read(name)[:, first:last].t().contiguous()
        if not self.layout.reorders:
            return checkpoint.read(name, first, last)
        pieces = []  # head by head: rows of one head lie within one span of the source
        for start, stop in pairwise([first, *range(first - first % self.dim + self.dim, last, self.dim), last]):
            rows = hf_rows(self.layout, np.arange(start, stop), self.heads, self.dim)
            begin = int(rows.min())
            pieces.append(checkpoint.read(name, begin, int(rows.max()) + 1)[torch.from_numpy(rows - begin)])
        return torch.cat(pieces)


class CalibratedBlocks:
    """Stands for the checkpoint in `GGUFTensorSource.read`: rows of packed blocks under the names of the weights."""

    def __init__(self, store: BlockStore):
        self._store = store
        self.tensors = _Shapes(store)
        self.schemes = self.tensors  # rows are [N, bytes], even where the source stores the transpose

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._store.blocks(name.removesuffix(".weight"), start, stop)


class _Shapes:
    """Name of a calibrated weight → its first row of blocks, for the shape."""

    def __init__(self, store: BlockStore):
        self._store = store

    def __contains__(self, name: str) -> bool:
        return name in self._store

    def __getitem__(self, name: str) -> Tensor:
        return self._store.blocks(name.removesuffix(".weight"), 0, 1)


@dataclass(frozen=True)
class GGUFModel:
    """A mapped model, before types are chosen.

    arch        general.architecture
    tensors     embedding first, then block by block, then the output: llama.cpp's order
    key_values  key → (value, type), of a list (value, ARRAY, type of items): everything but tokenizer.*,
                general.file_type, general.quantization_version
    notes       for the user
    """

    arch: str
    tensors: tuple[GGUFTensorSource, ...]
    key_values: KeyValues
    notes: tuple[str, ...]


def describe_gguf(checkpoint: Checkpoint, architecture: Architecture) -> GGUFModel:
    """The GGUF form of a model that is open under the architecture's names, experts one by one."""
    assert "experts" not in architecture.roles.values(), "describe the model with split_experts=True"
    where = checkpoint.source
    row = row_of_model(architecture.model_type, where)
    get = _lookup(checkpoint.config(), where)
    values, notes = key_values(row, get, where)
    rope, computed, rope_notes = rope_key_values(row, get, where)
    values |= rope
    names, beside = _names(checkpoint, architecture, row)
    tensors = _tensors(checkpoint, architecture, row, values, names)
    tensors += [
        GGUFTensorSource(f"{TENSOR_NAMES[kind]}.weight", tuple(factors.shape), (), None, "other", values=factors)
        for kind, factors in computed.items()
    ]
    tensors.sort(key=_order(row))
    vocabulary = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    name = checkpoint.metadata.get("general.name") or checkpoint.config().get("_name_or_path")
    name = str(name or PurePath(where.rstrip("/")).name or "model")
    general: KeyValues = {
        "general.architecture": (row.arch, GGUFValueType.STRING),
        "general.type": ("model", GGUFValueType.STRING),
        "general.name": (name, GGUFValueType.STRING),
        f"{row.arch}.vocab_size": (vocabulary, GGUFValueType.UINT32),
    }
    path = checkpoint.folder / "generation_config.json"
    generation = read_json_object(path) if path.is_file() else {}
    general |= general_key_values(checkpoint.folder, generation, ((tensor.name, tensor.shape) for tensor in tensors))
    return GGUFModel(row.arch, tuple(tensors), general | values, (*beside, *notes, *rope_notes))


def _lookup(config: dict[str, Any], where: str) -> Lookup:
    """A look-up in config.json, completed with the defaults and the spellings of transformers' class."""
    from transformers import AutoConfig

    config = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        parsed = AutoConfig.for_model(**config).get_text_config()
    except Exception as error:  # transformers' validators can raise anything
        raise ArchitectureError(f"{where}: transformers does not take config.json: {error}") from error
    return lambda key: getattr(parsed, key, None)


def _names(checkpoint: Checkpoint, architecture: Architecture, row: GGUFArchitecture) -> tuple[list[str], list[str]]:
    """(Hugging Face tensors that go into the file, notes about those that do not)."""
    where = checkpoint.source
    names = []
    tied = {stored: alias for alias, stored in architecture.tied.items()}
    for name in architecture.parameters:
        if row.leaves_out(name):
            continue
        present = name if name in checkpoint.tensors else tied.get(name)
        if present not in checkpoint.tensors:
            raise CheckpointError(f"{where}: there is no tensor {name!r}", "a download may be incomplete")
        names.append(name)
    beside = Counter()
    known = architecture.parameters.keys() | architecture.tied.keys()
    for name in checkpoint.tensors:
        if row.leaves_out(name):
            beside[_where_vision_goes(checkpoint)] += 1
        elif name not in known and architecture.predicts(name):
            beside["blocks for multi-token prediction"] += 1
        elif name not in known and (architecture.stands_beside(name) or MASKS.search(name)):
            beside["buffers that are computed"] += 1
        elif name in architecture.tied and architecture.tied[name] in checkpoint.tensors:
            beside[f"{name}, which config.json ties to {architecture.tied[name]}"] += 1
        elif name not in known:
            target_of(row, name, where)
            raise ArchitectureError(f"{where}: {name!r} is no tensor of {architecture.class_name}")
    return names, [f"left out ({count} tensors): {what}" for what, count in beside.items()]


def _where_vision_goes(checkpoint: Checkpoint) -> str:
    note = "vision: llama.cpp keeps it in a file of its own (mmproj)"
    if tower_of(checkpoint.config()) is None:
        return note
    return (
        f"{note}; lowbit convert {shlex.quote(checkpoint.source)} --format gguf --mmproj -o mmproj-F16.gguf writes it"
    )


def _tensors(
    checkpoint: Checkpoint, architecture: Architecture, row: GGUFArchitecture, values: KeyValues, names: list[str]
) -> list[GGUFTensorSource]:
    """Everything that the model stores; experts of a block under one name."""
    where = checkpoint.source
    groups: dict[str, list[tuple[RowTarget, str]]] = {}
    for name in names:
        target = target_of(row, name, where)
        groups.setdefault(target.name, []).append((target, name))
    if row.needs_output and "output.weight" not in groups:
        embedding = groups["token_embd.weight"][0]
        output = row.places[T.OUTPUT][1]
        groups["output.weight"] = [(RowTarget(output, None, None, "weight"), embedding[1])]
    tensors = [_tensor(checkpoint, architecture, values, row, members) for members in groups.values()]
    _require_complete(row, len(architecture.blocks), groups, where)
    return tensors


def _tensor(
    checkpoint: Checkpoint,
    architecture: Architecture,
    values: KeyValues,
    row: GGUFArchitecture,
    members: list[tuple[RowTarget, str]],
) -> GGUFTensorSource:
    """One tensor of the file; `members` are the Hugging Face tensors that it is made of."""
    members = sorted(members, key=lambda member: member[0].expert or 0)
    target, name = members[0]
    linear = architecture.linears.get(name.removesuffix(".weight"))
    shape, layout = architecture.parameters[name], target.place.layout
    if layout is RowLayout.TRANSPOSED:
        shape, layout = shape[::-1], layout if len(shape) > 1 else RowLayout.SAME
    heads = dim = 0
    if layout.reorders:
        heads, dim = _heads(values, row, target, shape, f"{checkpoint.source}: {name}")
    stacked = target.expert is not None
    if stacked and [member.expert for member, _ in members] != list(range(values[f"{row.arch}.expert_count"][0])):
        raise CheckpointError(
            f"{checkpoint.source}: there are {len(members)} experts for {target.name}, config.json has "
            f"{values[f'{row.arch}.expert_count'][0]}",
            "config.json and the weights belong to different models",
        )
    stored = {name: alias for alias, name in reversed(architecture.tied.items()) if alias in checkpoint.tensors}
    return GGUFTensorSource(
        name=target.name,
        shape=(len(members), *shape) if stacked else shape,
        sources=tuple(member if member in checkpoint.tensors else stored[member] for _, member in members),
        block=target.block,
        role=linear.role if linear is not None else architecture.roles[name],
        layout=layout,
        heads=heads,
        dim=dim,
    )


def _heads(
    values: KeyValues, row: GGUFArchitecture, target: RowTarget, shape: tuple[int, ...], where: str
) -> tuple[int, int]:
    """(heads, rows of each) of a tensor whose layout goes by head."""
    heads = values.get(f"{row.arch}.{target.place.heads}", values[f"{row.arch}.attention.head_count"])[0]
    dim = head_dim(target.place.layout, math.prod(shape[:1]), heads)
    if dim is None:
        raise CheckpointError(f"{where} {list(shape)} is not {heads} heads of rotary pairs")
    return heads, dim


def _require_complete(row: GGUFArchitecture, blocks: int, found: dict[str, Any], where: str) -> None:
    """llama.cpp's loader needs every tensor of the row in every block, and biases in all blocks or none."""
    biased = frozenset(kind for kind in row.places if _names_of(kind, "bias", blocks) & found.keys())
    if biased not in row.biases:
        listed = ", ".join(sorted(kind.name for kind in biased)) or "nothing"
        raise ArchitectureError(
            f"{where}: biases on {listed}, with which llama.cpp does not load {row.arch} models",
            "llama.cpp cannot run this variant of the model",
        )
    needed = {name for kind in row.places if kind is not T.OUTPUT for name in _names_of(kind, "weight", blocks)}
    needed |= {name for kind in biased for name in _names_of(kind, "bias", blocks)}
    missing = sorted(needed - found.keys())
    if missing:
        raise ArchitectureError(
            f"{where}: the model has nothing for {missing[0]}, which llama.cpp needs to load {row.arch} models",
            "llama.cpp cannot run this variant of the model",
        )


def _names_of(kind: MODEL_TENSOR, suffix: str, blocks: int) -> set[str]:
    pattern = TENSOR_NAMES[kind]
    return {f"{pattern.format(bid=block)}.{suffix}" for block in (range(blocks) if "{bid}" in pattern else [0])}


def _order(row: GGUFArchitecture):
    """Sort key: what stands before the blocks, the blocks in the row's order, what stands behind them."""
    last = {f"{TENSOR_NAMES[kind]}.{suffix}" for kind in (T.OUTPUT_NORM, T.OUTPUT) for suffix in ("weight", "bias")}
    inside = [TENSOR_NAMES[place.tensor] for place in row.inside.values()]

    def key(tensor: GGUFTensorSource) -> tuple[float, int, str]:
        if tensor.block is None:
            behind = tensor.name in last
            return (math.inf if behind else -1, int(tensor.name.startswith("output.")), tensor.name[::-1])
        stem, _, suffix = tensor.name.rpartition(".")
        return (tensor.block, inside.index(stem.replace(f"blk.{tensor.block}.", "blk.{bid}.")), suffix[::-1])

    return key
