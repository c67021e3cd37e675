"""`transform_config`: rotations of inputs that engines apply as the model runs, as llm-compressor states its R4.

    config_groups: R4 → {type: hadamard, head_dim, apply: [{location: input}, {location: weight_input, inverse: true}]}

The second entry says what the stored weight holds already; loaders skip it. One group for each size of block. No matrix
is stored: loaders build Sylvester's, and vLLM's kernel reads none.
"""

from __future__ import annotations

from typing import Any

from lowbit.architecture import Architecture
from lowbit.numerics.hadamard import Rotation


def stated_rotations(rotations: dict[str, Rotation], architecture: Architecture) -> dict[str, Any]:
    """The `transform_config` of linears whose inputs are rotated in blocks of `Rotation.size`."""
    sizes: dict[int, list[str]] = {}
    for linear, rotation in rotations.items():
        sizes.setdefault(rotation.size, []).append(linear)
    groups = {}
    for index, (size, linears) in enumerate(sizes.items()):
        targets = _targets(linears, architecture)
        groups["R4" if index == 0 else f"R4_{index}"] = {
            "type": "hadamard",
            "apply": [
                {"targets": targets, "location": "input", "inverse": False, "ignore": []},
                {"targets": targets, "location": "weight_input", "inverse": True, "ignore": []},
            ],
            "randomize": False,
            "requires_grad": False,
            "head_dim": size,
            "precision": "torch.float32",
        }
    return {"config_groups": groups}


def _targets(linears: list[str], architecture: Architecture) -> list[str]:
    """One regex where the linears are all of the model with their last name; else every name."""
    leaves = {name.rpartition(".")[2] for name in linears}
    same = [name for name in architecture.linears if name.rpartition(".")[2] in leaves]
    if len(leaves) == 1 and set(same) == set(linears):
        return [f"re:.*\\.{leaves.pop()}$"]
    return linears
