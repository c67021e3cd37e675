"""A model's roles, discovered: transformers builds the model on the meta device (shapes, no weights) and the family's
row of the table names what was found.

Refused: a model type without a row, and a model whose decoder blocks hold a linear that the row does not name: its role
is unknown, and guessing which linears engines fuse writes checkpoints that load and talk nonsense.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lowbit.architecture.table import FAMILIES, Family
from lowbit.errors import ArchitectureError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Linear:
    """One linear layer. `name` is the module's; its weight is `name + ".weight"`, [out_features, in_features].

    reads, fused and fed_by are full names: model.layers.3.attention_input, model.layers.3.self_attn.qkv_proj,
    model.layers.3.input_layernorm; None outside decoder blocks.
    """

    name: str
    role: str
    shape: tuple[int, int]
    block: int | None = None
    reads: str | None = None
    fused: str | None = None
    fed_by: str | None = None
    has_bias: bool = False


@dataclass(frozen=True)
class Architecture:
    """model_type, class_name: as in config.json
    blocks       module names of the decoder blocks, in order
    linears      module name → Linear, in model order; decoder linears first seen first, then lm_head
    parameters   every parameter and persistent buffer: name → shape, tied ones once, under the name that is stored
    tied         name → the stored name it shares memory with
    roles        role of every parameter in `parameters`: linear roles, "norm", "embedding", "bias", "other"
    """

    model_type: str
    class_name: str
    blocks: tuple[str, ...]
    linears: dict[str, Linear]
    parameters: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    roles: dict[str, str]

    @cached_property
    def fused_sets(self) -> dict[str, tuple[str, ...]]:
        """Fused name → the linears that engines put into it."""
        sets: dict[str, list[str]] = {}
        for linear in self.linears.values():
            if linear.fused is not None:
                sets.setdefault(linear.fused, []).append(linear.name)
        return {name: tuple(members) for name, members in sets.items()}

    def block_of(self, name: str) -> int | None:
        """Index of the decoder block that a parameter belongs to."""
        prefix = self.blocks[0].rsplit(".", 1)[0] + "." if self.blocks else "\0"
        if not name.startswith(prefix):
            return None
        index = name[len(prefix) :].split(".", 1)[0]
        return int(index) if index.isdigit() else None


def discover(config: dict[str, Any], folder: str, trust_remote_code: bool = False) -> Architecture:
    """The architecture of a model, from its parsed config.json; `folder` holds it (for remote code only).

    Raises ArchitectureError for a model type without a row in the table, or a block that does not match its row.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        named = ", ".join(config.get("architectures") or []) or "no architecture named"
        raise ArchitectureError(
            f"{folder}: model type {model_type!r} ({named}) is not known to lowbit",
            f"known model types: {', '.join(sorted(FAMILIES))}",
        )
    return describe(build_on_meta(config, folder, trust_remote_code), family)


def build_on_meta(config: dict[str, Any], folder: str, trust_remote_code: bool = False) -> nn.Module:
    """The transformers model of a config.json, with shapes but no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        if trust_remote_code and config.get("auto_map"):
            parsed = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        else:
            parsed = AutoConfig.for_model(**config)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(parsed, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config can make somebody else's validators raise
        raise ArchitectureError(
            f"{folder}: transformers cannot build a model from config.json: {_first_line(error)}",
            "check config.json, or upgrade transformers if the model is newer than it",
        ) from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def describe(model: nn.Module, family: Family) -> Architecture:
    """Roles of a built model's modules and parameters."""
    from torch import nn

    modules = dict(model.named_modules())
    if family.blocks not in modules:
        raise ArchitectureError(f"{type(model).__name__} has no decoder blocks at {family.blocks}")
    blocks = tuple(f"{family.blocks}.{index}" for index in range(len(modules[family.blocks])))  # type: ignore[arg-type]
    linears: dict[str, Linear] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            linears[name] = _linear(name, module, family)
    tied = _tied(model)
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    roles = {name: _role(name, linears, modules) for name in parameters}
    config = model.config
    return Architecture(config.model_type, type(model).__name__, blocks, linears, parameters, tied, roles)  # type: ignore[union-attr, arg-type]


def _linear(name: str, module: nn.Module, family: Family) -> Linear:
    shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    has_bias = module.bias is not None
    if not name.startswith(family.blocks + "."):
        return Linear(name, name.rsplit(".", 1)[-1], shape, has_bias=has_bias)
    index, path = name[len(family.blocks) + 1 :].split(".", 1)
    row = family.linears.get(path)
    block = f"{family.blocks}.{index}"
    if row is None:
        raise ArchitectureError(
            f"{block} holds a linear {path!r} whose role is not known",
            "the model differs from its model type; it needs a row of its own in lowbit/architecture/table.py",
        )
    fused = None if row.fused is None else f"{block}.{row.fused}"
    return Linear(name, row.role, shape, int(index), f"{block}.{row.reads}", fused, f"{block}.{row.fed_by}", has_bias)


def _tied(model: nn.Module) -> dict[str, str]:
    """Parameters that share memory with another, by the model's own declaration."""
    keys = getattr(model, "_tied_weights_keys", None) or {}
    if not getattr(model.config, "tie_word_embeddings", False) or not isinstance(keys, dict):  # type: ignore[union-attr]
        return {}
    return dict(keys)


def _role(name: str, linears: dict[str, Linear], modules: dict[str, nn.Module]) -> str:
    from torch import nn

    owner, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return "bias"
    if owner in linears:
        return linears[owner].role
    module = modules.get(owner)
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return "other"
