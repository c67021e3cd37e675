"""Stage 6: quantized tensors → files. A format is an object with the methods of `Exporter`, and a row in `FORMATS`.

A module with those functions is such an object; formats with variants (GPTQ v1 and v2) are instances in a module.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowbit.export.safetensors_writer import StoredTensor
    from lowbit.schemes import Scheme
    from lowbit.tensors import QuantizedTensor

# name of the format → "module" or "module:object"
FORMATS = {
    "compressed-tensors": "lowbit.export.compressed_tensors",
    "gptq": "lowbit.export.gptq:GPTQ_V1",
    "gptq_v2": "lowbit.export.gptq:GPTQ_V2",
    "awq": "lowbit.export.awq",
    "bitsandbytes": "lowbit.export.bitsandbytes",
    "modelopt": "lowbit.export.modelopt",
    "mxfp4": "lowbit.export.mxfp4",
    "float": "lowbit.export.plain",
}

# Schemes that only one format knows; every other scheme goes to compressed-tensors unless the user says otherwise.
_FORMAT_OF_NUMBER = {"nf4": "bitsandbytes", "fp4": "bitsandbytes"}


@dataclass(frozen=True)
class Piece:
    """Values for a rectangle of a stored tensor: from `row` of its first dimension and `column` of its second on.

    values are as wide as the stored tensor (then column is 0), or narrower: formats that store a weight transposed
    turn a slab of rows into a strip of columns.

    index  where it is given, values are stored[index] instead, of the same shape; it begins with a number: the expert,
           of formats that keep the experts of a block in one tensor
    """

    name: str
    values: Tensor
    row: int = 0
    column: int = 0
    index: tuple[int | slice, ...] = ()


class Exporter(Protocol):
    """What an output format must be able to say and do. `dtype` is the float dtype of the model, or, where codes are
    repacked, of the source's scales."""

    FORMAT: str
    ENGINE: str  # whose rules the written folder is verified against

    def storage_format(self, scheme: Scheme) -> str:
        """The format's own name of how it stores a scheme; FormatError if it cannot hold it."""
        ...

    def unfit(self, shape: tuple[int, int], scheme: Scheme) -> str | None:
        """Why a linear of this shape cannot be stored, though the scheme can; None where it can."""
        ...

    def scale_format(self, scheme: Scheme, dtype: torch.dtype) -> str:
        """How "model" scales are stored, a name of `lowbit.numerics.scales`: "bfloat16", "float32" …"""
        ...

    def lowest_zero_point(self, scheme: Scheme) -> int | None:
        """The least zero point, a signed code, that can be stored; None where every code can be one."""
        ...

    def stored_tensors(
        self, linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
    ) -> list[StoredTensor]:
        """What will be written for one linear, exactly."""
        ...

    def row_multiple(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """Slabs must begin at multiples of this many rows."""
        ...

    def pack(
        self,
        linear: str,
        quantized: QuantizedTensor,
        scheme: Scheme,
        first_row: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        input_absmax: float | None = None,
    ) -> list[Piece]:
        """A slab of rows, as it lies in the file. What there is once per linear comes with the slab at row 0."""
        ...

    def inexact(self, quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> str | None:
        """Why these rows of somebody else's codes would not survive `pack` bit for bit; None where they would.

        Looks at values (a zero point of 0 in GPTQ v1, a scale that float16 does not hold); what is wrong with the
        scheme itself is `storage_format`'s to say.
        """
        ...

    def quantization_config(self, schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        """config.json's `quantization_config`; FormatError where the format cannot say this (mixed schemes)."""
        ...

    def companion_files(self, schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, dict[str, Any]]:
        """Further JSON files of the format: name → content."""
        ...


def find_exporter(name: str) -> Exporter:
    """The exporter of an output format of folders; GGUF files are written by `gguf_pipeline`."""
    module, _, attribute = FORMATS[name].partition(":")
    found: Any = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def default_format(scheme: Scheme) -> str:
    """The format a scheme is written in when the user names none."""
    if scheme.weight.narrow:
        return "bitsandbytes"
    return _FORMAT_OF_NUMBER.get(scheme.weight.number, "compressed-tensors")
