"""A model as a GGUF file has it: tensors, their sources and layouts, key-values. Types, bytes and tokenizer: elsewhere.

    model.layers.0.self_attn.q_proj.weight            →  blk.0.attn_q.weight         [N, K], rows by rotary pair
    model.layers.0.mlp.experts.*.gate_proj.weight     →  blk.0.ffn_gate_exps.weight  [E, N, K]
    transformer.h.0.attn.c_attn.weight [K, N]         →  blk.0.attn_qkv.weight       [N, K]
    rope_parameters of Llama 3, Phi-3                 →  rope_freqs.weight, rope_factors_long.weight, …
    lm_head.weight, tied                              →  nothing, or output.weight once more where llama.cpp needs it

Every tensor is read in rows, whatever its layout: those of a head come from one span of the source, those of stacked
experts from one source each. The rules are rows of `lowbit.checkpoint.gguf_table`.

Refused: a model type without a row, a model that llama.cpp would compute differently, a tensor without a place, a
tensor that is missing. Noted: what stands beside the model (buffers, multi-token prediction, vision).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, GGUFValueType
from torch import Tensor

from lowbit.architecture.structure import Architecture
from lowbit.checkpoint.base import Checkpoint, is_decoded
from lowbit.checkpoint.gguf_keys import KeyValues, key_values
from lowbit.checkpoint.gguf_layout import Layout, head_dim, hf_rows
from lowbit.checkpoint.gguf_raw import rows_and_columns
from lowbit.checkpoint.gguf_rope import rope_key_values
from lowbit.checkpoint.gguf_row import GGUFArchitecture, Lookup, Target
from lowbit.checkpoint.gguf_table import row_of_model, target_of
from lowbit.errors import ArchitectureError, CheckpointError

T = MODEL_TENSOR

# llama.cpp computes these in float32 whatever the file type (its converter and llama-quantize keep them).
_ALWAYS_FLOAT = frozenset({T.FFN_GATE_INP, T.FFN_GATE_INP_SHEXP, T.POS_EMBD})
# Causal masks that old GPT-2 and GPT-NeoX files store.
_MASKS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$")


@dataclass(frozen=True)
class GGUFTensorSource:
    """One tensor of the file and where it comes from. It is seen as [rows, K]: K is the last dimension.

    name        "blk.0.attn_q.weight"
    shape       in torch's order: [N, K], [E, N, K] for stacked experts, [n] for a vector
    sources     the Hugging Face tensors that it is made of: one, or one per expert; none for a computed one
    role        of the architecture: a linear's role, "norm", "embedding", "bias" …
    keep_float  llama.cpp wants F32 whatever the file type
    layout      how rows differ from the sources'
    heads, dim  number of heads and rows of each, for layouts that go by head; else 0
    values      float32, of a computed tensor
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    block: int | None
    role: str
    keep_float: bool
    layout: Layout = Layout.SAME
    heads: int = 0
    dim: int = 0
    values: Tensor | None = field(default=None, compare=False)

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

    def release(self, checkpoint: Checkpoint) -> None:
        """Drop the sources' pages from resident memory."""
        for name in self.sources:
            checkpoint.release(name)

    def _rows(self, checkpoint: Checkpoint, name: str, first: int, last: int) -> Tensor:
        """Rows of one source, in this tensor's order; a vector is one row."""
        if len(checkpoint.tensors[name].shape) < 2:
            return self._vector(checkpoint.read(name))[first:last]
        if self.layout is Layout.TRANSPOSED and not is_decoded(checkpoint, name):
            return checkpoint.read(name)[:, first:last].t().contiguous()
        if not self.layout.reorders:
            return checkpoint.read(name, first, last)
        cuts = [first, *range(first - first % self.dim + self.dim, last, self.dim), last]
        return torch.cat([self._rows_of_head(checkpoint, name, *cut) for cut in pairwise(cuts)])

    def _rows_of_head(self, checkpoint: Checkpoint, name: str, first: int, last: int) -> Tensor:
        """Rows first..last, all of one head: they lie within one span of the source."""
        wanted = hf_rows(self.layout, np.arange(first, last), self.heads, self.dim)
        start = int(wanted.min())
        return checkpoint.read(name, start, int(wanted.max()) + 1)[torch.from_numpy(wanted - start)]

    def _vector(self, values: Tensor) -> Tensor:
        """[n] → [1, n]."""
        if self.layout is Layout.PLUS_ONE:
            values = values.float() + 1
        if self.layout.reorders:
            values = values[torch.from_numpy(hf_rows(self.layout, np.arange(len(values)), self.heads, self.dim))]
        return values.reshape(1, -1)


@dataclass(frozen=True)
class GGUFModel:
    """A file without its types and bytes.

    arch        general.architecture
    tensors     embedding first, then block by block, then the output: llama.cpp's order
    key_values  key → (value, type), of a list (value, ARRAY, type of items): everything but tokenizer.*,
                general.file_type, general.quantization_version
    notes       what the user should know
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
    tensors += [_computed(kind, factors) for kind, factors in computed.items()]
    tensors.sort(key=_order(row))
    vocabulary = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    general: KeyValues = {
        "general.architecture": (row.arch, GGUFValueType.STRING),
        "general.type": ("model", GGUFValueType.STRING),
        "general.name": (_model_name(checkpoint), GGUFValueType.STRING),
        f"{row.arch}.vocab_size": (vocabulary, GGUFValueType.UINT32),
    }
    return GGUFModel(row.arch, tuple(tensors), general | values, (*beside, *notes, *rope_notes))


def _lookup(config: dict[str, Any], where: str) -> Lookup:
    """A look-up in config.json, completed with the defaults and the spellings of transformers' class."""
    from transformers import AutoConfig

    config = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        parsed = AutoConfig.for_model(**config).get_text_config()
    except Exception as error:  # whatever a config can make somebody else's validators raise
        raise ArchitectureError(f"{where}: transformers does not take config.json: {error}") from error
    return lambda key: getattr(parsed, key, None)


def _model_name(checkpoint: Checkpoint) -> str:
    name = checkpoint.metadata.get("general.name") or checkpoint.config().get("_name_or_path")
    return str(name or PurePath(checkpoint.source.rstrip("/")).name or "model")


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
            beside["vision: llama.cpp keeps it in a file of its own (mmproj)"] += 1
        elif name not in known and architecture.predicts(name):
            beside["blocks for multi-token prediction"] += 1
        elif name not in known and (architecture.stands_beside(name) or _MASKS.search(name)):
            beside["buffers that are computed"] += 1
        elif name in architecture.tied and architecture.tied[name] in checkpoint.tensors:
            beside[f"{name}, which config.json ties to {architecture.tied[name]}"] += 1
        elif name not in known:
            target_of(row, name, where)
            raise ArchitectureError(f"{where}: {name!r} is no tensor of {architecture.class_name}")
    return names, [f"left out ({count} tensors): {what}" for what, count in beside.items()]


def _tensors(
    checkpoint: Checkpoint, architecture: Architecture, row: GGUFArchitecture, values: KeyValues, names: list[str]
) -> list[GGUFTensorSource]:
    """Everything that the model stores; experts of a block under one name."""
    where = checkpoint.source
    groups: dict[str, list[tuple[Target, str]]] = {}
    for name in names:
        target = target_of(row, name, where)
        groups.setdefault(target.name, []).append((target, name))
    if row.needs_output and "output.weight" not in groups:
        embedding = groups["token_embd.weight"][0]
        output = row.places[T.OUTPUT][1]
        groups["output.weight"] = [(Target(output, None, None, "weight"), embedding[1])]
    tensors = [_tensor(checkpoint, architecture, values, row, members) for members in groups.values()]
    _require_complete(row, len(architecture.blocks), groups, where)
    return tensors


def _tensor(
    checkpoint: Checkpoint,
    architecture: Architecture,
    values: KeyValues,
    row: GGUFArchitecture,
    members: list[tuple[Target, str]],
) -> GGUFTensorSource:
    """One tensor of the file; `members` are the Hugging Face tensors that it is made of."""
    members = sorted(members, key=lambda member: member[0].expert or 0)
    target, name = members[0]
    linear = architecture.linears.get(name.removesuffix(".weight"))
    shape, layout = architecture.parameters[name], target.place.layout
    if layout is Layout.TRANSPOSED:
        shape, layout = shape[::-1], layout if len(shape) > 1 else Layout.SAME
    heads = dim = 0
    if layout.reorders:
        heads, dim = _heads(values, row, target, shape, f"{checkpoint.source}: {name}")
    stacked = target.expert is not None
    if stacked:
        _require_all_experts(members, values[f"{row.arch}.expert_count"][0], checkpoint.source)
    return GGUFTensorSource(
        name=target.name,
        shape=(len(members), *shape) if stacked else shape,
        sources=tuple(_present(checkpoint, architecture, member) for _, member in members),
        block=target.block,
        role=linear.role if linear is not None else architecture.roles[name],
        keep_float=_keeps_float(target, shape),
        layout=layout,
        heads=heads,
        dim=dim,
    )


def _heads(
    values: KeyValues, row: GGUFArchitecture, target: Target, shape: tuple[int, ...], where: str
) -> tuple[int, int]:
    """(heads, rows of each) of a tensor whose layout goes by head."""
    heads = values.get(f"{row.arch}.{target.place.heads}", values[f"{row.arch}.attention.head_count"])[0]
    dim = head_dim(target.place.layout, math.prod(shape[:1]), heads)
    if dim is None:
        raise CheckpointError(f"{where} {list(shape)} is not {heads} heads of rotary pairs")
    return heads, dim


def _require_all_experts(members: list[tuple[Target, str]], count: int, where: str) -> None:
    if [member[0].expert for member in members] != list(range(count)):
        raise CheckpointError(
            f"{where}: there are {len(members)} experts for {members[0][0].name}, config.json has {count}",
            "config.json and the weights belong to different models",
        )


def _present(checkpoint: Checkpoint, architecture: Architecture, name: str) -> str:
    """The name under which a tied tensor is stored."""
    if name in checkpoint.tensors:
        return name
    return next(alias for alias, stored in architecture.tied.items() if stored == name and alias in checkpoint.tensors)


def _keeps_float(target: Target, shape: tuple[int, ...]) -> bool:
    is_norm = TENSOR_NAMES[target.place.tensor].endswith("_norm")
    return target.suffix != "weight" or len(shape) < 2 or is_norm or target.place.tensor in _ALWAYS_FLOAT


def _computed(kind: MODEL_TENSOR, values: Tensor) -> GGUFTensorSource:
    name = f"{TENSOR_NAMES[kind]}.weight"
    return GGUFTensorSource(name, tuple(values.shape), (), None, "other", True, values=values)


def _require_complete(row: GGUFArchitecture, blocks: int, found: dict[str, Any], where: str) -> None:
    """llama.cpp's loader wants every tensor of the row in every block, and biases in all blocks or none."""
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
