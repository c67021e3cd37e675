"""What an adapter changes, in the names of the architecture, whatever names PEFT saw when it trained.

    adapter                                            tensor of the architecture
    model.layers.0.self_attn.q_proj                    model.layers.0.self_attn.q_proj.weight
    model.language_model.layers.0.mlp.up_proj          language_model.model.layers.0.mlp.up_proj.weight   (by spelling)
    model.layers.0.mlp.experts, target_parameters      model.layers.0.mlp.experts.7.gate_proj.weight, … of all experts
        gate_up_proj [E, 2I, H]
    lm_head.weight, tied                               lm_head.weight of its own: the tie is undone

An adapter of the embedding or of the head of a model that ties the two changes one of them: PEFT applies it to that
module alone while it trains. So both are stored, and the tie is undone; but for `ensure_weight_tying`.

Refused: a base that is quantized, or a GGUF file; modules that the base does not have; matrices of other shapes than
the base's; experts whose matrices fit either way round.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch

from lowbit.architecture.cache import discover_once
from lowbit.architecture.merged import Change, MergedCheckpoint, Update
from lowbit.architecture.structure import Architecture
from lowbit.architecture.view import canonical_sources, canonical_view, find_renaming, holds_single_experts
from lowbit.checkpoint.adapter import Adapter, LowRank, open_adapter
from lowbit.checkpoint.base import Checkpoint, OpenOptions, TensorInfo, refuse_remote_code
from lowbit.checkpoint.companions import adapter_beside, adapter_kind, gather_companions, passed_over
from lowbit.errors import CheckpointError, UsageError

_OTHER_BASE = "the adapter was trained on another model: give the one that its adapter_config.json names"


@dataclass
class AdapterChanges:
    """What an adapter changes: tensor → change; rows that the vocabulary has now, None where it has what it had."""

    tensors: dict[str, Change] = field(default_factory=dict)
    vocabulary: int | None = None


def merge_adapter(checkpoint: Checkpoint, options: OpenOptions) -> Checkpoint:
    """The open base with the adapter of `options` merged; see `find_changes` for what is refused."""
    assert options.adapter is not None
    if checkpoint.kind not in ("safetensors", "pickle"):
        what = "is a GGUF file" if checkpoint.kind == "gguf" else f"holds quantized weights ({checkpoint.kind})"
        raise UsageError(f"{checkpoint.source} {what}, into which no adapter is merged",
                         "give the 16-bit model that it was made of, as a folder")  # fmt: skip
    adapter = open_adapter(options.adapter)
    config = checkpoint.config()
    refuse_remote_code(config, checkpoint.source, options)
    split = holds_single_experts(checkpoint)
    architecture = discover_once(config, str(checkpoint.folder), options.trust_remote_code, split)
    view = canonical_view(checkpoint, architecture)
    apart = discover_once(config, str(checkpoint.folder), options.trust_remote_code, True)
    changes = find_changes(adapter, architecture, apart)
    notes = [_summary(adapter, changes), *missed_training(adapter, architecture)]
    notes += _untie(view, adapter, architecture, changes)
    for name, change in changes.tensors.items():
        if change.source not in view.tensors:
            raise CheckpointError(f"{checkpoint.source}: there is no tensor {name}, which the adapter changes",
                                  "the files are incomplete")  # fmt: skip
    companions = tempfile.TemporaryDirectory(prefix="lowbit-merged-")
    merged_config = None if changes.vocabulary is None else _with_vocabulary(config, changes.vocabulary)
    merged = MergedCheckpoint(view, adapter, changes.tensors, companions, merged_config)
    given = gather_companions(checkpoint.folder, adapter.folder, merged.folder)
    if given and adapter.folder.resolve() != checkpoint.folder.resolve():
        notes.append(f"of the adapter's folder, not of the base's: {', '.join(given)}")
    if adapter.folder.resolve() != checkpoint.folder.resolve():
        notes += adapter_beside(checkpoint.folder, checkpoint.source)
    merged.notes += [*passed_over(checkpoint.folder), *notes]
    return merged


def find_changes(adapter: Adapter, architecture: Architecture, apart: Architecture) -> AdapterChanges:
    """Every tensor of the architecture that the adapter changes, with shapes checked.

    apart  the same model with its experts described one by one, which tells how a fused parameter holds them

    CheckpointError for a module that the architecture does not have, and for matrices that do not fit.
    """
    return _Finder(adapter, architecture, apart).found()


def missed_training(adapter: Adapter, architecture: Architecture) -> list[str]:
    """Notes on an adapter that was not trained, or of which a part is not in the file."""
    notes = []
    idle = [pair.module for pair in adapter.pairs if not bool(adapter.read(pair.b).any())]
    if idle:
        which = "all" if len(idle) == len(adapter.pairs) else f"{len(idle)} of {len(adapter.pairs)}"
        notes.append(f"{which} matrices B of the adapter are zeros, the first of {idle[0]}: they change nothing")
    saved = adapter.config.get("modules_to_save") or []
    for module in [saved] if isinstance(saved, str) else saved if isinstance(saved, list) else []:
        of_module = re.compile(rf"(^|\.){re.escape(str(module))}(\.|$)")
        if not any(map(of_module.search, adapter.replaced)) and any(map(of_module.search, architecture.parameters)):
            notes.append(f"adapter_config.json says that {module} was trained (modules_to_save), and the file has no "
                         "tensor of it: the base's stays")  # fmt: skip
    return notes


def _untie(view: Checkpoint, adapter: Adapter, architecture: Architecture, changes: AdapterChanges) -> list[str]:
    """Store both of two tied tensors where the adapter changes one; returns notes."""
    notes = []
    for alias, stored in architecture.tied.items():
        if alias in view.tensors or not {alias, stored} & changes.tensors.keys():
            continue
        change = changes.tensors.get(alias)
        if change is not None and change.source == alias:
            changes.tensors[alias] = replace(change, source=stored)
        elif change is None and not adapter.config.get("ensure_weight_tying"):
            if changes.vocabulary is not None:
                raise CheckpointError(
                    f"{adapter.source}: {stored} has {changes.vocabulary} rows, and {alias}, which the base ties to "
                    f"it, is not in the adapter",
                    "save the adapter with save_embedding_layers=True",
                )
            changes.tensors[alias] = Change(stored)
            notes.append(f"the adapter changes {stored} and not {alias}, which the base ties to it: the tie is undone")
    return notes


def _with_vocabulary(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """config.json with another vocab_size, wherever it stands."""
    text = config.get("text_config")
    changed = config | ({"vocab_size": rows} if "vocab_size" in config or not isinstance(text, dict) else {})
    return changed | ({"text_config": _with_vocabulary(text, rows)} if isinstance(text, dict) else {})


def _summary(adapter: Adapter, changes: AdapterChanges) -> str:
    """ "merged: a LoRA adapter of org/base (FOLDER), into 28 tensors; 1 more is the adapter's own" """
    computed = sum(change.computes for change in changes.tensors.values())
    own = sum(change.replaced is not None for change in changes.tensors.values())
    said = f"merged: {adapter_kind(adapter.folder)} ({adapter.source}), into {computed} tensors"
    said += f"; {own} {'is' if own == 1 else 'are'} the adapter's own" if own else ""
    return said + (f"; the vocabulary has {changes.vocabulary} tokens" if changes.vocabulary is not None else "")


class _Finder:
    def __init__(self, adapter: Adapter, architecture: Architecture, apart: Architecture):
        self.adapter, self.architecture, self.apart = adapter, architecture, apart
        self.changes: dict[str, Change] = {}
        self.vocabulary: int | None = None  # rows of an embedding or a head that has not the base's, and those before
        self.before: int | None = None
        wanted = [*adapter.replaced, *(f"{pair.module}.weight" for pair in adapter.pairs)]
        self.renamed, _ = find_renaming(wanted, architecture)

    def found(self) -> AdapterChanges:
        for parameter, name in self.adapter.replaced.items():
            self._replace(parameter, name)
        for pair in self.adapter.pairs:
            self._add(pair)
        if self.vocabulary is not None:
            self._refuse_half_a_vocabulary()
        return AdapterChanges(self.changes, self.vocabulary)

    def _refuse_half_a_vocabulary(self) -> None:
        """A head of other rows goes with an embedding of as many; `_untie` sees to one that is tied to it."""
        for name, shape in self.architecture.parameters.items():
            if shape[0] == self.before and name not in self.changes and self._is_of_vocabulary(name):
                raise CheckpointError(
                    f"{self.adapter.source}: its tokens are {self.vocabulary}, and {name}, which has {self.before} "
                    f"rows, is not in the adapter",
                    "save the adapter with save_embedding_layers=True",
                )

    def _is_of_vocabulary(self, name: str) -> bool:
        """True for an embedding, or a linear outside the blocks, such as the head."""
        stored = self.architecture.tied.get(name, name)
        linear = self.architecture.linears.get(stored.removesuffix(".weight"))
        return self.architecture.roles.get(stored) == "embedding" or (linear is not None and linear.block is None)

    def _replace(self, parameter: str, name: str) -> None:
        info = self.adapter.tensors[name]
        self.adapter.read(name)
        for canonical, source in self._sources(parameter, info.shape):
            if source.part is not None or canonical not in self._known:
                self._refuse(f"{name} is no tensor of {self.architecture.class_name}")
            shape = self._shape(canonical)
            if info.shape != shape and not self._resizes(canonical, info.shape, shape):
                self._refuse(f"{name} has shape {list(info.shape)}, the base {list(shape)}")
            self._change(canonical, replaced=name)

    def _resizes(self, name: str, now: tuple[int, ...], before: tuple[int, ...]) -> bool:
        """True for an embedding or a head of another vocabulary; both must have the same."""
        if not self._is_of_vocabulary(name) or len(now) != 2 or now[1:] != before[1:]:
            return False
        if self.vocabulary not in (None, now[0]):
            self._refuse(f"{name} has {now[0]} rows, another tensor of the vocabulary {self.vocabulary}")
        self.vocabulary, self.before = now[0], before[0]
        return True

    def _add(self, pair: LowRank) -> None:
        a, b = self.adapter.tensors[pair.a].shape, self.adapter.tensors[pair.b].shape
        weight = f"{pair.module}.weight"
        shape = (a[1], b[0]) if pair.embedding else (b[0], a[1])
        sources = list(self._sources(weight, shape))
        if not all(canonical in self._known for canonical, _ in sources):
            self._add_to_parameter(pair)
            return
        scale = self.adapter.scale(pair, pair.module)
        for canonical, source in sources:
            linear = self.architecture.linears.get(canonical.removesuffix(".weight"))
            turned = pair.embedding or (linear is not None and linear.transposed)
            there = self._shape(canonical) if source.part is None else shape
            fits = shape if pair.embedding or not turned else shape[::-1]
            if tuple(there) != fits:
                self._refuse(f"{pair.a} {list(a)} and {pair.b} {list(b)} do not fit {canonical} {list(there)}")
            self._change(canonical, Update(pair, scale, turned, part=source.part), pair.magnitude)
        if pair.magnitude is not None and self.adapter.read(pair.magnitude).numel() != b[0]:
            self._refuse(f"{pair.magnitude} has shape {list(self.adapter.tensors[pair.magnitude].shape)}; [{b[0]}] is "
                         "needed")  # fmt: skip
        if pair.magnitude is not None and any(source.part is not None for _, source in sources):
            self._refuse(f"{pair.module}: DoRA of a module that files hold in several tensors is not merged")
        if pair.bias is not None:
            self._shift(pair, f"{sources[0][0].removesuffix('.weight')}.bias", scale)

    def _shift(self, pair: LowRank, bias: str, scale: float) -> None:
        assert pair.bias is not None
        if bias not in self.architecture.parameters:
            self._refuse(f"{pair.bias} would be added to a bias that {self.architecture.class_name} does not have")
        if self.adapter.read(pair.bias).shape != self._shape(bias):
            self._refuse(f"{pair.bias} does not fit {bias} {list(self._shape(bias))}")
        self.changes[bias] = replace(self.changes.get(bias, Change(bias)), shift=(pair.bias, scale))

    def _add_to_parameter(self, pair: LowRank) -> None:
        """Add to a parameter that is no module's weight (`target_parameters`): the experts of a block."""
        fitting = []
        for parameter in self._targeted(pair.module):
            named = self.renamed.get(f"{pair.module}.weight", f"{pair.module}.weight").removesuffix(".weight")
            name = f"{named}.{parameter.rpartition('.')[2]}"
            placement = self.architecture.layout.get(name)
            shape = self.architecture.parameters.get(name) if placement is None else placement.shape
            if shape is None:
                continue
            a, b = self.adapter.tensors[pair.a].shape, self.adapter.tensors[pair.b].shape
            straight = (b[0], a[1]) == shape[-2:]
            if len(shape) in (2, 3) and (straight or (len(shape) == 3 and (a[1], b[0]) == shape[-2:])):
                fitting.append((parameter, name, shape, straight))
        if len(fitting) != 1:
            listed = ", ".join(each[0] for each in fitting)
            self._refuse(f"{pair.a} could belong to {listed}" if fitting else
                         f"{pair.module} is no module of {self.architecture.class_name}")  # fmt: skip
        parameter, name, shape, straight = fitting[0]
        if len(shape) == 3 and shape[-1] == shape[-2]:
            # PEFT has saved [E, out, in] either way round, and [E, in, out] always in this one
            placed = self.apart.layout.get(name)
            if placed is None or not all(part.transposed for part in placed.parts):
                self._refuse(f"{pair.a} fits {name} {list(shape)} either way round, and versions of PEFT differ in it")
            straight = False
        if pair.magnitude is not None or pair.bias is not None:
            self._refuse(f"{pair.module}: DoRA and biases of a bare parameter are not merged")
        experts = shape[0] if len(shape) == 3 else 1
        update = Update(pair, self.adapter.scale(pair, parameter, experts), not straight, experts)
        if name in self.architecture.parameters:
            self._change(name, update)
            return
        for canonical, part, expert in self.architecture.layout[name].pieces():
            self._change(canonical, replace(update, expert=expert, part=part))

    def _targeted(self, module: str) -> list[str]:
        """The parameters of a module that adapter_config.json targets."""
        targets = self.adapter.config.get("target_parameters") or []
        targets = [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else []
        named = [f"{module}.{target.rpartition('.')[2]}" for target in targets
                 if f".{module}.{target.rpartition('.')[2]}".endswith(f".{target}")]  # fmt: skip
        return list(dict.fromkeys(named))

    def _change(self, name: str, update: Update | None = None, magnitude: str | None = None,
                replaced: str | None = None) -> None:  # fmt: skip
        change = self.changes.get(name, Change(name))
        if magnitude is not None or (change.magnitude is not None and update is not None):
            if change.updates:
                self._refuse(f"{name} is changed twice, once with DoRA")
            change = replace(change, magnitude=magnitude)
        if update is not None:
            for each in (update.pair.a, update.pair.b):
                self.adapter.read(each)
            change = replace(change, updates=(*change.updates, update))
        self.changes[name] = change if replaced is None else replace(change, replaced=replaced)

    def _sources(self, parameter: str, shape: tuple[int, ...]):
        """(canonical name, source) of everything that a parameter of the model PEFT trained is stored as."""
        name = self.renamed.get(parameter, parameter)
        info = TensorInfo(name, shape, torch.float32, "F32", 0, self.adapter.folder)
        return canonical_sources(name, info, self.architecture)

    @property
    def _known(self) -> set[str]:
        return self.architecture.parameters.keys() | self.architecture.tied.keys()

    def _shape(self, name: str) -> tuple[int, ...]:
        change = self.changes.get(name)
        if change is not None and change.replaced is not None:
            return self.adapter.tensors[change.replaced].shape
        return tuple(self.architecture.parameters[self.architecture.tied.get(name, name)])

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.adapter.source}: {what}", _OTHER_BASE)
