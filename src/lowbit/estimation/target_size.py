"""`--target-size`: the scheme of most bits whose files fit into so many bytes, found by planning from headers.

Candidates go from many bits to few; each is planned to the byte, as its run would write it, and the first that fits is
taken. File types that are of no use without an importance matrix are candidates where there is one. The size says
nothing of quality: `lowbit advise` and the chart of a report do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import ArchitectureError, FormatError, LowbitError, UsageError
from lowbit.estimation.weights import weight_bytes
from lowbit.measure import human_bytes

# From many bits to few.
FOLDER_SCHEMES = ("W8A16", "W4A16", "W3A16", "W2A16")
FILE_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q3_K_S", "Q2_K")
WITH_IMPORTANCE = (
    *FILE_TYPES[:8], "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"
)  # fmt: skip


@dataclass(frozen=True)
class Fitting:
    """scheme, bytes: what fits. larger, larger_bytes: the next one, which does not; None if the first of all fits."""

    scheme: str
    bytes: int
    larger: str | None = None
    larger_bytes: int = 0

    def __str__(self) -> str:
        beyond = f"; {self.larger} would take {human_bytes(self.larger_bytes)}" if self.larger else ""
        return f"{self.scheme} takes {human_bytes(self.bytes)}{beyond}"


def scheme_within(
    model: str | Path, target: int, gguf: bool, options: OpenOptions | None = None, **settings: Any
) -> Fitting:
    """The first candidate whose files have at most `target` bytes.

    gguf  file types, of a GGUF file; else schemes of folders. settings  the others of the run

    Raises UsageError where none fits, and what planning raises where no candidate can be planned.
    """
    if settings.get("scheme") is not None:
        raise UsageError("a target size chooses the scheme, and one was given", "leave out --scheme or --target-size")
    candidates = (WITH_IMPORTANCE if settings.get("imatrix") else FILE_TYPES) if gguf else FOLDER_SCHEMES
    larger: tuple[str | None, int] = (None, 0)
    refused: LowbitError | None = None
    for scheme in candidates:
        try:
            found = weight_bytes(model, scheme, options=options, **settings)
        except (FormatError, ArchitectureError) as error:  # the model's shapes, or the format, do not take this one
            refused = error
            continue
        if found.files <= target:
            return Fitting(scheme, found.files, *larger)
        larger = (scheme, found.files)
    if larger[0] is None and refused is not None:
        raise refused
    raise UsageError(
        f"nothing fits into {human_bytes(target)}: {larger[0]}, the smallest, takes {human_bytes(larger[1])}",
        "allow more bytes, or choose a smaller model" if not gguf or settings.get("imatrix")
        else "allow more bytes; with --imatrix there are smaller file types",
    )  # fmt: skip
