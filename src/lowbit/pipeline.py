"""The main job: the one loop that knows the order of the stages.

    open → discover → plan → calibrate → for each tensor, slab by slab: read → round → pack → write
         → verify → report → rename

The source is never held: worker threads each take a slab of rows (about two million weights), quantize it and write
the result to its final place in the output file, whose layout the plan fixed in advance. Peak memory is therefore the
interpreter, plus a few slabs, whatever the size of the model.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lowbit.architecture import Architecture, describe_checkpoint
from lowbit.blockwise.results import TensorResult, decided_results
from lowbit.checkpoint import open_checkpoint, refuse_remote_code
from lowbit.checkpoint.base import CanReadCodes, Checkpoint, OpenOptions, is_decoded
from lowbit.checkpoint.quantized import FLOATS, KINDS
from lowbit.checkpoint.rows import row_slabs
from lowbit.errors import CheckpointError, NonFiniteError, UsageError
from lowbit.export import Piece
from lowbit.export.atomic import atomic_folder, check_disk, refuse_existing
from lowbit.export.companions import copy_companions
from lowbit.export.fused_experts import FUSED_EXPERTS
from lowbit.export.safetensors_writer import ASSEMBLED_BYTES, SafetensorsWriter
from lowbit.measure import resident_memory
from lowbit.numerics import grid_for
from lowbit.numerics.grid import Grid, RangeSearch
from lowbit.plan import Plan, PlannedTensor, make_plan, model_dtype
from lowbit.rounding.error import squared_error
from lowbit.rounding.histogram import RowReader, WeightHistogram, WeightHistograms, rows_decoder
from lowbit.rounding.rtn import TensorRange, measure_range, needs_tensor_range, round_to_nearest
from lowbit.rounding.widen import widened
from lowbit.schemes import Scheme
from lowbit.settings import Settings
from lowbit.tensors import QuantizedTensor
from lowbit.text import CalibrationWindows
from lowbit.workers import run_all

if TYPE_CHECKING:
    from lowbit.blockwise.prepare import Decided

SLAB_WEIGHTS = 2_000_000
# Bytes per weight of a slab in flight: source (≤ 4), float32 copies in a reference kernel, codes, packed codes.
_SLAB_BYTES_PER_WEIGHT = 12
# What verifying and reporting load beside that: code, tables of the report, pages of the output.
_LATER_BYTES = 30_000_000
# Tensors above this many bytes give their pages back after every slab, smaller ones after the last.
_RELEASE_ABOVE = 1 << 24

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


@dataclass(frozen=True)
class CalibrationText:
    """The text that input ranges were measured on."""

    name: str
    sha256: str
    windows: int
    window_tokens: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, cut: CalibrationWindows) -> CalibrationText:
        return cls(cut.name, cut.sha256, cut.ids.shape[0], cut.ids.shape[1], cut.notes)


@dataclass(frozen=True)
class Prepared:
    """A plan with its open source; `calibration` once a text was run, `decided` what that decided, block by block."""

    checkpoint: Checkpoint
    plan: Plan
    threads: int
    options: OpenOptions = field(default_factory=OpenOptions)
    calibration: CalibrationText | None = None
    decided: Decided | None = None

    @property
    def source(self) -> str:
        return self.checkpoint.source

    @property
    def source_kind(self) -> str:
        return self.checkpoint.kind

    @property
    def source_notes(self) -> tuple[str, ...]:
        return tuple(self.checkpoint.notes)

    def peak_memory(self) -> int:
        """Predicted peak resident bytes of the run: what is resident now, the slabs in flight, and the later stages."""
        smallest = (_row_multiple(t, self.plan, self.checkpoint) * t.walked_shape[-1] for t in self.plan.quantized)
        slab = max(SLAB_WEIGHTS, *smallest)
        turned = (s.nbytes for t in self.plan.quantized for s in t.stored if s.shape[:1] != t.walked_shape[:1])
        assembled = min(max(turned, default=0), ASSEMBLED_BYTES)
        in_flight = (self.threads + 1) * (slab * _SLAB_BYTES_PER_WEIGHT + assembled)
        return resident_memory() + in_flight + _LATER_BYTES


def prepare(
    model: str | Path, settings: Settings, options: OpenOptions | None = None, threads: int | None = None
) -> Prepared:
    """Open a model and plan what would be written; reads headers only."""
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot do anything", "leave it out for one per core")
    options = options or OpenOptions()
    checkpoint = open_checkpoint(model, options)
    architecture, checkpoint = described(checkpoint, options, settings.format in FUSED_EXPERTS)
    if checkpoint.kind in KINDS:
        checkpoint.notes.append(f"the source is quantized already ({checkpoint.kind}); its error comes on top")
    plan = make_plan(checkpoint, architecture, settings, model_dtype(checkpoint))
    return Prepared(checkpoint, plan, threads or os.cpu_count() or 1, options)


def needs_input_ranges(plan: Plan) -> set[str]:
    """Linears whose scheme stores a static activation scale."""
    schemes = plan.schemes.items()
    return {name for name, scheme in schemes if scheme.activation is not None and scheme.activation.needs_calibration}


def described(
    checkpoint: Checkpoint, options: OpenOptions, split_experts: bool = False
) -> tuple[Architecture, Checkpoint]:
    """The architecture of an open model, and the model under the architecture's names; experts as
    `describe_checkpoint` has them.

    Raises CheckpointError where config.json quantizes a linear that the files hold in 16 bits.
    """
    refuse_remote_code(checkpoint.config(), checkpoint.source, options)
    architecture, checkpoint = describe_checkpoint(checkpoint, options.trust_remote_code, split_experts)
    if checkpoint.kind in KINDS:
        _refuse_partly_quantized(checkpoint, architecture)
    return architecture, checkpoint


def write_checkpoint(
    prepared: Prepared,
    output: Path,
    progress: Progress | None = None,
    overwrite: bool = False,
    finish: Callable[[Path, dict[str, TensorResult], dict[str, WeightHistogram]], None] | None = None,
) -> None:
    """Write the plan's checkpoint to `output`, atomically.

    finish  is called with the still hidden folder, results and histograms by tensor, before the folder is renamed (to
            verify it and to write the report); an exception there leaves nothing behind
    """
    checkpoint, plan = prepared.checkpoint, prepared.plan
    refuse_existing(output, overwrite)
    check_disk(output, plan.file_bytes)
    with atomic_folder(output, overwrite) as work:
        writer = SafetensorsWriter(work, plan.stored, plan.settings.bytes_per_shard)
        try:
            run = _Run(prepared, writer, progress)
            results = run.quantize()
            for piece in plan.kv_pieces():
                writer.write(piece.name, piece.values)
            writer.close()
        finally:
            writer.abandon()
        _write_config(work, checkpoint, plan)
        copy_companions(checkpoint.folder, work)
        if finish is not None:
            finish(work, results, run.histograms.done)


class _Run:
    """State shared by the worker threads of one run."""

    def __init__(self, prepared: Prepared, writer: SafetensorsWriter, progress: Progress | None):
        self.plan, self.writer, self.threads, self.decided = prepared.plan, writer, prepared.threads, prepared.decided
        plan = self.plan
        self.checkpoint = prepared.checkpoint if self.decided is None else self.decided.checkpoint
        self.shares = plan.shares
        self.progress = progress or (lambda what, done, total: None)
        self.total = sum(tensor.source.nbytes for tensor in plan.tensors)
        self.done = 0
        self.lock = threading.Lock()
        self.sums: dict[str, dict[int, tuple[float, float, float]]] = {}
        self.histograms = WeightHistograms()

    def quantize(self) -> dict[str, TensorResult]:
        ranges = self._measure_ranges()
        jobs = (
            (self._slab, tensor, first, last, ranges.get(tensor.name))
            for tensor in self.plan.tensors
            for first, last in slabs(tensor, self.plan, self.checkpoint)
        )
        run_all(jobs, self.threads)
        results = {name: summed(sums) for name, sums in self.sums.items()}
        return results | ({} if self.decided is None else decided_results(self.decided.store))

    def _is_decided(self, tensor: PlannedTensor) -> bool:
        return self.decided is not None and tensor.scheme is not None and tensor.name in self.decided.store

    def _measure_ranges(self) -> dict[str, TensorRange]:
        """Ranges that must be known before the first slab; a fused set shares the range of its members."""
        needed = [
            tensor
            for tensor in self.plan.quantized
            if tensor.scheme
            and needs_tensor_range(tensor.scheme.weight)
            and not (tensor.repack or self._is_decided(tensor))
        ]
        slabs_of: dict[str, dict[int, TensorRange]] = {tensor.name: {} for tensor in needed}

        def measure(tensor: PlannedTensor, first: int, last: int) -> None:
            slab_range = measure_range(self._read(tensor, first, last), tensor.scheme.weight if tensor.scheme else None)
            if not math.isfinite(slab_range.high - slab_range.low):
                raise _non_finite(tensor, first)
            self._release(tensor, last)
            slabs_of[tensor.name][first] = slab_range

        jobs = ((measure, tensor, *bounds) for tensor in needed for bounds in slabs(tensor, self.plan, self.checkpoint))
        run_all(jobs, self.threads)
        # in the order of the rows, so that sums do not depend on which thread was first
        found = {name: reduce(TensorRange.joined, (ranges[first] for first in sorted(ranges)))
                 for name, ranges in slabs_of.items()}  # fmt: skip
        shared = {t.linear.name: t.name for t in needed if t.linear and t.scheme and not _stands_alone(t.scheme)}
        for members in self.plan.architecture.fused_sets.values():
            names = [shared[member] for member in members if member in shared]
            if names:
                joined = reduce(TensorRange.joined, (found[name] for name in names))
                found.update(dict.fromkeys(names, joined))
        return found

    def _read(self, tensor: PlannedTensor, first: int, last: int) -> Tensor:
        """Rows of the logical weight; a linear that lies transposed is turned round."""
        linear = tensor.linear
        if linear is None or not linear.transposed or tensor.scheme is None or is_decoded(self.checkpoint, tensor.name):
            return self.checkpoint.read(tensor.name, first, last)
        return self.checkpoint.read(tensor.name)[:, first:last].t().contiguous()

    def _release(self, tensor: PlannedTensor, last: int) -> None:
        if last == rows_of(tensor) or tensor.source.nbytes > _RELEASE_ABOVE:
            self.checkpoint.release(tensor.name)

    def _slab(self, tensor: PlannedTensor, first: int, last: int, tensor_range: TensorRange | None) -> None:
        if tensor.repack:
            self._repack_slab(tensor, first, last)
        elif self._is_decided(tensor):
            self._decided_slab(tensor, first, last)
        else:
            values = self._read(tensor, first, last)
            if tensor.scheme is not None:
                self._quantize_slab(tensor, values, first, last, tensor_range)
            else:
                if values.dtype in FLOATS and values.numel() and not _is_finite(values):
                    raise _non_finite(tensor, first)
                self._sample(tensor, first, last, lambda rows: values.reshape(last - first, -1)[rows])
                self._write(Piece(tensor.plain.name, values.to(tensor.plain.dtype), first))
            del values
        self._release(tensor, last)
        with self.lock:
            self.done += tensor.source.nbytes * (last - first) // max(1, rows_of(tensor))
            self.progress(tensor.name, self.done, self.total)

    def _quantize_slab(
        self, tensor: PlannedTensor, values: Tensor, first: int, last: int, tensor_range: TensorRange | None
    ) -> None:
        scheme = tensor.scheme
        assert scheme is not None, "planned to be quantized"
        quantized = round_to_nearest(
            values, scheme.weight, grid_of(tensor, self.plan), search_of(scheme, self.plan), tensor_range
        )
        sums = squared_error(values, quantized)
        if not math.isfinite(sums[0]):
            raise _non_finite(tensor, first)
        self._sample(tensor, first, last, lambda rows: values[rows], rows_decoder(quantized))
        self._pack(tensor, quantized, first, sums)

    def _decided_slab(self, tensor: PlannedTensor, first: int, last: int) -> None:
        """Codes that calibration has decided."""
        assert self.decided is not None
        assert tensor.scheme is not None
        assert tensor.linear is not None
        quantized = self.decided.store.quantized(
            tensor.linear.name, tensor.scheme.weight, grid_of(tensor, self.plan), tensor.linear.shape[1], first, last
        )
        self._sample(tensor, first, last, lambda rows: self._read(tensor, first, last)[rows], rows_decoder(quantized))
        self._pack(tensor, quantized, first, None)

    def _repack_slab(self, tensor: PlannedTensor, first: int, last: int) -> None:
        """The source's own codes, in the target's grid where that is wider; nothing is lost."""
        assert tensor.scheme is not None
        assert isinstance(self.checkpoint, CanReadCodes)
        quantized = widened(self.checkpoint.read_quantized(tensor.name, first, last), tensor.scheme.weight)
        sums = (0.0, 1.0, 0.0)
        self._sample(tensor, first, last, rows_decoder(quantized), rows_decoder(quantized))
        if self.plan.exporter.FORMAT == "float":
            sums = squared_error(quantized.decode().to(tensor.dtype), quantized)
        self._pack(tensor, quantized, first, sums)

    def _sample(self, tensor: PlannedTensor, first: int, last: int, source: RowReader, decode: RowReader | None = None):
        """Rows for the tensor's histogram."""
        self.histograms.add(tensor.name, tensor.walked_shape, first, last, source, decode)

    def _pack(self, tensor: PlannedTensor, quantized: QuantizedTensor, first: int, sums: tuple | None) -> None:
        linear, scheme = tensor.linear, tensor.scheme
        assert linear is not None
        assert scheme is not None
        if sums is not None:
            with self.lock:
                self.sums.setdefault(tensor.name, {})[first] = sums
        absmax = self.plan.input_absmax.get(linear.name)
        pack = self.plan.exporter.pack
        for piece in pack(linear.name, quantized, scheme, first, linear.shape, tensor.dtype, absmax):
            if linear.transposed and self.plan.exporter.FORMAT == "float":
                piece = replace(piece, values=piece.values.t(), row=0, column=first)
            self._write(piece)

    def _write(self, piece: Piece) -> None:
        share = self.shares.get(piece.name)
        if share is not None:
            piece = share.place(piece)
        self.writer.write(piece.name, piece.values, piece.row, piece.column, piece.index)


def _stands_alone(scheme: Scheme) -> bool:
    """True where each tensor has its own second level, whatever it is fused with."""
    return scheme.weight.scale_format == "nested"


def _is_finite(values: Tensor) -> bool:
    found = measure_range(values.reshape(1, -1))
    return math.isfinite(found.high - found.low)


def _non_finite(tensor: PlannedTensor, first: int) -> NonFiniteError:
    return NonFiniteError(
        f"{tensor.source.file}: tensor {tensor.name} holds NaN or inf, in the slab that begins at row {first}",
        "the checkpoint is damaged, or was trained into overflow; get another copy of it",
    )


def grid_of(tensor: PlannedTensor, plan: Plan) -> Grid:
    """The grid of a quantized tensor, with scales as the format stores them."""
    scheme, exporter = tensor.scheme, plan.exporter
    assert scheme is not None
    return grid_for(scheme.weight, exporter.scale_format(scheme, tensor.dtype), exporter.lowest_zero_point(scheme))


def search_of(scheme: Scheme, plan: Plan) -> RangeSearch:
    """How ranges of its weights are chosen."""
    return plan.settings.range_search(scheme.weight)


def rows_of(tensor: PlannedTensor) -> int:
    return tensor.walked_shape[0] if tensor.walked_shape else 1


def slabs(tensor: PlannedTensor, plan: Plan, checkpoint: Checkpoint) -> Iterator[tuple[int, int]]:
    """Row ranges of about `SLAB_WEIGHTS` weights, cut where the exporter and the source's own layout allow it."""
    if tensor.weights == 0:
        return iter([(0, rows_of(tensor))])
    return row_slabs(tensor.walked_shape, SLAB_WEIGHTS, _row_multiple(tensor, plan, checkpoint))


def _row_multiple(tensor: PlannedTensor, plan: Plan, checkpoint: Checkpoint) -> int:
    multiple = 1
    if tensor.linear is not None and tensor.scheme is not None:
        multiple = plan.exporter.row_multiple(tensor.scheme, tensor.linear.shape)
    if is_decoded(checkpoint, tensor.name) and isinstance(checkpoint, CanReadCodes):
        multiple = math.lcm(multiple, checkpoint.row_multiple(tensor.name))
    return multiple


def _write_config(work: Path, checkpoint: Checkpoint, plan: Plan) -> None:
    config = {key: value for key, value in checkpoint.config().items() if key != "quantization_config"}
    if not ("dtype" in config or "torch_dtype" in config):
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
    quantization = plan.quantization_config()
    if quantization:
        config["quantization_config"] = quantization
    files = {"config.json": config} | plan.companion_files()
    for name, content in files.items():
        (work / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse_partly_quantized(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """A linear that config.json quantizes and the files hold in 16 bits: one of the two is wrong."""
    assert isinstance(checkpoint, CanReadCodes), "kinds with codes show them"
    for linear in architecture.linears.values():
        weight = f"{linear.name}.weight"
        if linear.block is None or weight in architecture.tied or linear.keep is not None:
            continue
        if not is_decoded(checkpoint, weight) and checkpoint.says_quantized(linear.name):
            raise CheckpointError(
                f"{checkpoint.source}: config.json quantizes {linear.name}, but the files hold a plain {weight}",
                "the model is quantized in part, or config.json is of another one; list the linear as ignored there",
            )


def summed(sums: dict[int, tuple[float, float, float]]) -> TensorResult:
    ordered = [sums[first] for first in sorted(sums)]
    squared_error, squared_weight = sum(s[0] for s in ordered), sum(s[1] for s in ordered)
    return TensorResult(squared_error / squared_weight if squared_weight else 0.0, max(s[2] for s in ordered))
