"""Stage 6: quantized tensors → files. A format is a module with the functions of `Exporter`, and a row in `FORMATS`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowbit.export.safetensors_writer import StoredTensor
    from lowbit.schemes import Scheme
    from lowbit.tensors import QuantizedTensor

FORMATS = {"compressed-tensors": "lowbit.export.compressed_tensors"}


class Exporter(Protocol):
    """What an output format must be able to say and do."""

    FORMAT: str

    def storage_format(self, scheme: Scheme) -> str:
        """The format's own name of how it stores a scheme; FormatError if it cannot hold it."""
        ...

    def stored_tensors(
        self, linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
    ) -> list[StoredTensor]:
        """What will be written for one linear, exactly."""
        ...

    def row_multiple(self, scheme: Scheme) -> int:
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
    ) -> list[tuple[str, Tensor, int]]:
        """A slab of rows as (stored name, values, row in the stored tensor)."""
        ...

    def quantization_config(self, schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        """config.json's `quantization_config`."""
        ...


def find_exporter(name: str) -> Exporter:
    """The exporter of an output format."""
    return importlib.import_module(FORMATS[name])  # type: ignore[return-value]
