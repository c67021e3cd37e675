"""What the models of speed and memory need to know of a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Kind = Literal["cuda", "rocm", "metal", "cpu"]
# Number formats of `Device.peak`. "f32" is there for processors only, where matrices are multiplied in it.
PEAK_DTYPES = ("f32", "bf16", "fp16", "fp8", "int8", "fp4", "int4")


@dataclass(frozen=True)
class Device:
    """One accelerator, or the processors of one machine with their memory.

    name                as one types it: "h100"
    label               as one reads it, with the size of the memory
    kind                "cuda", "rocm", "metal", "cpu": what engines have kernels for
    memory_bytes        all of it; what a program may use of it is less (`lowbit.advice.roofline.USABLE_MEMORY`)
    bandwidth           bytes/s between memory and chip: the data sheet's, or measured reading
    peak                dtype of `PEAK_DTYPES` → operations/s of a dense matrix product (a multiplication and an
                        addition are two); a dtype that is absent has no instruction of its own there
    source              address of the data sheet, or how it was measured
    compute_capability  of CUDA: (9, 0); None elsewhere
    consumer            True for cards that are sold for desktops and for Macs
    note                what a reader of the figures should know
    """

    name: str
    label: str
    kind: Kind
    memory_bytes: int
    bandwidth: float
    peak: Mapping[str, float] = field(hash=False)
    source: str
    compute_capability: tuple[int, int] | None = None
    consumer: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        unknown = set(self.peak) - set(PEAK_DTYPES)
        assert not unknown, f"{self.name}: no such dtype {unknown}"
        object.__setattr__(self, "peak", MappingProxyType(dict(self.peak)))

    def has(self, dtype: str) -> bool:
        """True where the device multiplies matrices of this dtype in hardware."""
        return dtype in self.peak

    @property
    def sixteen_bit_peak(self) -> float:
        """operations/s where activations stay in 16 bits (or 32, where that is the quickest a processor has)."""
        return max(self.peak.get(dtype, 0.0) for dtype in ("bf16", "fp16", "f32"))
