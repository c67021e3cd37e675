"""The vision tower and projector of a Hugging Face model, mapped to the mmproj file that llama.cpp loads.

    model.visual.patch_embed.proj.weight [N, C, 2, h, w]  →  v.patch_embd.weight, v.patch_embd.weight.1  [N, C, h, w]
    visual.blocks.0.attn.qkv.weight [3N, K]               →  v.blk.0.attn_q.weight, …attn_k…, …attn_v…  [N, K]
    config.json, preprocessor_config.json                 →  clip.vision.*

Each tower is a row of `mmproj/table.py`.

Refused: a tower without a row or one that llama.cpp would compute differently, a tensor without a place, a missing
tensor, a model without preprocessor_config.json. Left out with a note: the language model.
"""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gguf.constants import GGUFValueType, Keys
from torch import Tensor

from lowbit.architecture.structure import Architecture
from lowbit.checkpoint.base import Checkpoint, read_json_object
from lowbit.checkpoint.companions import leads_out
from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.formats.gguf.general import general_key_values
from lowbit.formats.gguf.keys import KeyValues
from lowbit.formats.gguf.layout import Lookup, rotary_rows
from lowbit.formats.gguf.mmproj.row import (
    ARRAY,
    BOOL,
    CLIP,
    COMMON_KEYS,
    FLOAT,
    STRING,
    Tower,
    TowerConfig,
    TowerKey,
    TowerLayout,
    TowerTarget,
)
from lowbit.formats.gguf.mmproj.table import SWAPPED_IF_SQUARE, require_tower
from lowbit.formats.gguf.raw import rows_and_columns
from lowbit.formats.gguf.table import MODEL_TYPES, parse_config

if TYPE_CHECKING:
    from lowbit.calibrate.store import BlockStore
    from lowbit.rounding.target import Target

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # the second overrules the first


@dataclass(frozen=True)
class TowerTensor:
    """One tensor of the file; the source of its rows, which are [rows, K] with K the last dimension.

    shape   in torch's order
    source  its Hugging Face tensor
    part    FRAMES: the frame; THIRDS: 0, 1, 2 for q, k, v; TOKEN: the number of the token
    heads   of ROTARY; else 0
    share   of the source's bytes
    """

    name: str
    shape: tuple[int, ...]
    source: str
    target: TowerTarget
    role: str
    part: int = 0
    heads: int = 0
    share: float = 1.0

    @property
    def layout(self) -> TowerLayout:
        return self.target.place.layout

    @property
    def names(self) -> tuple[str, ...]:
        return (self.source,)

    def read(self, checkpoint: Checkpoint, first: int, last: int) -> Tensor:
        """Rows first..last, [last - first, K], in the source's dtype (float32 where something is added)."""
        rows, columns = rows_and_columns(self.shape)
        if not 0 <= first <= last <= rows:
            raise IndexError(f"rows {first}..{last} of {self.name}, which has {rows}")
        if len(self.shape) == 2 and self.layout in (TowerLayout.SAME, TowerLayout.THIRDS):
            before = self.part * rows
            return checkpoint.read(self.source, before + first, before + last)
        return self._whole(checkpoint).reshape(rows, columns)[first:last]

    def read_calibrated(self, store: BlockStore, target: Target, first: int, last: int) -> Tensor:
        raise AssertionError("towers are not calibrated")

    def repack(self, checkpoint: Checkpoint, target: Target, first: int, last: int) -> Tensor:
        raise AssertionError("only GGUF files store ggml types")

    def _whole(self, checkpoint: Checkpoint) -> Tensor:
        """Convolutions, vectors and matrices of rotary pairs are small: at most a hidden size squared."""
        if self.layout is TowerLayout.TOKEN:
            return checkpoint.read(self.source, self.part, self.part + 1)
        values = checkpoint.read(self.source)
        if self.layout is TowerLayout.FRAMES and values.dim() == 5:
            return values[:, :, self.part].contiguous()
        if self.layout is TowerLayout.THIRDS:
            return values.chunk(3)[self.part]
        if self.layout is TowerLayout.PLUS_ONE:
            return values.float() + 1
        if self.layout is TowerLayout.ROTARY:
            return values[torch.from_numpy(rotary_rows(len(values), self.heads))]
        return values


@dataclass(frozen=True)
class MmprojModel:
    """A mapped tower, before types are chosen.

    tensors     blocks in order, before them what patches pass first, behind them the projector
    key_values  key → (value, type), of a list (value, ARRAY, type of items): everything but general.file_type and
                general.quantization_version
    notes       for the user
    """

    tower: Tower
    tensors: tuple[TowerTensor, ...]
    key_values: KeyValues
    notes: tuple[str, ...]


def describe_mmproj(checkpoint: Checkpoint, architecture: Architecture) -> MmprojModel:
    """The mmproj form of a model that is open under the architecture's names."""
    where, config = checkpoint.source, checkpoint.config()
    tower = require_tower(config, where)
    facts = tower_config(config, checkpoint.folder, where)
    _refuse_what_is_computed_otherwise(tower, facts, where)
    values = _key_values(tower, facts, where)
    tensors, notes = _tensors(checkpoint, architecture, tower, facts)
    path = checkpoint.folder / "generation_config.json"
    generation = read_json_object(path) if path.is_file() else {}
    shapes = ((tensor.name, tensor.shape) for tensor in tensors)
    said, left = general_key_values(checkpoint.folder, where, config, generation, shapes)
    general: KeyValues = {
        "general.architecture": (CLIP, STRING),
        "general.type": ("mmproj", STRING),
    }
    notes = (*notes, *([tower.note] if tower.note else []), *left)
    return MmprojModel(tower, tuple(tensors), general | said | values, notes)


def tower_config(config: dict[str, Any], folder: Path, where: str) -> TowerConfig:
    """The look-ups of a row, over config.json as transformers' class completes it, and the files beside it."""
    parsed, text = parse_config(config, where)
    vision = getattr(parsed, "vision_config", None)
    if vision is None:
        raise ArchitectureError(f"{where}: config.json has no vision_config")
    return TowerConfig(_getter(vision), _getter(parsed), _getter(text), _processor(folder, where),
                       lambda token: _token_id(folder, token, where))  # fmt: skip


def _getter(part: Any) -> Lookup:
    return lambda key: getattr(part, key, None)


def _processor(folder: Path, where: str) -> dict[str, Any]:
    """Both files of the image processor, what lies deeper in them moved up."""
    found: dict[str, Any] = {}
    for name in PROCESSOR_FILES:
        if (folder / name).is_file() and leads_out(folder / name, folder) is None:
            read = read_json_object(folder / name)
            inner = read.get("image_processor")
            found |= read | (inner if isinstance(inner, dict) else {})
    for key in ("image_mean", "image_std"):
        numbers = found.get(key)
        if not isinstance(numbers, list) or len(numbers) != 3 or not all(_is_finite(number) for number in numbers):
            said = "there is no" if numbers is None else f"{str(numbers)[:80]} is no three numbers for"
            raise CheckpointError(
                f"{where}: {said} {key} in {' or '.join(PROCESSOR_FILES)}, by which llama.cpp normalizes images",
                "copy the files of the image processor from where the model was published",
            )
    return found


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 1e30


def _token_id(folder: Path, token: str, where: str) -> int:
    path = folder / "tokenizer.json"
    added = read_json_object(path).get("added_tokens") if path.is_file() else None
    for row in added if isinstance(added, list) else []:
        if isinstance(row, dict) and row.get("content") == token and isinstance(row.get("id"), int):
            return row["id"]
    raise CheckpointError(
        f"{where}: tokenizer.json has no added token {token}, whose embedding belongs to the file",
        "copy tokenizer.json from where the model was published",
    )


def _refuse_what_is_computed_otherwise(tower: Tower, facts: TowerConfig, where: str) -> None:
    stated = [(f"{key} of vision_config", facts.vision(key), allowed) for key, allowed in tower.fixed.items()]
    stated += [(key, value, (needed,)) for key, value, needed in tower.implied(facts)]
    for key, value, allowed in stated:
        if value is not None and value not in allowed:
            raise ArchitectureError(
                f"{where}: {key} is {str(value)[:80]} in config.json, and llama.cpp computes {tower.projector} towers "
                f"with {str(allowed[0])[:80]}",
                "llama.cpp cannot run this variant of the model",
            )


def _key_values(tower: Tower, facts: TowerConfig, where: str) -> KeyValues:
    values: KeyValues = {Keys.Clip.PROJECTOR_TYPE: (str(tower.projector), STRING)}
    for key in (*COMMON_KEYS, *tower.keys):
        try:
            value = key.of(facts)
            if value is not None:
                values[key.name] = _typed(key, value)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ArchitectureError(
                f"{where}: config.json gives no sound {key.name}: {error}",
                "complete config.json; the one that the model was published with has it",
            ) from error
        if value is None and isinstance(key.value, str):
            raise ArchitectureError(
                f"{where}: vision_config has no {key.value}, which {key.name} needs",
                "complete config.json; the one that the model was published with has it",
            )
    return values


def _typed(key: TowerKey, value: Any) -> Any:
    if key.kind is ARRAY:
        assert key.items is not None
        return [bool(item) if key.items is BOOL else float(item) for item in value], ARRAY, key.items
    if key.kind is GGUFValueType.UINT32:
        number = int(value)
        if not 0 < number < 2**31:
            raise ValueError(f"{str(value)[:80]} is no positive number of 31 bits")
        return number, key.kind
    return {BOOL: bool, FLOAT: float}[key.kind](value), key.kind


def _tensors(
    checkpoint: Checkpoint, architecture: Architecture, tower: Tower, facts: TowerConfig
) -> tuple[list[TowerTensor], list[str]]:
    """(all tensors of the file in its order, notes about those of the model that are not in it)."""
    where, extra, tensors, beside = checkpoint.source, tower.extra(facts), [], Counter()
    for name in dict.fromkeys([*architecture.parameters, *checkpoint.tensors]):
        belongs, why, target = name.startswith(tower.prefixes), tower.why_left_out(name), tower.find(name, extra)
        if target is not None:
            if name not in checkpoint.tensors:
                raise CheckpointError(f"{where}: there is no tensor {name!r}", "a download may be incomplete")
            tensors += _parts(checkpoint, architecture, name, target, facts, where)
        if why is not None:
            beside[why] += 1
        elif not belongs:
            beside[_language_model(architecture.model_type, where)] += 1
        elif target is None:
            raise ArchitectureError(
                f"{where}: {name!r} has no place in an mmproj file of {tower.projector}",
                "llama.cpp cannot run this variant of the model",
            )
    blocks = int(facts.vision(tower.block_count) or 0)
    missing = sorted(tower.needed(blocks, extra) - {tensor.name for tensor in tensors})
    if missing:
        raise ArchitectureError(
            f"{where}: the model has nothing for {missing[0]}, which llama.cpp needs for {tower.projector} towers",
            "llama.cpp cannot run this variant of the model",
        )
    beyond = next((t.name for t in tensors if t.target.block is not None and t.target.block >= blocks), None)
    if beyond is not None:
        raise CheckpointError(f"{where}: there is {beyond}, and vision_config has {blocks} blocks",
                              "config.json and the weights belong to different models")  # fmt: skip
    square = next((t.name for t in tensors if ".ffn_down." in t.name and len(set(t.shape)) < len(t.shape)), None)
    if square is not None and tower.projector in SWAPPED_IF_SQUARE:
        raise ArchitectureError(
            f"{where}: {square} is as wide as the tower, and llama.cpp takes such up and down projections for swapped",
            "llama.cpp cannot run this variant of the model",
        )
    order = {place: index for index, place in enumerate((*tower.outside.values(), *tower.inside.values()))}
    tensors.sort(key=lambda t: (-1 if t.target.block is None else t.target.block, order.get(t.target.place, 99)))
    return tensors, [f"left out ({count} tensors): {what}" for what, count in beside.items()]


def _language_model(model_type: str, where: str) -> str:
    if model_type in MODEL_TYPES:
        return f"the language model; lowbit quantize {shlex.quote(where)} -o model.gguf --scheme Q4_K_M writes it"
    return "the language model, which llama.cpp has in a file of its own"


def _parts(
    checkpoint: Checkpoint, architecture: Architecture, name: str, target: TowerTarget, facts: TowerConfig, where: str
) -> list[TowerTensor]:
    """The tensors of the file that one Hugging Face tensor becomes."""
    shape, names, layout = checkpoint.tensors[name].shape, target.names, target.place.layout
    role = architecture.roles.get(name, "other")
    if layout is TowerLayout.FRAMES and target.suffix == "weight":
        if len(shape) != 5 or shape[2] != len(names):
            raise CheckpointError(f"{where}: {name} {list(shape)} is no convolution of {len(names)} frames")
        cut = (*shape[:2], *shape[3:])
        return [TowerTensor(each, cut, name, target, role, part, share=0.5) for part, each in enumerate(names)]
    if layout is TowerLayout.THIRDS:
        if shape[0] % 3:
            raise CheckpointError(f"{where}: {name} {list(shape)} is no q, k and v, one after the other")
        cut = (shape[0] // 3, *shape[1:])
        return [TowerTensor(each, cut, name, target, role, part, share=1 / 3) for part, each in enumerate(names)]
    if layout is TowerLayout.TOKEN:
        part = target.place.number or 0
        if part >= shape[0]:
            raise CheckpointError(f"{where}: {name} has {shape[0]} rows, and the token is number {part}")
        return [TowerTensor(names[0], shape[1:], name, target, role, part, share=1 / shape[0])]
    heads = 0
    if layout is TowerLayout.ROTARY:
        heads = int(facts.vision("num_attention_heads"))
        if not shape or shape[0] % (2 * heads):
            raise CheckpointError(f"{where}: {name} {list(shape)} is not {heads} heads of rotary pairs")
    return [TowerTensor(names[0], shape, name, target, role, heads=heads)]
