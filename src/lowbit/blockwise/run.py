"""The loop: block by block, measure, transform, round, keep, go on with what the rounded block makes.

    for each block, not finished earlier:
        for each child (attention, MLP) where there are transforms:
            statistics of its inputs → scales                               transform
        for each distinct input:
            statistics, behind everything that is rounded already           calibrate
            codes of the linears that read it                               rounding
        sign-SGD over the whole block, where asked for
        what was decided → store
        hidden states go on, through the rounded block

The weights of one block are in memory, in the compute dtype (twice where the unquantized stream runs too), and in
float32 one linear at a time, or all where a transform rewrites them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.blockwise.passes import BlockPasses, Streams, run_through
from lowbit.blockwise.rounders import InputData, Outcome, is_llm_int8, round_linear, round_to_nearest
from lowbit.blockwise.store import BlockRecord, BlockStore, LinearResult
from lowbit.blockwise.tensors import StoredTensors
from lowbit.calibrate.block_modules import Block
from lowbit.calibrate.blocks import BlockRunner, Progress
from lowbit.calibrate.stages import Stage, by_child, count_stages
from lowbit.calibrate.summary import summaries_of
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import NonFiniteError
from lowbit.measure import trim_memory
from lowbit.methods import Method, parse_method
from lowbit.numerics.grid import RangeSearch
from lowbit.rounding.bias_correction import corrected_bias, why_not_corrected
from lowbit.rounding.error import squared_error_of
from lowbit.rounding.gptq import GPTQOptions
from lowbit.rounding.rtn import TensorRange, measure_range, needs_tensor_range
from lowbit.rounding.sign_sgd import LinearSlot, SignSGDOptions, sign_sgd_block
from lowbit.rounding.target import GridTarget, Rounded, Target
from lowbit.settings import Settings
from lowbit.tensors import LayerStats, QuantizedTensor
from lowbit.transform import find_transform
from lowbit.transform.block import BlockTensors
from lowbit.transform.facts import ModelFacts, model_facts
from lowbit.transform.rotate import residual_rotation, rotate_outside

# Hidden states are kept on disk when so many seconds have passed since the last time.
KEEP_STATES_EVERY = 60.0
# A finer search gains nothing (docs/gptq.md).
GPTQ_SEARCH = RangeSearch("wmse", steps=24, smallest=0.5)


@dataclass(frozen=True)
class Job:
    """What is to be rounded, and how.

    checkpoint  under the architecture's names; with the residual stream's outside rotated already, where it is
    targets     linear → where its codes may lie; linears without one stay as they are
    dtypes      stored name → dtype of tensors that are written as floats
    ids         int64 [windows, tokens]
    """

    checkpoint: Checkpoint
    targets: dict[str, Target]
    dtypes: dict[str, torch.dtype]
    ids: Tensor
    settings: Settings
    options: OpenOptions
    dtype: torch.dtype
    device: str = "cpu"
    states_memory: int = 1 << 30

    @property
    def method(self) -> Method:
        return parse_method(self.settings.method)

    def method_of(self, linear: str) -> str:
        """How a linear is rounded by itself: the first override that matches, or the method's rounding."""
        for pattern, name in self.settings.method_overrides.items():
            if re.search(pattern, linear):
                return parse_method(name).rounding
        return self.method.rounding

    @property
    def gptq_options(self) -> GPTQOptions:
        settings = self.settings
        given = {"damping": settings.damping, "correction": settings.correction, "refine": settings.refine}
        return GPTQOptions(**{name: value for name, value in given.items() if value is not None})

    @property
    def transforms(self) -> tuple[str, ...]:
        """Those that look at statistics; a rotation of the residual stream does not."""
        return tuple(name for name in self.method.transforms if name != "hadamard")

    @property
    def feeds_back(self) -> bool:
        """True where some linear is rounded by GPTQ."""
        return any(self.method_of(linear) == "gptq" for linear in self.targets)

    @property
    def wants_channels(self) -> bool:
        """True where ranges and means of channels are looked at, beside the Hessian."""
        int8 = any(is_llm_int8(target) for target in self.targets.values())
        return bool(self.method.transforms) or self.settings.bias_correction or int8

    @property
    def compared_windows(self) -> int:
        """Windows that the unquantized model is run on too."""
        if self.method.learns:
            return len(self.ids)
        windows = self.settings.correction_samples or len(self.ids)
        return min(len(self.ids), windows) if self.feeds_back and self.gptq_options.correction > 0 else 0


class Cost:
    """Seconds of wall time by kind of work."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def timed(self, kind: str, call: Callable, *arguments):
        began = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - began


def quantize_blocks(job: Job, store: BlockStore, progress: Progress | None = None) -> Cost:
    """Decide for every block that the store does not have yet."""
    runner = BlockRunner(job.checkpoint, job.dtype, job.device, job.options, job.states_memory)
    facts = model_facts(runner.architecture, job.checkpoint.config()) if job.method.transforms else None
    cost = Cost()
    steps = max(_steps(job, block) for block in runner.blocks)
    meter = _Meter(progress, len(runner.blocks) * steps * len(job.ids), steps * len(job.ids))
    if store.finished == len(runner.blocks):
        return cost
    streams = cost.timed("forward", Streams, runner, job.ids, job.compared_windows)
    start = store.load_states(streams.all)
    meter.skip(start)
    kept_at = time.monotonic()
    for index, block in enumerate(runner.blocks):
        if index < start:
            continue
        meter.block(block.name, index)
        if index < store.finished:
            _again(job, runner, index, streams, facts, store)
            continue
        _Block(job, runner, index, streams, facts, meter.tick, cost).decide(store)
        if time.monotonic() - kept_at > KEEP_STATES_EVERY and index + 1 < len(runner.blocks):
            store.save_states(index + 1, streams.all)
            kept_at = time.monotonic()
    return cost


def _steps(job: Job, block: Block) -> int:
    """How often every window goes on in a block, at most."""
    children = len({path.split(".")[0] for path in (*block.inputs, *block.experts)}) if job.transforms else 0
    return children + (0 if job.transforms and not job.feeds_back else count_stages(block)) + 1


class _Block:
    """One block while it is decided."""

    def __init__(self, job: Job, runner: BlockRunner, index: int, streams: Streams, facts: ModelFacts | None,
                 tick: Callable[[int], None], cost: Cost):  # fmt: skip
        self.job, self.runner, self.index, self.streams, self.tick, self.cost = job, runner, index, streams, tick, cost
        self.facts = facts
        self.linears = tuple(each for each in runner.architecture.linears.values() if each.block == index)
        self.tensors = StoredTensors(job.checkpoint, runner, index, {each.name: each for each in self.linears})
        self.rewritten: dict[str, Tensor] = {}
        self.rounded: dict[str, Rounded] = {}
        self.results: dict[str, LinearResult] = {}
        self.transforms: list[dict] = []
        self.notes: list[str] = []
        self.inputs: dict[str, dict] = {}

    def decide(self, store: BlockStore) -> None:
        runner, job = self.runner, self.job
        self.cost.timed("read", runner.load, self.index)
        self.rotate()
        passes = BlockPasses(runner, self.index, self.streams, job.settings.all_experts, job.wants_channels)
        # Of the windows in front of this block; the quantized stream goes on only at the end.
        for stage in by_child(passes.stages) if job.transforms else passes.stages:
            stats = self.cost.timed("forward", passes.measure, stage, self.tick, not job.transforms)
            if "hadamard" not in job.method.transforms:  # channels of a rotated stream are no channels of the model
                self.inputs |= summaries_of(stats, self.index, len(runner.blocks))
            passes.transformed(self._transform(stats, job.transforms))
            if not (job.transforms and job.feeds_back):
                self.cost.timed("round", self._round_stage, stage, stats)
                continue
            del stats  # each input once more, behind what is rounded of its own child
            for part in passes.stages:
                if part.child == stage.child:
                    stats = self.cost.timed("forward", passes.measure, part, self.tick)
                    self.cost.timed("round", self._round_stage, part, stats)
        if job.method.learns:
            self.cost.timed("learn", self._learn)
            passes.forget()
        changed = {name: self.tensors.stored(name, self.rewritten[name], job.dtypes[name]) for name in self.rewritten}
        stored: dict[str, QuantizedTensor | Tensor] = {name: each.stored for name, each in self.rounded.items()}
        record = BlockRecord(self.results, tuple(self.transforms), notes=tuple(self.notes), inputs=self.inputs)
        self.cost.timed("store", store.save, self.index, stored, changed, record)
        if self.index + 1 < len(runner.blocks):
            self.cost.timed("forward", passes.advance, self.tick, job.checkpoint.read)
        runner.drop(self.index)
        trim_memory()  # what statistics leave in pieces: 0.2 GB of 0.86 for SmolLM2 with 16 windows

    def rotate(self) -> None:
        """The residual stream's rotation, where it is asked for: of the quantized and the unquantized stream."""
        if "hadamard" in self.job.method.transforms:
            self._transform({}, ("hadamard",))

    def _transform(self, stats: dict[str, LayerStats], names: tuple[str, ...]) -> dict[str, Tensor]:
        """Rewrite weights and `stats`; what changed, by stored name."""
        if not names:
            return {}
        assert self.facts is not None
        dtypes = {name: dtype for name, dtype in self.job.dtypes.items() if name in self.tensors.names}
        block = BlockTensors(self.linears, self.tensors.all(), dict(stats), dtypes)
        before = dict(block.tensors)
        for name in names:
            found = self.cost.timed("transform", find_transform(name), block, self.facts, self._fake_quantize)
            self.transforms += [asdict(note) for note in found if note.point in self._points(stats) or note.applied]
        changed = {name: values for name, values in block.tensors.items() if values is not before[name]}
        for name, values in changed.items():
            # What is written as a float is used as it will be read.
            written = block.as_written(name, values)
            self.tensors.replace(name, written)
            if name.removesuffix(".weight") not in self.job.targets:
                self.rewritten[name] = written
        stored = {name: self.tensors.in_file(name) for name in changed}
        self.runner.put(stored)
        stats.update(block.stats)
        return stored

    def _points(self, stats: dict[str, LayerStats]) -> set[str]:
        """Names that notes of a transform may have in this stage."""
        return set(stats) | {str(linear.fed_by) for linear in self.linears if linear.reads in stats}

    def _fake_quantize(self, linear: Linear, weight: Tensor, importance: Tensor | None) -> Tensor:
        target = self.job.targets.get(linear.name)
        if target is None:
            return weight
        return round_to_nearest(weight, with_range(target, [weight]), importance).decoded

    def _round_stage(self, stage: Stage, stats: dict[str, LayerStats]) -> None:
        job = self.job
        for source in stage.inputs:
            data = InputData(stats.get(source.name))
            for linear in source.linears:
                target = job.targets.get(linear.name)
                if target is None:
                    continue
                weight = self.tensors.read(f"{linear.name}.weight").to(job.device)
                target = with_range(target, self._sharing_range(linear, target))
                if not torch.isfinite(weight).all():
                    raise NonFiniteError(
                        f"tensor {linear.name}.weight holds NaN or inf",
                        "the checkpoint is damaged, or was trained into overflow; get another copy of it",
                    )
                search = GPTQ_SEARCH if job.settings.range == "auto" else None
                outcome = round_linear(
                    weight, target, job.method_of(linear.name), data, job.gptq_options, job.settings.expert_tokens,
                    search,
                )  # fmt: skip
                self._keep(linear, weight, outcome.rounded, outcome, 0 if data.stats is None else data.stats.tokens)
                if job.settings.bias_correction:
                    self._correct_bias(linear, weight, data.stats)
            stats.pop(source.name, None)

    def _sharing_range(self, linear: Linear, target: Target) -> list[Tensor]:
        """The weights whose range sets the scales of this one: of its fused set, or its own."""
        if not isinstance(target, GridTarget) or not needs_tensor_range(target.spec):
            return []
        alone = linear.fused is None or target.spec.scale_format == "nested"
        members = [each for each in self.linears if each is linear or (not alone and each.fused == linear.fused)]
        return [self.tensors.read(f"{each.name}.weight") for each in members]

    def _keep(self, linear: Linear, weight: Tensor, rounded: Rounded, outcome: Outcome, tokens: int) -> None:
        error, size, largest = squared_error_of(weight, rounded.decoded)
        self.rounded[linear.name] = rounded
        self.results[linear.name] = LinearResult(
            outcome.method, error / size if size else 0.0, largest, outcome.layer_error, outcome.nearest_error, tokens,
            rounded.notes,
        )  # fmt: skip
        name = f"{linear.name}.weight"
        self.runner.put({name: self.tensors.turned(name, rounded.decoded)})

    def _correct_bias(self, linear: Linear, weight: Tensor, stats: LayerStats | None) -> None:
        """The mean error of the linear's outputs, moved into its bias; a note where there is none to move it to."""
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

    def _learn(self) -> None:
        """Sign-SGD from the codes that there are, towards what the unquantized model makes of these windows."""
        runner, block = self.runner, self.runner.blocks[self.index]
        slots: dict[str, LinearSlot] = {}
        for linear in self.linears:
            if linear.name not in self.rounded:
                continue
            module = runner.linear_module(linear.name)
            if module is None:
                self.notes.append(f"{linear.name} runs inside a fused operation and kept its codes")
                continue
            runner.put({f"{linear.name}.weight": self.tensors.in_file(f"{linear.name}.weight")})
            target = self.job.targets[linear.name]
            slots[linear.name] = LinearSlot(
                module, with_range(target, self._sharing_range(linear, target)), self.rounded[linear.name]
            )
        assert self.streams.unquantized is not None
        options = SignSGDOptions(iterations=self.job.settings.iterations, seed=self.job.settings.seed)
        found = sign_sgd_block(
            block.module, lambda module, x: runner.forward(self.index, x, module), self.streams.quantized.values,
            self.streams.unquantized.values, slots, options,
        )  # fmt: skip
        for linear in self.linears:
            if linear.name in found:
                weight = self.tensors.read(f"{linear.name}.weight")
                old = self.results[linear.name]
                outcome = Outcome(found[linear.name], f"{old.method}+sign-sgd", None, old.nearest_error)
                self._keep(linear, weight, found[linear.name], outcome, old.tokens)


def with_range(target: Target, weights: list[Tensor]) -> Target:
    """The target with the range of its whole tensor, or fused set, where its scales need one."""
    if not isinstance(target, GridTarget) or not needs_tensor_range(target.spec):
        return target
    ranges = [measure_range(weight, target.spec) for weight in weights]
    return replace(target, tensor_range=reduce(TensorRange.joined, ranges))


def _again(
    job: Job, runner: BlockRunner, index: int, streams: Streams, facts: ModelFacts | None, store: BlockStore
) -> None:
    """A block that was finished by an earlier run: its hidden states, with what was decided in place."""
    runner.load(index)
    if facts is not None:
        _Block(job, runner, index, streams, facts, lambda windows: None, Cost()).rotate()
    if streams.unquantized is not None:
        run_through(runner, index, streams.unquantized, job.ids[: streams.compared])
    linears = {each.name: each for each in runner.architecture.linears.values() if each.block == index}
    tensors = StoredTensors(job.checkpoint, runner, index, linears)
    values = {name: store.tensor(name).float() for name in store.rewritten() if name in tensors.names}
    for linear in linears.values():
        if linear.name in store.records[index].linears:
            name = f"{linear.name}.weight"
            values[name] = tensors.turned(name, store.decoded(linear.name, job.targets[linear.name], linear.shape[1]))
    runner.put(values)
    run_through(runner, index, streams.quantized, job.ids)
    runner.drop(index)


@dataclass
class _Meter:
    """Windows that went through a stage, for the progress bar."""

    progress: Progress | None
    total: int
    per_block: int
    done: int = 0
    name: str = field(default="")

    def skip(self, blocks: int) -> None:
        self.done = blocks * self.per_block

    def block(self, name: str, index: int) -> None:
        self.name, self.done = name, index * self.per_block
        self.tick(0)

    def tick(self, windows: int) -> None:
        self.done = min(self.done + windows, self.total)
        if self.progress is not None:
            self.progress(self.name, self.done, self.total)


def outside_rotated(checkpoint: Checkpoint, facts: ModelFacts) -> dict[str, Tensor]:
    """Embedding, final norm and head of a model whose residual stream is rotated, float32."""
    outside = facts.outside
    tensors = {name: checkpoint.read(name).float() for name in (outside.embedding, outside.norm, outside.head)
               if name in checkpoint.tensors}  # fmt: skip
    return rotate_outside(tensors, residual_rotation(facts), facts)
