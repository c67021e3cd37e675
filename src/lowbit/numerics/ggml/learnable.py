"""The parameters of ggml blocks as a function of relative changes, with gradients: what a distillation moves.

Each tensor that a block stores beside its codes (`Blocks.stored`) is one parameter, at the precision of the file:

    d, dmin      half                start · exp(change)
    m            half                start + d · change        (Q4_1 and Q5_1: it may change its sign)
    scales …     integers of a type  nearest to start · exp(change), within their bits
    e            E8M0                the exponent nearest to start + change / ln 2
    scales       unsigned E4M3       of NVFP4

`changed` gives scale and offset of every group, bit for bit as `unpack` of the resulting bytes does. The shift of IQ1_S
is a choice of codes, and stays; floats (F32, F16, BF16) have no parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.numerics.ggml.codebooks import MXFP4_TOP, NVFP4_TOP, e8m0_half, ue4m3_half
from lowbit.numerics.ggml.iquant_search import SHIFT
from lowbit.numerics.ggml.iquants import SCALE_UNITS
from lowbit.numerics.ggml.types import Blocks, GgmlType, per_column
from lowbit.numerics.straight_through import changed_half, changed_integer, moved_half, straight_through

# Type → (lowest, highest) of its integer sub-scales, and of the sub-minima.
_INTEGERS: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "Q2_K": ((0, 15), (0, 15)), "Q3_K": ((-32, 31), None), "Q4_K": ((0, 63), (0, 63)), "Q5_K": ((0, 63), (0, 63)),
    "Q6_K": ((-128, 127), None), "IQ4_XS": ((0, 63), None),
    "IQ1_S": ((0, 7), None), "IQ1_M": ((0, 7), None),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), ((0, 15), None)),
}  # fmt: skip
_FIXED = ("shift",)
_PER_OCTAVE = 1.4426950408889634  # 1 / ln 2


def parameter_names(blocks: Blocks) -> tuple[str, ...]:
    """Names of the tensors of `Blocks.stored` that can change."""
    return tuple(name for name in blocks.stored if name not in _FIXED)


def changed(kind: GgmlType, blocks: Blocks, changes: Mapping[str, Tensor]) -> Blocks:
    """The blocks with changed parameters: `stored` in the dtypes of a file, `scale` and `offset` with gradients.

    changes  name of `parameter_names` → float32 of its shape; names that are missing do not change
    """
    values = {name: _plain(kind, name, held) for name, held in blocks.stored.items()}
    values |= {name: _changed_parameter(kind, blocks.stored, name, change) for name, change in changes.items()}
    scale, offset = _effective(kind, values)
    stored = {name: _as_stored(kind, name, held, values[name].detach()) for name, held in blocks.stored.items()}
    return replace(blocks, scale=scale, offset=offset, stored=stored)


def _plain(kind: GgmlType, name: str, held: Tensor) -> Tensor:
    """A stored tensor as the number that it stands for, float32."""
    if kind.name == "MXFP4":
        return e8m0_half(held)
    return ue4m3_half(held) if kind.name == "NVFP4" else held.float()


def _changed_parameter(kind: GgmlType, stored: dict[str, Tensor], name: str, change: Tensor) -> Tensor:
    held = stored[name]
    if name in ("d", "dmin"):
        return changed_half(held, change)
    if name == "m":
        return moved_half(held, stored["d"].float().abs(), change)
    if kind.name == "MXFP4":
        start = e8m0_half(held)
        code = (held.float() + change.detach() * _PER_OCTAVE).round().clamp(0, MXFP4_TOP).to(torch.uint8)
        return straight_through(start * change.exp(), e8m0_half(torch.where(change == 0, held, code)))
    if kind.name == "NVFP4":
        wanted = ue4m3_half(held) * change.exp()
        code = torch.where(change == 0, held, _nearest_ue4m3(wanted.detach()))
        return straight_through(wanted, ue4m3_half(code))
    scales, minima = _INTEGERS[kind.name]
    bounds = minima if name == "minima" else scales
    assert bounds is not None, f"{kind.name} has no {name}"
    slope, zero = (1, -32) if kind.name == "IQ4_XS" else (2, 1) if kind.family == "i" else (1, 0)
    return changed_integer(held, change, *bounds, slope, zero)


def _nearest_ue4m3(wanted: Tensor) -> Tensor:
    """Codes, uint8, of the halved E4M3 nearest to float32 values; ties to the smaller, and 0 only for 0."""
    table = ue4m3_half(torch.arange(NVFP4_TOP + 1, dtype=torch.uint8, device=wanted.device))
    code = torch.bucketize(wanted, (table[1:] + table[:-1]) / 2)
    return torch.where(wanted > 0, code.clamp(min=1), code).to(torch.uint8)


def _effective(kind: GgmlType, values: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of every group, in the order of float32 operations of the family's `unpack`."""
    if kind.family == "k":
        scale = per_column(values["d"], values["scales"].shape[1]) * values["scales"]
        if "dmin" not in values:
            return scale, None
        return scale, -(per_column(values["dmin"], values["minima"].shape[1]) * values["minima"])
    if kind.family == "i":
        per_group = values["scale"].shape[1] // values["d"].shape[1]
        scale = values["d"].repeat_interleave(per_group, dim=1) * (SCALE_UNITS[kind.name] * (2 * values["scale"] + 1))
        if kind.name != "IQ1_S":
            return scale, None
        return scale, scale * torch.where(values["shift"] > 0, -SHIFT, SHIFT)
    if kind.name == "IQ4_XS":
        integer = values["scales"] - 32.0
        return per_column(values["d"], integer.shape[1]) * integer, None
    if kind.name in ("MXFP4", "NVFP4"):
        return values["e" if kind.name == "MXFP4" else "scales"], None
    if kind.name == "Q1_0":
        return 2 * values["d"], -values["d"]
    return values["d"], values.get("m")


def _as_stored(kind: GgmlType, name: str, held: Tensor, value: Tensor) -> Tensor:
    """The number in the dtype that the family's `pack` takes."""
    if kind.name == "MXFP4":
        table = e8m0_half(torch.arange(256, dtype=torch.uint8, device=value.device))
        return torch.searchsorted(table, value.contiguous()).to(torch.uint8)
    if kind.name == "NVFP4":
        table = ue4m3_half(torch.arange(NVFP4_TOP + 1, dtype=torch.uint8, device=value.device))
        return torch.where(
            value == ue4m3_half(held), held, torch.searchsorted(table, value.contiguous()).to(torch.uint8)
        )
    return value.to(held.dtype)
