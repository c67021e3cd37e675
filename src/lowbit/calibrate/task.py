"""What a calibrated run works on, and the finished model that a refinement starts from.

`stream_rotations` has the rotations of the residual stream, found or learned, which are folded into a model before
anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lowbit.architecture import Architecture
from lowbit.calibrate.blocks import Progress
from lowbit.calibrate.store import BlockStore
from lowbit.calibrate.tensors import Replacement
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.methods import Method
from lowbit.numerics.hadamard import Rotation
from lowbit.registry import load
from lowbit.rounding.target import Stored, Target
from lowbit.schemes import ActivationSpec
from lowbit.settings import RunOptions, Settings
from lowbit.text import GivenText
from lowbit.transform.facts import ModelFacts, model_facts
from lowbit.transform.rotate import StreamRotations, rotated_outside


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


@dataclass(frozen=True, kw_only=True)
class RotationJob(CalibrationTask):
    """A task whose rotations are found before anything is measured.

    nearest  linears that are rounded to nearest
    online   linear → rotation of its input by the engine
    ids      int64 [windows, tokens]
    """

    nearest: frozenset[str]
    online: Mapping[str, Rotation]
    ids: Tensor

    @cached_property
    def facts(self) -> ModelFacts:
        return model_facts(self.architecture)


def stream_rotations(method: Method, job: RotationJob, store: BlockStore) -> StreamRotations | None:
    """The rotations of the method's transform of the residual stream, if it has one.

    Learned ones are kept in the store, so that a run that goes on has those of the run before.
    """
    row = next((row for row in method.transforms if row.stream is not None), None)
    if row is None:
        return None
    assert row.stream is not None
    return load(row.stream)(job, store) if row.learns else load(row.stream)(job.facts)


def outside_blocks(task: CalibrationTask, rotations: StreamRotations) -> dict[str, Replacement]:
    """Embedding, final norm and head, rotated, in the dtypes of the output."""
    rewritten = rotated_outside(task.checkpoint, model_facts(task.architecture), rotations.residual)
    return {name: _written(values, task.dtypes[name]) for name, values in rewritten.items()}


def _written(values: Tensor, dtype: torch.dtype) -> Replacement:
    values = values.to(dtype)
    return Replacement(lambda: values, dtype)
