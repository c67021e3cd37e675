"""config.json's `transform_config` as compressed-tensors means it: rotations that a loader applies as the model runs.

    config_groups: name → {type, apply: [{targets, location, inverse, ignore}], head_dim, randomize, precision, …}

    location       when      of a linear y = x Wᵀ
    input          online    x V             V = S / sqrt(n), Sylvester's matrix, or blocks of head_dim
    weight_input   offline   W V             folded into the stored weight; nothing to do
    weight_output  offline   Vᵀ W            likewise
    q_attn, k_cache  online  (q V)(k V)ᵀ     the scores stay as they are

So a stored weight W′ behind an online input transform is, in the model's own basis, W = W′ Vᵀ (`Rotation.back`).

Refused, never guessed at: unknown keys; online transforms of outputs; `random-matrix`, which need not be orthogonal; a
permuted (`randomize`) matrix; a `random-hadamard` matrix that is not in the files, or is none; queries rotated without
keys; a size that does not divide the columns, or has no Sylvester matrix.
Spec: `TransformConfig`, `TransformScheme`, `TransformArgs` and factory/hadamard.py of compressed-tensors 0.20.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.compressed_tensors_config import bad_value, matches, parse_targets, refuse_unknown
from lowbit.errors import CheckpointError
from lowbit.numerics.hadamard import Rotation, sylvester

_GROUP_KEYS = {"type", "apply", "randomize", "requires_grad", "head_dim", "precision"}
_APPLY_KEYS = {"targets", "location", "inverse", "ignore"}
_OFFLINE = ("weight_input", "weight_output")
_ATTENTION = ("q_attn", "k_cache")
_LOCATIONS = (*_OFFLINE, "input", "output", *_ATTENTION)
_TYPES = ("hadamard", "random-hadamard", "random-matrix")


@dataclass(frozen=True)
class InputTransform:
    """An online transform of the inputs of linears.

    name      of its group; a matrix of its own is stored as LINEAR.NAME_input.weight
    kind      "hadamard" or "random-hadamard"
    head_dim  columns of a block; None: all columns
    inverse   x Vᵀ instead of x V
    """

    name: str
    kind: str
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    head_dim: int | None
    inverse: bool = False

    def takes(self, linear: str) -> bool:
        """True for a linear (a module of class Linear) that it is applied to."""
        if any(matches(target, linear) or target == "Linear" for target in self.ignore):
            return False
        return any(matches(target, linear) or target == "Linear" for target in self.targets)

    def names(self, module: str) -> bool:
        """True for a module that a target names, rather than its class."""
        return any(matches(target, module) for target in self.targets)


@dataclass(frozen=True)
class RunTimeTransforms:
    """What a transform_config does as the model runs.

    inputs     in the order of the file
    attention  True if queries and keys are rotated too
    stored     endings of the tensors that hold matrices: "R4_input.weight"
    """

    inputs: tuple[InputTransform, ...] = ()
    attention: bool = False
    stored: tuple[str, ...] = ()

    def of(self, linear: str) -> InputTransform | None:
        """The transform of a linear's input. CheckpointError for two: vLLM applies one, compressed-tensors both."""
        found = [each for each in self.inputs if each.takes(linear)]
        if len(found) > 1:
            raise CheckpointError(
                f"config.json: transform_config rotates the input of {linear} twice ({found[0].name}, "
                f"{found[1].name}), which engines read differently",
                "start from the 16-bit model",
            )
        return found[0] if found else None

    def owns(self, name: str) -> bool:
        """True for a stored tensor that is the matrix (or permutation) of a transform."""
        return any(name.endswith(f".{ending}") for ending in self.stored)

    def rotation(self, linear: str, columns: int, stored: Checkpoint) -> Rotation | None:
        """The rotation of a linear's input, in blocks of its size; CheckpointError where it cannot be."""
        transform = self.of(linear)
        if transform is None:
            return None
        size = transform.head_dim or columns
        if columns % size:
            raise CheckpointError(
                f"{linear} has {columns} columns, which blocks of {size} of transform {transform.name} do not divide",
                "the files and config.json do not belong together",
            )
        if transform.kind == "random-hadamard":
            return _stored_rotation(transform, linear, size, stored)
        if size & (size - 1):
            raise CheckpointError(
                f"{linear}: transform {transform.name} is of type hadamard and size {size}, which is no power of two",
                "such a matrix has a head_dim that divides the columns, or is of type random-hadamard",
            )
        return sylvester(size)


def parse_transform_config(stated: Any) -> RunTimeTransforms:
    """The parsed `transform_config` of a quantization_config; nothing for null and {}. CheckpointError for what the
    module docstring refuses."""
    if not stated:
        return RunTimeTransforms()
    groups = stated.get("config_groups") if isinstance(stated, dict) else None
    if not isinstance(groups, dict) or set(stated) != {"config_groups"}:
        raise _bad("transform_config", stated, "{} or a mapping with config_groups alone")
    inputs: list[InputTransform] = []
    attention: dict[str, set[tuple[Any, ...]]] = {place: set() for place in _ATTENTION}
    stored: list[str] = []
    for name, group in groups.items():
        where = f"transform_config.config_groups.{name}"
        kind, head_dim, applied = _group(where, group)
        for index, args in enumerate(applied):
            place = _applied(f"{where}.apply[{index}]", args)
            if place in _OFFLINE:
                continue
            if place == "output":
                raise _bad(f"{where}.apply[{index}].location", place, "another place: rotated outputs are not read")
            if kind == "random-matrix":
                raise _bad(f"{where}.type", kind, "hadamard or random-hadamard, which are orthogonal")
            if group.get("randomize"):
                raise _bad(f"{where}.randomize", True, "false: the permutation is not in config.json")
            stored += [f"{name}_{place}.{leaf}" for leaf in ("weight", "perm")]
            if place in _ATTENTION:
                attention[place].add((kind, head_dim))
            else:
                targets = _targets(f"{where}.apply[{index}].targets", args["targets"])
                ignore = _targets(f"{where}.apply[{index}].ignore", args.get("ignore") or [])
                inputs.append(InputTransform(name, kind, targets, ignore, head_dim, args.get("inverse", False)))
    if attention["q_attn"] != attention["k_cache"]:
        raise _bad("transform_config", "rotated queries or keys alone", "the same rotation of both")
    return RunTimeTransforms(tuple(inputs), bool(attention["q_attn"]), tuple(dict.fromkeys(stored)))


def _group(where: str, group: Any) -> tuple[str, int | None, list[Any]]:
    """(type, head_dim, the entries of apply) of one group."""
    if not isinstance(group, dict):
        raise _bad(where, group, "a mapping")
    refuse_unknown(where, group, _GROUP_KEYS, _bad)
    if group.get("type") not in _TYPES:
        raise _bad(f"{where}.type", group.get("type"), f"one of {', '.join(_TYPES)}")
    head_dim, applied = group.get("head_dim"), group.get("apply") or []
    if head_dim is not None and (type(head_dim) is not int or head_dim < 1):
        raise _bad(f"{where}.head_dim", head_dim, "a positive number of columns, or null")
    if not isinstance(applied, list):
        raise _bad(f"{where}.apply", applied, "a list")
    return group["type"], head_dim, applied


def _applied(where: str, args: Any) -> str:
    """The location of one entry of apply."""
    if not isinstance(args, dict):
        raise _bad(where, args, "a mapping")
    refuse_unknown(where, args, _APPLY_KEYS, _bad)
    if args.get("location") not in _LOCATIONS:
        raise _bad(f"{where}.location", args.get("location"), f"one of {', '.join(_LOCATIONS)}")
    if type(args.get("inverse", False)) is not bool:
        raise _bad(f"{where}.inverse", args["inverse"], "true or false")
    _targets(f"{where}.targets", args.get("targets"))
    return args["location"]


def _targets(where: str, value: Any) -> tuple[str, ...]:
    return parse_targets(where, [value] if isinstance(value, str) else value)


def _stored_rotation(transform: InputTransform, linear: str, size: int, stored: Checkpoint) -> Rotation:
    """A matrix of ±1 that lies in the files once: of this linear, or of another that shares it."""
    ending = f".{transform.name}_input.weight"
    names = [f"{linear}{ending}", *(name for name in stored.tensors if name.endswith(ending))]
    found = next((name for name in names
                  if name in stored.tensors and tuple(stored.tensors[name].shape) == (size, size)), None)  # fmt: skip
    if found is None:
        raise CheckpointError(
            f"{linear}: transform {transform.name} is of type random-hadamard, and its matrix [{size}, {size}] "
            f"({linear}{ending}) is not in the files",
            "the checkpoint is incomplete",
        )
    matrix = stored.read(found).double()
    if not torch.equal(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64)):
        raise CheckpointError(f"{found} is no Hadamard matrix of ±1", "the checkpoint is damaged")
    matrix = matrix.t() if transform.inverse else matrix
    return Rotation(torch.ones(size, dtype=torch.float64), matrix.contiguous() / size**0.5, True)


def _bad(where: str, found: Any, needed: str) -> CheckpointError:
    return bad_value(where, found, needed, "lowbit cannot decode such weights: start from the 16-bit model")
