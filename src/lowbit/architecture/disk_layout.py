"""The placement of transformers' parameters in files: stored names, and the part of a parameter that each one holds.

transformers has the rules of every family as data (conversion_mapping.py): renamings, and converters that merge the
experts of a block, cut a matrix of queries, keys and values, or permute rows. They are applied in reverse, from the
parameter to the files; `conversions` finds out which rows a converter moves where:

    ".experts.*.w1.weight", ".experts.*.w3.weight"  ──MergeModulelist(0), Concatenate(1)──►  ".experts.gate_up_proj"

Rules that take a prefix from the names of some files cannot tell whether other files have it. The layout has it, as the
hub has; `save_pretrained` leaves it out, and `disk_layout(…, prefixes=False)` says how the names are then.

`disk_layout(…, own_names=True)` has the names of transformers' modules where a rule moves rows: transformers applies
its rules to no file that has these names, so that quantized tensors and what stands beside them arrive as they are.
Experts of the decoder stay one by one, since transformers decodes and merges these.

A parameter whose rows cannot be followed has no parts: its tensors are copied as they are, and lowbit does not load
such a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowbit.architecture.blocks import find_blocks
from lowbit.architecture.conversions import Conversions, ConvertedGroup
from lowbit.architecture.families import Family, family_of
from lowbit.architecture.structure import FusedTensor, Part, Placement
from lowbit.architecture.trace import is_experts, lies_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def disk_layout(
    model: PreTrainedModel, split_experts: bool = False, prefixes: bool = True, own_names: bool = False
) -> dict[str, Placement]:
    """Placement of every parameter and persistent buffer of a model, tied ones too, in model order.

    split_experts  take apart the experts that files of this model type hold in one tensor
    prefixes       names as files on the hub have them; without: as `save_pretrained` writes them, which leaves out
                   prefixes that only some files have
    own_names      names of transformers' modules, if a rule makes weights of several tensors or of a part of one
    """
    family = family_of(model.config.model_type)
    modules = dict(model.named_modules())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layout = {}
    for name, parts in _stored_parts(model, shapes, prefixes).items():
        if prefixes:
            parts = tuple(replace(part, name=_on_hub(part.name, family)) for part in parts)
        layout[name] = Placement(shapes[name], parts)
        owner = modules.get(name.rpartition(".")[0])
        if split_experts and len(shapes[name]) > 1 and is_experts(owner):
            layout[name] = _split(name.rpartition(".")[2], layout[name], owner, family)
    return _renamed(model, layout) if own_names else layout


def _renamed(model: PreTrainedModel, layout: dict[str, Placement]) -> dict[str, Placement]:
    """The layout under the names of transformers' modules; as it is where all rules only rename, or merge experts."""
    blocks = find_blocks(model)[0].rpartition(".")[0]
    # A rule that splits the experts of a list, some for text and some for images, does not fit packed ones.
    holders = Counter(part.name for placed in layout.values() for part in placed.parts)
    apart = {
        name for name, placed in layout.items()
        if _path_in_block(name, blocks) is not None and placed.parts
        and all(part.per_expert and holders[part.name] == 1 for part in placed.parts)
    }  # fmt: skip
    if not any(
        name not in apart and placed.converted and any(part.name.endswith(".weight") for part in placed.parts)
        for name, placed in layout.items()
    ):
        return layout
    rules, renamed = _rules(model), {}
    for name, placed in layout.items():
        if name in apart:
            parts = tuple(replace(part, name=_in_own_block(part.name, name, blocks, rules)) for part in placed.parts)
            fused = (FusedTensor(name, placed.shape, parts),) if placed.fused else ()
            renamed[name] = Placement(placed.shape, parts, fused)
        else:
            renamed[name] = Placement(placed.shape, (Part(name),)) if placed.parts else placed
    return renamed


def _in_own_block(stored: str, parameter: str, blocks: str, rules: list[Any]) -> str:
    """The stored name of an expert under its block's own name, if transformers makes the same of both."""
    index = parameter.removeprefix(f"{blocks}.").partition(".")[0]
    inside = re.match(rf".*?\.{index}\.(.*)", stored)
    moved = stored if inside is None else f"{blocks}.{index}.{inside[1]}"
    return moved if _loaded_as(moved, rules) == _loaded_as(stored, rules) else stored


def _loaded_as(stored: str, rules: list[Any]) -> str:
    from transformers.core_model_loading import WeightConverter, rename_source_key

    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    return rename_source_key(stored.replace("*", "0"), renamings, converters)[0]


def saved_names(model: PreTrainedModel, layout: dict[str, Placement], split_experts: bool = False) -> dict[str, str]:
    """Stored name as `save_pretrained` spells it → the layout's, where they differ."""
    if not family_of(model.config.model_type).on_hub and not any(_is_prefix(rule) for rule in _rules(model)):
        return {}
    saved = disk_layout(model, split_experts, prefixes=False)
    return {
        other[0]: piece[0]
        for name, placement in layout.items()
        for other, piece in zip(saved[name].pieces(), placement.pieces(), strict=True)
        if other[0] != piece[0]
    }


def fit_rows(layout: dict[str, Placement], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Placement]:
    """The placements of parameters that are stored tensors one below the other, of those where files cut them at other
    rows: transformers joins what there is, and cuts into equal tensors when it saves.

    shapes  stored name → shape in files
    """
    fitted = {}
    for name, placed in layout.items():
        parts, end = [], 0
        if len(placed.parts) < 2 or any(part.per_expert or part.total is not None for part in placed.parts):
            continue
        for part in placed.parts:
            found, expected = shapes.get(part.name, ()), part.shape_in(placed.shape)
            if len(found) != len(expected) or part.transposed or part.step != 1:
                break
            rows = found[part.dim]
            if (*expected[: part.dim], rows, *expected[part.dim + 1 :]) != tuple(found):
                break
            parts.append(replace(part, start=end, rows=rows))
            end += rows
        whole = len(parts) == len(placed.parts) and end == placed.shape[parts[0].dim]
        if whole and tuple(parts) != placed.parts:
            fitted[name] = replace(placed, parts=tuple(parts))
    return fitted


def _on_hub(name: str, family: Family) -> str:
    """A stored name as the hub has it, of one that transformers' rules give."""
    for made, hub in family.on_hub:
        name = re.sub(made, hub, name)
    return name


def _rules(model: PreTrainedModel) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model, add_legacy=False)


def _is_prefix(rule: Any) -> bool:
    from transformers.core_model_loading import PrefixChange

    return isinstance(rule, PrefixChange)


def _stored_parts(
    model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], prefixes: bool
) -> dict[str, tuple[Part, ...]]:
    """Parameter → its parts, in model order."""
    from transformers.core_model_loading import WeightConverter, apply_converters, apply_renamings

    rules = [rule.reverse_transform() for rule in _invertible(_rules(model), list(shapes), prefixes)[::-1]]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    found: dict[str, tuple[Part, ...]] = {}
    groups: dict[str, ConvertedGroup] = {}
    for name, shape in shapes.items():
        key, pattern = apply_converters(name, converters)
        if pattern is None:
            found[name] = (Part(apply_renamings(name, renamings)),)
        else:
            converter = next(rule for rule in converters if pattern in rule.source_patterns)
            groups.setdefault(key, ConvertedGroup(converter, key)).members.append((pattern, name, shape))
    conversions = Conversions(model)
    for group in groups.values():
        for name, parts in conversions.parts(group).items():
            found[name] = tuple(replace(part, name=apply_renamings(part.name, renamings)) for part in parts)
    return {name: found.get(name, ()) for name in shapes}


def _invertible(rules: list[Any], names: list[str], prefixes: bool) -> list[Any]:
    """The rules with the prefixes that files have: all where transformers finds every parameter again under the names
    that these give, else those of the model itself without those of models inside, else none."""
    plain = [rule for rule in rules if not _is_prefix(rule)]
    if len(plain) == len(rules) or not prefixes:
        return plain
    outer = [rule for rule in rules if not _is_prefix(rule) or rule.scope_prefix is None]
    return next((chosen for chosen in (rules, outer) if _finds_again(chosen, rules, names)), plain)


def _finds_again(chosen: list[Any], rules: list[Any], names: list[str]) -> bool:
    from transformers.core_model_loading import WeightConverter, apply_converters, apply_renamings

    back = [rule.reverse_transform() for rule in chosen[::-1]]
    converters = [rule for rule in back if isinstance(rule, WeightConverter)]
    back = [rule for rule in back if not isinstance(rule, WeightConverter)]
    forth: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    plain = [name for name in names if apply_converters(name, converters)[1] is None]
    return all(apply_renamings(apply_renamings(name, back), forth) == name for name in plain)


def _path_in_block(name: str, blocks: str) -> tuple[int, str] | None:
    """(index of the block, path in it) of a stored name; None outside the decoder blocks."""
    if not name.startswith(blocks + "."):
        return None
    index, _, path = name[len(blocks) + 1 :].partition(".")
    return (int(index), path) if index.isdigit() and path else None


def _split(leaf: str, placed: Placement, owner: Any, family: Family) -> Placement:
    """The parts of every expert in a parameter that files hold as one tensor, or as one of gates and one of ups."""
    if not placed.parts or any(part.per_expert for part in placed.parts):
        return placed
    turned = lies_transposed(owner)  # of the parameter
    stored, shape = placed.parts[0], placed.shape
    path = stored.name.removesuffix(".weight").rpartition(".")[0]
    kind = leaf.removesuffix("_bias")
    is_bias = leaf.endswith("_bias")
    spelled = (
        (stored.name.removesuffix(end), names) for end, names in family.expert_names if stored.name.endswith(end)
    )
    prefix, names = next(spelled, ("", ()))
    names = tuple(prefix + name for name in names)
    if not names:
        leaves: dict[str, tuple[str, ...]] = {leaf: (leaf,) for leaf in ("gate_proj", "up_proj", "down_proj")}
        leaves["gate_up_proj"] = ("gate_proj", "up_proj")
        if kind not in leaves:
            return placed
        names = tuple(f"{path}.*.{each}.{'bias' if is_bias else 'weight'}" for each in leaves[kind])
    size = shape[1] if is_bias else shape[2 if turned else 1]
    rows, alternate = size // len(names), not getattr(owner, "is_concatenated", True)
    parts = tuple(
        Part(name, index if alternate else index * rows, len(names) if alternate else 1, rows,
             transposed=turned and not is_bias)
        for index, name in enumerate(names)
    )  # fmt: skip
    fused = _fused_tensors(placed, parts)
    return Placement(shape, parts, fused) if fused else placed


def _fused_tensors(placed: Placement, parts: tuple[Part, ...]) -> tuple[FusedTensor, ...]:
    """The stored tensors of a parameter, with the parts of every expert as they lie there; none where rows of an expert
    are no arithmetic sequence in one of them."""
    if placed.parts[0].whole:
        fused = FusedTensor(placed.parts[0].name, placed.shape, parts)
        return (fused.turned() if placed.parts[0].transposed else fused,)
    if any(part.dim != 1 for part in placed.parts) or any(part.transposed for part in (*placed.parts, *parts)):
        return ()
    there: dict[int, tuple[str, int]] = {}  # row of every matrix of the parameter → stored tensor, row there
    for part in placed.parts:
        there |= {part.start + row * part.step: (part.name, part.at + row * part.stride)
                  for row in range(part.rows or 0)}  # fmt: skip
    inside: dict[str, list[Part]] = {part.name: [] for part in placed.parts}
    for part in parts:
        found = [there[part.start + row * part.step] for row in range(part.rows or 0)]
        names, rows = {name for name, _ in found}, [row for _, row in found]
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        if len(names) > 1 or step < 1 or rows != list(range(rows[0], rows[0] + step * len(rows), step)):
            return ()
        inside[found[0][0]].append(replace(part, start=rows[0], step=step))
    shapes = {part.name: part.shape_in(placed.shape) for part in placed.parts}
    return tuple(FusedTensor(name, shapes[name], tuple(held)) for name, held in inside.items())
