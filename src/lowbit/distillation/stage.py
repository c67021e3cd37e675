"""Distillation as the last step of a calibrated quantization: codes from the store, what was learned back into it.

Learned are the scales of every rounded linear, and the norms and biases that the output stores as floats. The student
is the model that is going to be run: the source with rewritten tensors, rounded linears, what the plan rounds outside
the blocks (embedding and head of a GGUF file) already rounded, and inputs rounded where the engine rounds them. The
teacher is the source.

The state of the descent is kept beside the blocks, so that a run that is stopped goes on from it. Blocks with what was
learned are files of their own (`BlockStore.save_distilled`), made again by a run that goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from lowbit.architecture.structure import Linear
from lowbit.calibrate.blocks import BlockRunner, Progress
from lowbit.calibrate.loop import Calibrated
from lowbit.calibrate.store import BlockRecord, BlockStore
from lowbit.calibrate.task import CalibrationTask
from lowbit.calibrate.tensors import OverlaidCheckpoint, Replacement
from lowbit.checkpoint.base import Checkpoint
from lowbit.distillation.descent import Distilled, DistillOptions, State, distill, outcome
from lowbit.distillation.divergence import TokenDivergence
from lowbit.distillation.inputs import round_inputs
from lowbit.distillation.memory import DistillMemory, distill_memory, distillation_dtype
from lowbit.distillation.student import Changes, LearnedTensor, Parts, Student
from lowbit.numerics.hadamard import Rotation
from lowbit.rounding.learnable import Learnable, LearnableVector, learnable
from lowbit.rounding.target import Stored, Target

LEARNED_ROLES = ("norm", "bias")


@dataclass(frozen=True, kw_only=True)
class FinishJob(CalibrationTask):
    """A task whose linears are rounded.

    rounded  checkpoint → tensors outside the blocks that the output rounds, as a reader of it will see them
    """

    rounded: Callable[[Checkpoint], dict[str, Replacement]]

    @property
    def dtype(self) -> torch.dtype:
        """float32 unless the user names another: in bfloat16 the rounding of activations alone is a divergence, which
        hides small gains."""
        return distillation_dtype(self.settings)

    def memory(self, windows: int, tokens: int) -> DistillMemory:
        return distill_memory(self.architecture, self.targets, self.dtype, windows, tokens)


def check_distillation(job: FinishJob) -> None:
    """Before anything is calibrated: UsageError for too few windows, or too little memory."""
    job.memory(job.settings.learned_windows, job.settings.seqlen).share(job.run.max_memory)


def distill_store(calibrated: Calibrated, job: FinishJob) -> tuple[Calibrated, Distilled]:
    """Learn scales, norms and biases of the rounded model; see `descent.distill`."""
    store, ids = calibrated.store, calibrated.learning
    options, keeper = DistillOptions.of(job.settings), _StoreKeeper(store)
    state = keeper.load()
    opened = _openers(calibrated, job)
    if state is not None and state.finished:
        done = outcome(state, len(ids), options)
    else:
        share = job.memory(*ids.shape).share(job.run.max_memory)
        parts: Parts = [
            {name: cache(read) if share.resident else read for name, read in part.items()} for part in opened
        ]
        runs = (job.dtype, job.run.device, job.options, share.states)
        base = OverlaidCheckpoint(calibrated.checkpoint, job.rounded(calibrated.checkpoint))
        runner = BlockRunner(base, *runs)
        apart = round_inputs(runner, job.activations, calibrated.rotations)
        student = Student(runner, ids, parts, share.resident, share.graphs)
        divergence = TokenDivergence(BlockRunner(job.checkpoint, *runs), student, job.progress)
        why = f"since they are no nn.Linear of their own in transformers: {', '.join(apart[:1])}"
        notes = [f"inputs of {len(apart)} linears were not rounded while learning, {why}"] if apart else []
        done = distill(student, divergence, options, keeper, _shown(job.progress), notes)
    _write(store, opened, done.changes, job)
    rewritten = {name: Replacement(partial(store.tensor, name), job.dtypes[name]) for name in store.rewritten()}
    return replace(calibrated, checkpoint=OverlaidCheckpoint(calibrated.checkpoint, rewritten)), done


def _openers(calibrated: Calibrated, job: FinishJob) -> list[dict[str, Callable[[], LearnedTensor]]]:
    """What can be learned, and rounded linears without anything to learn: by block, then behind the last."""
    architecture, checkpoint = job.architecture, calibrated.checkpoint
    found: list[dict[str, Callable[[], LearnedTensor]]] = [{} for _ in range(len(architecture.blocks) + 1)]
    for name, target in job.targets.items():
        linear = architecture.linears[name]
        assert linear.block is not None, "the calibrated loop rounds linears of blocks"
        turned = linear.transposed and f"{name}.weight" not in checkpoint.schemes
        online = calibrated.rotations.get(name)
        found[linear.block][f"{name}.weight"] = partial(_open_linear, calibrated.store, linear, target, turned, online)
    for name, shape in architecture.parameters.items():
        block = architecture.block_of(name)
        is_vector = len(shape) == 1 and architecture.roles.get(name) in LEARNED_ROLES and name in checkpoint.tensors
        if is_vector and name in job.dtypes and not architecture.predicts(name):
            place = len(architecture.blocks) if block is None else block
            found[place][name] = partial(_open_vector, checkpoint, name, job.dtypes[name])
    return found


def _open_linear(
    store: BlockStore, linear: Linear, target: Target, turned: bool, online: Rotation | None
) -> LearnedTensor:
    return LearnedTensor(learnable(target, store.stored(linear.name, target, linear.shape[1])), turned, online)


def _open_vector(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> LearnedTensor:
    return LearnedTensor(LearnableVector(checkpoint.read(name), dtype))


@torch.no_grad()
def _write(
    store: BlockStore, opened: list[dict[str, Callable[[], LearnedTensor]]], changes: Changes, job: FinishJob
) -> None:
    """Every block with its changed scales and vectors; those behind the last block lie in its file."""
    if not changes:
        return
    blocks = len(opened) - 1
    for index in range(blocks):
        learned = {**opened[index], **(opened[blocks] if index == blocks - 1 else {})}
        record, rounded, tensors = store.records[index], {}, store.rewritten_in(index)
        for name, read in learned.items():
            stored = _stored(read().learnable, changes.get(name, {}))
            linear = name.removesuffix(".weight")
            if linear in record.linears:
                rounded[linear] = stored
            elif name in changes:
                assert isinstance(stored, torch.Tensor)
                tensors[name] = stored
        store.save_distilled(index, rounded, tensors, _marked(record, changes))


def _stored(one: Learnable, changes: dict[str, torch.Tensor]) -> Stored:
    return one.stored(changes)


def _marked(record: BlockRecord, changes: Changes) -> BlockRecord:
    """The record with "distill" in the method of the linears whose scales changed."""
    linears = {
        name: replace(result, method=f"{result.method}+distill") if f"{name}.weight" in changes else result
        for name, result in record.linears.items()
    }
    return replace(record, linears=linears)


def _shown(progress: Progress | None) -> Callable[[int, int, float], None] | None:
    if progress is None:
        return None
    return lambda step, steps, loss: progress(f"distillation, KL {loss:.4f}", step, steps)


class _StoreKeeper:
    """The state of a descent in the folder of the run."""

    def __init__(self, store: BlockStore):
        self._store = store

    def load(self) -> State | None:
        found = self._store.load_learning()
        return None if found is None else State.of(*found)

    def save(self, state: State) -> None:
        self._store.save_learning(state.tensors(), state.facts())
