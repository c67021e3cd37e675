"""One run, the same for every output format.

    prepare: open → discover → plan    calibrate    write: for each tensor, slab by slab: read → round → pack → write

Worker threads each take a slab of rows (about two million weights), quantize it and write the result to its final place
in the output, whose layout the plan has fixed. Peak memory is the interpreter plus a few slabs, whatever the size of
the model.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from lowbit.calibrate import loop
from lowbit.calibrate.input_ranges import measure_ranges
from lowbit.calibrate.store import TensorResult, joined_results
from lowbit.calibrate.task import CalibrationTask
from lowbit.calibrate.tensors import Replacement
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.quantized import FLOATS
from lowbit.distillation.descent import Distilled
from lowbit.distillation.stage import FinishJob, check_distillation
from lowbit.errors import NonFiniteError
from lowbit.files.claim import Claim
from lowbit.files.hashes import file_digests
from lowbit.files.system import check_disk
from lowbit.methods import RTN, parse_method
from lowbit.numerics.precision import compute_dtype, squared_error_in_double
from lowbit.plan.plan import SLAB_WEIGHTS, CalibrationText, Container, Making, Plan, PlannedTensor, Prepared, Progress
from lowbit.registry import load
from lowbit.rounding.extremes import EMPTY, empty, find_extreme, overflowing
from lowbit.rounding.hessian import InputData
from lowbit.rounding.histogram import RowReader, WeightHistogram, WeightHistograms
from lowbit.rounding.rtn import TensorRange, measure_range
from lowbit.rounding.target import Stored, Sums, Target
from lowbit.settings import RunOptions
from lowbit.workers import run_all

# Larger tensors release their pages after every slab, smaller ones after the last.
_RELEASE_ABOVE = 1 << 24


def calibrate(
    prepared: Prepared, output: Path, run: RunOptions | None = None, progress: Progress | None = None
) -> Prepared:
    """Run the calibration text where the plan needs one.

    Blockwise methods choose their codes first; then the calibrated model, which is what the engine will run, gives the
    ranges of static activation scales and of the KV cache.
    """
    plan, run, settings = prepared.plan, run or RunOptions(), prepared.plan.settings
    checkpoint, targets = prepared.checkpoint, prepared.plan.targets
    windows = None
    if settings.is_blockwise:
        assert plan.architecture is not None, "methods that work block by block need Hugging Face names"
        task = CalibrationTask(
            checkpoint=checkpoint, architecture=plan.architecture, targets=targets, dtypes=plan.float_dtypes,
            settings=settings, options=prepared.options, run=run, progress=progress, text=prepared.text,
            activations=plan.activations,
        )  # fmt: skip
        done, distilled = run_method(task, output, partial(_rounded_outside, plan))
        windows = done.windows
        prepared = replace(
            prepared, checkpoint=done.checkpoint, calibrated=done, distilled=distilled,
            calibration=CalibrationText.of(windows),
        )  # fmt: skip
        checkpoint = done.decoded(targets, plan.architecture, plan.dtype)
    elif prepared.calibrated is not None and plan.architecture is not None:  # codes of a training
        checkpoint = prepared.calibrated.decoded(targets, plan.architecture, plan.dtype)
        windows = prepared.calibrated.windows if len(prepared.calibrated.windows.ids) else None
    if not plan.static_inputs and not plan.needs_kv_ranges:
        return prepared
    if windows is None:
        windows = loop.read_windows(checkpoint, settings, prepared.options, run, progress, prepared.text)
    ranges = measure_ranges(
        checkpoint, plan.static_inputs, windows.ids, cache=plan.needs_kv_ranges,
        dtype=compute_dtype(settings.compute, run.device), device=run.device, options=prepared.options,
        progress=progress, method=settings.activation_range, percentile=settings.activation_percentile,
        activations=plan.activations, rotations=plan.rotations,
    )  # fmt: skip
    return replace(prepared, plan=plan.with_ranges(ranges), calibration=CalibrationText.of(windows))


def run_method(
    task: CalibrationTask, output: Path, rounded: Callable[[Checkpoint], dict[str, Replacement]],
    finishing: Progress | None = None,
) -> tuple[loop.Calibrated, Distilled | None]:  # fmt: skip
    """The calibrated loop, and the finish that the method may have; too little memory or text for that is refused
    first.

    rounded    as of `FinishJob`
    finishing  progress of the finish; None: the task's
    """
    finish = parse_method(task.settings.method).finish
    if finish is None:
        return loop.calibrate(task, output), None
    job = FinishJob(**vars(task), rounded=rounded)
    check_distillation(job)
    return load(finish.function)(loop.calibrate(task, output), replace(job, progress=finishing or task.progress))


def _rounded_outside(plan: Plan, checkpoint: Checkpoint) -> dict[str, Replacement]:
    """Whole tensors outside the decoder blocks that are rounded slab by slab (embedding and head of a GGUF file), as a
    reader of the output sees them."""

    @cache
    def encoded(name: str) -> tuple[Target, Stored]:
        tensor = chosen[name]
        assert tensor.target is not None
        weight = tensor.source.read(checkpoint, 0, tensor.rows).reshape(tensor.rows, tensor.columns).float()
        target = tensor.target.with_range([weight])
        return target, target.encode(weight, tensor.importance_at(0))[0]

    def read(name: str) -> Tensor:
        target, stored = encoded(name)
        return target.reader(stored)(torch.arange(chosen[name].rows))

    chosen = {
        tensor.source.names[0]: tensor
        for tensor in plan.tensors
        if tensor.making is Making.rounded and tensor.block is None and tensor.rounding is RTN
        and len(tensor.source.names) == 1 and tensor.source.names[0] in checkpoint.tensors and len(tensor.shape) == 2
        and tuple(checkpoint.tensors[tensor.source.names[0]].shape) == tensor.shape
    }  # fmt: skip
    return {name: Replacement(partial(read, name), torch.float32) for name in chosen}


@dataclass(frozen=True)
class Written:
    """The output of a run. results, notes, histograms: by the names of the plan's tensors

    beside   the other files: config, tokenizer …
    digests  file name → SHA-256 of each MiB, of every file
    """

    files: list[Path]
    results: dict[str, TensorResult] = field(default_factory=dict)
    histograms: dict[str, WeightHistogram] = field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    beside: list[Path] = field(default_factory=list)
    digests: dict[str, bytes] = field(default_factory=dict)


def write_checkpoint(
    prepared: Prepared,
    output: Path,
    progress: Progress | None = None,
    overwrite: bool = False,
    finish: Callable[[Path, Written], None] | None = None,
    claim: Claim | None = None,
) -> None:
    """Write the plan's output, atomically.

    finish  verifies the hidden folder and writes the report, before the folder gets its name; an exception in it leaves
            nothing behind
    claim   the run's claim on the output; None: one for the writing alone
    """
    plan = prepared.plan
    plan.refuse_existing(output, overwrite)
    check_disk(output, plan.file_bytes, plan.largest_file)
    with plan.workplace(output, overwrite, claim) as work:
        container = plan.container(work, output)
        try:
            run = _Run(prepared, container, progress)
            results, notes = run.all_tensors(), run.all_notes()
            for piece in plan.pieces_beside():
                container.write(piece)
            container.close()
        finally:
            container.abandon()
        plan.complete(work, prepared.checkpoint)
        if finish is not None:
            beside = sorted({path for path in work.rglob("*") if path.is_file()} - set(container.files))
            digests = container.digests | {str(path.relative_to(work)): file_digests(path) for path in beside}
            finish(work, Written(container.files, results, run.histograms.done, notes, beside, digests))


class _Run:
    """State shared by the worker threads of one run."""

    def __init__(self, prepared: Prepared, container: Container, progress: Progress | None):
        self.plan, self.checkpoint, self.threads = prepared.plan, prepared.checkpoint, prepared.threads
        self.container = container
        self.store = None if prepared.calibrated is None else prepared.calibrated.store
        self.progress = progress or (lambda what, done, total: None)
        self.total = sum(tensor.source_bytes for tensor in self.plan.tensors)
        self.done = 0
        self.lock = threading.Lock()
        self.sums: dict[str, dict[int, Sums]] = {}
        self.notes: dict[str, dict[int, str]] = {}  # tensor → first row of a slab → what became of extreme values
        self.histograms = WeightHistograms()

    def all_tensors(self) -> dict[str, TensorResult]:
        """Write every tensor; return the rounding error of each."""
        targets = self._with_ranges()
        jobs = (
            (self._slab, tensor, self._target(targets, tensor, first), first, last)
            for tensor in self.plan.tensors
            for first, last in tensor.slabs(SLAB_WEIGHTS)
        )
        run_all(jobs, self.threads)
        results = {name: _summed(sums) for name, sums in self.sums.items()}
        if self.store is not None:
            calibrated = self.store.results()
            for tensor in self.plan.tensors:
                if tensor.making is Making.calibrated:
                    results[tensor.name] = joined_results([calibrated[name] for name in tensor.source.names])
        return results

    def all_notes(self) -> dict[str, tuple[str, ...]]:
        """Tensor → what became of extreme values in it, in the order of its rows."""
        return {name: tuple(found[first] for first in sorted(found)) for name, found in self.notes.items()}

    def _target(self, ranged: dict[str, list[Target]], tensor: PlannedTensor, row: int) -> Target | None:
        return ranged[tensor.name][tensor.expert_at(row)] if tensor.name in ranged else tensor.target

    def _slab(self, tensor: PlannedTensor, target: Target | None, first: int, last: int) -> None:
        # For the histogram: readers of the source's rows and of the decoded ones.
        source: RowReader = lambda chosen: tensor.source.read(self.checkpoint, first, last)[chosen]  # noqa: E731
        decode: RowReader | None = None
        if tensor.making is Making.copied or target is None:
            rows = tensor.source.read(self.checkpoint, first, last)
            values = rows.reshape(last - first, -1)
            source = lambda chosen: values[chosen]  # noqa: E731
            if rows.dtype in FLOATS and rows.numel():
                self._check_kept(tensor, first, values)
        elif tensor.making is Making.rounded:
            values = tensor.source.read(self.checkpoint, first, last).reshape(last - first, tensor.columns)
            values = values.float() if values.dtype.itemsize > 4 else values
            if tensor.rounding is RTN:
                rows, sums = target.encode(values, tensor.importance_at(first))
            else:
                options = tensor.rounding.options_of(self.plan.settings)
                rows = load(tensor.rounding.function)(values, target, InputData(), options).stored
                sums = target.error(values, rows)
            sums = self._finite(tensor, first, values, target.reader(rows), sums)
            found = find_extreme(values, rows, sums, target, tensor.stored_as, first) if values.numel() else None
            self._keep(tensor, first, sums)
            self._note(tensor, first, found or overflowing(values, sums[1] ** 0.5, first, len(tensor.shape) < 2))
            source, decode = lambda chosen: values[chosen], target.reader(rows)
        elif tensor.making is Making.calibrated:
            assert self.store is not None
            rows = tensor.source.read_calibrated(self.store, target, first, last)
            decode = target.reader(rows)
        else:
            rows = tensor.source.repack(self.checkpoint, target, first, last)
            self._keep(tensor, first, self.plan.packing_error(tensor, rows))
            decode = source = target.reader(rows)
            self._check_kept(tensor, first, decode(torch.arange(last - first)))
        self.histograms.add(tensor.name, tensor.rows_shape, first, last, source, decode)
        for piece in self.plan.pack(tensor, rows, first):
            self.container.write(piece)
        self._release(tensor, last)
        with self.lock:
            self.done += tensor.source_bytes * (last - first) // max(1, tensor.rows)
            self.progress(tensor.name, self.done, self.total)

    def _with_ranges(self) -> dict[str, list[Target]]:
        """Targets whose scales need the range of the whole tensor, with that range, one per expert of a tensor; fused
        sets share one, where engines want them to."""
        needed = {
            tensor.name: (tensor, tensor.target)
            for tensor in self.plan.tensors
            if tensor.making is Making.rounded and tensor.target is not None and tensor.target.needs_range
        }
        slabs: dict[str, dict[int, TensorRange]] = {name: {} for name in needed}

        def measure(tensor: PlannedTensor, target: Target, first: int, last: int) -> None:
            rows = tensor.source.read(self.checkpoint, first, last).reshape(last - first, tensor.columns)
            extent = target.measured(rows.float() if rows.dtype.itemsize > 4 else rows)
            self._check_finite(tensor, first, extent.high - extent.low)
            self._release(tensor, last)
            slabs[tensor.name][first] = extent

        run_all(((measure, *pair, *bounds) for pair in needed.values() for bounds in pair[0].slabs(SLAB_WEIGHTS)),
                self.threads)  # fmt: skip
        ranges = {name: _ranges_by_expert(needed[name][0], extents) for name, extents in slabs.items()}
        fused = {t.linear.name: t.name for t, target in needed.values()
                 if t.linear is not None and target.fused_sets_share}  # fmt: skip
        for members in self.plan.architecture.fused_sets.values() if self.plan.architecture and fused else ():
            names = [fused[member] for member in members if member in fused]
            if names:
                shared = reduce(TensorRange.joined, (ranges[name][0] for name in names))
                ranges.update({name: [shared] for name in names})
        return {name: [target.ranged(extent) for extent in ranges[name]] for name, (_, target) in needed.items()}

    def _release(self, tensor: PlannedTensor, last: int) -> None:
        if last == tensor.rows or tensor.source_bytes > _RELEASE_ABOVE:
            for name in tensor.source.names:
                if name in self.checkpoint.tensors:
                    self.checkpoint.release(name)

    def _keep(self, tensor: PlannedTensor, first: int, sums: Sums) -> None:
        with self.lock:
            self.sums.setdefault(tensor.name, {})[first] = sums

    def _note(self, tensor: PlannedTensor, first: int, note: str | None) -> None:
        if note is not None and (len(tensor.shape) > 1 or not note.endswith(EMPTY)):  # biases of zeros are ordinary
            with self.lock:
                self.notes.setdefault(tensor.name, {})[first] = note

    def _check_kept(self, tensor: PlannedTensor, first: int, values: Tensor) -> None:
        """NonFiniteError for NaN or inf in rows that keep their floats or codes; a note where all are zero, or one is
        so large that it overflows."""
        extent = measure_range(values.reshape(1, -1))
        self._check_finite(tensor, first, extent.high - extent.low)
        if extent.low == extent.high == 0:
            self._note(tensor, first, empty(first, len(values)))
        else:
            limit = max(-extent.low, extent.high)
            self._note(tensor, first, overflowing(values, limit, first, len(tensor.shape) < 2))

    def _finite(self, tensor: PlannedTensor, first: int, values: Tensor, decode: RowReader, sums: Sums) -> Sums:
        """The sums of a slab's errors, in float64 where finite weights overflow float32; NonFiniteError for others."""
        if math.isfinite(sums[0] + sums[1]):
            return sums
        self._check_finite(tensor, first, 0.0 if bool(torch.isfinite(values).all()) else math.nan)
        decoded = decode(torch.arange(len(values)))
        if not bool(torch.isfinite(decoded).all()):
            row, column = divmod(int(values.abs().argmax()), values.shape[1])
            raise NonFiniteError(
                f"{self._file_of(tensor)}: tensor {tensor.name} holds {values[row, column].item():.6g} at "
                f"[{first + row}, {column}], which is beyond the range of {tensor.stored_as}",
                f"store it in 16 bits: {self.plan.keeping(tensor.name)}",
            )
        return squared_error_in_double(values, decoded)

    def _file_of(self, tensor: PlannedTensor) -> Path | str:
        return next((self.checkpoint.tensors[name].file for name in tensor.source.names), self.checkpoint.source)

    def _check_finite(self, tensor: PlannedTensor, first: int, weights: float) -> None:
        """NonFiniteError where the range of a slab's weights is not finite."""
        if not math.isfinite(weights):
            raise NonFiniteError(
                f"{self._file_of(tensor)}: tensor {tensor.name} holds NaN or inf, in the slab that begins at row "
                f"{first}",
                "the checkpoint is damaged, or was trained into overflow; get another copy of it",
            )


def _ranges_by_expert(tensor: PlannedTensor, slabs: dict[int, TensorRange]) -> list[TensorRange]:
    """The range of each expert, from those of slabs by their first row; joined in the order of rows, so that sums do
    not depend on the threads."""
    joined: dict[int, TensorRange] = {}
    for first in sorted(slabs):
        expert = tensor.expert_at(first)
        joined[expert] = joined[expert].joined(slabs[first]) if expert in joined else slabs[first]
    return [joined.get(expert, TensorRange(0.0, 0.0)) for expert in range(tensor.experts)]


def _summed(sums: dict[int, Sums]) -> TensorResult:
    ordered = [sums[first] for first in sorted(sums)]
    squared_error, squared_weight = sum(s[0] for s in ordered), sum(s[1] for s in ordered)
    return TensorResult(squared_error / squared_weight if squared_weight else 0.0, max(s[2] for s in ordered))
