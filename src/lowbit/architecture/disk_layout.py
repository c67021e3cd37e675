"""The placement of transformers' parameters in files: stored names, and the part of a parameter that each one holds.

transformers has the rules of every family as data (conversion_mapping.py): renamings, and converters that merge the
experts of a block. They are applied in reverse, from the parameter to the files:

    ".experts.*.w1.weight", ".experts.*.w3.weight"  ──MergeModulelist(0), Concatenate(1)──►  ".experts.gate_up_proj"

A parameter that transformers makes in any other way (vision towers whose rows it permutes) has no parts: its tensors
are copied as they are, and lowbit does not load such a model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowbit.architecture.families import Family, family_of
from lowbit.architecture.structure import Part, Placement
from lowbit.architecture.trace import is_experts, lies_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def disk_layout(model: PreTrainedModel, split_experts: bool = False) -> dict[str, Placement]:
    """Placement of every parameter and persistent buffer of a model, tied ones too, in model order.

    split_experts  take apart the experts that files of this model type hold in one tensor
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, apply_converters, apply_renamings

    family = family_of(model.config.model_type)
    rules = [rule.reverse_transform() for rule in get_model_conversion_mapping(model, add_legacy=False)[::-1]]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    modules = dict(model.named_modules())
    layout = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        converted, pattern = apply_converters(name, converters)
        if pattern is None:
            parts: tuple[Part, ...] = (Part(apply_renamings(name, renamings)),)
        else:
            converter = next(rule for rule in converters if pattern in rule.source_patterns)
            parts = _converted(shape, converted, converter)
            parts = tuple(replace(part, name=apply_renamings(part.name, renamings)) for part in parts)
        layout[name] = Placement(shape, parts)
        owner = modules.get(name.rpartition(".")[0])
        if split_experts and len(parts) == 1 and parts[0].whole and is_experts(owner):
            assert owner is not None
            layout[name] = _split(name.rpartition(".")[2], shape, parts[0], owner, family)
    return layout


def path_in_block(name: str, blocks: str) -> tuple[int, str] | None:
    """(index of the block, path in it) of a stored name; None outside the decoder blocks."""
    if not name.startswith(blocks + "."):
        return None
    index, _, path = name[len(blocks) + 1 :].partition(".")
    return (int(index), path) if index.isdigit() and path else None


def _converted(shape: tuple[int, ...], converted: str, converter: Any) -> tuple[Part, ...]:
    """Parts of a parameter that transformers makes of stored tensors; none where the conversion is not known."""
    steps = [type(operation).__name__ for operation in converter.operations]
    dims = [getattr(operation, "dim", None) for operation in converter.operations]
    targets = converter.target_patterns
    names = [converted.replace(targets[0], target) for target in targets]
    count = len(names)
    if steps == ["SplitModulelist"] and count == 1:
        return (Part(names[0]),)
    if steps == ["Chunk", "SplitModulelist"] and dims == [1, 0] and shape[1] % count == 0:
        rows = shape[1] // count
        return tuple(Part(each, index * rows, 1, rows) for index, each in enumerate(names))
    if steps == ["Chunk"] and dims == [0] and shape[0] % count == 0:
        rows = shape[0] // count
        return tuple(Part(each, index * rows, 1, rows) for index, each in enumerate(names))
    if steps == ["Transpose"] and count == 1 and len(shape) == 3:
        operation = converter.operations[0]
        if {operation.dim0 % 3, operation.dim1 % 3} == {1, 2}:
            return (Part(names[0], transposed=True),)
    return ()


def _split(leaf: str, shape: tuple[int, ...], stored: Part, owner: Any, family: Family) -> Placement:
    """The parts of every expert in a parameter that files hold as one tensor."""
    turned = lies_transposed(owner)  # of the parameter
    path = stored.name.removesuffix(".weight").rpartition(".")[0]
    kind = leaf.removesuffix("_bias")
    is_bias = leaf.endswith("_bias")
    spelled = (
        (stored.name.removesuffix(end), names) for end, names in family.expert_names if stored.name.endswith(end)
    )
    prefix, names = next(spelled, ("", ()))
    names = tuple(prefix + name for name in names)
    if not names:
        leaves = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
        if kind not in leaves:
            return Placement(shape, (stored,))
        names = tuple(f"{path}.*.{each}.{'bias' if is_bias else 'weight'}" for each in leaves[kind])
    size = shape[1] if is_bias else shape[2 if turned else 1]
    rows, alternate = size // len(names), not getattr(owner, "is_concatenated", True)
    parts = tuple(
        Part(name, index if alternate else index * rows, len(names) if alternate else 1, rows,
             transposed=turned and not is_bias)
        for index, name in enumerate(names)
    )  # fmt: skip
    return Placement(shape, parts, fused=stored.name, fused_transposed=stored.transposed)
