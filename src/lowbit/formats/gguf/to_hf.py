"""The tensors of a GGUF file under Hugging Face names and layouts: the rows of `table.py`, inverted.

    blk.3.attn_q.weight          [N, K], rows by rotary pair   →  model.layers.3.self_attn.q_proj.weight
    blk.3.ffn_gate_exps.weight   [E, N, K]                     →  model.layers.3.mlp.experts.0.gate_proj.weight, …
    rope_freqs.weight                                          →  rope_parameters of config.json

Refused: architectures without a row, a tensor that has no place in the Hugging Face model, a layer with a tensor
missing, a tensor of another rank than its name says, another number of experts than expert_count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from gguf.constants import MODEL_TENSOR, TENSOR_NAMES

from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.formats.gguf.header import GGUFTensor
from lowbit.formats.gguf.keys import config_of, positive
from lowbit.formats.gguf.row import GGUFArchitecture, Place, RowLayout, head_dim
from lowbit.formats.gguf.table import DERIVED, row_of_file
from lowbit.formats.gguf.weight_scales import INPUT_SCALE, SCALE, weight_of

T = MODEL_TENSOR
MAX_EXPERTS = 65536

_VECTORS = frozenset({T.ATTN_SINKS})


@dataclass(frozen=True)
class MappedTensor:
    """A stored tensor, or one expert of it, under its Hugging Face name.

    shape        of the Hugging Face tensor
    layout       row layout that `read` undoes
    heads, dim   number of heads and rows of each, for layouts that go by head; else 0
    expert       which of the stacked experts; None for a tensor of its own
    scale        the scale of the whole stored matrix, which lies beside it (`weight_scales`); None without one
    """

    name: str
    stored: GGUFTensor
    shape: tuple[int, ...]
    layout: RowLayout = RowLayout.SAME
    heads: int = 0
    dim: int = 0
    expert: int | None = None
    scale: GGUFTensor | None = None


@dataclass(frozen=True)
class MappedModel:
    """
    config   config.json, but for rotary embeddings and tokens
    left_out  names of stored tensors that no Hugging Face tensor has a place for and that llama.cpp does not use
    """

    row: GGUFArchitecture
    tensors: list[MappedTensor]
    derived: dict[MODEL_TENSOR, GGUFTensor]
    config: dict[str, Any]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Name:
    """A parsed GGUF name. tensor: None where the architecture has no such name"""

    tensor: MODEL_TENSOR | None
    layer: int | None
    suffix: str


def map_to_hf(metadata: dict[str, Any], tensors: list[GGUFTensor], where: str) -> MappedModel:
    """Hugging Face names and layouts of every tensor; see the module's docstring for what is refused."""
    row = row_of_file(metadata, where)
    kinds = {TENSOR_NAMES[kind]: kind for kind in DERIVED | row.places.keys()}
    mapped: dict[_Name, list[MappedTensor]] = {}
    derived: dict[MODEL_TENSOR, GGUFTensor] = {}
    stored = {tensor.name for tensor in tensors}
    scales = {name: t for t in tensors if t.name.endswith(SCALE) and (name := weight_of(t.name)) in stored}
    unused = [t.name for t in tensors if t.name.endswith(INPUT_SCALE) and weight_of(t.name) in stored]
    beside = {scale.name for scale in scales.values()} | set(unused)
    for tensor in tensors:
        if tensor.name in beside:
            continue
        stem, _, suffix = tensor.name.rpartition(".")
        layer = re.match(r"blk\.(0|[1-9]\d{0,5})\.", stem)
        pattern = stem if layer is None else f"blk.{{bid}}.{stem[layer.end() :]}"
        kind = kinds.get(pattern) if suffix in ("weight", "bias") else None
        name = _Name(kind, int(layer[1]) if layer else None, suffix)
        if name.tensor is None:
            raise ArchitectureError(
                f"{where}: tensor {tensor.name!r} has no place in {row.model_class}",
                "use the safetensors checkpoint of the model",
            )
        if name.tensor in DERIVED:
            derived[name.tensor] = tensor
        else:
            parts = _undo_conversion(row, metadata, tensor, name, where)
            mapped[name] = [replace(part, scale=scales.get(tensor.name)) for part in parts]
    biased = frozenset(name.tensor for name in mapped if name.suffix == "bias" and name.tensor is not None)
    if biased not in row.biases:
        names = ", ".join(sorted(kind.name for kind in biased)) or "nothing"
        raise ArchitectureError(f"{where}: biases on {names}, which is not how {row.model_class} is built")
    _require_all_layers(row, biased, metadata.get(f"{row.arch}.block_count"), set(mapped), where)
    config = config_of(row, metadata, where) | row.biases[biased]
    config["tie_word_embeddings"] = _Name(T.OUTPUT, None, "weight") not in mapped
    config["vocab_size"] = mapped[_Name(T.TOKEN_EMBD, None, "weight")][0].shape[0]
    return MappedModel(row, [each for parts in mapped.values() for each in parts], derived, config, tuple(unused))


def _undo_conversion(
    row: GGUFArchitecture, metadata: dict[str, Any], tensor: GGUFTensor, name: _Name, where: str
) -> list[MappedTensor]:
    """The Hugging Face tensors that a stored one holds: itself, or one per expert."""
    assert name.tensor is not None
    module, place = row.places[name.tensor]
    suffix = "" if place.bare else f".{name.suffix}"
    stacked = "{expert}" in module
    _check_rank(tensor, name, place, stacked, where)
    if not stacked:
        full = module.format(bid=name.layer) + suffix
        shape, layout, heads, dim = tensor.shape, place.layout, 0, 0
        if layout is RowLayout.TRANSPOSED:
            shape, layout = (shape[::-1], layout) if name.suffix == "weight" else (shape, RowLayout.SAME)
        elif layout is RowLayout.ONE_ROW and len(shape) == 1:
            shape = (1, shape[0])
        if layout.reorders:
            heads, dim = _heads(row, metadata, tensor, place, where)
        return [MappedTensor(full, tensor, shape, layout, heads, dim)]
    count = positive(metadata, f"{row.arch}.expert_count", where)
    if tensor.shape[0] != count or count > MAX_EXPERTS:
        raise CheckpointError(
            f"{where}: tensor {tensor.name!r} has shape {list(tensor.shape)}, where expert_count is {count}"
        )
    return [
        MappedTensor(module.format(bid=name.layer, expert=expert) + suffix, tensor, tensor.shape[1:], expert=expert)
        for expert in range(count)
    ]


def _check_rank(tensor: GGUFTensor, name: _Name, place: Place, stacked: bool, where: str) -> None:
    assert name.tensor is not None
    is_vector = name.suffix == "bias" or "norm" in TENSOR_NAMES[name.tensor] or name.tensor in _VECTORS
    ranks = ((1 if is_vector else 2) + stacked,)
    if place.layout is RowLayout.ONE_ROW:
        ranks = (1, 2)
    if len(tensor.shape) not in ranks:
        needed = " or ".join(f"{rank}-d" for rank in ranks)
        raise CheckpointError(f"{where}: tensor {tensor.name!r} has shape {list(tensor.shape)}; {needed} is needed")


def _heads(
    row: GGUFArchitecture, metadata: dict[str, Any], tensor: GGUFTensor, place: Place, where: str
) -> tuple[int, int]:
    """(heads, rows of each); without grouped queries a file may leave the number for k out."""
    key = f"{row.arch}.{place.heads}"
    heads = positive(metadata, key if key in metadata else f"{row.arch}.attention.head_count", where)
    dim = head_dim(place.layout, tensor.shape[0], heads)
    if dim is None:
        raise CheckpointError(f"{where}: tensor {tensor.name!r} {list(tensor.shape)} is not {heads} heads of pairs")
    return heads, dim


def _require_all_layers(
    row: GGUFArchitecture, biased: frozenset[MODEL_TENSOR], block_count: Any, mapped: set[_Name], where: str
) -> None:
    """Every weight and bias must be there for every layer, and no layer beyond the last."""
    layers = {name.layer for name in mapped if name.layer is not None}
    if type(block_count) is not int or layers != set(range(len(layers))) or len(layers) != block_count:
        raise CheckpointError(
            f"{where}: block_count is {block_count!r}, but tensors of {len(layers)} layers are in the file",
            "download the file again",
        )
    weights = [(kind, "weight") for kind in row.places if kind is not T.OUTPUT]
    for kind, suffix in weights + [(kind, "bias") for kind in biased]:
        for layer in sorted(layers) if "{bid}" in TENSOR_NAMES[kind] else [None]:
            if _Name(kind, layer, suffix) not in mapped:
                missing = f"{TENSOR_NAMES[kind].format(bid=layer)}.{suffix}"
                raise CheckpointError(f"{where}: tensor {missing!r} is missing", "download the file again")
