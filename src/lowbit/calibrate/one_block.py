"""One block of the calibrated loop: measure, transform, round, store; `loop.py` shows the order of the steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.calibrate.blocks import BlockRunner, Progress
from lowbit.calibrate.gradients import TokenWeights
from lowbit.calibrate.linear import linear_result, relative_error_of_nearest, round_linear
from lowbit.calibrate.passes import BlockPasses, Streams, run_through
from lowbit.calibrate.stages import Stage, by_child
from lowbit.calibrate.store import BlockRecord, BlockStore, LinearResult
from lowbit.calibrate.summary import summaries_of
from lowbit.calibrate.task import CalibrationTask
from lowbit.calibrate.tensors import StoredTensors
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import NonFiniteError
from lowbit.methods import Method, Rounding, Transform, parse_method
from lowbit.numerics.hadamard import Rotation
from lowbit.numerics.precision import compute_dtype
from lowbit.registry import load
from lowbit.rounding.bias_correction import corrected_bias, why_not_corrected
from lowbit.rounding.hessian import InputData
from lowbit.rounding.target import LinearSlot, Rounded, Target
from lowbit.tensors import LayerStats
from lowbit.transform.block import BlockTensors, TransformNote
from lowbit.transform.facts import ModelFacts
from lowbit.transform.rotate import StreamRotations, rotated_stats


class Job:
    """The linears to round, and how.

    checkpoint      under the architecture's names; after `turn`, tensors outside the blocks are rewritten
    ids             int64 [windows, tokens]
    roundings       linear → its rounding: that of the first matching override, else the method's
    options         name of a rounding → its options
    before          transforms that rewrite a block before measuring; `measured` are those that need statistics
    stream          the rotations of `before`
    shrinkage       of the Hessians of error feedback
    rotations       linear → rotation of its input by the engine: its weight is rounded rotated, everything else sees it
                    rotated back
    needs_channels  the run reads per-channel ranges and means, beside the Hessian
    start           the finished model that refinement starts from
    """

    def __init__(self, task: CalibrationTask, ids: Tensor, rotations: dict[str, Rotation]):
        settings, device, targets = task.settings, task.run.device, task.targets
        self.checkpoint, self.targets, self.dtypes, self.ids = task.checkpoint, targets, task.dtypes, ids
        self.settings, self.device, self.dtype = settings, device, compute_dtype(settings.compute, device)
        self.start, self.rotations = task.start, rotations
        self.method: Method = parse_method(settings.method)
        self.roundings: dict[str, Rounding] = {}
        self.options: dict[str, Any] = {}
        self.needs_hessian = self.needs_lost = needs_drift = False
        self.shrinkage = 0.0
        for linear in targets:
            row = self.roundings[linear] = settings.rounding_of(linear)
            if row.name not in self.options:
                options = self.options[row.name] = row.options_of(settings)
                self.needs_hessian |= row.needs_hessian
                if row.needs_hessian:
                    needs_drift |= options.needs_drift
                    self.needs_lost |= options.needs_lost
                    self.shrinkage = max(self.shrinkage, options.shrinkage)
        self.stream: StreamRotations | None = None
        self.before = tuple(row for row in self.method.transforms if row.stream is not None)
        self.measured = tuple(row for row in self.method.transforms if row.needs_statistics)
        # Windows that the unquantized model runs on too.
        self.compared_windows = min(len(ids), settings.correction_samples or len(ids)) if needs_drift else 0
        if self.method.learned is not None:
            self.options[self.method.learned.name] = self.method.learned.options_of(settings)
            self.compared_windows = len(ids)
        # Linear → groups of output rows with a Hessian each, of tokens weighed by the gradient of the loss.
        self.weighed: dict[str, int] = {}
        groups = settings.hessian_groups
        self.feeds_rows = settings.feeds_rows and self.needs_hessian
        if groups and self.needs_hessian:
            self.weighed = {linear: groups if targets[linear].rows_are_apart else 1
                            for linear, row in self.roundings.items() if row.needs_hessian}  # fmt: skip
        int8 = any(target.is_llm_int8 for target in targets.values())
        self.needs_channels = bool(self.method.transforms) or settings.bias_correction or int8

    def turn(self, checkpoint: Checkpoint, stream: StreamRotations | None) -> None:
        """Work on a checkpoint whose tensors outside the blocks are rotated, with the rotations of its blocks."""
        self.checkpoint, self.stream = checkpoint, stream


class Work:
    """Wall time by kind of work, and the windows that finished a stage, for the progress bar."""

    def __init__(self, progress: Progress | None):
        self.progress, self.seconds = progress, dict[str, float]()
        self.name, self.done, self.total = "", 0, 0

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - began

    def tick(self, windows: int) -> None:
        self.done = min(self.done + windows, self.total)
        if self.progress is not None:
            self.progress(self.name, self.done, self.total)


class CalibratedBlock:
    """One block while its linears are rounded."""

    def __init__(self, job: Job, runner: BlockRunner, index: int, streams: Streams, facts: ModelFacts | None,
                 work: Work, weights: TokenWeights | None = None):  # fmt: skip
        self.job, self.runner, self.index, self.streams = job, runner, index, streams
        self.facts, self.work, self.weights = facts, work, weights
        self.linears = tuple(each for each in runner.architecture.linears.values() if each.block == index)
        self.tensors = StoredTensors(job.checkpoint, runner, index, {each.name: each for each in self.linears})
        self.rewritten: dict[str, Tensor] = {}
        # What `before` made of tensors that `measured` then rewrote, as in the file.
        self.rotated: dict[str, Tensor] = {}
        self.rounded: dict[str, Rounded] = {}
        self.results: dict[str, LinearResult] = {}
        self.transforms: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.mends_stream = False
        self.inputs: dict[str, dict[str, Any]] = {}
        self.curvature: dict[str, tuple[Tensor, ...]] = {}  # of the loss in the outputs of a linear (`row_feedback`)

    def calibrate(self, store: BlockStore) -> None:
        job, runner, work = self.job, self.runner, self.work
        with work.timed("read"):
            runner.load(self.index)
        self._transform({}, job.before)
        passes = BlockPasses(runner, self.index, self.streams, job.settings.all_experts, job.needs_channels,
                             job.shrinkage, job.needs_lost)  # fmt: skip
        self._put_kept()
        if self.weights is not None and job.feeds_rows:
            self.curvature = store.load_curvature(self.index)
        # Every stage sees the hidden states before this block; the quantized stream moves on only at the end.
        for stage in by_child(passes.stages) if job.measured else passes.stages:
            with work.timed("forward"):
                # What transforms search with counts all tokens alike.
                weights = None if job.measured else self.weights
                stats = passes.measure(stage, work.tick, not job.measured, weights)
            if not job.before:  # channels of a rotated stream are no channels of the model
                self.inputs |= summaries_of(stats, self.index, len(runner.blocks))
            passes.transformed(self._transform(stats, job.measured))
            if not (job.measured and job.needs_hessian):
                self._round_stage(stage, stats)
                continue
            del stats  # measure each input again, after the rounded linears of its child
            for part in passes.stages:
                if part.child == stage.child:
                    with work.timed("forward"):
                        stats = passes.measure(part, work.tick, weights=self.weights)
                    self._round_stage(part, stats)
        if job.method.learned is not None:
            with work.timed("learn"):
                self._learn(job.method.learned)
            passes.forget()
        with work.timed("store"):
            changed = {name: self.tensors.turned(name, values).to(job.dtypes[name])
                       for name, values in self.rewritten.items()}  # fmt: skip
            record = BlockRecord(self.results, tuple(self.transforms), tuple(self.notes), self.inputs,
                                 self.mends_stream)  # fmt: skip
            store.save(self.index, {name: each.stored for name, each in self.rounded.items()}, changed, record)
        if self.index + 1 < len(runner.blocks):
            with work.timed("forward"):
                passes.advance(work.tick, self._unquantized)
        runner.drop(self.index)

    def _unquantized(self, name: str) -> Tensor:
        """A tensor of the unquantized stream, whose hidden states are rotated where those of the run are."""
        return self.rotated[name] if name in self.rotated else self.job.checkpoint.read(name)

    def repeat(self, store: BlockStore) -> None:
        """Run the hidden states through a block that an earlier run rounded."""
        runner, streams = self.runner, self.streams
        runner.load(self.index)
        self._transform({}, self.job.before)
        if streams.unquantized is not None:
            run_through(runner, self.index, streams.unquantized, self.job.ids[: streams.compared])
        values = {name: store.tensor(name).float() for name in store.rewritten() if name in self.tensors.names}
        for linear in self.linears:
            if linear.name in store.records[self.index].linears:
                name = f"{linear.name}.weight"
                decoded = store.decoded(linear.name, self.job.targets[linear.name], linear.shape[1])
                if linear.name in self.job.rotations:
                    decoded = self.job.rotations[linear.name].back(decoded)
                values[name] = self.tensors.turned(name, decoded)
        self._put_kept()
        runner.put(values)
        run_through(runner, self.index, streams.quantized, self.job.ids)
        runner.drop(self.index)

    def _put_kept(self) -> None:
        """The quantized stream runs with what the file that is refined has in 16 bits, and keeps."""
        if self.job.start is None:
            return
        present = self.job.start.checkpoint
        held = StoredTensors(present, self.runner, self.index, {each.name: each for each in self.linears})
        for name in self.tensors.names:
            if name in present.tensors and name.removesuffix(".weight") not in self.job.targets:
                self.runner.put({name: self.tensors.turned(name, held.read(name))})

    def _transform(self, stats: dict[str, LayerStats], transforms: tuple[Transform, ...]) -> dict[str, Tensor]:
        """Rewrite weights and `stats`; returns the changed tensors by stored name, in the file's orientation."""
        if not transforms:
            return {}
        assert self.facts is not None
        names = self.tensors.names
        dtypes = {name: dtype for name, dtype in self.job.dtypes.items() if name in names}
        block = BlockTensors(self.linears, {name: self.tensors.read(name) for name in names}, dict(stats), dtypes)
        before = dict(block.tensors)
        # Keep only notes on points of this stage.
        points = set(stats) | {str(linear.fed_by) for linear in self.linears if linear.reads in stats}
        for transform in transforms:
            with self.work.timed("transform"):
                given = () if transform.stream is None else (self.job.stream,)
                notes = load(transform.function)(block, self.facts, self._fake_quantize, *given)
            self.transforms += [asdict(note) for note in notes if note.point in points or note.applied]
        changed = {name: values for name, values in block.tensors.items() if values is not before[name]}
        if self.job.before and transforms is self.job.measured:
            self.rotated = {name: self.tensors.in_file(name) for name in changed} | self.rotated
        for name, values in changed.items():
            # Compute with the values that a reader of the file will see.
            written = block.as_written(name, values)
            self.tensors.replace(name, written)
            if name.removesuffix(".weight") not in self.job.targets:
                self.rewritten[name] = written
        stored = {name: self.tensors.in_file(name) for name in changed}
        self.runner.put(stored)
        stats.update(block.stats)
        return stored

    def _fake_quantize(self, linear: Linear, weight: Tensor, importance: Tensor | None) -> Tensor:
        target = self.job.targets.get(linear.name)
        if target is None:
            return weight
        rotation = self.job.rotations.get(linear.name)
        if rotation is not None:  # the format that states rotations has no ggml types, which alone weigh errors
            weight = rotation.columns(weight)
            return rotation.back(target.with_range([weight]).nearest(weight).decoded)
        return target.with_range([weight]).nearest(weight, importance if target.is_ggml else None).decoded

    def _round_stage(self, stage: Stage, stats: dict[str, LayerStats]) -> None:
        """Round the linears that read the inputs of a stage; frees each input's statistics on the way."""
        job, settings = self.job, self.job.settings
        with self.work.timed("round"):
            for source in stage.inputs:
                data = InputData(stats.get(source.name))
                for linear in source.linears:
                    if linear.name not in job.targets:
                        continue
                    weight = self.tensors.read(f"{linear.name}.weight").to(job.device)
                    if not torch.isfinite(weight).all():
                        raise NonFiniteError(
                            f"tensor {linear.name}.weight holds NaN or inf",
                            "the checkpoint is damaged, or was trained into overflow; get another copy of it",
                        )
                    target, rounding = self._target(linear), job.roundings[linear.name]
                    options = job.options[rounding.name]
                    self.mends_stream |= (
                        rounding.needs_hessian and data.stats is not None and data.stats.lost is not None
                    )
                    own, rotation = self._data_of(data, linear.name), job.rotations.get(linear.name)
                    start = job.start.codes(linear.name) if job.start is not None else None
                    if rotation is None:
                        rounded, result = round_linear(
                            weight, target, rounding, own, options, settings.expert_tokens, start
                        )
                    else:
                        rounded, result = self._round_rotated(linear, weight, target, data, rotation)
                    if self.weights is not None and linear.name in self.weights.missing:
                        note = f"its Hessian counts all tokens alike: {self.weights.missing[linear.name]}"
                        result = replace(result, notes=(*result.notes, note))
                    self._keep(linear, rounded, result)
                    if settings.bias_correction:
                        self._correct_bias(linear, weight, data.stats)
                stats.pop(source.name, None)

    def _data_of(self, data: InputData, linear: str) -> InputData:
        """What is known of the input of a linear, and of its outputs."""
        return replace(data.of(linear), rows=self.curvature[linear]) if linear in self.curvature else data.of(linear)

    def _round_rotated(
        self, linear: Linear, weight: Tensor, target: Target, data: InputData, rotation: Rotation
    ) -> tuple[Rounded, LinearResult]:
        """Round the weight that reads a rotated input. `stored` of the result is rotated, `decoded` is not."""
        rounding, least_tokens = self.job.roundings[linear.name], self.job.settings.expert_tokens
        turned = InputData(None if data.stats is None else rotated_stats(data.stats, rotation))
        rounded, result = round_linear(
            rotation.columns(weight), target, rounding, self._data_of(turned, linear.name),
            self.job.options[rounding.name], least_tokens,
        )  # fmt: skip
        before = relative_error_of_nearest(weight, target, data.of(linear.name))
        detail = f"online Hadamard rotation of {linear.shape[1]} columns in blocks of {rotation.size}"
        note = TransformNote(linear.name, "hadamard-down", before, result.nearest_error, True, detail)
        self.transforms.append(asdict(note))
        return replace(rounded, decoded=rotation.back(rounded.decoded)), result

    def _target(self, linear: Linear) -> Target:
        """The target of a linear, with the weight range of its fused set if its scales need one."""
        target = self.job.targets[linear.name]
        if not target.needs_range:
            return target
        alone = linear.fused is None or not target.fused_sets_share
        members = [each for each in self.linears if each is linear or (not alone and each.fused == linear.fused)]
        weights = [self.tensors.read(f"{each.name}.weight") for each in members]
        rotation = self.job.rotations.get(linear.name)
        return target.with_range([rotation.columns(each) for each in weights] if rotation is not None else weights)

    def _keep(self, linear: Linear, rounded: Rounded, result: LinearResult) -> None:
        self.rounded[linear.name], self.results[linear.name] = rounded, result
        name = f"{linear.name}.weight"
        self.runner.put({name: self.tensors.turned(name, rounded.decoded)})

    def _correct_bias(self, linear: Linear, weight: Tensor, stats: LayerStats | None) -> None:
        """Move the mean error of the outputs into the bias; a linear without a bias gets a note instead."""
        name = f"{linear.name}.bias"
        bias = self.tensors.read(name) if name in self.tensors.names else None
        corrected = corrected_bias(weight, self.rounded[linear.name].decoded, stats, bias)
        if corrected is None:
            result = self.results[linear.name]
            why = why_not_corrected(stats, bias) or ""
            self.results[linear.name] = replace(result, notes=(*result.notes, why))
            return
        written = corrected.to(self.job.dtypes[name]).float()
        self.tensors.replace(name, written)
        self.rewritten[name] = written
        self.runner.put({name: written})

    def _learn(self, learned: Rounding) -> None:
        """Tune the codes so that the block's outputs approach those of the unquantized model."""
        runner, streams = self.runner, self.streams
        slots: dict[str, LinearSlot] = {}
        for linear in self.linears:
            if linear.name not in self.rounded:
                continue
            module = runner.linear_module(linear.name)
            if module is None:
                self.notes.append(f"{linear.name} runs inside a fused operation and kept its codes")
                continue
            runner.put({f"{linear.name}.weight": self.tensors.in_file(f"{linear.name}.weight")})
            slots[linear.name] = LinearSlot(module, self._target(linear), self.rounded[linear.name])
        assert streams.unquantized is not None
        tuned: dict[str, Rounded] = load(learned.function)(
            runner.blocks[self.index].module, lambda module, x: runner.forward(self.index, x, module),
            streams.quantized.values, streams.unquantized.values, slots, self.job.options[learned.name],
        )  # fmt: skip
        for linear in self.linears:
            if linear.name in tuned:
                rounded, before = tuned[linear.name], self.results[linear.name]
                weight, method = self.tensors.read(f"{linear.name}.weight"), f"{before.method}+{learned.name}"
                errors = (None, before.nearest_error)
                result = linear_result(
                    weight, rounded, self._target(linear), method, errors, before.tokens, rounded.notes
                )
                self._keep(linear, rounded, result)
