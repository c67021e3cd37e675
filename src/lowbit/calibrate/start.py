"""The finished model that refinement starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoint.base import Checkpoint
from lowbit.rounding.target import Stored


@dataclass(frozen=True)
class StartModel:
    """
    checkpoint  decoded, under the names of the reference's architecture; what it has in 16 bits stays as it is
    codes       linear → what the file holds of it, for its target
    files       of the model, which a resumed run compares
    """

    checkpoint: Checkpoint
    codes: Callable[[str], Stored]
    files: frozenset[Path]
