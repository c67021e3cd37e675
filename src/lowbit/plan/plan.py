"""`Plan` and `PlannedTensor`, the same for every output format.

    Request ─► Prepared: an open checkpoint and its Plan ─► (calibrate) ─► write

`plan/folder.py` plans safetensors folders, `formats/gguf/plan.py` GGUF files. Each defines a subclass of `Plan` that
packs rows and names the files of its format; all other code uses `Plan`.

Nothing is skipped silently: a tensor that is not quantized carries the reason, an adapted one carries a note.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lowbit.architecture import Architecture, Linear
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.checkpoint.opening import ModelSource
from lowbit.errors import UsageError
from lowbit.export import Piece, default_format
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.files.claim import Claim
from lowbit.methods import RTN, Rounding, parse_method
from lowbit.numerics.hadamard import Rotation
from lowbit.registry import FORMATS, Format, load
from lowbit.rounding.target import Stored, Sums, Target
from lowbit.schemes import ActivationSpec, Scheme
from lowbit.settings import Settings
from lowbit.text import CalibrationWindows, GivenText
from lowbit.transform.facts import model_facts
from lowbit.transform.rotate import needs_own_head

if TYPE_CHECKING:
    from lowbit.calibrate.input_ranges import Ranges
    from lowbit.calibrate.loop import Calibrated
    from lowbit.calibrate.store import BlockStore
    from lowbit.distillation.descent import Distilled

SLAB_WEIGHTS = 2_000_000  # about the weights that a worker thread holds
Progress = Callable[[str, int, int], None]  # (name, bytes done, bytes in all)


class Making(StrEnum):
    """How the rows of a tensor are produced."""

    copied = "copied"  # the source's values; floats are cast to the dtype of the output
    repacked = "repacked"  # the source's codes and scales, in the layout of the output
    calibrated = "calibrated"  # codes of a blockwise method
    rounded = "rounded"  # slab by slab, to nearest or by a method that needs no text


class Source(Protocol):
    """The source of the rows of a planned tensor."""

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors of the checkpoint; none for a computed tensor."""
        ...

    def read(self, checkpoint: Checkpoint, first: int, last: int) -> Tensor:
        """Rows first..last of the logical tensor, [last − first, …], in the dtype of the checkpoint."""
        ...

    def read_calibrated(self, store: BlockStore, target: Target, first: int, last: int) -> Stored:
        """The same rows as calibration rounded them."""
        ...

    def repack(self, checkpoint: Checkpoint, target: Target, first: int, last: int) -> Stored:
        """The same rows as the source stores them, in the target's grid."""
        ...


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor and what becomes of it.

    name         in the output: Hugging Face's in folders, llama.cpp's in GGUF files
    shape        of the logical tensor, [N, K] for a linear; [E, N, K] for stacked experts
    stored       tensors that are written; for a single expert, its share of the fused ones
    target       grid or ggml type that its rows are rounded to; None where they are copied
    rounding     method that chooses the codes where it is rounded slab by slab, without a text
    scheme       of a quantized linear in a folder; None otherwise
    reason       why it is not quantized; None where it is
    notes        adaptations: "group size 64, because 128 does not divide 576"
    dtype        float dtype of stored scales: the model's, or that of the source's scales
    plain_dtype  dtype of the values where they are not quantized
    linear       module of the weight, if it belongs to one linear
    importance   float32 [E, K], weights of squared errors (E = 1 without stacked experts); None: all alike
    in_decoder   True for matrices of decoder blocks, over which bits per weight are counted
    unfit        True where its shape is the reason not to quantize it
    multiple     slabs begin at multiples of this many rows
    """

    name: str
    role: str
    block: int | None
    shape: tuple[int, ...]
    source: Source
    source_bytes: int
    making: Making
    stored: tuple[StoredTensor, ...]
    target: Target | None = None
    rounding: Rounding = RTN
    scheme: Scheme | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    plain_dtype: torch.dtype = torch.bfloat16
    linear: Linear | None = None
    importance: Tensor | None = field(default=None, compare=False)
    in_decoder: bool = False
    unfit: bool = False
    multiple: int = 1

    @property
    def is_quantized(self) -> bool:
        return self.reason is None

    @property
    def stored_as(self) -> str:
        """Name of the scheme or ggml type, or "16 bits"."""
        if self.scheme is not None:
            return self.scheme.name
        return "16 bits" if self.target is None else self.target.name

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Shape that slabs are cut from: the tensor's own if it is copied, else [rows, K] with experts stacked and a
        vector as one row. A linear that is stored transposed counts as [N, K]."""
        if self.scheme is not None and self.linear is not None:
            return self.linear.shape
        if self.target is None:
            return self.shape
        return (math.prod(self.shape[:-1]), self.shape[-1]) if self.shape else (1, 1)

    @property
    def rows(self) -> int:
        return self.rows_shape[0] if self.rows_shape else 1

    @property
    def columns(self) -> int:
        return self.rows_shape[-1] if self.rows_shape else 1

    @property
    def experts(self) -> int:
        """Experts that its rows hold one after the other; 1 for a tensor of its own."""
        return self.shape[0] if self.target is not None and len(self.shape) == 3 else 1

    def expert_at(self, row: int) -> int:
        """The expert that a row belongs to."""
        return row // max(1, self.rows // self.experts) if self.experts > 1 else 0

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored)

    def slabs(self, weights: int) -> Iterable[tuple[int, int]]:
        """Row ranges of about `weights` weights each, at multiples of `multiple`, within one expert."""
        experts = self.experts
        rows = self.rows // experts if experts else 0
        per_row = max(1, self.weights // max(1, self.rows))
        step = max(1, weights // per_row // self.multiple) * self.multiple if self.weights else max(1, rows)
        for expert in range(experts):
            for first in range(0, rows, step):
                yield expert * rows + first, expert * rows + min(first + step, rows)

    def importance_at(self, row: int) -> Tensor | None:
        """Weights of the squared errors of the slab that begins at this row, float32 [K]."""
        if self.importance is None:
            return None
        return self.importance[min(self.expert_at(row), self.importance.shape[0] - 1)].to(torch.float32).contiguous()


class Container(Protocol):
    """The open files of an output; `write` takes pieces in any order and from any thread."""

    digests: dict[str, bytes]  # after `close`: file name → SHA-256 of each MiB, one after the other

    @property
    def files(self) -> list[Path]: ...

    def write(self, piece: Piece) -> None: ...

    def close(self) -> None:
        """Check that every byte was written; OutputError otherwise."""
        ...

    def abandon(self) -> None:
        """Close the files as they are."""
        ...


@dataclass(frozen=True)
class Plan(ABC):
    """Everything that will be written.

    architecture  None for GGUF files that are requantized under their own names
    scheme_name, range_method   headline of the report
    dtype         of unquantized floats
    notes         for the user, about the plan as a whole
    """

    tensors: tuple[PlannedTensor, ...]
    settings: Settings
    format: Format
    model_class: str
    scheme_name: str
    range_method: str
    dtype: torch.dtype
    architecture: Architecture | None = None
    notes: tuple[str, ...] = ()

    @property
    def engine(self) -> str:
        """The engine whose rules the output must pass."""
        return self.format.engine

    def keeping(self, name: str) -> str:
        """The options that keep a tensor as it is, with those that engines load as one matrix with it."""
        linear, architecture = name.removesuffix(".weight"), self.architecture
        sets = {} if architecture is None else architecture.fused_sets | architecture.expert_sets
        for whole, members in sets.items():
            if linear in members:
                together = all(member.startswith(f"{whole}.") for member in members)
                return " ".join(f"--ignore '{each}'" for each in ([f"{whole}."] if together else members))
        return f"--ignore '{linear}'"

    @property
    def quantized(self) -> list[PlannedTensor]:
        return [tensor for tensor in self.tensors if tensor.is_quantized]

    @cached_property
    def accounts(self) -> dict[str, list[PlannedTensor]]:
        """ "quantized", "kept" for a reason, "copied" as no parameter of the model → its tensors; together all."""
        found: dict[str, list[PlannedTensor]] = {"quantized": [], "kept": [], "copied": []}
        for tensor in self.tensors:
            copied = self.architecture is not None and not any(map(self.architecture.knows, tensor.source.names))
            found["quantized" if tensor.is_quantized else "copied" if copied else "kept"].append(tensor)
        return found

    @property
    def decoder_quantized(self) -> float | None:
        """Share of the weights of the decoder blocks' matrices that are quantized; None where none are known."""
        blocks = None if self.architecture is None else len(self.architecture.blocks)
        matrices = [t for t in self.tensors
                    if t.block is not None and len(t.shape) > 1 and (blocks is None or t.block < blocks)]  # fmt: skip
        weights = sum(tensor.weights for tensor in matrices)
        return sum(tensor.weights for tensor in matrices if tensor.is_quantized) / weights if weights else None

    @property
    def shortfall(self) -> str | None:
        """A warning if much of the decoder stays in 16 bits, with the largest reason."""
        share = self.decoder_quantized
        if share is None or share >= 0.9 or not self.quantized:
            return None
        reasons: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.block is not None and len(tensor.shape) > 1 and tensor.reason is not None:
                reasons[tensor.reason] = reasons.get(tensor.reason, 0) + tensor.weights
        most = max(reasons, key=lambda reason: reasons[reason])
        return f"only {share:.0%} of the decoder's weights are quantized; the largest part of the rest: {most}"

    def bits_per_weight(self, decoder_only: bool) -> float:
        """Stored bits ÷ weights, over the matrices of the decoder blocks or over the whole output."""
        chosen = [tensor for tensor in self.tensors if tensor.in_decoder or not decoder_only]
        weights = sum(tensor.weights for tensor in chosen)
        return 8 * sum(tensor.stored_bytes for tensor in chosen) / weights if weights else 0.0

    @property
    def targets(self) -> dict[str, Target]:
        """Linear of a decoder block → target, for linears that a blockwise method rounds."""
        return {
            name.removesuffix(".weight"): tensor.target
            for tensor in self.tensors
            if tensor.making is Making.calibrated and tensor.target is not None
            for name in tensor.source.names
        }

    @property
    def float_dtypes(self) -> dict[str, torch.dtype]:
        """Stored name → dtype that it has where it is written as floats."""
        return {name: tensor.plain_dtype for tensor in self.tensors for name in tensor.source.names}

    @property
    def activations(self) -> dict[str, ActivationSpec]:
        """Linear → quantization of its input at run time."""
        return {}

    @property
    def rotations(self) -> dict[str, Rotation]:
        """Linear → rotation of its input that the engine applies as the model runs."""
        return {}

    @property
    def static_inputs(self) -> set[str]:
        """Linears whose input range must be measured."""
        return set()

    @property
    def needs_kv_ranges(self) -> bool:
        """True if the largest keys and values must be measured."""
        return False

    def with_ranges(self, ranges: Ranges) -> Plan:
        """The plan with the ranges that calibration measured."""
        raise AssertionError(f"{self.format.name} stores no ranges")

    @property
    @abstractmethod
    def file_bytes(self) -> int:
        """Bytes of the weight files, headers included."""

    @abstractmethod
    def pack(self, tensor: PlannedTensor, rows: Stored, first: int) -> list[Piece]:
        """Rows from `first` on, as pieces of the output files."""

    def packing_error(self, tensor: PlannedTensor, rows: Stored) -> Sums:
        """Error of repacked rows: zero, unless the format casts them."""
        return 0.0, 1.0, 0.0

    def pieces_beside(self) -> list[Piece]:
        """Pieces that belong to no planned tensor: scales of the KV cache."""
        return []

    @abstractmethod
    def refuse_existing(self, output: Path, overwrite: bool) -> None:
        """OutputError where the output exists and may not be replaced."""

    @abstractmethod
    def workplace(self, output: Path, overwrite: bool, claim: Claim | None = None) -> AbstractContextManager[Path]:
        """A hidden folder; its content gets the final name when the block ends without an exception."""

    @abstractmethod
    def places(self, output: Path) -> list[Path]:
        """The final names of everything that is written: the folder, or the files."""

    @property
    @abstractmethod
    def largest_file(self) -> int:
        """Bytes of the largest weight file."""

    @abstractmethod
    def container(self, work: Path, output: Path) -> Container: ...

    def complete(self, work: Path, checkpoint: Checkpoint) -> None:  # noqa: B027 GGUF files need nothing more
        """Write the files beside the weights: config.json, tokenizer …"""

    def opened_at(self, output: Path) -> Path:
        """The path that a user opens: the folder, the file, or the first part of a split file."""
        return output

    def model_in(self, work: Path, output: Path) -> Path:
        """The path to open inside the hidden folder."""
        return work

    def report_at(self, work: Path, output: Path) -> Path:
        """The path inside the hidden folder that `report_path` takes."""
        return work

    def inherited_rules(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Rules that the source may break already: a failure is reported, and the output stays."""
        return ()


@dataclass(frozen=True)
class CalibrationText:
    """The calibration text of a run."""

    name: str
    sha256: str
    windows: int
    window_tokens: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, cut: CalibrationWindows) -> CalibrationText:
        return cls(cut.name, cut.sha256, cut.ids.shape[0], cut.ids.shape[1], cut.notes)


@dataclass(frozen=True)
class Request:
    """Input of `prepare`.

    model    what the user typed, or a path that stands for it (then `name` is what the user typed); or an open model
    preview  True if nothing will be written: an importance matrix is then promised, not measured
    lacks_tokenizer  in a preview: the model has no tokenizer, and its bytes are left out
    text     the calibration text, where it is in memory
    unties   give a tied head a tensor of its own
    """

    model: ModelSource
    settings: Settings
    options: OpenOptions = field(default_factory=OpenOptions)
    threads: int | None = None
    progress: Progress | None = None
    preview: bool = False
    name: str | None = None
    lacks_tokenizer: bool = False
    text: GivenText | None = None
    unties: bool = False

    @property
    def worker_threads(self) -> int:
        """The user's number, or one per core; UsageError below 1."""
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"{self.threads} threads: at least 1 is needed", "leave it out for one per core")
        return self.threads or os.cpu_count() or 1


@dataclass(frozen=True)
class Prepared:
    """A plan and its open source.

    checkpoint   after calibration, with the weights that transforms rewrote
    plan_again   plans the same model with other settings
    calibration  the text, after one was run
    calibrated   the codes of blockwise methods, after calibration
    text         the calibration text, where it is in memory
    made_by      what chose the codes of `calibrated`, where that is no method of the settings: training
    distilled    what a distillation learned, after it
    start        the finished file that is refined; `checkpoint` is then its reference
    held_out     the options of a refinement that choose its held-out text, where they are not the defaults
    """

    checkpoint: Checkpoint
    plan: Plan
    threads: int
    plan_again: Callable[[Settings], Plan]
    options: OpenOptions = field(default_factory=OpenOptions)
    source: str = ""
    calibration: CalibrationText | None = None
    calibrated: Calibrated | None = None
    text: GivenText | None = None
    made_by: str = ""
    distilled: Distilled | None = None
    start: str | None = None
    held_out: Mapping[str, Any] = field(default_factory=dict)


def output_format(settings: Settings, output: Path | None = None) -> Format:
    """The output format: by the name of the file, by --format, or the default of the scheme."""
    if settings.writes_gguf(output):
        return FORMATS["gguf"]
    return FORMATS[default_format(settings.base_scheme()) if settings.format == "auto" else settings.format]


def prepare(request: Request, output: Path | None = None) -> Prepared:
    """Open a model and plan its output; reads headers only, unless an importance matrix is to be measured. UsageError
    if the method has a transform that the model does not allow.

    output  its name tells a GGUF file from a folder where the settings do not
    """
    settings = request.settings
    for name in (settings.method, *settings.method_overrides.values()):
        if parse_method(name).rounding.refines:
            raise UsageError(f"method {name} starts from the codes of a finished file",
                             "lowbit refine FILE --reference MODEL -o OUT does that")  # fmt: skip
    format = output_format(settings, output)
    transforms = parse_method(settings.method).transforms
    for transform in transforms:
        if transform.online is not None and not format.transforms:
            able = ", ".join(row.name for row in FORMATS.values() if row.transforms)
            raise UsageError(
                f"{transform.name} is a rotation by the engine, and the format {format.name} cannot state one",
                f"take --format {able}, or omit {transform.name}",
            )
    prepared: Prepared = load(format.plan)(request)
    if transforms and prepared.plan.architecture is not None:
        facts = model_facts(prepared.plan.architecture)
        for transform in transforms:
            if transform.refuses is not None:
                load(transform.refuses)(facts)
            if transform.stream is not None and needs_own_head(prepared.checkpoint, facts):
                prepared = load(format.plan)(replace(request, unties=True))
    return replace(prepared, text=request.text)
