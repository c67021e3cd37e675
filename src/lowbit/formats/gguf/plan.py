"""The plan of a GGUF file: the ggml type of each tensor and every byte of the header, before any weight is read.

    model (tensors under GGUF names, key-values) + file type + imatrix → GGUFPlan

The model is a Hugging Face checkpoint, mapped by `model.py`, or a GGUF file of any architecture, which keeps its names
and key-values. `mix.py` chooses types. A tensor of a GGUF file that already has its type is copied byte for byte.

Refused: a type that needs an importance matrix without one; an imatrix of another model, or one with NaN; a pattern
that matches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, Keys
from torch import Tensor

from lowbit.architecture import Linear, model_dtype, open_described
from lowbit.checkpoint.base import HTML_NAME, Checkpoint, report_path
from lowbit.checkpoint.opening import find_gguf
from lowbit.errors import UsageError
from lowbit.export import Piece
from lowbit.export.atomic import atomic_files, refuse_existing_files
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.files.claim import Claim
from lowbit.formats.gguf.general import loadable_name
from lowbit.formats.gguf.header import GGUFTensor
from lowbit.formats.gguf.imatrix_file import read_imatrix
from lowbit.formats.gguf.importance import ImportanceMatrix, check_fits, promised_matrix
from lowbit.formats.gguf.mix import MixFacts, TensorShape, TypeChoice, choose_types, fallback_summary, find_file_type
from lowbit.formats.gguf.model import describe_gguf
from lowbit.formats.gguf.raw import NATIVE_DTYPE, RawCheckpoint, RawGGUF, rows_and_columns
from lowbit.formats.gguf.rules import INHERITED
from lowbit.formats.gguf.write import (
    GGUFWriter,
    KeyValues,
    StoredBlocks,
    packed,
    packed_key_values,
    part_names,
    part_sizes,
)
from lowbit.formats.gguf.write_tokenizer import tokenizer_key_values
from lowbit.knobs import Facts
from lowbit.numerics.ggml import TYPES
from lowbit.plan.plan import CalibrationText, Making, Plan, PlannedTensor, Prepared, Request, Source
from lowbit.registry import FORMATS, load
from lowbit.rounding.target import GgmlTarget, Stored, Target
from lowbit.settings import MEASURE, Settings, check_patterns, refuse_unread
from lowbit.text import read_text

if TYPE_CHECKING:
    from lowbit.calibrate.store import BlockStore

PLAIN = ("F32", "F16", "BF16")
NAME, TOKENS = Keys.General.NAME, Keys.Tokenizer.LIST
# Key-values about the source file, not about the model.
_NOT_COPIED = ("split.no", "split.count", "split.tensors.count", "general.alignment")


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a GGUF file, under its own name."""

    raw: RawGGUF = field(repr=False, compare=False)
    tensor: GGUFTensor

    @property
    def names(self) -> tuple[str, ...]:
        return (self.tensor.name,)

    def read(self, checkpoint: Checkpoint, first: int, last: int) -> Tensor:
        return checkpoint.read(self.tensor.name, first, last)

    def read_calibrated(self, store: BlockStore, target: Target, first: int, last: int) -> Tensor:
        raise AssertionError("methods that calibrate work on Hugging Face names")

    def repack(self, checkpoint: Checkpoint, target: Target, first: int, last: int) -> Tensor:
        return self.raw.blocks(self.tensor, first, last)


@dataclass(frozen=True)
class _Entry:
    """A tensor of the output before its type is chosen."""

    name: str
    role: str
    block: int | None
    shape: tuple[int, ...]
    source: Source
    source_bytes: int
    source_type: str | None = None
    linear: Linear | None = None


@dataclass(frozen=True)
class GGUFPlan(Plan):
    """key_values  packed, in the order of the file"""

    key_values: KeyValues = field(default_factory=dict)

    @property
    def stored(self) -> list[StoredBlocks]:
        return [_stored_blocks(tensor) for tensor in self.tensors]

    @property
    def file_bytes(self) -> int:
        return sum(self._part_sizes)

    @property
    def largest_file(self) -> int:
        return max(self._part_sizes)

    @cached_property
    def _part_sizes(self) -> list[int]:
        return part_sizes(self.stored, self.key_values, self.settings.shard_size)

    def pack(self, tensor: PlannedTensor, rows: Stored, first: int) -> list[Piece]:
        assert isinstance(rows, Tensor)
        if tensor.target is None:  # integers and doubles, as they are
            rows = rows.contiguous().view(torch.uint8)
        return [Piece(tensor.name, rows, first)]

    def refuse_existing(self, output: Path, overwrite: bool) -> None:
        refuse_existing_files(output, self.places(output), overwrite)

    def workplace(self, output: Path, overwrite: bool, claim: Claim | None = None) -> AbstractContextManager[Path]:
        return atomic_files(output, overwrite, claim)

    def places(self, output: Path) -> list[Path]:
        parts = part_names(output.name, self.stored, self.settings.shard_size)
        return [*(output.with_name(name) for name in parts), report_path(output), report_path(output, HTML_NAME)]

    def container(self, work: Path, output: Path) -> GGUFWriter:
        return GGUFWriter(work, output.name, self.stored, self.key_values, self.settings.shard_size)

    def model_in(self, work: Path, output: Path) -> Path:
        return work / self.opened_at(output).name

    def report_at(self, work: Path, output: Path) -> Path:
        return work / output.name

    def opened_at(self, output: Path) -> Path:
        """The first part."""
        return output.with_name(part_names(output.name, self.stored, self.settings.shard_size)[0])

    def inherited_rules(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        return INHERITED if checkpoint.kind == "gguf" else ()


def prepare_gguf(request: Request) -> Prepared:
    """Open a model and plan its GGUF; see `plan.prepare`."""
    threads, settings, options = request.worker_threads, request.settings, request.options
    if settings.mmproj:
        return load("lowbit.formats.gguf.mmproj.plan:prepare_mmproj")(request)
    path = None if settings.is_blockwise else find_gguf(request.model, options)
    if path is not None:
        refuse_unread(settings, None, Facts(gguf=True, copies_header=True))
        raw = RawGGUF(path)
        checkpoint, context = RawCheckpoint(raw, request.name or str(request.model)), _of_file(raw)
    else:
        checkpoint, context = _of_model(request)
    matrix = _importance_matrix(request, {entry.name: entry.shape for entry in context.entries})
    plan = context.plan(settings, matrix)
    calibration = None
    if settings.imatrix == MEASURE and matrix is not None and not request.preview:
        text = read_text(settings.calib, packaged="calibration")
        calibration = CalibrationText(text.name, text.sha256, matrix.chunks, matrix.chunk_tokens)
    return Prepared(
        checkpoint, plan, threads, lambda others: replace(context.plan(others, None), key_values=plan.key_values),
        options, request.name or checkpoint.source, calibration,
    )  # fmt: skip


@dataclass(frozen=True)
class _Mapped:
    """A model under GGUF names; `plan` chooses the types.

    linears  name of the weight → linear of a decoder block, for blockwise methods
    """

    arch: str
    entries: tuple[_Entry, ...]
    key_values: KeyValues
    facts: MixFacts
    notes: tuple[str, ...] = ()
    linears: Mapping[str, Linear] = field(default_factory=dict)
    architecture: Any = None

    def plan(self, settings: Settings, matrix: ImportanceMatrix | None) -> GGUFPlan:
        entries, notes = self.entries, self.notes
        shapes = {entry.name: entry.shape for entry in entries}
        calibrated: set[str] = set()
        if settings.is_blockwise:
            calibrated = {e.name for e in entries if e.source.names and self.linears.keys() >= set(e.source.names)}
        if matrix is not None:
            notes += tuple(check_fits(matrix, {n: s for n, s in shapes.items() if len(s) > 1}, settings.imatrix or ""))
        unweighed: set[str] = set()  # tensors without importance, where others have one
        if matrix is not None or calibrated:
            left = {name: shape for name, shape in shapes.items() if name not in calibrated}
            unweighed = {n for n, shape in left.items() if matrix is None or matrix.importance(n, shape) is None}
        file_type = find_file_type(settings.scheme)
        described = [TensorShape(e.name, e.shape, e.source_type, e.source.names) for e in entries]
        choices = choose_types(
            file_type.name, described, self.facts, pure=settings.pure, overrides=tuple(settings.overrides.items()),
            ignored=settings.ignore, output_type=settings.output_type,
            token_embedding_type=settings.token_embedding_type, has_imatrix=matrix is not None or bool(calibrated),
            missing_importance=unweighed,
        )  # fmt: skip
        tensors = tuple(_planned(entry, choices[entry.name], matrix, entry.name in calibrated) for entry in entries)
        key_values = self.key_values | {
            "general.file_type": packed(file_type.number, GGUFValueType.UINT32),
            "general.quantization_version": packed(GGML_QUANT_VERSION, GGUFValueType.UINT32),
        }
        if matrix is not None:  # as llama-quantize notes it
            key_values |= packed_key_values({
                "quantize.imatrix.file": (settings.imatrix or "", GGUFValueType.STRING),
                "quantize.imatrix.dataset": (", ".join(matrix.datasets), GGUFValueType.STRING),
                "quantize.imatrix.entries_count": (len(matrix.entries), GGUFValueType.UINT32),
                "quantize.imatrix.chunks_count": (matrix.chunks, GGUFValueType.UINT32),
            })  # fmt: skip
        fallbacks = fallback_summary(choices, described)
        return GGUFPlan(
            tensors, settings, FORMATS["gguf"], self.arch, file_type.name, "search", torch.float32, self.architecture,
            ((fallbacks, *notes) if fallbacks else notes), key_values,
        )  # fmt: skip


def _of_model(request: Request) -> tuple[Checkpoint, _Mapped]:
    """A Hugging Face model, opened and mapped to GGUF."""
    settings = request.settings
    checkpoint, architecture = open_described(request.model, request.options, split_experts=True)
    check_patterns("--method-override", settings.method_overrides, architecture.linears)
    mapped = describe_gguf(checkpoint, architecture)
    float_type = "BF16" if model_dtype(checkpoint) is torch.bfloat16 else "F16"
    values, notes = mapped.key_values, mapped.notes
    if not request.lacks_tokenizer:
        embedding = next(tensor for tensor in mapped.tensors if tensor.name == "token_embd.weight")
        tokenizer = tokenizer_key_values(checkpoint.folder, embedding.shape[0], settings.pre_tokenizer)
        values, notes = values | tokenizer.key_values, (*notes, *tokenizer.notes)
        name, note = loadable_name(values[NAME][0], tokenizer.key_values[TOKENS][0])
        values, notes = values | {NAME: (name, GGUFValueType.STRING)}, notes if note is None else (*notes, note)
    linears = {f"{linear.name}.weight": linear for linear in architecture.linears.values()}
    entries = tuple(
        _Entry(
            t.name, t.role, t.block, t.shape, t,
            sum(checkpoint.tensors[name].nbytes for name in t.names if name in checkpoint.tensors),
            linear=linears.get(t.names[0]) if len(t.names) == 1 else None,
        )
        for t in mapped.tensors
    )  # fmt: skip
    facts = model_facts(mapped.arch, {key: value[0] for key, value in mapped.key_values.items()}, float_type)
    of_blocks = {name: linear for name, linear in linears.items() if linear.block is not None}
    return checkpoint, _Mapped(mapped.arch, entries, packed_key_values(values), facts, notes, of_blocks, architecture)


def _of_file(raw: RawGGUF) -> _Mapped:
    """A GGUF file to be requantized: all its tensors, and all key-values but those about the file."""
    arch = str(raw.metadata.get("general.architecture", ""))
    entries = []
    for tensor in raw.tensors:
        parts = tensor.name.split(".")
        block = int(parts[1]) if parts[0] == "blk" and len(parts) > 1 and parts[1].isdigit() else None
        role = tensor.name.removesuffix(".weight").rpartition(".")[2]
        nbytes = tensor.stop - tensor.start
        entries.append(
            _Entry(tensor.name, role, block, tensor.shape, FileTensor(raw, tensor), nbytes, tensor.type_name)
        )
    key_values = {
        key: bytes(raw.key_value_bytes(key))[8 + len(key.encode()) :] for key in raw.metadata if key not in _NOT_COPIED
    }
    name, tokens = raw.metadata.get(NAME), raw.metadata.get(TOKENS)
    other, note = loadable_name(str(name), tokens if isinstance(tokens, list) else None)
    if name is not None and note is not None:
        key_values[NAME] = packed(other, GGUFValueType.STRING)
    notes = (note,) if name is not None and note is not None else ()
    return _Mapped(arch, tuple(entries), key_values, model_facts(arch, raw.metadata, "F16"), notes)


def _planned(entry: _Entry, choice: TypeChoice, matrix: ImportanceMatrix | None, calibrated: bool) -> PlannedTensor:
    kind = TYPES.get(choice.type_name)
    if kind is None and choice.type_name == entry.source_type and choice.type_name in NATIVE_DTYPE:
        return _kept(entry)
    if kind is None:
        raise UsageError(f"{entry.name} cannot be written as {choice.type_name}", f"types: {', '.join(TYPES)}")
    rows, columns = rows_and_columns(entry.shape)
    is_plain, same = kind.name in PLAIN, entry.source_type == kind.name
    making = Making.repacked if same else Making.calibrated if calibrated and not is_plain else Making.rounded
    notes = []
    if choice.fallback_from is not None:
        block = TYPES[choice.fallback_from].weights
        notes.append(f"{kind.name}, because rows of {columns} do not divide by {block} ({choice.fallback_from})")
    if same and not is_plain:
        notes.append("copied: the source stores it in this type")
    return PlannedTensor(
        entry.name, entry.role, entry.block, entry.shape, entry.source, entry.source_bytes, making,
        (StoredTensor(entry.name, torch.uint8, (rows, kind.row_bytes(columns))),),
        target=GgmlTarget(kind.name),
        reason=(choice.reason or f"stored as {kind.name}") if is_plain else None,
        notes=tuple(notes),
        dtype=torch.float32,
        plain_dtype=torch.float32,
        linear=entry.linear,
        importance=None if matrix is None or is_plain else matrix.importance(entry.name, entry.shape),
        in_decoder=entry.block is not None and len(entry.shape) > 1,
    )  # fmt: skip


def _kept(entry: _Entry) -> PlannedTensor:
    """A tensor of a GGUF file whose numbers no file type concerns: integers, doubles. Its rows are bytes."""
    rows, columns = rows_and_columns(entry.shape)
    stored = StoredTensor(entry.name, torch.uint8, (rows, columns * NATIVE_DTYPE[str(entry.source_type)].itemsize))
    return PlannedTensor(
        entry.name, entry.role, entry.block, (rows, columns), entry.source, entry.source_bytes, Making.copied,
        (stored,), reason=f"stored as {entry.source_type}, and copied", plain_dtype=torch.uint8,
    )  # fmt: skip


def _stored_blocks(tensor: PlannedTensor) -> StoredBlocks:
    if tensor.target is None:
        assert isinstance(tensor.source, FileTensor)
        kept = tensor.source.tensor
        return StoredBlocks(tensor.name, kept.shape, GGMLQuantizationType[kept.type_name].value, tensor.stored_bytes)
    return StoredBlocks(tensor.name, tensor.shape, TYPES[tensor.stored_as].number, tensor.stored_bytes)


def model_facts(arch: str, metadata: dict[str, Any], float_type: str) -> MixFacts:
    """The numbers that the rules of file types use, from the key-values of a model."""

    def number(name: str) -> int:
        value = metadata.get(f"{arch}.{name}", 0)
        first = value if isinstance(value, int) else next(iter(value), 0) if hasattr(value, "__iter__") else 0
        return int(first)

    heads = number("attention.head_count")
    kv_heads = number("attention.head_count_kv") or heads
    return MixFacts(arch, number("block_count"), number("expert_count"), heads, kv_heads, float_type)


def _importance_matrix(request: Request, shapes: Mapping[str, Sequence[int]]) -> ImportanceMatrix | None:
    """Read from a file, or measured on the calibration text if the settings ask for it; a preview promises one."""
    settings = request.settings
    if settings.imatrix is None:
        return None
    if settings.imatrix != MEASURE:
        return read_imatrix(Path(settings.imatrix))
    if request.preview:
        text = read_text(settings.calib, packaged="calibration")
        matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
        return promised_matrix(matrices, text.name, settings.samples, settings.seqlen)
    from lowbit.formats.gguf.imatrix import measure_imatrix_of

    return measure_imatrix_of(
        request.model, settings.calib, settings.samples, settings.seqlen, request.options, request.progress
    )
