"""Discovery of an architecture: transformers builds the model on the meta device (shapes, no weights), its own rules
give the layout on disk, and the family's row of the table gives the roles.

Refused: a model type without a row, and a model whose decoder blocks hold a matrix that the row does not name: its role
is unknown, and guessing which linears engines fuse writes checkpoints that load and talk nonsense.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowbit.architecture.disk_layout import disk_layout, path_in_block
from lowbit.architecture.structure import Architecture, Linear, Placement
from lowbit.architecture.table import FAMILIES, Family, LinearRole
from lowbit.errors import ArchitectureError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def discover(
    config: dict[str, Any], folder: str, trust_remote_code: bool = False, split_experts: bool = False
) -> Architecture:
    """The architecture of a model, from its parsed config.json; `folder` holds it (for remote code only).

    split_experts  describe experts that this family's files store as one tensor (gpt-oss) expert by expert

    Raises ArchitectureError for a model type without a row in the table, or a block that does not match its row.
    """
    family = find_family(config, folder)
    return describe(build_on_meta(config, folder, trust_remote_code), family, split_experts)


def find_family(config: dict[str, Any], folder: str) -> Family:
    """The table's row for the model_type of a config.json."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        named = ", ".join(config.get("architectures") or []) or "no architecture named"
        raise ArchitectureError(
            f"{folder}: model type {model_type!r} ({named}) is not known to lowbit",
            f"known model types: {', '.join(sorted(FAMILIES))}",
        )
    return family


def build_on_meta(config: dict[str, Any], folder: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The transformers model of a config.json, with shapes but no weights."""
    import torch
    from transformers import AutoConfig

    config = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        if trust_remote_code and config.get("auto_map"):
            parsed = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        else:
            parsed = AutoConfig.for_model(**config)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return auto_class(parsed).from_config(parsed, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers' validators can raise anything
        raise ArchitectureError(
            f"{folder}: transformers cannot build a model from config.json: {' '.join(str(error).split())[:300]}",
            "check config.json, or upgrade transformers if the model is newer than it",
        ) from error


def auto_class(config: Any) -> Any:
    """transformers' factory for a config: causal language models, and those that see images as well."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text = type(config) in AutoModelForCausalLM._model_mapping
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if sees and not text else AutoModelForCausalLM


@dataclass(frozen=True)
class _Stored:
    """One stored tensor: its shape, the number of its expert, and the module that holds it in transformers."""

    shape: tuple[int, ...]
    expert: int | None
    module: nn.Module | None


def describe(model: PreTrainedModel, family: Family, split_experts: bool = False) -> Architecture:
    """Roles of everything that a model's files store."""
    layout = disk_layout(model, family, split_experts)
    stored = _stored(model, layout)
    found = [place[0] for name in stored if (place := path_in_block(name, family.blocks)) is not None]
    if not found:
        raise ArchitectureError(f"{type(model).__name__} has no decoder blocks at {family.blocks}")
    blocks = tuple(f"{family.blocks}.{index}" for index in range(max(found) + 1))
    linears = _linears(stored, family, _norms_feed(model, family))
    tied = _tied(model, layout)
    parameters = {name: tensor.shape for name, tensor in stored.items() if name not in tied}
    roles = {name: _role(name, stored[name], linears, family) for name in parameters}
    moved = {name: place for name, place in layout.items() if [part.name for part in place.parts] != [name]}
    return Architecture(
        model.config.model_type, type(model).__name__, blocks, linears, parameters, tied, roles, moved,
        family.spellings, int(getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0),
    )  # fmt: skip


def _stored(model: PreTrainedModel, layout: dict[str, Placement]) -> dict[str, _Stored]:
    modules = dict(model.named_modules())
    stored = {}
    for parameter, placement in layout.items():
        module = modules.get(parameter.rpartition(".")[0])
        for name, part, expert in placement.pieces():
            stored[name] = _Stored(part.shape_in(placement.shape), expert, module)
    return stored


def _linears(stored: dict[str, _Stored], family: Family, norms_feed: bool) -> dict[str, Linear]:
    """Every linear: those of the blocks in the order of the table, then the others in model order."""
    rank = {path: index for index, path in enumerate(family.linears)}
    in_blocks: list[tuple[tuple[int, int, int], Linear]] = []
    others: list[Linear] = []
    for name, tensor in stored.items():
        place = path_in_block(name, family.blocks)
        if place is None:
            if name.endswith(".weight") and _is_linear(tensor.module):
                others.append(_outside(name.removesuffix(".weight"), tensor, stored))
            continue
        index, path = place
        row_path = re.sub(r"(^|\.)experts\.\d+\.", r"\1experts.*.", path.removesuffix(".weight"))
        row = family.linears.get(row_path) if path.endswith(".weight") else None
        if row is not None and len(tensor.shape) == 2:
            linear = _inside(name.removesuffix(".weight"), index, row, tensor, stored, family)
            linear = linear if norms_feed or not _is_norm_path(row.fed_by) else replace(linear, fed_by=None)
            order = (index, -1 if tensor.expert is None else tensor.expert, rank[row_path])
            in_blocks.append((order, linear))
        elif (_is_linear(tensor.module) and path.endswith(".weight")) or _is_unknown_matrix(path, tensor, family):
            raise ArchitectureError(
                f"{family.blocks}.{index} holds a linear {path.removesuffix('.weight')!r} whose role is not known",
                "the model differs from its model type; it needs a row of its own in lowbit/architecture/table.py",
            )
    ordered = [linear for _, linear in sorted(in_blocks, key=lambda pair: pair[0])]
    return {linear.name: linear for linear in [*_without_sets_of_one(ordered), *others]}


def _is_linear(module: nn.Module | None) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _is_unknown_matrix(path: str, tensor: _Stored, family: Family) -> bool:
    return len(tensor.shape) > 1 and path not in family.fused_experts


def _is_norm_path(path: str | None) -> bool:
    return path is not None and ("norm" in path or path.startswith("ln_"))


def _norms_feed(model: PreTrainedModel, family: Family) -> bool:
    if family.norms_feed_if is None:
        return True
    key, value = family.norms_feed_if
    return getattr(model.config, key, value) == value


def _outside(name: str, tensor: _Stored, stored: dict[str, _Stored]) -> Linear:
    rows, columns = tensor.shape
    return Linear(name, name.rsplit(".", 1)[-1], (rows, columns), has_bias=f"{name}.bias" in stored)


def _inside(
    name: str, index: int, row: LinearRole, tensor: _Stored, stored: dict[str, _Stored], family: Family
) -> Linear:
    from transformers.pytorch_utils import Conv1D

    def full(path: str | None) -> str | None:
        if path is None:
            return None
        return f"{family.blocks}.{index}.{path}".replace("*", str(tensor.expert))

    transposed = isinstance(tensor.module, Conv1D)
    rows, columns = tensor.shape[::-1] if transposed else tensor.shape
    feeders = [feeder for feeder in (full(row.fed_by), full(row.or_fed_by)) if f"{feeder}.weight" in stored]
    return Linear(
        name, row.role, (rows, columns), index, full(row.reads), full(row.fused), feeders[0] if feeders else None,
        f"{name}.bias" in stored, transposed, tensor.expert, row.keep,
    )  # fmt: skip


def _without_sets_of_one(linears: list[Linear]) -> list[Linear]:
    """A linear whose siblings this model lacks (MLA without q_lora_rank) stays alone."""
    counts: dict[str, int] = {}
    for linear in linears:
        if linear.fused is not None:
            counts[linear.fused] = counts.get(linear.fused, 0) + 1
    return [replace(linear, fused=None) if counts.get(linear.fused or "") == 1 else linear for linear in linears]


def _tied(model: PreTrainedModel, layout: dict[str, Placement]) -> dict[str, str]:
    """Parameters that share memory with another, by the model's own declaration, under their stored names."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {layout[name].parts[0].name: layout[source].parts[0].name for name, source in tied.items()}


def _role(name: str, tensor: _Stored, linears: dict[str, Linear], family: Family) -> str:
    from torch import nn

    owner, _, leaf = name.rpartition(".")
    place = path_in_block(name, family.blocks)
    if place is not None and place[1] in family.fused_experts and tensor.expert is None:
        return "experts"
    if leaf.endswith("bias"):
        return "bias"
    if owner in linears and leaf == "weight":
        return linears[owner].role
    if isinstance(tensor.module, nn.Embedding):
        return "embedding"
    if "norm" in type(tensor.module).__name__.lower():
        return "norm"
    return "other"
