"""`Checkpoint`: named tensors on disk, lazily.

Opening reads headers only: every name, shape and dtype is known, no weight is. `read` returns rows of one tensor;
`release` tells the operating system that its pages may go, so that walking through a model of any size keeps the
resident memory of one slab.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowbit.schemes import Scheme
    from lowbit.tensors import QuantizedTensor


# What quantizing leaves beside the weights; it also tells a folder of ours from one that merely has the same name.
REPORT_NAME = "lowbit-report.json"
HTML_NAME = "report.html"

_PART = re.compile(r"-\d{5}-of-\d{5}$")


def report_path(output: Path, name: str = REPORT_NAME) -> Path:
    """Where the report (or the page, `HTML_NAME`) of a written model lies: inside a folder, beside a GGUF file, as
    x.lowbit-report.json for x.gguf and for its parts."""
    if output.suffix != ".gguf":
        return output / name
    return output.with_name(f"{_PART.sub('', output.stem)}.{name}")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    name    in Hugging Face spelling, whatever the file calls it
    shape   as torch sees it: [N, K] for a linear
    dtype   of what `read` returns; float32 for ggml types, which are decoded on read
    stored  the file's own name of the stored type: "BF16", "Q4_1"
    nbytes  in the file
    file    the file that holds it
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str
    nbytes: int
    file: Path


class Checkpoint(Protocol):
    """An open model: tensors, and a Hugging Face folder with its config and tokenizer.

    `read` and `release` may be called from several threads at once.
    """

    source: str  # what the user typed
    kind: str  # "safetensors", "gguf", "pickle", or the quant_method of a quantized folder (decoded)
    tensors: dict[str, TensorInfo]  # in file order
    metadata: dict[str, Any]  # GGUF key-values, or the safetensors __metadata__
    notes: list[str]  # what the user should know of this source: "tensors are stored as Q4_1 …"

    @property
    def folder(self) -> Path:
        """Holds config.json, tokenizer files and so on; for GGUF a rebuilt folder, without weights."""
        ...

    def config(self) -> dict[str, Any]:
        """config.json, parsed."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of a tensor, on the CPU, C-contiguous. May alias the mapped file: never write into it."""
        ...

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory. Slices returned by `read` stay valid (they fault back in)."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class CanReadCodes(Protocol):
    """What a checkpoint of quantized linears offers beside floats: the codes themselves."""

    schemes: dict[str, Scheme]  # weight name → scheme, of the quantized ones

    @property
    def input_scales(self) -> dict[str, float]:
        """Weight name → static activation scale (multiplier), for schemes that store one."""
        ...

    def read_quantized(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor:
        """Codes and scales of rows start..stop; start divides by `row_multiple`."""
        ...

    def row_multiple(self, name: str) -> int:
        """Where slabs of a quantized weight may begin."""
        ...

    def scale_dtype(self, name: str) -> torch.dtype:
        """The float dtype of its stored scales."""
        ...

    def says_quantized(self, linear: str) -> bool:
        """True where config.json quantizes a linear, whatever the files hold."""
        ...


def is_decoded(checkpoint: Checkpoint, name: str) -> bool:
    """True for a weight that is shown decoded, [N, K], while the files hold codes."""
    return name in getattr(checkpoint, "schemes", ())


@dataclass(frozen=True)
class OpenOptions:
    """How much the user trusts the source.

    allow_pickle       read .bin / .pt files (they can run code); refused otherwise
    trust_remote_code  let transformers import modelling code that comes with the model; refused otherwise
    revision           of a hub id
    """

    allow_pickle: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
