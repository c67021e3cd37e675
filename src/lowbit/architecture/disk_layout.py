"""The placement of transformers' parameters in files: stored names, and the part of a parameter that each one holds.

transformers has the rules of every family as data (conversion_mapping.py): renamings, and converters that merge the
experts of a block. They are applied in reverse, from the parameter to the files:

    ".experts.*.w1.weight", ".experts.*.w3.weight"  ──MergeModulelist(0), Concatenate(1)──►  ".experts.gate_up_proj"

Refused: a converter of any other kind, whose effect on a weight is not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowbit.architecture.structure import Part, Placement
from lowbit.architecture.table import ExpertSlice, Family
from lowbit.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def disk_layout(model: PreTrainedModel, family: Family | None, split_experts: bool = False) -> dict[str, Placement]:
    """Placement of every parameter and persistent buffer of a model, tied ones too, in model order.

    family         None where the model type is not known: then only transformers' own rules apply
    split_experts  take apart the experts that the family's files store fused
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, apply_converters, apply_renamings

    rules = [rule.reverse_transform() for rule in get_model_conversion_mapping(model, add_legacy=False)[::-1]]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    layout = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        converted, pattern = apply_converters(name, converters)
        if pattern is None:
            stored = apply_renamings(name, renamings)
            place = path_in_block(stored, family.blocks) if split_experts and family is not None else None
            slices = None if place is None or family is None else family.fused_experts.get(place[1])
            parts = (Part(stored),) if slices is None else tuple(_sliced(row, stored, shape) for row in slices)
        else:
            converter = next(rule for rule in converters if pattern in rule.source_patterns)
            parts = _merged(name, shape, converted, converter)
            parts = tuple(Part(apply_renamings(part.name, renamings), part.start, 1, part.rows) for part in parts)
        layout[name] = Placement(shape, parts)
    return layout


def path_in_block(name: str, blocks: str) -> tuple[int, str] | None:
    """(index of the block, path in it) of a stored name; None outside the decoder blocks."""
    if not name.startswith(blocks + "."):
        return None
    index, _, path = name[len(blocks) + 1 :].partition(".")
    return (int(index), path) if index.isdigit() and path else None


def _merged(name: str, shape: tuple[int, ...], converted: str, converter: Any) -> tuple[Part, ...]:
    """Parts of a parameter that transformers merged of a tensor (or several) per expert."""
    steps = [(type(operation).__name__, operation.dim) for operation in converter.operations]
    targets = converter.target_patterns
    names = [converted.replace(targets[0], target) for target in targets]
    if steps == [("SplitModulelist", 0)] and len(names) == 1:
        return (Part(names[0]),)
    if steps == [("Chunk", 1), ("SplitModulelist", 0)] and shape[1] % len(names) == 0:
        rows = shape[1] // len(names)
        return tuple(Part(each, index * rows, 1, rows) for index, each in enumerate(names))
    raise ArchitectureError(
        f"{name}: transformers stores it by {', '.join(f'{step}({dim})' for step, dim in steps)}, which lowbit does "
        f"not know",
        "the model is newer than lowbit, or transformers lays it out anew; please report it",
    )


def _sliced(row: ExpertSlice, stored: str, shape: tuple[int, ...]) -> Part:
    """The part of a fused parameter [experts, …] that a row of the table describes."""
    block = stored.split(".mlp.")[0]
    size = shape[-1] if row.transposed or len(shape) == 2 else shape[1]
    return Part(f"{block}.{row.name}", row.start, row.step, size // row.step, row.transposed)
