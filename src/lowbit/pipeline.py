"""The main job: the one loop that knows the order of the stages.

    open → discover → plan → for each tensor, slab by slab: read → round → pack → write → verify → report → rename

The source is never held: worker threads each take a slab of rows (about two million weights), quantize it and write
the result to its final place in the output file, whose layout the plan fixed in advance. Peak memory is therefore the
interpreter, plus a few slabs, whatever the size of the model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.architecture import discover_once
from lowbit.checkpoint import open_checkpoint, refuse_remote_code
from lowbit.checkpoint.base import REPORT_NAME, Checkpoint, OpenOptions
from lowbit.checkpoint.rows import row_slabs
from lowbit.errors import CheckpointError, NonFiniteError, OutputError, UsageError
from lowbit.export.atomic import atomic_folder, refuse_existing
from lowbit.export.safetensors_writer import SafetensorsWriter
from lowbit.measure import resident_memory
from lowbit.numerics import grid_for
from lowbit.plan import Plan, PlannedTensor, make_plan, model_dtype
from lowbit.rounding.rtn import TensorRange, measure_range, needs_tensor_range, round_to_nearest
from lowbit.settings import Settings

SLAB_WEIGHTS = 2_000_000
# Bytes per weight of a slab in flight: source (≤ 4), float32 copies in a reference kernel, codes, packed codes.
_SLAB_BYTES_PER_WEIGHT = 12
# What verifying and reporting load beside that: code, tables of the report, pages of the output.
_LATER_BYTES = 30_000_000
# Tensors above this many bytes give their pages back after every slab, smaller ones after the last.
_RELEASE_ABOVE = 1 << 24

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


@dataclass(frozen=True)
class TensorResult:
    """What rounding one weight cost: ‖W − Ŵ‖² / ‖W‖², and the largest |w − ŵ|."""

    relative_error: float
    max_error: float


@dataclass(frozen=True)
class Prepared:
    """A plan with its open source."""

    checkpoint: Checkpoint
    plan: Plan
    threads: int

    def peak_memory(self) -> int:
        """Predicted peak resident bytes of the run: what is resident now, the slabs in flight, and the later stages."""
        widest = max((t.shape[-1] for t in self.plan.tensors if t.shape), default=1)
        slab = max(SLAB_WEIGHTS, widest * max(self.plan.exporter.row_multiple(s) for s in self.plan.schemes.values()))
        return resident_memory() + (self.threads + 1) * slab * _SLAB_BYTES_PER_WEIGHT + _LATER_BYTES


def prepare(
    model: str | Path, settings: Settings, options: OpenOptions | None = None, threads: int | None = None
) -> Prepared:
    """Open a model and plan what would be written; reads headers only."""
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot do anything", "leave it out for one per core")
    options = options or OpenOptions()
    checkpoint = open_checkpoint(model, options)
    config = checkpoint.config()
    refuse_remote_code(config, checkpoint.source, options)
    _refuse_quantized(checkpoint, config)
    architecture = discover_once(config, str(checkpoint.folder), options.trust_remote_code)
    plan = make_plan(checkpoint, architecture, settings, model_dtype(checkpoint))
    _refuse_static_activations(plan)
    return Prepared(checkpoint, plan, threads or os.cpu_count() or 1)


def write_checkpoint(
    prepared: Prepared,
    output: Path,
    progress: Progress | None = None,
    overwrite: bool = False,
    finish: Callable[[Path, dict[str, TensorResult]], None] | None = None,
) -> None:
    """Write the plan's checkpoint to `output`, atomically.

    finish  is called with the still hidden folder before it is renamed (to verify it and to write the report);
            an exception there leaves nothing behind
    """
    checkpoint, plan = prepared.checkpoint, prepared.plan
    _check_disk(output, plan, overwrite)
    with atomic_folder(output, overwrite) as work:
        writer = SafetensorsWriter(work, plan.stored, plan.settings.shard_size)
        try:
            results = _Run(checkpoint, plan, writer, prepared.threads, progress).quantize()
            writer.close()
        finally:
            writer.abandon()
        _write_config(work, checkpoint, plan)
        copy_companions(checkpoint.folder, work)
        if finish is not None:
            finish(work, results)


class _Run:
    """State shared by the worker threads of one run."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, writer: SafetensorsWriter, threads: int, progress):
        self.checkpoint, self.plan, self.writer, self.threads = checkpoint, plan, writer, threads
        self.progress = progress or (lambda what, done, total: None)
        self.total = sum(tensor.source.nbytes for tensor in plan.tensors)
        self.done = 0
        self.lock = threading.Lock()
        self.sums: dict[str, dict[int, tuple[float, float, float]]] = {}

    def quantize(self) -> dict[str, TensorResult]:
        ranges = self._measure_ranges()
        jobs = (
            (self._slab, tensor, first, last, ranges.get(tensor.name))
            for tensor in self.plan.tensors
            for first, last in slabs(tensor, self.plan)
        )
        self._run_all(jobs)
        return {name: _result(sums) for name, sums in self.sums.items()}

    def _measure_ranges(self) -> dict[str, TensorRange]:
        """Ranges that must be known before the first slab; a fused set shares the range of its members."""
        needed = [
            tensor for tensor in self.plan.quantized if tensor.scheme and needs_tensor_range(tensor.scheme.weight)
        ]
        found: dict[str, TensorRange] = {}

        def measure(tensor: PlannedTensor, first: int, last: int) -> None:
            slab_range = measure_range(self._read(tensor, first, last))
            if not math.isfinite(slab_range.high - slab_range.low):
                raise _non_finite(tensor, first)
            self._release(tensor, last)
            with self.lock:
                found[tensor.name] = slab_range.joined(found.get(tensor.name, slab_range))

        self._run_all((measure, tensor, *bounds) for tensor in needed for bounds in slabs(tensor, self.plan))
        by_linear = {tensor.linear.name: tensor.name for tensor in needed if tensor.linear}
        for members in self.plan.architecture.fused_sets.values():
            names = [by_linear[member] for member in members if member in by_linear]
            if names:
                joined = reduce(TensorRange.joined, (found[name] for name in names))
                found.update(dict.fromkeys(names, joined))
        return found

    def _run_all(self, jobs: Iterator[tuple[Any, ...]]) -> None:
        """Run jobs on the pool, a bounded number in flight; the first error (or Ctrl-C) stops the rest."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="lowbit")
        pending: set[Future[None]] = set()
        try:
            for function, *arguments in jobs:
                pending.add(pool.submit(function, *arguments))
                if len(pending) > 2 * self.threads:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
            for future in pending:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, tensor: PlannedTensor, first: int, last: int) -> Tensor:
        return self.checkpoint.read(tensor.name, first, last)

    def _release(self, tensor: PlannedTensor, last: int) -> None:
        if last == rows_of(tensor) or tensor.source.nbytes > _RELEASE_ABOVE:
            self.checkpoint.release(tensor.name)

    def _slab(self, tensor: PlannedTensor, first: int, last: int, tensor_range: TensorRange | None) -> None:
        values = self._read(tensor, first, last)
        if tensor.scheme is None or tensor.linear is None:
            if values.dtype in _CHECKED and values.numel() and not _is_finite(values):
                raise _non_finite(tensor, first)
            (stored,) = tensor.stored
            self.writer.write(stored.name, values.to(stored.dtype), first)
        else:
            self._quantize_slab(tensor, values, first, tensor_range)
        del values
        self._release(tensor, last)
        with self.lock:
            self.done += tensor.source.nbytes * (last - first) // max(1, rows_of(tensor))
            self.progress(tensor.name, self.done, self.total)

    def _quantize_slab(
        self, tensor: PlannedTensor, values: Tensor, first: int, tensor_range: TensorRange | None
    ) -> None:
        scheme, linear, plan = tensor.scheme, tensor.linear, self.plan
        if scheme is None or linear is None:
            raise AssertionError(f"{tensor.name} has no scheme")
        grid = grid_for(scheme.weight, str(plan.dtype).removeprefix("torch."))
        quantized = round_to_nearest(
            values, scheme.weight, grid, plan.settings.range_search(scheme.weight), tensor_range
        )
        params = quantized.params()
        sums = kernels.squared_error(
            values, quantized.codes, scheme.weight.columns_per_scale(values.shape[1]), params.scale, params.zero_point,
            getattr(grid, "format", None),
        )  # fmt: skip
        if not math.isfinite(sums[0]):
            raise _non_finite(tensor, first)
        with self.lock:
            self.sums.setdefault(tensor.name, {})[first] = sums
        for name, packed, row in plan.exporter.pack(linear.name, quantized, scheme, first, linear.shape, plan.dtype):
            self.writer.write(name, packed, row)


_CHECKED = (torch.float32, torch.bfloat16, torch.float16)


def _is_finite(values: Tensor) -> bool:
    found = measure_range(values.reshape(1, -1))
    return math.isfinite(found.high - found.low)


def _non_finite(tensor: PlannedTensor, first: int) -> NonFiniteError:
    return NonFiniteError(
        f"{tensor.source.file}: tensor {tensor.name} holds NaN or inf, in the slab that begins at row {first}",
        "the checkpoint is damaged, or was trained into overflow; get another copy of it",
    )


def rows_of(tensor: PlannedTensor) -> int:
    return tensor.shape[0] if tensor.shape else 1


def slabs(tensor: PlannedTensor, plan: Plan) -> Iterator[tuple[int, int]]:
    """Row ranges of about `SLAB_WEIGHTS` weights, cut where the exporter allows it."""
    multiple = plan.exporter.row_multiple(tensor.scheme) if tensor.scheme else 1
    if tensor.weights == 0:
        return iter([(0, rows_of(tensor))])
    return row_slabs(tensor.shape, SLAB_WEIGHTS, multiple)


def copy_companions(folder: Path, work: Path) -> None:
    """Tokenizer, generation config, chat template, licence and custom code: all small files that are not weights."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in _REWRITTEN and path.suffix.lower() in _COMPANIONS:
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, work / path.name)
        elif path.is_file() and path.name.upper().startswith(("LICENSE", "NOTICE")):
            shutil.copyfile(path, work / path.name)


_COMPANIONS = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".vocab", ".spm"}
# Written anew, or of an earlier quantization, which would contradict config.json.
_REWRITTEN = {
    "config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", REPORT_NAME,
}  # fmt: skip


def _write_config(work: Path, checkpoint: Checkpoint, plan: Plan) -> None:
    config = {key: value for key, value in checkpoint.config().items() if key != "quantization_config"}
    if not ("dtype" in config or "torch_dtype" in config):
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
    config["quantization_config"] = plan.exporter.quantization_config(plan.schemes, plan.ignored)
    (work / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_disk(output: Path, plan: Plan, overwrite: bool) -> None:
    refuse_existing(output, overwrite)
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < plan.file_bytes:
        raise OutputError(
            f"{output}: needs {plan.file_bytes / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB free",
            "free some space or write to another disk",
        )


def _refuse_quantized(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Codes of a format that is not decoded on reading must not be taken for weights."""
    quantization = config.get("quantization_config")
    if quantization and checkpoint.kind != "compressed-tensors":
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{checkpoint.source}: config.json says it is quantized already (quant_method {method!r})",
            "start from the original checkpoint; every quantization of a quantized model adds its error",
        )


def _refuse_static_activations(plan: Plan) -> None:
    for name, scheme in plan.schemes.items():
        if scheme.activation is not None and scheme.activation.needs_calibration:
            other = {"FP8": "FP8_DYNAMIC", "NVFP4": "NVFP4A16"}.get(scheme.name, "a dynamic scheme")
            raise UsageError(
                f"scheme {scheme.name} ({name}) needs static activation scales, which calibration measures",
                f"use {other}; calibration (`lowbit quantize --calib TEXT`) is not part of this version",
            )


def _result(sums: dict[int, tuple[float, float, float]]) -> TensorResult:
    ordered = [sums[first] for first in sorted(sums)]
    squared_error, squared_weight = sum(s[0] for s in ordered), sum(s[1] for s in ordered)
    return TensorResult(squared_error / squared_weight if squared_weight else 0.0, max(s[2] for s in ordered))
