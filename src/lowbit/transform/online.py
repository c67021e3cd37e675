"""A rotation that the engine applies: R4 of QuaRot (Ashkboos et al., arXiv 2404.00456), the input of down_proj.

    x V        as the model runs            V = S / sqrt(n), in blocks of n columns; S: Sylvester's matrix
    W' = W V   folded into the weight before it is rounded           x V (W V)ᵀ = x Wᵀ

No norm or linear feeds this input: an activation function lies between, so that nothing before can take the rotation.
Its outliers (one channel, few tokens) are what 4-bit activations break on. The largest power of two that divides the
columns is n: kernels compute such a transform without reading a matrix, in n log n; 14336 = 7 · 2048.

Calibration keeps the model in its own basis: only what is rounded, and what its rounding measures, is rotated
(`transform.rotate.rotated_stats`), and the decoded weight is rotated back. So nothing else of a run knows of V.

Refused: experts, which engines compute in fused operations that take no transform; transposed linears (GPT-2), which
loaders do not hook; a width whose power of two is below 16; models with images, whose linears engines rename.
"""

from __future__ import annotations

from collections.abc import Iterable

from lowbit.architecture.structure import Architecture, Linear
from lowbit.errors import UsageError
from lowbit.methods import Method
from lowbit.numerics.hadamard import LARGEST_SYLVESTER, Rotation, sylvester
from lowbit.registry import load
from lowbit.transform.facts import ModelFacts
from lowbit.transform.rotate import beside_stream

SMALLEST_BLOCK = 16


def online_rotations(method: Method, architecture: Architecture, linears: Iterable[str]) -> dict[str, Rotation]:
    """Linear → rotation of its input at run time, of the quantized `linears` that the method's transforms concern."""
    found: dict[str, Rotation] = {}
    for transform in method.transforms:
        if transform.online is not None:
            found |= load(transform.online)(architecture, linears)
    return found


def down_rotations(architecture: Architecture, linears: Iterable[str]) -> dict[str, Rotation]:
    """The rotations of all down_proj of decoder blocks among `linears`; UsageError where a model does not allow one."""
    chosen = [architecture.linears[name] for name in linears]
    rotations: dict[int, Rotation] = {}  # one object for all linears of a size
    found = {}
    for linear in chosen:
        if linear.role == "down_proj" and linear.block is not None:
            why = _unfit(linear)
            if why is not None:
                raise _refusal(architecture, why)
            size = block_size(linear.shape[1])
            found[linear.name] = rotations.setdefault(size, sylvester(size))
    return found


def block_size(columns: int) -> int:
    """The largest power of two that divides a number of columns, at most what kernels take."""
    return min(columns & -columns, LARGEST_SYLVESTER)


def refuse_down(facts: ModelFacts) -> None:
    """UsageError if the inputs of a model's down_proj cannot be rotated online."""
    architecture = facts.architecture
    downs = [linear for linear in architecture.linears.values()
             if linear.role == "down_proj" and linear.block is not None]  # fmt: skip
    if "experts" in architecture.roles.values():
        raise _refusal(architecture, "its experts are stored in one tensor")
    if not downs:
        raise _refusal(architecture, "it has no down_proj")
    why = next((why for linear in downs if (why := _unfit(linear)) is not None), None) or beside_stream(facts)
    if why is not None:
        raise _refusal(architecture, why)


def _unfit(linear: Linear) -> str | None:
    columns = linear.shape[1]
    if linear.expert is not None:
        return f"{linear.name} is an expert, which engines compute in a fused operation"
    if linear.transposed:
        return f"{linear.name} is a Conv1D, which loaders do not rotate"
    if block_size(columns) < SMALLEST_BLOCK:
        return (f"{linear.name} has {columns} columns, whose largest power of two is {block_size(columns)}; blocks "
                f"have at least {SMALLEST_BLOCK}")  # fmt: skip
    return None


def _refusal(architecture: Architecture, why: str) -> UsageError:
    return UsageError(
        f"the input of down_proj of {architecture.class_name} cannot be rotated as the model runs: {why}",
        "omit `hadamard-down`; `hadamard` and `rotate` are folded into the weights",
    )
