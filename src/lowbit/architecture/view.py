"""A checkpoint under the names and shapes of its architecture, whatever its files call things.

    file                                          canonical
    model.layers.0.mlp.experts.gate_up_proj       model.layers.0.mlp.experts.7.gate_proj.weight, … .up_proj.weight
        [E, 2I, H], as transformers 5 keeps it        [I, H] each
    model.language_model.layers.0.…               model.layers.0.…   (Qwen2.5-VL; Gemma 3: language_model.model.…)
    h.0.attn.c_attn.weight                        transformer.h.0.attn.c_attn.weight   (GPT-2, BLOOM)
    _orig_mod.model.layers.0.…                    model.layers.0.…   (prefixes of any kind)

Nothing is read before it is asked for: rows of a part of a fused tensor are cut from the mapped file. A tensor that the
architecture does not know keeps its name.

gpt-oss is different: its 16-bit files hold the experts as one tensor [E, H, 2I] with gate and up in alternating
columns, and transformers 5.23 and vLLM 0.32 read 16-bit experts in no other form. transformers has no rule that merges
them; vLLM's `_load_weights_other` (models/gpt_oss.py) passes over every name that it has no parameter for, in silence,
so that quantized experts under names of their own would leave the model without experts. So this architecture keeps
them as they are, unless it was discovered with `split_experts`, for formats that write them fused again
(lowbit.export.fused_experts): then they appear as `mlp.experts.E.gate_proj`, `up_proj` and `down_proj`, [N, K], gate
and up apart, with their biases. lowbit itself loads both forms.

Refused: a fused tensor of another shape than transformers' parameter, and a file that holds a weight twice, under two
spellings.

Prefixes of stored names: what a wrapper put in front of every name, or a base model left out.

    base_model.model.model.layers.0.…     state_dict() of a PEFT model
    _orig_mod.model.layers.0.…            of a compiled one; also inside a name: model._orig_mod.layers.0.…
    module.model.layers.0.…               of DataParallel
    layers.0.…                            of a base model class: transformers adds `model.` when it loads

A prefix is whatever makes the names those of the architecture; no list of prefixes and no model type is needed, but for
the wrappers that stand inside names.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowbit.architecture.structure import Architecture, Part
from lowbit.checkpoint.base import Checkpoint, CheckpointView, TensorInfo, find_tensor, row_range
from lowbit.errors import CheckpointError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Changes:
    """What a view changes beside names.

    config  stands for config.json; None: as it is
    copied  tied name → the name that it is stored under: it becomes a tensor of its own
    """

    left_out: frozenset[str] = frozenset()
    config: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    copied: dict[str, str] = field(default_factory=dict)


def canonical_view(checkpoint: Checkpoint, architecture: Architecture, changes: Changes | None = None) -> Checkpoint:
    """The checkpoint under the architecture's names; the same object if it has these names already."""
    changes = changes or Changes()
    renamed, notes = find_renaming(checkpoint.tensors, architecture)
    sources: dict[str, CanonicalSource] = {}
    for name, info in checkpoint.tensors.items():
        for canonical, source in canonical_sources(renamed.get(name, name), info, architecture):
            if canonical in changes.left_out:
                continue
            if canonical in sources:
                raise CheckpointError(
                    f"{info.file}: {canonical} is there twice, as {sources[canonical].name} and as {name}",
                    "remove one of them, or save the model anew with save_pretrained",
                )
            sources[canonical] = source
    for alias, stored in architecture.tied.items():  # a tied tensor may be stored under either name
        if alias in sources and stored not in sources:
            sources[stored] = sources.pop(alias)
    sources |= {alias: sources[stored] for alias, stored in changes.copied.items()}
    wide = any(info.dtype is torch.float64 for info in checkpoint.tensors.values())
    same = all(name == source.name and source.part is None for name, source in sources.items())
    if same and not wide and changes == Changes():
        return checkpoint
    changes = replace(changes, notes=(*notes, *changes.notes))
    return _View(checkpoint, sources, changes)


# Granite names them by a number alone: block_sparse_moe.0.gate_proj.
_FIRST_EXPERT = re.compile(r"\.experts\.0\.|(?<!\.layers)\.0\.gate_proj\.")


def holds_single_experts(checkpoint: Checkpoint) -> bool:
    """True if every expert has its own tensors: the value of `split_experts` for these files."""
    return any(_FIRST_EXPERT.search(name) for name in checkpoint.tensors)


@dataclass(frozen=True)
class CanonicalSource:
    """The source of a canonical tensor: a stored tensor, or a part of it (of one expert)."""

    name: str
    part: Part | None = None
    expert: int | None = None


def canonical_sources(name: str, info: TensorInfo, architecture: Architecture) -> Iterator[tuple[str, CanonicalSource]]:
    """(canonical name, source) of everything in a stored tensor; `name` is its name without prefixes."""
    name = _spelled(name, architecture)
    parameter = architecture.parameters.get(name)
    if parameter is not None or name in architecture.tied:
        turned = parameter is not None and len(parameter) == 3 and _is_turned(info, parameter)
        yield name, CanonicalSource(info.name, Part(name, transposed=True) if turned else None)
        return
    fused = architecture.fused_tensors.get(name)
    if fused is None or not fused.parts or any(part.total is not None for part in fused.parts):
        yield name, CanonicalSource(info.name)
    elif all(part.whole and not part.transposed for part in fused.parts):
        yield fused.parts[0].name, CanonicalSource(info.name)
    else:
        # transformers transposes fused experts by their shape (`Transpose` with check_dims), so files have both
        if _is_turned(info, fused.shape):
            fused = fused.turned()
        if tuple(info.shape) != fused.shape:
            raise CheckpointError(
                f"{info.file}: {name} has shape {list(info.shape)}; the experts of this model, fused, are "
                f"{list(fused.shape)}",
                "convert it with the program that wrote it, so that every expert has its own matrices",
            )
        for canonical, part, expert in fused.pieces():
            yield canonical, CanonicalSource(info.name, part, expert)


def _spelled(name: str, architecture: Architecture) -> str:
    """The name as the architecture spells it."""

    def is_known(each: str) -> bool:
        placed = each in architecture.fused_tensors
        return placed or each in architecture.parameters or each in architecture.tied

    if is_known(name):
        return name
    fitting = [(prefix, spelled) for prefix, spelled in architecture.spellings if name.startswith(prefix)]
    others = (spelled + name.removeprefix(prefix) for prefix, spelled in fitting)
    return architecture.saved_names.get(name) or next((other for other in others if is_known(other)), name)


def _is_turned(info: TensorInfo, shape: tuple[int, ...]) -> bool:
    """True for a 3-D tensor of another shape that has its last two dimensions the other way round."""
    return tuple(info.shape) != tuple(shape) and tuple(info.shape) == (*shape[:-2], shape[-1], shape[-2])


class _View(CheckpointView):
    """See the module docstring; `tensors` are the canonical ones. float64 is read as float32."""

    def __init__(self, stored: Checkpoint, sources: dict[str, CanonicalSource], changes: Changes):
        super().__init__(stored)
        self.sources, self._config = sources, changes.config
        self.notes = [*stored.notes, *changes.notes]
        self.tensors = {}
        for name, source in sources.items():
            info = stored.tensors[source.name]
            if source.part is not None:
                if source.name in stored.schemes:
                    raise CheckpointError(
                        f"{stored.source}: {source.name} holds the codes of several experts in one tensor, which are "
                        "not read",
                        "start from the 16-bit checkpoint",
                    )
                shape = source.part.shape_in(tuple(info.shape))
                info = replace(info, shape=shape, nbytes=math.prod(shape) * info.dtype.itemsize)
            dtype = torch.float32 if info.dtype is torch.float64 else info.dtype
            same = info.name == name and info.dtype is dtype
            self.tensors[name] = info if same else replace(info, name=name, dtype=dtype)
        self._names = {source.name: name for name, source in sources.items() if source.part is None}
        self.schemes = self._renamed(stored.schemes)
        self.rotations = self._renamed(stored.rotations)

    def _renamed(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What a name in the files has, under the name here."""
        return {self._names[name]: value for name, value in values.items() if name in self._names}

    def config(self) -> dict[str, Any]:
        return self.stored.config() if self._config is None else self._config

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        source = self._source(name)
        if source.part is None:
            return self.stored.read(source.name, start, stop).to(self.tensors[name].dtype)
        start, stop, _ = row_range(self.tensors[name], start, stop)
        values = self.stored.read(
            source.name, *((source.expert, source.expert + 1) if source.expert is not None else ())
        )
        values = values[0] if source.expert is not None else values
        return source.part.of(values)[start:stop].contiguous().to(self.tensors[name].dtype)

    def _stored_name(self, name: str) -> str:
        return self._source(name).name

    def _source(self, name: str) -> CanonicalSource:
        find_tensor(self.tensors, name, self.source)
        return self.sources[name]

    @property
    def input_scales(self) -> dict[str, float]:
        return self._renamed(self.stored.input_scales)

    @property
    def input_zero_points(self) -> dict[str, int]:
        return self._renamed(self.stored.input_zero_points)

    def says_quantized(self, linear: str) -> bool:
        source = self.sources.get(f"{linear}.weight")
        return self.stored.says_quantized(linear if source is None else source.name.removesuffix(".weight"))


# Modules that wrap another one under its place: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def find_renaming(names: Iterable[str], architecture: Architecture) -> tuple[dict[str, str], list[str]]:
    """(stored name → name without wrappers and with the architecture's beginning, of those that differ; notes)."""
    names, known = list(names), _spellings(architecture)
    unwrapped = {name: _WRAPPERS.sub("", name) for name in names}
    wrapper = next(filter(None, map(_WRAPPERS.search, names)), None)
    notes = [] if wrapper is None else [f"{wrapper[0]!r} in the names of tensors was dropped"]
    if not any(known.get(name) for name in unwrapped.values()):
        dropped = _prefix_before(unwrapped.values(), known)
        added = _prefix_left_out(unwrapped.values(), known, architecture)
        if dropped:
            unwrapped = {name: inner.removeprefix(dropped) for name, inner in unwrapped.items()}
            notes.append(f"{dropped!r} at the beginning of the names of tensors was dropped")
        elif added:
            unwrapped = {name: inner if inner in known else added + inner for name, inner in unwrapped.items()}
            notes.append(f"names of tensors lack {added!r} at the beginning, as a base model class saves them")
    return {name: inner for name, inner in unwrapped.items() if name != inner}, notes


def _spellings(architecture: Architecture) -> dict[str, bool]:
    """Every name that a tensor of the architecture may have in files (its own, transformers', the family's other
    spellings of it) → whether it is in a decoder block."""
    known = {name: architecture.block_of(name) is not None for name in (*architecture.parameters, *architecture.tied)}
    for name, placement in architecture.layout.items():
        known.setdefault(name, any(architecture.block_of(part.name) is not None for part in placement.parts))
    known |= {saved: known[name] for saved, name in architecture.saved_names.items() if name in known}
    for found, canonical in architecture.spellings:
        others = {found + name.removeprefix(canonical): known[name] for name in known if name.startswith(canonical)}
        known = others | known
    return known


def _prefix_before(found: Iterable[str], known: Container[str]) -> str:
    """What stands before known names, the same for most of them; empty where nothing does."""
    prefixes: Counter[str] = Counter()
    for name in found:
        places = [at + 1 for at, character in enumerate(name) if character == "." and name[at + 1 :] in known]
        prefixes.update(name[:at] for at in places)
    return max(prefixes, key=lambda prefix: (prefixes[prefix], -len(prefix)), default="")


def _prefix_left_out(found: Iterable[str], known: Container[str], architecture: Architecture) -> str:
    """The beginning of the architecture's names that makes stored ones known; empty where none does."""
    parts = architecture.blocks[0].split(".")[:-2]
    beginnings = [".".join(parts[:count]) + "." for count in range(len(parts), 0, -1)]
    return next((start for start in beginnings if any(start + name in known for name in found)), "")
