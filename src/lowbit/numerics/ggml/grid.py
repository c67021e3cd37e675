"""`GgmlGrid`: a ggml type as a number format for error feedback (GPTQ).

    fit     weights of whole blocks → params    the scales (offsets, sub-scales) that the type's encoder chooses
    round   weights, params → codes             nearest code given the params; any slice of columns_per_code columns
    decode  codes, params → weights             float32, equal to the decoded block, bit for bit
    pack    codes, params → blocks              the bytes of a file

Params are `Blocks` without codes. `fit` takes as little as one block of columns, so an algorithm can fit weights that
it has already corrected, block by block, and `join` the params; `at` gives the params of a few columns:

    for start in range(0, K, grid.block):
        params.append(grid.fit(weight[:, start : start + grid.block], importance[start : start + grid.block]))
        for column in range(0, grid.block, grid.columns_per_code):
            here = grid.at(params[-1], column, column + grid.columns_per_code)
            ... round, decode, spread the error over the columns to the right ...
    blocks = grid.pack(torch.cat(codes, dim=1), grid.join(params))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from lowbit.errors import ShapeError
from lowbit.kernels.tables import Codebook
from lowbit.numerics import ggml
from lowbit.numerics.ggml.codebooks import FP4_VALUES, IQ4_VALUES
from lowbit.numerics.ggml.types import Blocks, GgmlType, family, find_type, weights_of

# Bits that a block spends on the codes of one weight. Signs of lattice points are part of the code (IQ2_XXS, IQ2_XS and
# IQ3_XXS leave out one in eight); the shift of IQ1_M, one bit for 8 weights, is too, that of IQ1_S is a parameter.
_CODE_BITS = {
    "F32": 32, "F16": 16, "BF16": 16,
    "Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q1_0": 1, "Q2_0": 2,
    "Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6,
    "IQ4_NL": 4, "IQ4_XS": 4, "MXFP4": 4, "NVFP4": 4,
    "TQ1_0": 52 / 32, "TQ2_0": 2,
    "IQ1_S": 11 / 8, "IQ1_M": 12 / 8, "IQ2_XXS": 15 / 8, "IQ2_XS": 16 / 8, "IQ2_S": 18 / 8,
    "IQ3_XXS": 23 / 8, "IQ3_S": 13 / 4,
}  # fmt: skip


@dataclass(frozen=True)
class IntLevels:
    """The integers that scales multiply: lowest … highest, stored as themselves plus `zero`."""

    lowest: int
    highest: int
    zero: int = 0


_FP4 = Codebook("e2m1_doubled", tuple(float(value) for value in FP4_VALUES))
_IQ4 = Codebook("iq4_nl", tuple(float(value) for value in IQ4_VALUES))
_LEVELS: dict[str, IntLevels | Codebook] = {
    "Q4_0": IntLevels(-8, 7, 8), "Q4_1": IntLevels(0, 15), "Q5_0": IntLevels(-16, 15, 16), "Q5_1": IntLevels(0, 31),
    "Q8_0": IntLevels(-128, 127), "Q1_0": IntLevels(0, 1), "Q2_0": IntLevels(-1, 2, 1),
    "Q2_K": IntLevels(0, 3), "Q3_K": IntLevels(-4, 3, 4), "Q4_K": IntLevels(0, 15), "Q5_K": IntLevels(0, 31),
    "Q6_K": IntLevels(-32, 31, 32), "TQ1_0": IntLevels(-1, 1, 1), "TQ2_0": IntLevels(-1, 1, 1),
    "IQ4_NL": _IQ4, "IQ4_XS": _IQ4, "MXFP4": _FP4, "NVFP4": _FP4,
}  # fmt: skip


@dataclass(frozen=True)
class GgmlGrid:
    """One ggml type; UsageError if `type_name` is none. Grids of the same type compare equal."""

    type_name: str

    def __post_init__(self):
        object.__setattr__(self, "type_name", find_type(self.type_name).name)

    @property
    def name(self) -> str:
        return self.type_name

    @cached_property
    def kind(self) -> GgmlType:
        return find_type(self.type_name)

    @property
    def block(self) -> int:
        """Columns of a block, which `fit` and `pack` take whole."""
        return self.kind.weights

    @property
    def columns_per_code(self) -> int:
        """1 for scalar types, 4 or 8 for types that round to lattice points."""
        return _layout(self.kind)[0]

    @property
    def bits(self) -> float:
        """Stored bits per code; 1.625 for TQ1_0, which packs several codes together."""
        return _layout(self.kind)[1]

    @property
    def symmetric(self) -> bool:
        """True if no offset is stored."""
        return _layout(self.kind)[2]

    @property
    def levels(self) -> IntLevels | Codebook | None:
        """The values that scales multiply, for types that round single columns; None for floats and lattices."""
        return _LEVELS.get(self.name)

    @property
    def float_minima(self) -> bool:
        """True if every group has a minimum m of its own, as a half: it can be any number (Q4_1, Q5_1)."""
        return "m" in family(self.kind).unpack(self.kind, torch.zeros((1, self.kind.size), dtype=torch.uint8)).stored

    def shifted(self, blocks: Tensor, shift: Tensor) -> Tensor:
        """Blocks with m + shift, rounded to half, in place of m; codes and scales stay. shift  float32 [N, G]"""
        codes, params = self.unpack(blocks)
        moved = (params.stored["m"].float() + shift).half()
        return self.pack(codes, replace(params, stored={**params.stored, "m": moved}))

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Blocks:
        """Params of weight [N, K], K whole blocks; importance float32 [K] weights the squared errors."""
        return self.unpack(ggml.encode(self.name, weight, importance))[1]

    def at(self, params: Blocks, start: int, stop: int) -> Blocks:
        """Params of columns start..stop, for `round` and `decode`; a scale per column, nothing stored."""
        groups = torch.arange(start, stop, device=params.scale.device) // self.kind.group
        offset = None if params.offset is None else params.offset[:, groups]
        return Blocks(params.codes, params.scale[:, groups], offset)

    def round(self, weight: Tensor, params: Blocks, importance: Tensor | None = None) -> Tensor:
        """Codes [N, k / columns_per_code] of weight [N, k]; importance float32 [k] matters to lattices only."""
        return family(self.kind).round(self.kind, weight.to(torch.float32), params, importance)

    def decode(self, codes: Tensor, params: Blocks) -> Tensor:
        """Float32 [N, k] of codes [N, k / columns_per_code]."""
        return weights_of(self.kind, codes, params)

    def join(self, params: Sequence[Blocks]) -> Blocks:
        """Params of consecutive runs of whole blocks as one."""
        offsets = [part.offset for part in params if part.offset is not None]
        return Blocks(
            torch.cat([part.codes for part in params], dim=1),
            torch.cat([part.scale for part in params], dim=1),
            torch.cat(offsets, dim=1) if offsets else None,
            {key: torch.cat([part.stored[key] for part in params], dim=1) for key in params[0].stored},
        )

    def pack(self, codes: Tensor, params: Blocks) -> Tensor:
        """Blocks, uint8 [N, row bytes], of the codes of whole rows; ShapeError if params are of other columns."""
        columns = codes.shape[1] * self.columns_per_code
        fitted = params.scale.shape[1] * self.kind.group
        if columns != fitted:
            raise ShapeError(f"{columns} columns of codes, and params of {fitted} columns ({self.name})")
        if not params.stored and self.kind.family != "plain":
            raise ShapeError(
                f"params of single columns cannot be packed ({self.name})", "join those that fit made of whole blocks"
            )
        return family(self.kind).pack(self.kind, codes, params.stored)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Blocks]:
        """(codes, params) of blocks: the inverse of `pack`."""
        unpacked = family(self.kind).unpack(self.kind, blocks)
        return unpacked.codes, unpacked.with_codes(unpacked.codes[:, :0])


@cache
def _layout(kind: GgmlType) -> tuple[int, float, bool]:
    """(columns per code, bits per code, whether there are no offsets), as the family unpacks an empty block."""
    blocks = family(kind).unpack(kind, torch.zeros((1, kind.size), dtype=torch.uint8))
    codes = blocks.codes.shape[1]
    columns = kind.weights // codes
    return columns, _CODE_BITS[kind.name] * columns, blocks.offset is None
