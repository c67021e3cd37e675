"""The calibrated loop. One block at a time: measure its inputs, transform, round, store, run the rounded block.

    find or learn rotations of the residual stream, if the method has any   stream
    for each block that no earlier run finished:
        fold them                                                           transform
        for each child (attention, MLP), if the method has transforms:
            statistics of its inputs → scales                               transform
        for each distinct input:
            statistics, after everything before it is rounded               calibrate
            codes of the linears that read it                               rounding
        tune all linears together, if the method learns
        codes and results → store
        hidden states through the rounded block

One block's weights are in memory in the compute dtype (two copies when the unquantized stream runs too), plus one
linear in float32, or all of them when a transform rewrites them. Folders and GGUF files share the loop; only their
`targets` differ.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowbit.architecture import Architecture
from lowbit.architecture.inspection import embedding_rows
from lowbit.architecture.loading import load_tokenizer
from lowbit.calibrate.block_modules import Block
from lowbit.calibrate.blocks import BlockRunner, Progress
from lowbit.calibrate.gradients import PASSES, TokenWeights, token_weights
from lowbit.calibrate.identity import depends_on
from lowbit.calibrate.memory import ARRAYS_OF_STATES, states_memory
from lowbit.calibrate.one_block import CalibratedBlock, Job, Work
from lowbit.calibrate.passes import Streams
from lowbit.calibrate.stages import count_stages
from lowbit.calibrate.store import BlockStore, LinearResult
from lowbit.calibrate.summary import coverage_notes
from lowbit.calibrate.task import CalibrationTask, RotationJob, outside_blocks, stream_rotations
from lowbit.calibrate.tensors import OverlaidCheckpoint, Replacement
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.checkpoint.companions import has_tokenizer
from lowbit.errors import UnsafeError, UsageError
from lowbit.files.claim import work_folder
from lowbit.methods import RTN, RUNS_NO_TEXT, parse_method
from lowbit.numerics.hadamard import Rotation
from lowbit.rounding.target import Target
from lowbit.settings import RunOptions, Settings
from lowbit.text import CalibrationWindows, GivenText, context_length, mixed_windows
from lowbit.transform.facts import model_facts
from lowbit.transform.online import online_rotations

KEEP_STATES_EVERY = 60.0  # seconds between two saves of the hidden states


@dataclass(frozen=True)
class Calibrated:
    """The result of calibration.

    checkpoint  the source (of a refinement the file) with the tensors that transforms rewrote
    store       codes of the rounded linears
    windows     calibration text
    learning    int64 [windows, tokens]: what a distillation learns from
    seconds     wall time by kind of work
    rotations   linear → rotation of its input by the engine, with which its codes are stored
    unmet       notes on settings that were given and that the model has no use for
    """

    checkpoint: Checkpoint
    store: BlockStore
    windows: CalibrationWindows
    learning: Tensor
    seconds: dict[str, float] = field(default_factory=dict)
    rotations: dict[str, Rotation] = field(default_factory=dict)
    unmet: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the text, on settings and on single blocks."""
        of_blocks = (note for record in self.store.records.values() for note in record.notes)
        return (*self.windows.notes, *self.unmet, *of_blocks)

    def decoded(self, targets: dict[str, Target], architecture: Architecture, dtype: torch.dtype) -> Checkpoint:
        """The model as an engine will run it, for measuring the inputs of its rounded linears."""
        replaced = {}
        for name, target in targets.items():
            linear = architecture.linears[name]
            read = partial(self.store.decoded, name, target, linear.shape[1], linear.transposed)
            if name in self.rotations:  # of linears that are stored as [N, K]
                read = partial(_turned_back, read, self.rotations[name])
            replaced[f"{name}.weight"] = Replacement(read, dtype)
        return OverlaidCheckpoint(self.checkpoint, replaced)


def read_windows(
    checkpoint: Checkpoint, settings: Settings, options: OpenOptions, run: RunOptions, progress: Progress | None = None,
    given: GivenText | None = None, further: int = 0,
) -> CalibrationWindows:  # fmt: skip
    """The calibration text cut into windows; "self" has the model write it.

    given    what stands for it in memory
    further  windows beyond those of the settings, of the same text
    """
    count = settings.samples + further
    if given is not None:
        return given_windows(given, checkpoint, settings, options, count)
    if settings.calib == "self":
        from lowbit.calibrate.self_text import generate_windows

        return generate_windows(
            checkpoint, count, settings.seqlen, seed=settings.seed, options=options, device=run.device,
            max_memory=run.max_memory, progress=progress,
        )  # fmt: skip
    return mixed_windows(
        settings.calib, load_tokenizer(checkpoint, options), count, settings.seqlen, seed=settings.seed,
        longest=context_length(checkpoint.config()),
    )  # fmt: skip


def part_windows(windows: CalibrationWindows, settings: Settings) -> tuple[CalibrationWindows, Tensor]:
    """Windows of the calibration, and the ids that a distillation learns from: the further ones, since GPTQ has fitted
    its own; all there are, with a note, if fewer than half of those asked for are left."""
    first, further = windows.first(settings.samples), windows.ids[settings.samples :]
    if not settings.further_windows:
        return first, first.ids
    if 2 * len(further) >= settings.further_windows:
        return first, further
    note = (
        f"the text has {len(further) or 'no'} further windows for distillation, not the {settings.further_windows} "
        "asked for: it learns from those of the calibration too, which the rounding has fitted, so its gain there says "
        "little of other text"
    )
    return replace(first, notes=(*first.notes, note)), windows.ids


def given_windows(
    given: GivenText, checkpoint: Checkpoint, settings: Settings, options: OpenOptions, count: int
) -> CalibrationWindows:
    """Calibration data in memory, cut into `count` windows; texts need the checkpoint's tokenizer."""
    known = has_tokenizer(checkpoint.folder)
    tokenizer, refused = None, None
    try:
        tokenizer = load_tokenizer(checkpoint, options) if known or options.trust_remote_code else None
    except UnsafeError as error:  # token ids need no tokenizer
        refused = error
    return given.windows(
        tokenizer, count, settings.given.get("seqlen"), default=settings.seqlen,
        longest=context_length(checkpoint.config()), vocabulary=embedding_rows(checkpoint.tensors), refused=refused,
    )  # fmt: skip


def calibrate(task: CalibrationTask, output: Path) -> Calibrated:
    """Run the calibration text through the model, block by block, and round every target by the method.

    output  path of the output; a hidden folder beside it holds the codes until `BlockStore.remove`

    Raises LowbitError if the method does not fit the model or the memory limit, or rounded no linear at all.
    """
    checkpoint, architecture, targets, settings = task.checkpoint, task.architecture, task.targets, task.settings
    options, run = task.options, task.run
    if not targets:
        raise UsageError("no linear of a decoder block is quantized, so there is nothing to calibrate",
                         f"loosen --ignore; {RUNS_NO_TEXT}")  # fmt: skip
    windows, learning = part_windows(
        read_windows(checkpoint, settings, options, run, task.progress, task.text, settings.further_windows), settings
    )
    rotations = online_rotations(parse_method(settings.method), architecture, targets)
    job = Job(task, windows.ids, rotations)
    if not settings.allow_fallback:
        refuse_too_few_tokens(job)
    if job.needs_hessian:
        widest = max(architecture.linears[name].shape[1] for name in targets)
        windows = replace(windows, notes=(*windows.notes, *coverage_notes(windows.ids.numel(), widest)))
    memory = states_memory(
        architecture,
        job.dtype,
        job.compared_windows > 0,
        bool(job.method.transforms),
        run.max_memory,
        max(job.weighed.values(), default=0),
        windows.ids.numel(),
        job.feeds_rows,
    )
    store = BlockStore(work_folder(output), depends_on(job, options, learning), run.resume)
    work = Work(task.progress)
    with work.timed("rotations"):
        nearest = frozenset(name for name, row in job.roundings.items() if row is RTN)
        turning = RotationJob(**vars(task), nearest=nearest, online=rotations, ids=windows.ids)
        stream = stream_rotations(job.method, turning, store)
    outside = {} if stream is None else outside_blocks(task, stream)
    job.turn(OverlaidCheckpoint(checkpoint, outside), stream)
    runner = BlockRunner(job.checkpoint, job.dtype, run.device, options, memory)
    if store.finished < len(runner.blocks):
        facts = model_facts(runner.architecture) if job.method.transforms else None
        per_block = max(_steps(job, block) for block in runner.blocks) * len(job.ids)
        gradients = PASSES * len(runner.blocks) * len(job.ids) if job.weighed else 0
        work.total = gradients + len(runner.blocks) * per_block
        weights: TokenWeights | None = None
        if job.weighed:
            weights = _weights_of_tokens(task, job, store, memory, work)
        with work.timed("forward"):
            streams = Streams(runner, job.ids, job.compared_windows, task.start and task.start.checkpoint)
        kept_at = time.monotonic()
        for index in range(store.load_states(streams.all), len(runner.blocks)):
            work.name, work.done = runner.blocks[index].name, gradients + index * per_block
            work.tick(0)
            block = CalibratedBlock(job, runner, index, streams, facts, work, weights)
            if index < store.finished:
                block.repeat(store)
                continue
            block.calibrate(store)
            if time.monotonic() - kept_at > KEEP_STATES_EVERY and index + 1 < len(runner.blocks):
                store.save_states(index + 1, streams.all)
                kept_at = time.monotonic()
    if not settings.allow_fallback:
        refuse_fallback(job, [result for record in store.records.values() for result in record.linears.values()])
    rewritten = {name: Replacement(partial(store.tensor, name), task.dtypes[name]) for name in store.rewritten()}
    floats = (task.start or task).checkpoint  # what the output has in 16 bits
    unmet: tuple[str, ...] = ()
    if settings.stream_correction and not any(record.mends_stream for record in store.records.values()):
        why = "no output of a rounded linear at the end of attention or MLP is added to the residual stream as it is"
        unmet = (f"--stream-correction {settings.stream_correction:g} changed nothing: {why}",)
    done = OverlaidCheckpoint(floats, outside | rewritten)
    return Calibrated(done, store, windows, learning, work.seconds, rotations, unmet)


def _turned_back(read: Callable[[], Tensor], rotation: Rotation) -> Tensor:
    return rotation.back(read())


def _weights_of_tokens(task: CalibrationTask, job: Job, store: BlockStore, memory: int, work: Work) -> TokenWeights:
    """The weights of an earlier run, or new ones: of the model as it was given, without what transforms rewrite."""
    known = store.load_weights()
    if known is not None:
        blocks = {task.architecture.linears[name].block or 0 for name in known[0]} if job.feeds_rows else set[int]()
        if all(store.has_curvature(block) for block in sorted(blocks) if block >= store.finished):
            return TokenWeights(*known)
    work.name = "gradients"
    with work.timed("gradients"):
        runner = BlockRunner(task.checkpoint, job.dtype, job.device, task.options, memory)
        weights = token_weights(runner, job.ids, job.weighed, job.settings.seed, memory * ARRAYS_OF_STATES, work.tick,
                                store.save_curvature if job.feeds_rows else None)  # fmt: skip
    asked = "hessian" in job.settings.given  # rather than by a level of quality
    if not weights.weights and asked and not job.settings.allow_fallback:
        why = Counter(weights.missing.values()).most_common(3)
        raise UsageError(
            f"--hessian {job.settings.hessian} weighs the tokens of none of {len(job.weighed)} linears: "
            f"{'; '.join(f'{reason} ({count} linears)' for reason, count in why)}",
            "take --hessian inputs, or keep that with --allow-fallback",
        )
    store.save_weights(weights.weights, weights.missing)
    return weights


_MORE_TOKENS = "give more or longer windows (--samples, --seqlen) or lower --expert-tokens"
_KEEPS = "--allow-fallback keeps the output, rounded to nearest"


def refuse_too_few_tokens(job: Job) -> None:
    """UsageError, before any block is run, if the whole text is too short for every linear of a rounding."""
    least, given = job.settings.expert_tokens, job.ids.numel()
    asked = Counter(row.name for row in job.roundings.values() if row.needs_hessian)
    if given >= least or not asked:
        return
    name, count = asked.most_common(1)[0]
    verb, keeps = ("refine", "") if job.start is not None else ("round", f"; {_KEEPS}")
    raise UsageError(f"{name} would {verb} none of {count} linears: the text has {given} tokens, and a linear needs "
                     f"{least}", _MORE_TOKENS + keeps)  # fmt: skip


def refuse_fallback(job: Job, results: list[LinearResult]) -> None:
    """UsageError if the user asked for a rounding and it rounded no linear."""
    asked = Counter(row.name for row in job.roundings.values() if row is not RTN)
    if job.method.learned is not None:
        asked[job.method.learned.name] = len(job.roundings)
    used = {name for result in results for name in result.method.split("+")}
    for name, count in asked.items():
        if name not in used:
            notes = Counter(note for result in results for note in result.notes if "nearest" in note or "kept" in note)
            why = "; ".join(f"{note} ({times} linears)" for note, times in notes.most_common(3))
            if job.start is not None:
                raise UsageError(f"none of the {count} linears was refined: {why}", _MORE_TOKENS)
            raise UsageError(
                f"{name} rounded none of the {count} linears it was asked for: "
                f"{why or 'nothing but floats and fused operations'}",
                f"{_MORE_TOKENS if 'tokens reached' in why else 'choose another method or type'}; {_KEEPS}",
            )


def _steps(job: Job, block: Block) -> int:
    """Upper bound on the passes of a window through a block."""
    children = len({path.split(".")[0] for path in (*block.inputs, *block.experts)}) if job.measured else 0
    return children + (0 if job.measured and not job.needs_hessian else count_stages(block)) + 1
