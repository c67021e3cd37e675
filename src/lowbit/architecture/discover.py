"""Discovery of an architecture: transformers builds the model without weights, its own rules give the names in files,
and one run on a few tokens (`trace`, `perturb`) shows what its linears read.

    config.json ──build──► modules, shapes ──disk_layout──► names of the hub
                                │
                                └──trace──► order of linears, inputs they share, what feeds an input
                                                                    ──► Architecture

No table of model types is needed: `families` has what a model cannot tell of itself. Where the run ends early (a model
that computes on images only) linears are known without their inputs; they can be rounded to nearest.

Refused: what transformers cannot build, a model without a list of decoder blocks, and blocks with a parameter that
transformers makes of the files' tensors in a way that lowbit does not know.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.architecture.blocks import find_blocks
from lowbit.architecture.building import build_without_weights
from lowbit.architecture.disk_layout import disk_layout, saved_names
from lowbit.architecture.families import COMMON_SPELLINGS, family_of
from lowbit.architecture.feeding import Feed
from lowbit.architecture.perturb import gate_passes, look_at_block, norm_kind
from lowbit.architecture.quantized_loading import cut_weights, has_no_forward, initialization_reads, replaced_experts
from lowbit.architecture.roles import ROUTER, fused_names, input_name, role_of, why_kept
from lowbit.architecture.structure import Architecture, Linear, Part, Placement
from lowbit.architecture.trace import BlockTrace, is_experts, is_linear, trace_blocks
from lowbit.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def discover(
    config: dict[str, Any], folder: str, trust_remote_code: bool = False, split_experts: bool = False,
    own_names: bool = False,
) -> Architecture:  # fmt: skip
    """The architecture of a model, from its parsed config.json; `folder` holds it (for remote code only).

    split_experts  describe experts that this model's files store as one tensor expert by expert
    own_names      under the names of transformers' modules (`disk_layout`)

    Raises ArchitectureError for what the module docstring refuses.
    """
    model = build_without_weights(config, folder, trust_remote_code, torch.float32, eager=True)
    return describe(model, split_experts, own_names)


def describe(model: PreTrainedModel, split_experts: bool = False, own_names: bool = False) -> Architecture:
    """Roles of everything that a model's files store; parameters of `model` are on the meta device."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    paths = find_blocks(model)
    layout = disk_layout(model, split_experts)
    if own_names:
        on_hub, layout = layout, disk_layout(model, split_experts, own_names=True)
        own_names = layout != on_hub
    stored = _stored(modules, layout)
    names = _stored_blocks(paths, layout, modules, type(model).__name__)
    heads = query_heads(model.config)
    decoder = decoder_of(model, paths[0])
    traces, outputs, untraced = trace_blocks(model, decoder, paths, lambda name, run: look_at_block(max(heads, 1), run))
    linears: dict[str, Linear] = {}
    inside = _by_block(paths, stored)
    for index, (path, name) in enumerate(zip(paths, names, strict=True)):
        block = _Block(index, path, name, traces.get(path), modules, inside[path])
        linears.update((linear.name, linear) for linear in block.linears())
    for name, tensor in stored.items():
        owner = name.removesuffix(".weight")
        if name.endswith(".weight") and owner not in linears and is_linear(modules.get(tensor.path)):
            if any(name.startswith(f"{block}.") for block in names):
                continue
            leaf, has_bias = owner.rsplit(".", 1)[-1], f"{owner}.bias" in stored
            linears[owner] = Linear(owner, leaf, (tensor.shape[0], tensor.shape[1]), has_bias=has_bias)
    tied = _tied(model, layout)
    parameters = {name: tensor.shape for name, tensor in stored.items() if name not in tied}
    roles = {name: _role(name, stored[name], linears, modules) for name in parameters}
    owners = [
        stored[f"{each.name}.weight"].path for each in linears.values() if each.keep is None and each.block is not None
    ]
    return Architecture(
        model.config.model_type, type(model).__name__, names, linears, parameters, tied, roles,
        {name: place for name, place in layout.items() if place.parts != (Part(name),)},
        (*family_of(model.config.model_type).spellings, *COMMON_SPELLINGS),
        int(getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0),
        (*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_unknown_towers(layout, names[0])),
        _norms(modules, decoder, stored), untraced, outputs, heads,
        {} if own_names else saved_names(model, layout, split_experts),
        type(model).__name__ if has_no_forward(model)
        else initialization_reads(model, [path for path in owners if isinstance(modules[path], nn.Linear)]),
        replaced_experts(module for module in modules.values() if is_experts(module)),
        cut_weights(model), own_names,
    )  # fmt: skip


def query_heads(config: Any) -> int:
    """Query heads of a transformers config; of the first layer where layers differ, 0 where it states none."""
    text = config.get_text_config(decoder=True)
    try:
        heads = text.num_attention_heads
    except AttributeError:
        return 0
    except Exception:  # AmbiguousGlobalPerLayerAttributeError, which transformers does not export
        heads = text.per_layer_config[0].num_attention_heads
    return heads if isinstance(heads, int) and heads > 0 else 0


def decoder_of(model: PreTrainedModel, block: str) -> str:
    """Name of the innermost module around a block that runs on token ids."""
    name = block
    while name:
        name = name.rpartition(".")[0]
        if "input_ids" in inspect.signature(model.get_submodule(name).forward).parameters:
            break
    return name


@dataclass(frozen=True)
class _Stored:
    """One stored tensor: its shape, the number of its expert, the module that holds it in transformers, and the
    parameter."""

    shape: tuple[int, ...]
    expert: int | None
    path: str
    parameter: str


def _stored(modules: dict[str, nn.Module], layout: dict[str, Placement]) -> dict[str, _Stored]:
    """Stored tensor → what is known of it; of one with rows of several parameters, by the first."""
    found: dict[str, _Stored] = {}
    for parameter, placement in layout.items():
        for name, part, expert in placement.pieces():
            if name not in found:
                number = None if expert is None else part.first + expert
                found[name] = _Stored(part.shape_in(placement.shape), number, parameter.rpartition(".")[0], parameter)
    return found


def _by_block(paths: list[str], stored: dict[str, _Stored]) -> dict[str, dict[str, _Stored]]:
    """Block → its stored tensors."""
    stem = paths[0].rpartition(".")[0] + "."
    found: dict[str, dict[str, _Stored]] = {path: {} for path in paths}
    for name, tensor in stored.items():
        if tensor.path.startswith(stem):
            found[stem + tensor.path[len(stem) :].partition(".")[0]][name] = tensor
    return found


def _stored_blocks(
    paths: list[str], layout: dict[str, Placement], modules: dict[str, nn.Module], model: str
) -> tuple[str, ...]:
    """The names of the blocks in files."""
    names = []
    inside: dict[str, list[tuple[str, Placement]]] = {path: [] for path in paths}
    stem = paths[0].rpartition(".")[0] + "."
    for parameter, placement in layout.items():
        if parameter.startswith(stem):
            inside[stem + parameter[len(stem) :].partition(".")[0]].append((parameter, placement))
    for index, path in enumerate(paths):
        for parameter, placement in inside[path]:
            module = modules[parameter.rpartition(".")[0]]
            if not placement.parts and (is_linear(module) or is_experts(module)):
                raise ArchitectureError(
                    f"{model}: transformers makes {parameter} of the files' tensors in a way that lowbit does not know",
                    "the model is newer than lowbit, or transformers lays it out anew; please report it",
                )
        parts = [placement.parts[0].name for _, placement in inside[path] if placement.parts]
        found = next((match for name in parts if (match := re.match(rf"(.*?)\.{index}(?=\.)", name))), None)
        if found is None:
            raise ArchitectureError(f"{model}: the files hold no tensor of {path}")
        names.append(found[0])
    return tuple(names)


class _Block:
    """The linears of one decoder block.

    index, path, name   its number, its module in transformers, its name in files
    stored              its tensors
    trace               None where it did not run
    """

    def __init__(
        self, index: int, path: str, name: str, trace: BlockTrace | None, modules: dict[str, nn.Module],
        stored: dict[str, _Stored],
    ):  # fmt: skip
        self.index, self.path, self.name, self.modules = index, path, name, modules
        self.trace = trace or BlockTrace()
        self.stored = stored
        self.files: dict[str, str] = {}  # module in transformers, relative → stored name of its weight less ".weight"
        self.gate_up: dict[int, list[str]] = {}  # expert → its matrices in gate_up_proj
        self.experts: str | None = None  # module of the experts
        for each, tensor in self.stored.items():
            owner = each.removesuffix(".weight")
            if tensor.expert is None and tensor.parameter.endswith(".weight"):
                self.files.setdefault(tensor.path.removeprefix(f"{path}."), owner)
            elif tensor.expert is not None and tensor.parameter.endswith(".gate_up_proj"):
                self.gate_up.setdefault(tensor.expert, []).append(owner)
                self.experts = tensor.path
        self.passes_gate = self.experts is not None and gate_passes(modules[self.experts])

    def linears(self) -> list[Linear]:
        """In the order of computation, experts after the others, each expert's together."""
        rank = {path: place for place, path in enumerate(self.trace.order)}
        experts = len({tensor.expert for tensor in self.stored.values()} - {None})
        found: list[tuple[tuple[int, int, int], Linear]] = []
        for place, (name, tensor) in enumerate(self.stored.items()):
            module, path = self.modules[tensor.path], tensor.path.removeprefix(f"{self.path}.")
            if not name.endswith(".weight") or len(tensor.shape) != 2:
                continue
            if not (is_linear(module) or tensor.expert is not None or path in self.trace.routers):
                continue
            own = rank.get(path, len(rank))
            order = (-1, own, place) if tensor.expert is None else (tensor.expert, own, place)
            found.append((order, self._linear(name.removesuffix(".weight"), tensor, module, path, experts)))
        linears = [linear for _, linear in sorted(found, key=lambda pair: pair[0])]
        return self._fused(self._with_inputs(linears))

    def _linear(self, name: str, tensor: _Stored, module: nn.Module, path: str, experts: int) -> Linear:
        from transformers.pytorch_utils import Conv1D

        transposed = isinstance(module, Conv1D)
        rows, columns = tensor.shape[::-1] if transposed else tensor.shape
        within = name.removeprefix(f"{self.name}.")
        keep = ROUTER if path in self.trace.routers else why_kept(within, rows, columns, experts)
        return Linear(
            name, "router" if keep == ROUTER else role_of(within), (rows, columns), self.index,
            has_bias=f"{name}.bias" in self.stored, transposed=transposed, expert=tensor.expert, keep=keep,
        )  # fmt: skip

    def _with_inputs(self, linears: list[Linear]) -> list[Linear]:
        """Names of the inputs, and what feeds them."""
        names: dict[int, str] = {}
        taken: set[str] = set()
        found = []
        for linear in linears:
            if linear.expert is not None:
                found.append(self._of_expert(linear))
                continue
            path = self.stored[f"{linear.name}.weight"].path.removeprefix(f"{self.path}.")
            number = self.trace.inputs.get(path)
            within = linear.name.removeprefix(f"{self.name}.")
            if number is None:  # it did not run: an input of its own
                found.append(replace(linear, reads=f"{self.name}.{within}.input"))
                continue
            if number not in names:
                names[number] = input_name(within, linear.role, taken)
                taken.add(names[number])
            feed = self.trace.feeds.get(number)
            fed_by, rows = (None, None) if feed is None else (self._feeder(feed), feed.rows)
            found.append(
                replace(linear, reads=f"{self.name}.{names[number]}", fed_by=fed_by, fed_rows=rows if fed_by else None)
            )
        return found

    def _of_expert(self, linear: Linear) -> Linear:
        """An expert reads the tokens that are routed to it, so its inputs are its own."""
        tensor = self.stored[f"{linear.name}.weight"]
        experts = linear.name.rpartition(f".{linear.expert}.")[0]
        own = f"{experts}.{linear.expert}"
        if not tensor.parameter.endswith(".down_proj"):
            number = self.trace.inputs.get(tensor.path.removeprefix(f"{self.path}."))
            feed = self.trace.feeds.get(number) if number is not None else None
            fed_by, rows = (None, None) if feed is None else (self._feeder(feed), feed.rows)
            return replace(linear, reads=f"{own}.input", fed_by=fed_by, fed_rows=rows)
        if not self.passes_gate:
            return replace(linear, reads=f"{own}.hidden")
        return replace(linear, reads=f"{own}.hidden", fed_by=self.gate_up[linear.expert or 0][1], fed_rows="all")

    def _feeder(self, feed: Feed) -> str | None:
        """The feeder's name in files; None where files have it in several tensors."""
        return self.files.get(feed.module)

    def _fused(self, linears: list[Linear]) -> list[Linear]:
        """With the sets that engines fuse: linears of one module that read one input."""
        groups: dict[tuple[str, str | None], dict[str, Linear]] = {}
        for linear in linears:
            owner, _, leaf = linear.name.rpartition(".")
            groups.setdefault((owner, linear.reads if self.trace.inputs else None), {})[leaf] = linear
        sets = {
            members[leaf].name: f"{owner}.{name}"
            for (owner, _), members in groups.items()
            for leaf, name in fused_names(members).items()
        }
        return [replace(linear, fused=sets.get(linear.name)) for linear in linears]


def _unknown_towers(layout: dict[str, Placement], blocks: str) -> list[str]:
    """Patterns of tensors outside the blocks that transformers makes in ways that are not known; files and
    transformers may call such a module differently."""

    def tower(name: str) -> str:
        return name.removeprefix("model.").partition(".")[0]

    unknown = {tower(parameter) for parameter, placement in layout.items() if not placement.parts}
    stored = {tower(part.name) for parameter, placement in layout.items() if tower(parameter) in unknown
              for part in placement.parts}  # fmt: skip
    return [rf"(^|\.){re.escape(each)}\." for each in sorted((unknown | stored) - {tower(blocks)})]


def _tied(model: PreTrainedModel, layout: dict[str, Placement]) -> dict[str, str]:
    """Parameters that share memory with another, by the model's own declaration, under their stored names."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        alias: stored
        for name, source in tied.items()
        if name in layout and source in layout
        for (alias, _, _), (stored, _, _) in zip(layout[name].pieces(), layout[source].pieces(), strict=False)
    }


def _role(name: str, tensor: _Stored, linears: dict[str, Linear], modules: dict[str, nn.Module]) -> str:
    owner, _, leaf = name.rpartition(".")
    module = modules.get(tensor.path)
    if tensor.expert is None and is_experts(module):
        return "experts"
    if leaf.endswith("bias"):
        return "bias"
    if owner in linears and leaf == "weight":
        return linears[owner].role
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "norm" in type(module).__name__.lower() and leaf != "num_batches_tracked":
        return "norm"
    return "convolution" if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else "other"


def _norms(modules: dict[str, nn.Module], decoder: str, stored: dict[str, _Stored]) -> dict[str, str]:
    """Norm of the decoder, under its stored name → what it computes."""
    kinds: dict[tuple[type, int], str | None] = {}
    found = {}
    for name, tensor in stored.items():
        module = modules.get(tensor.path)
        inside = not decoder or tensor.path.startswith(f"{decoder}.")
        if module is None or not inside or not name.endswith(".weight") or len(tensor.shape) != 1:
            continue
        key = (type(module), tensor.shape[0])
        if key not in kinds:
            kinds[key] = norm_kind(module, tensor.shape[0])
        kind = kinds[key]
        if kind is not None:
            found[name.removesuffix(".weight")] = kind
    return found
