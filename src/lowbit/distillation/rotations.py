"""Rotations learned from the unquantized model (SpinQuant: Liu et al. 2024, arXiv 2405.16406).

    minimise KL(unquantized ‖ rotated and rounded) over orthogonal R1 [H, H], and R2 [d, d] of each block

by SGD along the Cayley transform (`numerics.stiefel`), from random Hadamard matrices. Rotations alone change no logit:
the divergence is all from rounding. Inputs of linears are rounded in the forward pass as the engine will; weights where
the run rounds them to nearest, or where nothing else is rounded. GPTQ adapts to weights that are rotated already, so
that rotations learned for activations alone serve it better, as the paper found.

The paper takes the loss of the text; here it is the divergence, for which a text of any kind will do, and whose value
on held-out windows decides: the rotations of the best evaluation count, those of the start among them. The rate falls
in a line to 0, as in the paper. Everything follows from the seed and the step, so that a run that goes on makes the
same bytes.

R3 and R4 of the paper are no learned matrices: R4 is `hadamard-down`, R3 concerns the KV cache alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.architecture import Architecture
from lowbit.calibrate.blocks import BlockRunner
from lowbit.calibrate.store import BlockStore
from lowbit.calibrate.task import RotationJob
from lowbit.distillation.descent import EVALUATIONS, PASSES, Split, windows_per_step
from lowbit.distillation.divergence import TokenDivergence
from lowbit.distillation.memory import DistillMemory, distill_memory, distillation_dtype
from lowbit.distillation.rotated import MATRIX, RESIDUAL, VALUES, RotatedStudent, rotations_of
from lowbit.distillation.student import Changes
from lowbit.errors import NonFiniteError
from lowbit.numerics.hadamard import make_rotation
from lowbit.numerics.stiefel import cayley_step
from lowbit.rounding.target import Target
from lowbit.settings import Settings
from lowbit.transform.rotate import StreamRotations, residual_rotation, value_point

RATE = 1.5
KEEP_EVERY = 60.0  # seconds between two saved states
_DECAY = 0.9  # of the momentum
_MATRICES = 9  # of [H, H], float64: now, best, momentum, gradient, and what a step takes
_NAME = "spinquant"
_STATE = "rotations"  # in the folder of the run


def rotation_steps(settings: Settings, windows: int, tokens: int) -> int:
    """Steps over so many windows of so many tokens: the user's number, or those of a few passes."""
    split = Split.of(windows, _NAME)
    return settings.rotation_steps or PASSES * max(1, len(split.train) // windows_per_step(windows, tokens))


def rotation_memory(
    architecture: Architecture, targets: Mapping[str, Target], dtype: torch.dtype, windows: int, tokens: int
) -> DistillMemory:
    """Memory of learning over so many windows of so many tokens: as of a distillation, and matrices of the width of the
    stream. UsageError for too few windows."""
    Split.of(windows, _NAME)
    memory = distill_memory(architecture, dict(targets), dtype, windows, tokens)
    embeddings = (shape for name, shape in architecture.parameters.items() if architecture.roles[name] == "embedding")
    width = max(shape[-1] for shape in embeddings)
    return replace(memory, needed=memory.needed | {"rotations": _MATRICES * 8 * width * width})


@dataclass
class RotationState:
    """Everything a run needs to go on.

    now, best, momentum  float64 matrices by their place
    step                 steps done
    start, lowest        KL on the held-out windows, nats;  lowest_at: the step of `best`
    finished             True behind the last step
    """

    now: Changes
    best: Changes
    momentum: Changes
    step: int = 0
    start: float = math.nan
    lowest: float = math.nan
    lowest_at: int = 0
    finished: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """All matrices under flat names."""
        parts = {"now": self.now, "best": self.best, "momentum": self.momentum}
        return {f"{part}|{kind}|{name}": matrix for part, changes in parts.items()
                for kind, each in changes.items() for name, matrix in each.items()}  # fmt: skip

    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not isinstance(value, dict)}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> RotationState:
        """The inverse of `tensors` and `facts`."""
        parts: dict[str, Changes] = {part: {RESIDUAL: {}, VALUES: {}} for part in ("now", "best", "momentum")}
        for flat, matrix in tensors.items():
            part, kind, name = flat.split("|", 2)
            parts[part][kind][name] = matrix
        return cls(**parts, **facts)


def learned_rotations(job: RotationJob, store: BlockStore) -> StreamRotations:
    """The rotations of a model, learned, or those that an earlier run learned.

    UsageError for too few windows or too little memory; NonFiniteError if the divergence is not finite.
    """
    steps = rotation_steps(job.settings, *job.ids.shape)
    found = store.load_learning(_STATE)
    state = None if found is None else RotationState.of(*found)
    if state is None or not state.finished:
        state = _descend(job, store, steps, state)
    kept = state.lowest_at
    learned = f"learned: KL {state.start:.4g} → {state.lowest:.4g} on held-out windows, at step {kept} of {state.step}"
    if not kept:
        learned = f"of a random Hadamard matrix: no evaluation of {state.step} steps was better, KL {state.start:.4g}"
    size, values = len(state.best[RESIDUAL][MATRIX]), len(state.best[VALUES])
    return rotations_of(state.best, f"rotations of {size} channels and of the values of {values} blocks, {learned}")


def start_of(job: RotationJob) -> RotationState:
    """Random Hadamard matrices."""
    facts, seed = job.facts, job.settings.seed
    values = {}
    for index in range(len(job.architecture.blocks)):
        point = value_point(facts, index)
        if point is not None:
            values[str(index)] = make_rotation(point.columns // facts.heads, seed).matrix()
    start: Changes = {RESIDUAL: {MATRIX: residual_rotation(facts, seed).matrix()}, VALUES: values}
    return RotationState(start, _copied(start), _zeros(start))


def _descend(job: RotationJob, store: BlockStore, steps: int, state: RotationState | None) -> RotationState:
    windows, tokens = job.ids.shape
    split, size = Split.of(windows, _NAME), windows_per_step(windows, tokens)
    dtype = distillation_dtype(job.settings)
    memory = rotation_memory(job.architecture, job.targets, dtype, windows, tokens)
    share = memory.share(job.run.max_memory, _NAME, "take hadamard, which learns nothing")
    runs = (dtype, job.run.device, job.options, share.states)
    student = RotatedStudent(job, BlockRunner(job.checkpoint, *runs), share.resident, share.graphs)
    divergence = TokenDivergence(BlockRunner(job.checkpoint, *runs), student, job.progress)
    rate = RATE if job.settings.rotation_rate is None else job.settings.rotation_rate
    every, kept_at = max(1, steps // EVALUATIONS), time.monotonic()
    if state is None:
        state = start_of(job)
        student.prepare(state.now)
        state.start = state.lowest = divergence.mean(split.held_out, state.now, size)
        _refuse_not_finite(state.start, 0)
    student.prepare(state.now)
    while state.step < steps:
        found = _zeros(state.now)
        batch = split.batch(state.step, size, job.settings.seed)
        loss = divergence.gradients(batch, state.now, found)
        _refuse_not_finite(loss, state.step + 1)
        _move(state, found, batch.numel() * tokens, rate * (1 - state.step / steps))
        state.step += 1
        student.prepare(state.now)
        if state.step % every == 0 or state.step == steps:
            now = divergence.mean(split.held_out, state.now, size)
            if now < state.lowest:
                state.best, state.lowest, state.lowest_at = _copied(state.now), now, state.step
        if job.progress is not None:
            job.progress(f"rotations, KL {loss:.4f}", state.step, steps)
        if time.monotonic() - kept_at > KEEP_EVERY:
            store.save_learning(state.tensors(), state.facts(), _STATE)
            kept_at = time.monotonic()
    state.finished = True
    store.save_learning(state.tensors(), state.facts(), _STATE)
    return state


def _move(state: RotationState, found: Changes, tokens: int, rate: float) -> None:
    """One step of every matrix, by the gradients of the sum over so many tokens."""
    for kind, each in found.items():
        for name, gradient in each.items():
            matrix, momentum = state.now[kind][name], state.momentum[kind][name]
            moved = cayley_step(matrix, gradient / tokens, momentum, rate, _DECAY)
            state.now[kind][name], state.momentum[kind][name] = moved


def _refuse_not_finite(divergence: float, step: int) -> None:
    if not math.isfinite(divergence):
        when = f"in step {step}" if step else "before a step is taken"
        raise NonFiniteError(
            f"the divergence of the rotated model from the unquantized one is not finite {when}",
            "check the weights and the calibration text, or take hadamard, which learns nothing",
        )


def _copied(changes: Changes) -> Changes:
    return {kind: {name: matrix.clone() for name, matrix in each.items()} for kind, each in changes.items()}


def _zeros(changes: Changes) -> Changes:
    return {kind: {name: torch.zeros_like(matrix) for name, matrix in each.items()} for kind, each in changes.items()}
