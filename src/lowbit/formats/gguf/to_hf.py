"""The tensors of a GGUF file under Hugging Face names and layouts: the rows of `table.py`, inverted.

    blk.3.attn_q.weight          [N, K], rows by rotary pair   →  model.layers.3.self_attn.q_proj.weight
    blk.3.ffn_gate_exps.weight   [E, N, K]                     →  model.layers.3.mlp.experts.0.gate_proj.weight, …
    rope_freqs.weight                                          →  rope_parameters of config.json

Refused: architectures without a row, a tensor that has no place in the Hugging Face model, a layer with a tensor
missing, a tensor of another rank than its name says, another number of experts than expert_count.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES
from torch import Tensor

from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.formats.gguf.header import GGUFTensor
from lowbit.formats.gguf.keys import config_of, positive
from lowbit.formats.gguf.layout import ONE_ROW, Arranged, Lookup, heads_of
from lowbit.formats.gguf.row import GGUFArchitecture, Place
from lowbit.formats.gguf.table import DERIVED, look_up_first, row_of_file
from lowbit.formats.gguf.weight_scales import INPUT_SCALE, SCALE, weight_of

T = MODEL_TENSOR
MAX_EXPERTS = 65536

# Beginnings of GGUF names whose weights are vectors, whatever the layout makes of them.
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.")
_VECTORS = frozenset({T.ATTN_SINKS, T.SSM_A, T.SSM_D, T.SSM_DT, T.FFN_EXP_PROBS_B, T.LAYER_OUT_SCALE,
                      T.ALTUP_CORRECT_SCALE})  # fmt: skip


@dataclass(frozen=True)
class MappedTensor:
    """A tensor under its Hugging Face name, and the stored one that holds it; several, where its rows were split.

    shape   of the Hugging Face tensor
    pieces  (stored tensor, how its rows follow from this one's, the scale of the whole stored matrix that lies beside
            it (`weight_scales`) or None); none where a key-value holds it
    values  float32, of a tensor that a key-value holds
    expert  which of the stacked experts; None for a tensor of its own
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[GGUFTensor, Arranged, GGUFTensor | None], ...]
    expert: int | None = None
    values: Tensor | None = None

    @property
    def stored(self) -> GGUFTensor:
        return self.pieces[0][0]

    @property
    def is_changed(self) -> bool:
        """True if the values in the file are a function of the tensor's."""
        return any(arranged.is_changed for _, arranged, _ in self.pieces)

    @property
    def is_scaled(self) -> bool:
        return any(scale is not None for *_, scale in self.pieces)


@dataclass(frozen=True)
class MappedModel:
    """
    config    config.json, but for rotary embeddings and tokens
    left_out  names of stored tensors that no Hugging Face tensor has a place for and that llama.cpp does not use
    predicts  tensors of blocks for multi-token prediction, which transformers does not build
    unread    number of tensors that only the loader asks for (`GGUFArchitecture.unread`)
    """

    row: GGUFArchitecture
    tensors: list[MappedTensor]
    derived: dict[MODEL_TENSOR, GGUFTensor]
    config: dict[str, Any]
    left_out: tuple[str, ...] = ()
    predicts: int = 0
    unread: int = 0


@dataclass(frozen=True)
class _Found:
    """A stored tensor of a known name.

    scale   of the whole matrix, which lies beside it; None without one
    module  Hugging Face module or bare parameter, {expert} not filled in
    """

    tensor: GGUFTensor
    scale: GGUFTensor | None
    place: Place
    module: str
    block: int | None
    suffix: str


def map_to_hf(metadata: dict[str, Any], tensors: list[GGUFTensor], where: str) -> MappedModel:
    """Hugging Face names and layouts of every tensor; see the module's docstring for what is refused."""
    row = row_of_file(metadata, {tensor.name for tensor in tensors}, where)
    metadata, model = _without_prediction(row, metadata, tensors)
    predicts = len(tensors) - len(model)
    nvfp4 = {tensor.name for tensor in model if tensor.type_name == "NVFP4"}  # others' are the model's own
    scales = {name: t for t in model if t.name.endswith(SCALE) and (name := weight_of(t.name)) in nvfp4}
    unused = [t.name for t in model if t.name.endswith(INPUT_SCALE) and weight_of(t.name) in nvfp4]
    beside = {scale.name for scale in scales.values()} | set(unused)
    derived, found = _found(row, [tensor for tensor in model if tensor.name not in beside], scales, where)
    biased = frozenset(each.place.tensor for each in found if each.suffix == "bias" and not each.place.bare)
    if biased not in row.biases:
        names = ", ".join(sorted(kind.name for kind in biased)) or "nothing"
        raise ArchitectureError(f"{where}: biases on {names}, which is not how {row.model_class} is built")
    _require_all_blocks(row, biased, metadata, found, where)
    names = {each.tensor.name for each in found}
    config = config_of(row, metadata, names, where) | row.biases[biased]
    kinds = {each.place.tensor for each in found}
    config |= {place.flag: place.tensor in kinds for _, place in row.places.values() if place.flag}
    config["tie_word_embeddings"] = "output.weight" not in names
    config["vocab_size"] = next(each.tensor.shape[0] for each in found if each.place.tensor is T.TOKEN_EMBD)
    get = look_up_first(config, where)
    unread = names & row.unread(get).keys()
    sources: dict[str, list[_Found]] = {}
    for each in (each for each in found if each.tensor.name not in unread):
        _check_rank(each, where)
        sources.setdefault(each.module + ("" if each.place.bare else f".{each.suffix}"), []).append(each)
    mapped = []
    for name, parts in sources.items():
        try:
            mapped += _undo_conversion(name, parts, get, metadata, row, where)
        except ValueError as error:
            raise CheckpointError(
                f"{where}: tensor {parts[0].tensor.name!r} {list(parts[0].tensor.shape)} does not fit the key-values: "
                f"{error}"
            ) from error
    mapped += _scalars(row, metadata, config["num_hidden_layers"], where) if row.scalars else []
    return MappedModel(row, mapped, derived, config, tuple(unused), predicts, len(unread))


def _without_prediction(
    row: GGUFArchitecture, metadata: dict[str, Any], tensors: list[GGUFTensor]
) -> tuple[dict[str, Any], list[GGUFTensor]]:
    """Key-values and tensors without the last blocks, those that nextn_predict_layers counts."""
    count, key = metadata.get(f"{row.arch}.nextn_predict_layers"), f"{row.arch}.block_count"
    blocks = metadata.get(key)
    if type(count) is not int or type(blocks) is not int or not 0 < count < blocks:
        return metadata, tensors

    def predicts(name: str) -> bool:
        found = _BLOCK.match(name)
        return found is not None and blocks - count <= int(found[1]) < blocks

    return metadata | {key: blocks - count}, [each for each in tensors if not predicts(each.name)]


def _found(
    row: GGUFArchitecture, tensors: list[GGUFTensor], scales: dict[str, GGUFTensor], where: str
) -> tuple[dict[MODEL_TENSOR, GGUFTensor], list[_Found]]:
    """(tensors that are computed from the config, the others with their places)."""
    places: dict[str, tuple[Place, str, str]] = {}  # pattern of the GGUF name → place, module, suffix
    for (_, ending), (module, place) in row.places.items():
        for suffix in (ending,) if place.bare else ("weight", "bias"):
            stem = TENSOR_NAMES[place.tensor]
            places[f"{stem}.{suffix}" if suffix else stem] = place, module, suffix
    computed = {f"{TENSOR_NAMES[kind]}.weight": kind for kind in DERIVED}
    derived: dict[MODEL_TENSOR, GGUFTensor] = {}
    found = []
    for tensor in tensors:
        block = _BLOCK.match(tensor.name)
        pattern = tensor.name if block is None else f"blk.{{bid}}.{tensor.name[block.end() :]}"
        if pattern in computed:
            derived[computed[pattern]] = tensor
        elif pattern in places:
            place, module, suffix = places[pattern]
            number = int(block[1]) if block else None
            found.append(
                _Found(tensor, scales.get(tensor.name), place, module.replace("{bid}", str(number)), number, suffix)
            )
        else:
            raise ArchitectureError(
                f"{where}: tensor {tensor.name!r} has no place in {row.model_class}",
                "use the safetensors checkpoint of the model",
            )
    return derived, found


def _scalars(row: GGUFArchitecture, metadata: dict[str, Any], blocks: int, where: str) -> list[MappedTensor]:
    """Tensors of one number; llama.cpp takes one key-value for all blocks too."""
    mapped = []
    for path, (key, shape) in row.scalars.items():
        numbers = np.asarray(metadata.get(key))
        if numbers.dtype.kind != "f" or numbers.shape not in ((), (blocks,)) or not np.isfinite(numbers).all():
            raise ArchitectureError(
                f"{where}: {key} is {str(numbers)[:80]}; one number for each of {blocks} blocks is needed"
            )
        for block, number in enumerate(np.broadcast_to(numbers, (blocks,)).tolist()):
            name = f"{row.blocks}.{block}.{path}"
            mapped.append(MappedTensor(name, shape, (), values=torch.tensor(number).reshape(shape)))
    return mapped


def _undo_conversion(
    name: str, parts: list[_Found], get: Lookup, metadata: dict[str, Any], row: GGUFArchitecture, where: str
) -> list[MappedTensor]:
    """The Hugging Face tensors that stored ones hold: one, or one per expert."""
    tensor = parts[0].tensor
    if "{expert}" not in name:
        shape = _source_shape(parts, get)
        pieces = []
        for part in parts:
            arranged = part.place.layout_of(part.suffix).arranged(get, shape)
            if math.prod(arranged.stored) != math.prod(part.tensor.shape):
                raise ValueError(f"{list(arranged.stored)} is needed")
            pieces.append((part.tensor, arranged, part.scale))
        return [MappedTensor(name, shape, tuple(pieces))]
    counted = parts[0].place.count
    if callable(counted):
        count = counted(get)
    else:
        count = heads_of(get, counted) if counted else positive(metadata, f"{row.arch}.expert_count", where)
    if tensor.shape[0] != count or count > MAX_EXPERTS:
        raise CheckpointError(
            f"{where}: tensor {tensor.name!r} has shape {list(tensor.shape)}, where the key-values count {count}"
        )
    arranged = parts[0].place.layout.arranged(get, tensor.shape[1:])
    return [
        MappedTensor(
            name.replace("{expert}", str(expert)),
            tensor.shape[1:],
            ((tensor, arranged, parts[0].scale),),
            expert=expert,
        )
        for expert in range(count)
    ]


def _source_shape(parts: list[_Found], get: Lookup) -> tuple[int, ...]:
    """Of the Hugging Face tensor that all parts come from."""
    rows, rest = 0, ()
    for part in parts:
        layout, shape = part.place.layout, part.tensor.shape
        shape = shape if layout.unshape is None else layout.unshape(get, shape)
        if layout is ONE_ROW and len(shape) == 1:
            shape = (1, shape[0])
        if layout.heads is not None:
            heads, _, first, last = layout.heads(get)
            shape = (heads * (last - first), shape[1])
        rows, rest = rows + shape[0], shape[1:]
    shape = (rows, *rest)
    return shape[::-1] if parts[0].place.layout.transposed and len(shape) == 2 else shape


def _check_rank(found: _Found, where: str) -> None:
    kind, layout = found.place.tensor, found.place.layout
    if layout.shape is not None or layout.heads is not None:
        return  # the size is compared with what the layout makes
    is_vector = (
        found.suffix in ("bias", "scale") or "norm" in TENSOR_NAMES[kind] or (found.place.bare and kind in _VECTORS)
    )
    ranks = ((1 if is_vector else 2) + ("{expert}" in found.module),)
    if layout is ONE_ROW or kind is T.SSM_A:  # one number per head, or a row of them per channel
        ranks = (1, 2)
    if len(found.tensor.shape) not in ranks:
        needed = " or ".join(f"{rank}-d" for rank in ranks)
        shape = list(found.tensor.shape)
        raise CheckpointError(f"{where}: tensor {found.tensor.name!r} has shape {shape}; {needed} is needed")


def _require_all_blocks(
    row: GGUFArchitecture, biased: frozenset[MODEL_TENSOR], metadata: dict[str, Any], found: list[_Found], where: str
) -> None:
    """Every weight and bias of a block's kind must be there, and no block beyond the last."""
    count = metadata.get(f"{row.arch}.block_count")
    blocks = {each.block for each in found if each.block is not None}
    if type(count) is not int or blocks != set(range(len(blocks))) or len(blocks) != count:
        raise CheckpointError(
            f"{where}: block_count is {count!r}, but tensors of {len(blocks)} layers are in the file",
            "download the file again",
        )
    missing = row.missing(count, biased, {each.tensor.name for each in found})
    if missing:
        raise CheckpointError(f"{where}: tensor {missing[0]!r} is missing", "download the file again")
