"""`Architecture`, the roles of a model's tensors, and `Placement`, the stored tensors inside a transformers parameter.

An architecture describes the files: it uses the names of the hub, which vLLM expects too. transformers 5 renames and
fuses while it loads (vision-language models get other prefixes, the experts of a block become two 3-D parameters). A
`Placement` maps parts of a transformers parameter to stored tensors:

    parameter [E, 2I, H] "model.layers.0.mlp.experts.gate_up_proj"
        rows 0..I   of [e]   "model.layers.0.mlp.experts.{e}.gate_proj.weight"  [I, H]
        rows I..2I  of [e]   "model.layers.0.mlp.experts.{e}.up_proj.weight"    [I, H]
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# Old checkpoints store these; current classes compute them.
COMPUTED_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias)$")

# Blocks for multi-token prediction with names of their own (Qwen3-Next, MiMo).
_PREDICTION = re.compile(r"(^|\.)mtp(_layers|_block|_emb_norm|_hidden_norm|_linear_proj)?\.")


@dataclass(frozen=True)
class Linear:
    """One linear layer. `name` is its module in the files; its weight is `name + ".weight"`.

    shape       [out_features, in_features], also where the file stores the transpose
    reads, fused, fed_by   full names of its input, fused set and of the norm or linear that alone feeds the input:
                model.layers.3.attention_input, model.layers.3.self_attn.qkv_proj, model.layers.3.input_layernorm; None
                outside decoder blocks, and where there is none
    fed_rows    the rows of a linear `fed_by` that feed it (lowbit.architecture.feeding); "norm" of a norm
    transposed  the file stores the 16-bit weight as [in_features, out_features] (Conv1D of GPT-2)
    expert      number of its expert
    keep        why it always stays in 16 bits; None where it may be quantized
    """

    name: str
    role: str
    shape: tuple[int, int]
    block: int | None = None
    reads: str | None = None
    fused: str | None = None
    fed_by: str | None = None
    has_bias: bool = False
    transposed: bool = False
    expert: int | None = None
    keep: str | None = None
    fed_rows: str | None = None


@dataclass(frozen=True)
class Part:
    """One stored tensor inside a parameter, or one per expert if `name` contains "*".

    start, step, rows   rows start, start + step, … (`rows` of them) of the parameter, or of parameter[expert]
    transposed          the matrix (every matrix of a 3-D tensor) is transposed before its rows are counted
    dim                 the dimension in which rows are counted: 1 for those of every matrix of a 3-D tensor
    first               what files call expert 0
    at, stride, total   these rows lie at rows at, at + stride, … of a stored tensor of `total` rows, which holds more
                        than them: rows of other parameters, or the same in another order; None: they are all of it
    """

    name: str
    start: int = 0
    step: int = 1
    rows: int | None = None
    transposed: bool = False
    dim: int = 0
    first: int = 0
    at: int = 0
    stride: int = 1
    total: int | None = None

    @property
    def per_expert(self) -> bool:
        return "*" in self.name

    @property
    def whole(self) -> bool:
        return not self.per_expert and self.rows is None

    def of(self, values: Tensor) -> Tensor:
        """The view of this part in `values`, the parameter (of one expert)."""
        if self.transposed:
            values = values.transpose(-1, -2)
        return values if self.rows is None else values[self._along(self.start, self.step)]

    def of_stored(self, values: Tensor) -> Tensor:
        """The view of this part in `values`, the stored tensor."""
        return values if self.total is None else values[self._along(self.at, self.stride)]

    def shape_in(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor (of one expert) for a parameter of this shape."""
        shape = shape[1:] if self.per_expert else shape
        shape = (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape
        rows = self.rows if self.total is None else self.total
        return shape if rows is None else (*shape[: self.dim], rows, *shape[self.dim + 1 :])

    def _along(self, start: int, step: int) -> tuple[slice, ...]:
        assert self.rows is not None
        return (*(slice(None),) * self.dim, slice(start, start + self.rows * step, step))


@dataclass(frozen=True)
class FusedTensor:
    """A tensor in which files may hold experts of a parameter together: its shape, and the parts that lie in it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def turned(self) -> FusedTensor:
        """The same with the last two dimensions the other way round."""
        parts = tuple(replace(part, transposed=not part.transposed) for part in self.parts)
        return FusedTensor(self.name, (*self.shape[:-2], self.shape[-1], self.shape[-2]), parts)

    def pieces(self) -> Iterator[tuple[str, Part, int | None]]:
        """As those of a `Placement`."""
        return _pieces(self.parts, self.shape)


@dataclass(frozen=True)
class Placement:
    """A parameter of the transformers model: its shape and its stored tensors; no parts if lowbit does not know them.

    fused  the tensors in which files may hold all of it, where it is described expert by expert; none where that has
           the parameter's own name and rows
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    fused: tuple[FusedTensor, ...] = ()

    @property
    def converted(self) -> bool:
        """True where transformers makes the parameter of several tensors, of a part of one, or of its transpose."""
        return len(self.parts) > 1 or any(part.per_expert or not part.whole or part.transposed for part in self.parts)

    def pieces(self) -> Iterator[tuple[str, Part, int | None]]:
        """(stored name, part, expert) of every stored tensor in it; a name may come several times, with other rows."""
        return _pieces(self.parts, self.shape)


def _pieces(parts: tuple[Part, ...], shape: tuple[int, ...]) -> Iterator[tuple[str, Part, int | None]]:
    for part in parts:
        if part.per_expert:
            for expert in range(shape[0]):
                yield part.name.replace("*", str(expert + part.first)), part, expert
        else:
            yield part.name, part, None


@dataclass(frozen=True)
class Architecture:
    """model_type, class_name: as in config.json
    blocks       names of the decoder blocks, in order
    linears      name → Linear: those of the decoder blocks first, block by block, then the others in model order
    parameters   name → stored shape of every parameter and persistent buffer; tied ones once, under the stored name
    tied         name → the stored name that it shares memory with
    roles        role of every entry of `parameters`: linear roles, "norm", "embedding", "bias", "experts", "other"
    layout       transformers parameter → placement, where files use other names or parts
    spellings    (found, canonical): prefixes of names that some files spell differently
    prediction_blocks   number of blocks for multi-token prediction behind the others in the files (MTP,
                 num_nextn_predict_layers); transformers does not build them
    passed_over  patterns of tensors that the class does not read, by its own word
    norms        norm → what it computes: "rms" x/rms(x) · w, "rms_plus_one" x/rms(x) · (1 + w), "layer" LayerNorm
    untraced     why inputs of linears are not known; None where the model ran
    block_outputs  entries of the tuple that a block returns; 0 for a tensor
    saved_names    name that `save_pretrained` writes → the stored name, of those without the prefix that the hub has
    needs_weights  the class of a module that transformers cannot initialize where linears have no weight, or of a model
                   without a forward, whose packed linears it never decodes; None where there is none
                   (quantized_loading)
    replaced_experts   quantization methods for which transformers puts linears in the place of fused experts
    cut_weights    patterns of the first of several weights into which transformers cuts a stored weight
    own_names      names are those of transformers' modules, but for experts that it merges; else the hub's
                   (lowbit.architecture.own_names)
    heads          query heads of attention, with which `fed_rows` were tested; 0 where config.json states none
    """

    model_type: str
    class_name: str
    blocks: tuple[str, ...]
    linears: dict[str, Linear]
    parameters: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    roles: dict[str, str]
    layout: dict[str, Placement] = field(default_factory=dict)
    spellings: tuple[tuple[str, str], ...] = ()
    prediction_blocks: int = 0
    passed_over: tuple[str, ...] = ()
    norms: dict[str, str] = field(default_factory=dict)
    untraced: str | None = None
    block_outputs: int = 0
    heads: int = 0
    saved_names: dict[str, str] = field(default_factory=dict)
    needs_weights: str | None = None
    replaced_experts: tuple[str, ...] = ()
    cut_weights: tuple[str, ...] = ()
    own_names: bool = False

    @cached_property
    def fused_sets(self) -> dict[str, tuple[str, ...]]:
        """Fused name → its linears: one scheme, and one range where a scale spans the whole tensor."""
        sets: dict[str, list[str]] = {}
        for linear in self.linears.values():
            if linear.fused is not None:
                sets.setdefault(linear.fused, []).append(linear.name)
        return {name: tuple(members) for name, members in sets.items()}

    @cached_property
    def expert_sets(self) -> dict[str, tuple[str, ...]]:
        """ "model.layers.3.mlp.experts" → the linears of all its experts, which engines stack, with one scheme."""
        sets: dict[str, list[str]] = {}
        for linear in self.linears.values():
            if linear.expert is not None:
                sets.setdefault(linear.name.rpartition(f".{linear.expert}.")[0], []).append(linear.name)
        return {name: tuple(members) for name, members in sets.items()}

    @cached_property
    def expert_containers(self) -> tuple[str, ...]:
        """Modules, as engines name them, of experts that files hold in one tensor: "model.layers.3.mlp.experts"."""
        found = []
        for name, role in self.roles.items():
            if role == "experts":
                path = name.removesuffix(".weight")
                before, experts, _ = path.partition(".experts")
                found.append(before + experts if experts else path.rpartition(".")[0] + ".experts")
        return tuple(dict.fromkeys(found))

    @property
    def files_fuse_experts(self) -> bool:
        """True if files hold experts in one tensor, so that taking them apart makes another description."""
        return "experts" in self.roles.values() or any(place.fused for place in self.layout.values())

    @cached_property
    def loaded_names(self) -> dict[str, tuple[str, ...]]:
        """Module in files → its names in transformers, where they differ: several where files join matrices."""
        names: dict[str, dict[str, None]] = {}
        for parameter, placement in self.layout.items():
            stored = {part.name for part in placement.parts}
            module, weight = next(iter(stored), ""), ".weight"
            if len(stored) != 1 or any(part.per_expert for part in placement.parts) or not parameter.endswith(weight):
                continue
            if module not in (parameter, "") and (module.endswith(weight) or not placement.parts[0].whole):
                names.setdefault(module.removesuffix(weight), {})[parameter.removesuffix(weight)] = None
        return {module: tuple(found) for module, found in names.items()}

    @cached_property
    def fused_tensors(self) -> dict[str, FusedTensor]:
        """Tensor that files may hold instead of several of `parameters` → what lies in it."""
        return {
            fused.name: fused
            for name, placement in self.layout.items()
            for fused in placement.fused or (FusedTensor(name, placement.shape, placement.parts),)
        }

    def block_of(self, name: str) -> int | None:
        """Index of a parameter's decoder block or multi-token prediction block; None outside blocks."""
        prefix = self.blocks[0].rsplit(".", 1)[0] + "." if self.blocks else "\0"
        if not name.startswith(prefix):
            return None
        index = name[len(prefix) :].split(".", 1)[0]
        return int(index) if index.isdigit() else None

    def predicts(self, name: str) -> bool:
        """True for a stored tensor of a block for multi-token prediction."""
        block = self.block_of(name)
        behind = block is not None and len(self.blocks) <= block < len(self.blocks) + self.prediction_blocks
        return behind or _PREDICTION.search(name) is not None

    def knows(self, name: str) -> bool:
        """True for a stored tensor that the model has, blocks for multi-token prediction included."""
        return name in self.parameters or name in self.tied or self.predicts(name)

    def stands_beside(self, name: str) -> bool:
        """True for stored tensors that are no parameters but belong to the model: parts of a block for multi-token
        prediction, and buffers that old files store and current classes compute."""
        return (
            self.predicts(name)
            or COMPUTED_BUFFERS.search(name) is not None
            or any(re.search(pattern, name) for pattern in self.passed_over)
        )
