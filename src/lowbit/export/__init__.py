"""Quantized tensors → files. Every output format has an `Exporter` and a row in `registry.FORMATS`.

An exporter is a module with the functions of the protocol, or, for variants (GPTQ v1 and v2), an instance of a class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lowbit.patterns import up_to_a_dot
from lowbit.registry import FORMATS, load

if TYPE_CHECKING:
    from torch import Tensor

    from lowbit.export.safetensors_writer import StoredTensor
    from lowbit.schemes import Scheme
    from lowbit.tensors import InputRange, QuantizedTensor

# Numbers that only one format stores; compressed-tensors is the default for all others.
_FORMAT_OF_NUMBER = {
    "nf4": "bitsandbytes", "fp4": "bitsandbytes", "ternary": "bitnet", "kmeans": "codebook", "log": "codebook",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Values for a rectangle of a stored tensor, from `row` of its first dimension and `column` of its second on.

    A format that stores the weight transposed turns a slab of rows into a strip of columns.

    index  if given, the values are stored[index] instead; its first entry is the expert, in formats that keep the
           experts of a block in one tensor
    """

    name: str
    values: Tensor
    row: int = 0
    column: int = 0
    index: tuple[int | slice, ...] = ()


class Exporter(Protocol):
    """One output format. `dtype` is the float dtype of the model; of the source's scales where codes are repacked."""

    FORMAT: str

    def storage_format(self, scheme: Scheme) -> str:
        """The format's own name for the layout of a scheme; FormatError if it cannot hold it."""
        ...

    def unfit(self, shape: tuple[int, int], scheme: Scheme) -> str | None:
        """Why a linear of this shape cannot be stored, though the scheme can; None where it can."""
        ...

    def scale_format(self, scheme: Scheme, dtype: torch.dtype) -> str:
        """Storage of "model" scales, a name of `lowbit.numerics.scales`: "bfloat16", "float32" …"""
        ...

    def lowest_zero_point(self, scheme: Scheme) -> int | None:
        """The lowest zero point, a signed code, that can be stored; None where every code can be one."""
        ...

    def stored_tensors(
        self, linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
    ) -> list[StoredTensor]:
        """The tensors of one linear, with dtypes and shapes."""
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
        input_range: InputRange | None = None,
    ) -> list[Piece]:
        """A slab of rows, packed. Tensors that a linear has once come with the slab at row 0.

        input_range  of the input in calibration, for schemes with static activation scales
        """
        ...

    def inexact(self, quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> str | None:
        """Why `pack` would change these rows of a source's codes; None where they survive bit for bit.

        About values (a zero point of 0 in GPTQ v1, a scale that float16 does not hold); `storage_format` refuses
        schemes.
        """
        ...

    def quantization_config(self, schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        """config.json's `quantization_config`; FormatError where it cannot express the schemes.

        schemes  linear → scheme, of every quantized linear
        ignored  names of the linears that stay unquantized
        """
        ...

    def companion_files(self, schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, dict[str, Any]]:
        """Further JSON files of the format: name → content."""
        ...

    def needless(self, scheme: Scheme) -> tuple[str, ...]:
        """Endings of stored names that loaders need not find in a linear which they load as one matrix with others."""
        ...

    def engine_of(self, schemes: dict[str, Scheme]) -> str | None:
        """The engine whose rules the output must pass, where it is not the usual one of the format's row."""
        ...


# Answers that several formats share; a module takes one over by `lowest_zero_point = every_zero_point`.
def every_zero_point(scheme: Scheme) -> int | None:
    """None: every code can be a zero point."""
    return None


def no_companions(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, dict[str, Any]]:
    """Empty: loaders read config.json only."""
    return {}


def usual_engine(schemes: dict[str, Scheme]) -> str | None:
    """None: whatever the schemes are."""
    return None


def none_needless(scheme: Scheme) -> tuple[str, ...]:
    """None: a fused linear is stored as a single one is."""
    return ()


def not_converted(quantized: list[str], ignored: list[str]) -> list[str]:
    """Names for transformers that match every ignored linear and no quantized one.

    transformers compares an entry with the beginning of a module's name (as a regex, up to a dot or the end) and with
    its end. Where a plain name would also catch a quantized linear, an anchored regex takes its place. A tied output
    head is a linear to transformers though the files do not hold one, hence `lm_head`. SGLang looks fused linears up
    under the fused name.
    """
    entries = []
    for name in dict.fromkeys([*ignored, *fused_names(ignored), "lm_head"]):
        if name in quantized:
            continue
        plain = up_to_a_dot(name)
        catches = any(plain.match(linear) or linear.endswith(name) for linear in quantized)
        entries.append(f"^{re.escape(name)}$" if catches else name)
    return entries


def block_rows(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Slabs must not cut a block; without blocks they may begin at any row."""
    return scheme.weight.block_rows


def float16_scales(scheme: Scheme, dtype: torch.dtype) -> str:
    """float16; in a bfloat16 model only numbers that bfloat16 holds too, since vLLM casts scales to its dtype."""
    return "bfloat16_in_float16" if dtype == torch.bfloat16 else "float16"


def find_exporter(name: str) -> Exporter:
    """The exporter of an output format of folders."""
    write = FORMATS[name].write
    assert write is not None, f"{name} has no exporter"
    return load(write)


def default_format(scheme: Scheme) -> str:
    """The output format of a scheme when the user names none."""
    if scheme.weight.narrow:
        return "bitsandbytes"
    if scheme.weight.ranged:
        return "modelopt"
    return _FORMAT_OF_NUMBER.get(scheme.weight.number, "compressed-tensors")


# Fused name → the linears that engines load as one under it. vLLM: `packed_modules_mapping` of the model classes;
# the last row is SGLang's name of DeepSeek's.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def fused_names(members: list[str]) -> Iterator[str]:
    """The fused names of sets of which every member is in `members`."""
    present = set(members)
    for name in members:
        parent, _, leaf = name.rpartition(".")
        for fused, parts in FUSED.items():
            if leaf == parts[0] and all(f"{parent}.{part}" in present for part in parts):
                yield f"{parent}.{fused}"
