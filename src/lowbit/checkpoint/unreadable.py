"""Quantized folders that lowbit knows, by name or by layout, and cannot read: why, and what to do instead.

A format is read where its layout is fixed, by a specification or by the loader of an engine that all files must suit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowbit.checkpoint.base import TensorInfo


@dataclass(frozen=True)
class Unreadable:
    """why follows "… cannot be read:"; instead is the hint."""

    why: str
    instead: str


_START = "start from the 16-bit checkpoint"

MLX = "mlx"  # states no quant_method: its layout tells

# quant_method, in lower case.
UNREADABLE: dict[str, Unreadable] = {
    "aqlm": Unreadable(
        "a code stands for several weights at once, and vectors of several learned codebooks are summed (AQLM), which "
        "no format that lowbit writes can hold",
        f"{_START}, or run it as it is: transformers with the package aqlm",
    ),
    "vptq": Unreadable(
        "weights are vectors out of learned codebooks, behind permutations and norms of channels (VPTQ), which no "
        "format that lowbit writes can hold",
        f"{_START}, or run it as it is: transformers with the package vptq",
    ),
    "quip": Unreadable(
        "weights are points of a lattice in a rotated basis (QuIP#), and the layout is that of its authors' kernels, "
        "without a version",
        f"{_START}, or run it as it is with the quip-sharp repository",
    ),
    "spqr": Unreadable(
        "groups, their scales and sparse outliers lie as its own kernel reads them (SpQR)",
        f"{_START}, or run it as it is: transformers with the package spqr_quant",
    ),
    "higgs": Unreadable(
        "weights are points of a grid in a rotated basis, packed for the kernels of FLUTE (HIGGS)",
        f"{_START}, or run it as it is: transformers with the package flute-kernel",
    ),
    "quanto": Unreadable(
        "transformers does not save what it quantized with quanto, and optimum-quanto's own folders state it in "
        "quanto_qmap.json, with shifts that are floats",
        f"{_START}, or run it as it is with optimum-quanto",
    ),
    MLX: Unreadable(
        "lowbit has no reader for codes in words of 32 bits beside scales and float biases",
        f"{_START}; where there is none, mlx_lm.convert --dequantize makes a 16-bit folder of it",
    ),
}  # fmt: skip
_SPELLINGS = {"quip#": "quip", "quip_sharp": "quip", "quip-sharp": "quip", "quipsharp": "quip"}


def is_mlx(tensors: Mapping[str, TensorInfo]) -> bool:
    """True for the layout of MLX, of any bits and mode: L.weight in words without a sign beside L.scales."""
    return any(
        info.stored == "U32" and name.endswith(".weight") and f"{name.removesuffix('weight')}scales" in tensors
        for name, info in tensors.items()
    )


def find_unreadable(method: str) -> Unreadable | None:
    """The entry of a quant_method in lower case, other spellings included; None for one that is not known at all."""
    return UNREADABLE.get(_SPELLINGS.get(method, method))
