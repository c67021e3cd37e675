"""Rotations of the residual stream, which are folded into a model before anything is measured: found, or learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowbit.calibrate.store import BlockStore
from lowbit.calibrate.task import CalibrationTask
from lowbit.calibrate.tensors import Replacement
from lowbit.methods import Method
from lowbit.numerics.hadamard import Rotation
from lowbit.registry import load
from lowbit.transform.facts import ModelFacts, model_facts
from lowbit.transform.rotate import StreamRotations, rotated_outside


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
