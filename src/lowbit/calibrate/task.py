"""What a calibrated run works on, and the finished model that a refinement starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowbit.architecture import Architecture
from lowbit.calibrate.blocks import Progress
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.rounding.target import Stored, Target
from lowbit.schemes import ActivationSpec
from lowbit.settings import RunOptions, Settings
from lowbit.text import GivenText


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


@dataclass(frozen=True, kw_only=True)
class CalibrationTask:
    """
    checkpoint   the unquantized model
    targets      linear of a decoder block → the grid or ggml type of its codes; linears without one stay unchanged
    dtypes       stored name → dtype of the tensors written as floats
    options      of the checkpoint
    text         what stands for the calibration text in memory
    start        the finished model whose codes are refined
    activations  linear → rounding of its input at run time, for rotations that are learned
    """

    checkpoint: Checkpoint
    architecture: Architecture
    targets: dict[str, Target]
    dtypes: dict[str, torch.dtype]
    settings: Settings
    options: OpenOptions
    run: RunOptions
    progress: Progress | None = None
    text: GivenText | None = None
    start: StartModel | None = None
    activations: Mapping[str, ActivationSpec] = field(default_factory=dict)
