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
from collections.abc import Container
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, GGUFValueType
from torch import Tensor

from lowbit.architecture.inspection import MASKS
from lowbit.architecture.structure import Architecture
from lowbit.checkpoint.base import Checkpoint, read_json_object
from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.formats.gguf.general import general_key_values, kept_key_values
from lowbit.formats.gguf.keys import KeyValues, key_values
from lowbit.formats.gguf.layout import Arranged, Lookup
from lowbit.formats.gguf.mmproj.table import tower_of
from lowbit.formats.gguf.pooling import pooling_of_folder, ranking_of_folder
from lowbit.formats.gguf.raw import rows_and_columns
from lowbit.formats.gguf.rope import rope_key_values
from lowbit.formats.gguf.row import GGUFArchitecture, RowTarget, each_place
from lowbit.formats.gguf.table import CANNOT_RUN, EXPERT_COUNTS, look_up, row_of_model, targets_of
from lowbit.numerics.ggml import TYPES
from lowbit.numerics.ggml.types import family
from lowbit.rounding.target import ScaledBlocks

if TYPE_CHECKING:
    from lowbit.calibrate.store import BlockStore
    from lowbit.rounding.target import Target

T = MODEL_TENSOR

# Causal masks that old GPT-2 and GPT-NeoX files store.


@dataclass(frozen=True)
class GGUFTensorSource:
    """One tensor of the file and its sources. `read` treats it as [rows, K]: K is the last dimension.

    name       "blk.0.attn_q.weight"
    shape      in torch's order: [N, K], [E, N, K] for stacked experts, [n] for a vector
    sources    its Hugging Face tensors: one, or one per expert; none for a computed tensor
    role       of the architecture: a linear's role, "norm", "embedding", "bias" …
    arranged   how rows follow from those of a source; of a matrix, as a linear applies it: [N, K]
    values     float32, of a computed tensor
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    block: int | None
    role: str
    arranged: Arranged | None = field(default=None, compare=False)
    values: Tensor | None = field(default=None, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return self.sources

    @property
    def keeps_rows(self) -> bool:
        """True if packed rows of its one source, or of its experts, can stand for it."""
        return self.arranged is not None and self.arranged.keeps_rows

    def read(self, checkpoint: Checkpoint, first: int, last: int) -> Tensor:
        """Rows first..last, [last - first, K], in the source's dtype (float32 where values change)."""
        rows, columns = rows_and_columns(self.shape)
        if not 0 <= first <= last <= rows:
            raise IndexError(f"rows {first}..{last} of {self.name}, which has {rows}")
        if self.values is not None:
            return self.values.reshape(rows, columns)[first:last]
        if first == last:
            return torch.empty((0, columns), dtype=checkpoint.tensors[self.sources[0]].dtype)
        assert self.arranged is not None
        per_source = rows // len(self.sources)
        pieces = []
        for index in range(first // per_source, -(-last // per_source)):
            start = index * per_source
            read = partial(self._source_rows, checkpoint, self.sources[index])
            piece = self.arranged.stored_rows(read, max(first - start, 0), min(last - start, per_source))
            pieces.append(piece.reshape(-1, columns))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def read_calibrated(self, store: BlockStore, target: Target, first: int, last: int) -> Tensor | ScaledBlocks:
        """The blocks that calibration chose, row by row as the weights would be read; uint8 [rows, row bytes]."""
        rows = self.with_columns(TYPES[target.name].row_bytes(self.shape[-1]))
        blocks = rows.read(CalibratedBlocks(store), first, last)  # type: ignore[arg-type]
        return ScaledBlocks(blocks, store.scale(self._source_at(first))) if target.needs_range else blocks

    def repack(self, checkpoint: Checkpoint, target: Target, first: int, last: int) -> ScaledBlocks:
        """The codes and scales of an NVFP4 folder as blocks of the file; the scale of the matrix beside them."""
        codes = NVFP4Codes(checkpoint)
        rows = self.with_columns(TYPES[target.name].row_bytes(self.shape[-1]))
        blocks = rows.read(codes, first, last)  # type: ignore[arg-type]
        return ScaledBlocks(blocks, codes.scale(f"{self._source_at(first)}.weight"))

    def with_columns(self, columns: int) -> GGUFTensorSource:
        """The same rows of another width: blocks, or the left factor of a low-rank update; see `keeps_rows`."""
        assert self.arranged is not None
        source, stored = self.arranged.source[:-1], self.arranged.stored[:-1]
        arranged = replace(self.arranged, source=(*source, columns), stored=(*stored, columns))
        return replace(self, shape=(*self.shape[:-1], columns), arranged=arranged)

    def _source_at(self, row: int) -> str:
        """The linear that a row comes from."""
        per_source = rows_and_columns(self.shape)[0] // len(self.sources)
        return self.sources[row // per_source].removesuffix(".weight")

    def _source_rows(self, checkpoint: Checkpoint, name: str, first: int, last: int) -> Tensor:
        """Rows of a source as a linear applies it, in the source's order; a vector is read whole."""
        assert self.arranged is not None
        if len(checkpoint.tensors[name].shape) < 2:
            return checkpoint.read(name)
        if self.arranged.layout.transposed and name not in checkpoint.schemes:
            return checkpoint.read(name)[:, first:last].t().contiguous()
        return checkpoint.read(name, first, last)


class CalibratedBlocks:
    """Stands for the checkpoint in `GGUFTensorSource.read`: rows of packed blocks under the names of the weights."""

    def __init__(self, store: BlockStore):
        self._store = store
        self.tensors = _Shapes(store)
        self.schemes = self.tensors  # rows are [N, bytes], even where the source stores the transpose

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._store.blocks(name.removesuffix(".weight"), start, stop)


class NVFP4Codes:
    """Likewise: the codes of an NVFP4 folder, packed as blocks.

    A block of 64 weights has the E4M3 scales of four groups of 16, then their codes, two in a byte, j and j + 8.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self.tensors = checkpoint.tensors  # type: ignore[attr-defined]
        self.schemes = checkpoint.schemes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """uint8 [rows, row bytes]."""
        stored = self._checkpoint.read_quantized(name, start, stop)
        scales = (stored.scale / stored.global_scale).to(torch.float8_e4m3fn).view(torch.uint8)
        kind = TYPES["NVFP4"]
        return family(kind).pack(kind, stored.codes.view(torch.uint8), {"scales": scales})

    def scale(self, name: str) -> float:
        return self._checkpoint.read_quantized(name, 0, 1).global_scale


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
    vocabulary  tokenizer.ggml.model of a vocabulary that has "▁" for spaces
    """

    arch: str
    tensors: tuple[GGUFTensorSource, ...]
    key_values: KeyValues
    notes: tuple[str, ...]
    vocabulary: str = "llama"


def describe_gguf(checkpoint: Checkpoint, architecture: Architecture) -> GGUFModel:
    """The GGUF form of a model that is open under the architecture's names, experts one by one."""
    assert "experts" not in architecture.roles.values(), "describe the model with split_experts=True"
    where = checkpoint.source
    row = row_of_model(checkpoint.config(), where)
    get = look_up(checkpoint.config(), where)
    values, notes = key_values(row, get, where)
    rope, computed, rope_notes = rope_key_values(row, get, where)
    pooling, dense = pooling_of_folder(checkpoint.folder, row.arch, get("hidden_size"))
    values |= rope | pooling
    names, beside = _names(checkpoint, architecture, row)
    values |= _scalars(checkpoint, row, len(architecture.blocks))
    names = [name for name in names if not row.is_scalar(name)]
    tensors = _tensors(checkpoint, architecture, row, get, names)
    unread = row.unread(get)
    tensors += [_of_zeros(name, shape) for name, shape in unread.items()]
    by_name = {tensor.name: tensor for tensor in tensors}
    output = by_name.get("output.weight", by_name["token_embd.weight"])
    ranking, answers, rank_notes = ranking_of_folder(
        checkpoint.folder, checkpoint.config(), row.arch, output.shape[0],
        lambda token: output.read(checkpoint, token, token + 1),
    )  # fmt: skip
    values |= ranking
    tensors += [
        GGUFTensorSource(f"{TENSOR_NAMES[kind]}.weight", tuple(factors.shape), (), None, "other", values=factors)
        for kind, factors in (computed | dense | answers).items()
    ]
    tensors.sort(key=_order(row))
    general: KeyValues = {
        "general.architecture": (row.arch, GGUFValueType.STRING),
        "general.type": ("model", GGUFValueType.STRING),
        f"{row.arch}.vocab_size": (by_name["token_embd.weight"].shape[0], GGUFValueType.UINT32),
    }
    path = checkpoint.folder / "generation_config.json"
    generation = read_json_object(path) if path.is_file() else {}
    shapes = ((tensor.name, tensor.shape) for tensor in tensors)
    said, left = general_key_values(checkpoint.folder, where, checkpoint.config(), generation, shapes)
    if checkpoint.kind == "gguf":  # keeps what it says of itself
        said, left = said | kept_key_values(checkpoint.metadata), []
    zeros = f"zeros ({len(unread)} tensors): llama.cpp's loader asks for them and computes nothing with them"
    notes = (*beside, *notes, *rope_notes, *rank_notes, *left, *([zeros] if unread else []))
    return GGUFModel(row.arch, tuple(tensors), general | said | values, notes, row.vocabulary)


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
    elsewhere = _where_vision_goes(checkpoint)
    known = architecture.parameters.keys() | architecture.tied.keys()
    for name in checkpoint.tensors:
        if row.leaves_out(name):
            beside[elsewhere] += 1
        elif name not in known and architecture.predicts(name):
            beside["blocks for multi-token prediction"] += 1
        elif name not in known and (architecture.stands_beside(name) or MASKS.search(name)):
            weight = name.endswith(".weight") and not MASKS.search(name)
            beside["weights that the model does not use" if weight else "buffers that are computed"] += 1
        elif name in architecture.tied and architecture.tied[name] in checkpoint.tensors:
            beside[f"{name}, which config.json ties to {architecture.tied[name]}"] += 1
        elif name not in known:
            targets_of(row, name, where)
            raise ArchitectureError(f"{where}: {name!r} is no tensor of {architecture.class_name}")
    return names, [f"left out ({count} tensors): {what}" for what, count in beside.items()]


def _where_vision_goes(checkpoint: Checkpoint) -> str:
    note = "vision: llama.cpp keeps it in a file of its own (mmproj)"
    if tower_of(checkpoint.config()) is None:
        return note
    return (
        f"{note}; lowbit convert {shlex.quote(checkpoint.source)} --format gguf --mmproj -o mmproj-F16.gguf writes it"
    )


def _scalars(checkpoint: Checkpoint, row: GGUFArchitecture, blocks: int) -> KeyValues:
    """Key-values that hold a number of each block: the tensors of one element that are there."""
    return {
        key: (
            [float(checkpoint.read(f"{row.blocks}.{block}.{path}").float()) for block in range(blocks)],
            GGUFValueType.ARRAY, GGUFValueType.FLOAT32,
        )
        for path, (key, _) in row.scalars.items()
    }  # fmt: skip


def _tensors(
    checkpoint: Checkpoint, architecture: Architecture, row: GGUFArchitecture, get: Lookup, names: list[str]
) -> list[GGUFTensorSource]:
    """Everything that the model stores; experts of a block under one name."""
    where = checkpoint.source
    groups: dict[str, list[tuple[RowTarget, str]]] = {}
    for name in names:
        for target in targets_of(row, name, where):
            groups.setdefault(target.name, []).append((target, name))
    if row.needs_output and "output.weight" not in groups:
        embedding = groups["token_embd.weight"][0]
        output = row.places[T.OUTPUT, "weight"][1]
        groups["output.weight"] = [(RowTarget(output, None, None, "weight"), embedding[1])]
    tensors = [_tensor(checkpoint, architecture, get, members) for members in groups.values()]
    _require_complete(row, len(architecture.blocks), groups.keys() | row.unread(get).keys(), where)
    return tensors


def _of_zeros(name: str, shape: tuple[int, ...]) -> GGUFTensorSource:
    """A tensor that nobody reads; it takes no memory."""
    block = int(name.split(".")[1])
    return GGUFTensorSource(name, shape, (), block, "other", values=torch.zeros((1,) * len(shape)).expand(shape))


def _tensor(
    checkpoint: Checkpoint, architecture: Architecture, get: Lookup, members: list[tuple[RowTarget, str]]
) -> GGUFTensorSource:
    """One tensor of the file; `members` are the Hugging Face tensors that it is made of."""
    members = sorted(members, key=lambda member: member[0].expert or 0)
    target, name = members[0]
    linear = architecture.linears.get(name.removesuffix(".weight"))
    try:
        arranged = target.place.layout_of(target.suffix).arranged(get, architecture.parameters[name])
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.source}: {name} {list(architecture.parameters[name])} does not fit config.json: {error}",
            "config.json and the weights belong to different models",
        ) from error
    stacked = target.expert is not None
    if stacked:
        counted = target.place.count
        keys = (counted,) if isinstance(counted, str) and counted else EXPERT_COUNTS
        found = (get(key) for key in keys)
        needed = counted(get) if callable(counted) else next((count for count in found if count is not None), None)
        if [member.expert for member, _ in members] != list(range(needed or 0)):
            raise CheckpointError(
                f"{checkpoint.source}: there are {len(members)} tensors for {target.name}, config.json has {needed}",
                "config.json and the weights belong to different models",
            )
    stored = {name: alias for alias, name in reversed(architecture.tied.items()) if alias in checkpoint.tensors}
    return GGUFTensorSource(
        name=target.name,
        shape=(len(members), *arranged.stored) if stacked else arranged.stored,
        sources=tuple(member if member in checkpoint.tensors else stored[member] for _, member in members),
        block=target.block,
        role=linear.role if linear is not None else architecture.roles[name],
        arranged=arranged,
    )


def _require_complete(row: GGUFArchitecture, blocks: int, found: Container[str], where: str) -> None:
    """llama.cpp's loader needs every tensor of a block's kind, and biases in all blocks of the kind or in none."""
    biased = frozenset(
        place.tensor for _, place in row.places.values()
        if not place.bare and any(place.name("bias", block) in found for block in range(blocks))
    )  # fmt: skip
    if biased not in row.biases:
        listed = ", ".join(sorted(kind.name for kind in biased)) or "nothing"
        raise ArchitectureError(
            f"{where}: biases on {listed}, with which llama.cpp does not load {row.arch} models", CANNOT_RUN
        )
    missing = row.missing(blocks, biased, found)
    if missing:
        raise ArchitectureError(
            f"{where}: the model has nothing for {missing[0]}, which llama.cpp needs to load {row.arch} models",
            CANNOT_RUN,
        )


def _order(row: GGUFArchitecture):
    """Sort key: what stands before the blocks, the blocks in the row's order, what stands behind them."""
    norm = (
        T.OUTPUT_NORM if (T.OUTPUT_NORM, "weight") in row.places else T.TOKEN_EMBD_NORM
    )  # LFM2's, named after another
    behind = (norm, T.OUTPUT, T.DENSE_2_OUT, T.DENSE_3_OUT, T.CLS_OUT)
    last = {f"{TENSOR_NAMES[kind]}.{suffix}" for kind in behind for suffix in ("weight", "bias")}
    inside = [TENSOR_NAMES[place.tensor] for places in row.inside.values() for place in each_place(places)]

    def key(tensor: GGUFTensorSource) -> tuple[float, int, str]:
        if tensor.block is None:
            behind = tensor.name in last
            first = tensor.name != "token_embd.weight"
            return (math.inf if behind else -1, first + tensor.name.startswith("output."), tensor.name[::-1])
        name = tensor.name.replace(f"blk.{tensor.block}.", "blk.{bid}.")
        stem, _, suffix = (name, "", "") if name in inside else name.rpartition(".")
        return (tensor.block, inside.index(stem), suffix[::-1])

    return key
