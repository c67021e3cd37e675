"""The main job for llama.cpp: any checkpoint → one GGUF file (or a split set).

    open → map to GGUF → imatrix → types → for each tensor, slab by slab: read → encode → write
         → verify → report → rename

As in `pipeline.py` nothing of the model's size is held: worker threads each take a slab of rows, encode it and write
the blocks to their final place. Reading, encoding and writing of different slabs overlap.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowbit.architecture import Architecture
from lowbit.blockwise.overlay import DecidedBlocks
from lowbit.blockwise.results import TensorResult, decided_results, joined_results
from lowbit.calibrate.imatrix_file import read_imatrix
from lowbit.calibrate.importance import ImportanceMatrix
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint, OpenOptions, report_path
from lowbit.checkpoint.gguf_raw import RawGGUF
from lowbit.errors import NonFiniteError, UsageError
from lowbit.export.atomic import atomic_files, check_disk, refuse_existing_file
from lowbit.export.gguf_model import GGUFModel, describe_gguf
from lowbit.export.gguf_tokenizer import tokenizer_key_values
from lowbit.export.gguf_writer import GGUFWriter
from lowbit.gguf_plan import GGUFPlan, PlannedBlocks, importance_of, plan_from_gguf, plan_from_model, slabs
from lowbit.measure import resident_memory
from lowbit.numerics import ggml
from lowbit.pipeline import CalibrationText, Progress, described, summed
from lowbit.plan import model_dtype
from lowbit.rounding.histogram import RowReader, WeightHistogram, WeightHistograms
from lowbit.rounding.target import GgmlTarget, Target
from lowbit.settings import MEASURE, RunOptions, Settings
from lowbit.text import read_text
from lowbit.workers import run_all

if TYPE_CHECKING:
    from lowbit.blockwise.prepare import Decided

SLAB_WEIGHTS = 2_000_000
# Bytes per weight of a slab in flight: source, a float32 copy where rows are put in another order, blocks.
_SLAB_BYTES_PER_WEIGHT = 10
_LATER_BYTES = 30_000_000
# Tensors above this many bytes give their pages back after every slab, smaller ones after the last.
_RELEASE_ABOVE = 1 << 24


@dataclass(frozen=True)
class PreparedGGUF:
    """A plan with its open source. checkpoint: the model under Hugging Face names, or a GGUF file as it is."""

    checkpoint: Checkpoint | RawGGUF
    source: str
    source_kind: str
    source_notes: tuple[str, ...]
    plan: GGUFPlan
    threads: int
    options: OpenOptions = field(default_factory=OpenOptions)
    matrix: ImportanceMatrix | None = None
    architecture: Architecture | None = None
    decided: Decided | None = None

    @property
    def calibration(self) -> CalibrationText | None:
        """The text that the importance was measured on, where this run did that."""
        settings, matrix = self.plan.settings, self.matrix
        if self.decided is not None:
            return CalibrationText.of(self.decided.windows)
        if settings.imatrix != MEASURE or matrix is None:
            return None
        text = read_text(settings.calib, packaged="calibration")
        return CalibrationText(text.name, text.sha256, matrix.chunks, matrix.chunk_tokens)

    def peak_memory(self) -> int:
        """Predicted peak resident bytes of the run: what is resident now, the slabs in flight, and the later stages."""
        slab = max(SLAB_WEIGHTS, *(tensor.columns for tensor in self.plan.tensors))
        return resident_memory() + (self.threads + 1) * slab * _SLAB_BYTES_PER_WEIGHT + _LATER_BYTES


def prepare_gguf(
    model: str | Path,
    settings: Settings,
    options: OpenOptions | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PreparedGGUF:
    """Open a model and plan its GGUF; reads headers only, unless the imatrix is to be measured."""
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot do anything", "leave it out for one per core")
    threads = threads or os.cpu_count() or 1
    options = options or OpenOptions()
    matrix = _imatrix(model, settings, options, progress)
    raw = None if settings.is_blockwise else open_as_gguf(model, options)
    if raw is not None:
        plan = plan_from_gguf(raw, settings, matrix)
        return PreparedGGUF(raw, str(model), "gguf", _stored_note(raw), plan, threads, options, matrix)
    checkpoint = open_checkpoint(model, options)
    architecture, checkpoint = described(checkpoint, options, split_experts=True)
    mapped = describe_gguf(checkpoint, architecture)
    embedding = next(tensor for tensor in mapped.tensors if tensor.name == "token_embd.weight")
    tokenizer = tokenizer_key_values(checkpoint.folder, embedding.shape[0], settings.pre_tokenizer)
    float_type = "BF16" if model_dtype(checkpoint) is torch.bfloat16 else "F16"
    plan = plan_from_model(
        checkpoint, mapped, tokenizer.key_values, settings, matrix, float_type, tuple(tokenizer.notes),
        calibrated_names(mapped, architecture) if settings.is_blockwise else frozenset(),
    )  # fmt: skip
    notes = tuple(checkpoint.notes)
    return PreparedGGUF(
        checkpoint, checkpoint.source, checkpoint.kind, notes, plan, threads, options, matrix, architecture
    )


def calibrated_names(mapped: GGUFModel, architecture: Architecture) -> frozenset[str]:
    """The tensors of the file that consist of linears of decoder blocks: those that calibration decides."""
    linears = {f"{linear.name}.weight" for linear in architecture.linears.values() if linear.block is not None}
    return frozenset(tensor.name for tensor in mapped.tensors if tensor.sources and linears.issuperset(tensor.sources))


def calibrate_gguf(
    prepared: PreparedGGUF, output: Path, run: RunOptions | None = None, progress: Progress | None = None
) -> PreparedGGUF:
    """The same with the blocks that a method decides block by block; nothing is run where it decides none."""
    settings, architecture, checkpoint = prepared.plan.settings, prepared.architecture, prepared.checkpoint
    if not settings.is_blockwise:
        return prepared
    from lowbit.blockwise.prepare import decide

    assert architecture is not None
    assert not isinstance(checkpoint, RawGGUF)
    linears = {f"{linear.name}.weight": linear for linear in architecture.linears.values() if linear.block is not None}
    targets: dict[str, Target] = {
        linears[source].name: GgmlTarget(tensor.kind.name)
        for tensor in prepared.plan.quantized
        for source in tensor.source.sources
        if source in linears
    }
    dtypes = dict.fromkeys(checkpoint.tensors, torch.float32)
    decided = decide(checkpoint, architecture, targets, dtypes, settings, prepared.options, run or RunOptions(), output,
                     progress)  # fmt: skip
    return replace(prepared, decided=decided, checkpoint=decided.checkpoint)


def write_gguf(
    prepared: PreparedGGUF,
    output: Path,
    progress: Progress | None = None,
    overwrite: bool = False,
    finish: Callable[[Path, list[Path], dict[str, TensorResult], dict[str, WeightHistogram]], None] | None = None,
) -> None:
    """Write the plan's file (or parts) under the name `output`, atomically.

    finish  is called with the hidden folder, the files in it, results and histograms by tensor, before the files get
            their names, to verify them and to write the report beside them; an exception there leaves nothing behind
    """
    for name in prepared.plan.file_names(output.name):
        refuse_existing_file(output.with_name(name), report_path(output), overwrite)
    check_disk(output, prepared.plan.file_bytes)
    with atomic_files(output) as work:
        plan = prepared.plan
        writer = GGUFWriter(work, output.name, plan.stored, plan.key_values, plan.settings.shard_size)
        try:
            run = _Run(prepared, writer, progress)
            results = run.encode()
            writer.close()
        finally:
            writer.abandon()
        if finish is not None:
            finish(work, writer.files, results, run.histograms.done)


class _Run:
    """State shared by the worker threads of one run."""

    def __init__(self, prepared: PreparedGGUF, writer: GGUFWriter, progress: Progress | None):
        self.prepared, self.writer = prepared, writer
        self.progress = progress or (lambda what, done, total: None)
        self.total = sum(tensor.source_bytes for tensor in prepared.plan.tensors)
        self.done = 0
        self.lock = threading.Lock()
        self.sums: dict[str, dict[int, tuple[float, float, float]]] = {}
        self.histograms = WeightHistograms()

    def encode(self) -> dict[str, TensorResult]:
        jobs = (
            (self._slab, tensor, first, last)
            for tensor in self.prepared.plan.tensors
            for first, last in slabs(tensor, SLAB_WEIGHTS)
        )
        run_all(jobs, self.prepared.threads)
        results = {name: summed(sums) for name, sums in self.sums.items()}
        return results | self._decided_results()

    def _slab(self, tensor: PlannedBlocks, first: int, last: int) -> None:
        if tensor.copied:
            self._copy(tensor, first, last)
        elif self._is_decided(tensor):
            self._write_decided(tensor, first, last)
        else:
            self._encode(tensor, first, last)
        self._release(tensor, first, last)
        with self.lock:
            self.done += tensor.source_bytes * (last - first) // max(1, tensor.rows)
            self.progress(tensor.name, self.done, self.total)

    def _copy(self, tensor: PlannedBlocks, first: int, last: int) -> None:
        raw = self.prepared.checkpoint
        assert isinstance(raw, RawGGUF), "only GGUF files store ggml types"
        stored = raw.bytes(tensor.source.tensor)  # type: ignore[attr-defined]
        begin = first * tensor.row_bytes
        self.writer.write(tensor.name, stored[begin : last * tensor.row_bytes], begin)

    def _is_decided(self, tensor: PlannedBlocks) -> bool:
        decided = self.prepared.decided
        sources = tensor.source.sources
        return decided is not None and bool(sources) and all(name in decided.store for name in sources)

    def _write_decided(self, tensor: PlannedBlocks, first: int, last: int) -> None:
        """Blocks that calibration has decided, row by row as the source's weights would be read."""
        assert self.prepared.decided is not None
        in_bytes = replace(tensor.source, shape=(*tensor.shape[:-1], tensor.row_bytes))  # type: ignore[type-var]
        rows = in_bytes.read(DecidedBlocks(self.prepared.decided.store), first, last)  # type: ignore[attr-defined]
        self._sample(tensor, first, last, lambda chosen: self._read(tensor, first, last)[chosen], rows)
        self.writer.write(tensor.name, rows, first * tensor.row_bytes)

    def _decided_results(self) -> dict[str, TensorResult]:
        """Of each tensor that calibration decided; of stacked experts the mean error and what one of them says."""
        found: dict[str, TensorResult] = {}
        decided = self.prepared.decided
        if decided is None:
            return found
        results = decided_results(decided.store)
        for tensor in self.prepared.plan.tensors:
            if self._is_decided(tensor):
                parts = [results[name] for name in tensor.source.sources]
                found[tensor.name] = joined_results(parts)
        return found

    def _encode(self, tensor: PlannedBlocks, first: int, last: int) -> None:
        values = self._read(tensor, first, last)
        blocks, sums = ggml.encode_measured(tensor.kind.name, values, importance_of(tensor, first))
        if not math.isfinite(sums[1]):
            raise NonFiniteError(
                f"{self.prepared.source}: tensor {tensor.name} holds NaN or inf, in the slab from row {first} on",
                "the checkpoint is damaged, or was trained into overflow; get another copy of it",
            )
        if not math.isfinite(sums[0]):
            raise NonFiniteError(
                f"{self.prepared.source}: tensor {tensor.name} has weights beyond the range of {tensor.kind.name}",
                f"store it in BF16: --override '{tensor.name}=BF16'",
            )
        with self.lock:
            self.sums.setdefault(tensor.name, {})[first] = sums
        self._sample(tensor, first, last, lambda chosen: values[chosen], blocks)
        self.writer.write(tensor.name, blocks, first * tensor.row_bytes)

    def _read(self, tensor: PlannedBlocks, first: int, last: int) -> torch.Tensor:
        """Rows of the source in the order of the file, of at most 4 bytes a weight, [rows, K]."""
        values = tensor.source.read(self.prepared.checkpoint, first, last).reshape(last - first, tensor.columns)
        return values.float() if values.dtype.itemsize > 4 else values

    def _sample(self, tensor: PlannedBlocks, first: int, last: int, source: RowReader, blocks: torch.Tensor) -> None:
        """Rows for the tensor's histogram; `blocks` are the bytes of rows first … last."""
        blocks = blocks.reshape(last - first, tensor.row_bytes)
        self.histograms.add(
            tensor.name, (tensor.rows, tensor.columns), first, last, source,
            lambda chosen: ggml.decode(tensor.kind.name, blocks[chosen]),
        )  # fmt: skip

    def _release(self, tensor: PlannedBlocks, first: int, last: int) -> None:
        checkpoint = self.prepared.checkpoint
        if isinstance(checkpoint, RawGGUF):
            checkpoint.release(tensor.source.tensor, first, last)  # type: ignore[attr-defined]
        elif last == tensor.rows or tensor.source_bytes > _RELEASE_ABOVE:
            for name in tensor.source.sources:
                if name in checkpoint.tensors:
                    checkpoint.release(name)


def open_as_gguf(model: str | Path, options: OpenOptions) -> RawGGUF | None:
    """The GGUF file that MODEL is or names, opened as it is; None where it is something else."""
    from lowbit.checkpoint.opening import find_gguf

    path = find_gguf(model, options)
    return None if path is None else RawGGUF(path)


def _stored_note(raw: RawGGUF) -> tuple[str, ...]:
    from lowbit.checkpoint.gguf import stored_types_note

    return tuple(stored_types_note(raw.tensors))


def _imatrix(
    model: str | Path, settings: Settings, options: OpenOptions, progress: Progress | None
) -> ImportanceMatrix | None:
    """From a file, or measured now on the calibration text where `settings.imatrix` says so."""
    if settings.imatrix is None:
        return None
    if settings.imatrix != MEASURE:
        return read_imatrix(Path(settings.imatrix))
    from lowbit.calibrate.imatrix import measure_imatrix_of

    return measure_imatrix_of(model, settings.calib, settings.samples, settings.seqlen, options, progress)
