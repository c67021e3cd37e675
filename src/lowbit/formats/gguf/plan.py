"""The plan of a GGUF file: the ggml type of each tensor and every byte of the header, before any weight is read.

    model (tensors under GGUF names, key-values) + file type + imatrix → GGUFPlan

The model is a Hugging Face checkpoint, mapped by `model.py`, or a GGUF file of any architecture, which keeps its names
and key-values. `mix.py` chooses types. A tensor of a GGUF file that already has its type is copied byte for byte.

Refused: a type that needs an importance matrix without one; an imatrix of another model, or one with NaN; a pattern
that matches nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gguf.constants import GGML_QUANT_VERSION, GGUFValueType, Keys
from torch import Tensor

from lowbit.architecture import Linear, model_dtype, open_described
from lowbit.calibrate.loop import given_windows
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import HTML_NAME, Checkpoint, report_path
from lowbit.checkpoint.opening import find_gguf
from lowbit.errors import UsageError
from lowbit.export import Piece
from lowbit.export.atomic import atomic_files, refuse_existing_files
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.files.claim import Claim
from lowbit.formats.gguf.header import GGUFTensor, ggml_type
from lowbit.formats.gguf.imatrix_file import read_imatrix
from lowbit.formats.gguf.importance import ImportanceMatrix, check_fits, promised_matrix
from lowbit.formats.gguf.mix import MixFacts, TensorShape, TypeChoice, choose_types, fallback_summary, find_file_type
from lowbit.formats.gguf.mix_table import FILE_TYPES
from lowbit.formats.gguf.model import GGUFTensorSource, describe_gguf
from lowbit.formats.gguf.modelfile import NAME as MODELFILE
from lowbit.formats.gguf.modelfile import Modelfile, make_modelfile, refuse_unwritable_name
from lowbit.formats.gguf.names import loadable_name, name_for_tokenizer
from lowbit.formats.gguf.raw import NATIVE_DTYPE, RawCheckpoint, RawGGUF, refuse_no_model, rows_and_columns
from lowbit.formats.gguf.rules import INHERITED
from lowbit.formats.gguf.tokenizer import NO_TOKENIZER
from lowbit.formats.gguf.tokenizer_files import TokenizerFiles
from lowbit.formats.gguf.type_rules import read_type_rules
from lowbit.formats.gguf.weight_scales import INPUT_SCALE, applies_scale, scale_name, weight_of, why_not_applied
from lowbit.formats.gguf.write import (
    GGUFWriter,
    KeyValues,
    StoredBlocks,
    packed,
    packed_key_values,
    part_names,
    part_sizes,
)
from lowbit.formats.gguf.write_tokenizer import LEFT_OUT, WITHOUT_TOKENIZER, tokenizer_key_values
from lowbit.knobs import Facts
from lowbit.numerics.ggml import TYPES
from lowbit.patterns import check_patterns
from lowbit.plan.plan import CalibrationText, Making, Plan, PlannedTensor, Prepared, Request
from lowbit.registry import FORMATS, load
from lowbit.rounding.target import GgmlTarget, ScaledBlocks, Stored, Target
from lowbit.schemes import SCHEMES
from lowbit.settings import MEASURE, Settings, refuse_unread
from lowbit.text import stream_text

if TYPE_CHECKING:
    from lowbit.calibrate.store import BlockStore

PLAIN = ("F32", "F16", "BF16")
NAME, TOKENS = Keys.General.NAME, Keys.Tokenizer.LIST
UNSCALED = "IQ4_NL"  # of as many bits, with a scale in half precision per 32 weights
# Key-values about the source file, not about the model.
_NOT_COPIED = ("split.no", "split.count", "split.tensors.count", "general.alignment")


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a GGUF file, under its own name; an NVFP4 weight with the scale beside it."""

    raw: RawGGUF = field(repr=False, compare=False)
    tensor: GGUFTensor

    keeps_rows = True

    @property
    def is_scaled(self) -> bool:
        return self.tensor.name in self.raw.weight_scales

    @property
    def names(self) -> tuple[str, ...]:
        return (self.tensor.name,)

    def read(self, checkpoint: Checkpoint, first: int, last: int) -> Tensor:
        return checkpoint.read(self.tensor.name, first, last)

    def read_calibrated(self, store: BlockStore, target: Target, first: int, last: int) -> Tensor:
        raise AssertionError("methods that calibrate work on Hugging Face names")

    def repack(self, checkpoint: Checkpoint, target: Target, first: int, last: int) -> Tensor | ScaledBlocks:
        blocks, scales = self.raw.blocks(self.tensor, first, last), self.raw.scales(self.tensor)
        if scales is None:
            return blocks
        per_expert = rows_and_columns(self.tensor.shape)[0] // len(scales)
        return ScaledBlocks(blocks, scales[first // per_expert].item())


@dataclass(frozen=True)
class _Entry:
    """A tensor of the output before its type is chosen.

    source_type  the ggml type that the source stores it in; "NVFP4" of weights of an NVFP4 folder too
    """

    name: str
    role: str
    block: int | None
    shape: tuple[int, ...]
    source: GGUFTensorSource | FileTensor
    source_bytes: int
    source_type: str | None = None
    linear: Linear | None = None


@dataclass(frozen=True)
class GGUFPlan(Plan):
    """key_values  packed, in the order of the file; modelfile: for Ollama, where one was asked for"""

    key_values: KeyValues = field(default_factory=dict)
    modelfile: Modelfile | None = None

    @property
    def stored(self) -> list[StoredBlocks]:
        return [stored for tensor in self.tensors for stored in _stored_blocks(tensor)]

    @property
    def file_bytes(self) -> int:
        return sum(self._part_sizes)

    @property
    def largest_file(self) -> int:
        return max(self._part_sizes)

    @cached_property
    def _part_sizes(self) -> list[int]:
        return part_sizes(self.stored, self.key_values, self.settings.shard_size)

    def keeping(self, name: str) -> str:
        return f"--override '{name}=BF16'"

    def pack(self, tensor: PlannedTensor, rows: Stored, first: int) -> list[Piece]:
        if isinstance(rows, ScaledBlocks):
            pieces, expert = [Piece(tensor.name, rows.blocks, first)], tensor.expert_at(first)
            if first % (tensor.rows // tensor.experts) == 0:
                scale = torch.tensor([rows.scale], dtype=torch.float32)
                pieces.append(Piece(scale_name(tensor.name), scale, column=expert))
            return pieces
        assert isinstance(rows, Tensor)
        if tensor.target is None:  # integers and doubles, as they are
            rows = rows.contiguous().view(torch.uint8)
        return [Piece(tensor.name, rows, first)]

    def refuse_existing(self, output: Path, overwrite: bool) -> None:
        refuse_existing_files(output, self.places(output), overwrite)

    def workplace(self, output: Path, overwrite: bool, claim: Claim | None = None) -> AbstractContextManager[Path]:
        return atomic_files(output, overwrite, claim)

    def places(self, output: Path) -> list[Path]:
        names = part_names(output.name, self.stored, self.settings.shard_size)
        if self.modelfile is not None:
            refuse_unwritable_name(output)
            names.append(MODELFILE)
        return [*(output.with_name(name) for name in names), report_path(output), report_path(output, HTML_NAME)]

    def complete(self, work: Path, checkpoint: Checkpoint) -> None:
        if self.modelfile is not None:
            parts = sorted(path.name for path in work.glob("*.gguf"))
            (work / MODELFILE).write_text(self.modelfile.text(parts), encoding="utf-8")

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
        refuse_no_model(raw, request.name or str(request.model))
        checkpoint, context = RawCheckpoint(raw, request.name or str(request.model)), _of_file(raw, settings.modelfile)
    else:
        checkpoint, context = _of_model(request)
    matrix, calibration = _importance_matrix(request, {entry.name: entry.shape for entry in context.entries})
    plan = context.plan(settings, matrix)
    return Prepared(
        checkpoint, plan, threads, lambda others: replace(context.plan(others, None), key_values=plan.key_values),
        options, request.name or checkpoint.source, calibration,
    )  # fmt: skip


@dataclass(frozen=True)
class _Mapped:
    """A model under GGUF names; `plan` chooses the types.

    linears    name of the weight → linear of a decoder block, for blockwise methods
    modelfile  for Ollama, where one was asked for
    """

    arch: str
    entries: tuple[_Entry, ...]
    key_values: KeyValues
    facts: MixFacts
    notes: tuple[str, ...] = ()
    linears: Mapping[str, Linear] = field(default_factory=dict)
    architecture: Any = None
    modelfile: Modelfile | None = None

    def plan(self, settings: Settings, matrix: ImportanceMatrix | None) -> GGUFPlan:
        entries, notes = self.entries, self.notes
        shapes = {entry.name: entry.shape for entry in entries}
        calibrated: set[str] = set()
        if settings.is_blockwise:
            calibrated = {
                e.name for e in entries
                if e.source.names and self.linears.keys() >= set(e.source.names) and e.source.keeps_rows
            }  # fmt: skip
        if matrix is not None:
            notes += tuple(check_fits(matrix, {n: s for n, s in shapes.items() if len(s) > 1}, settings.imatrix or ""))
        unweighed: set[str] = set()  # tensors without importance, where others have one
        if matrix is not None or calibrated:
            left = {name: shape for name, shape in shapes.items() if name not in calibrated}
            unweighed = {n for n, shape in left.items() if matrix is None or matrix.importance(n, shape) is None}
        file_type = find_file_type(settings.scheme)
        rules, said = read_type_rules(settings.tensor_type_file) if settings.tensor_type_file else None, []
        described = [TensorShape(e.name, e.shape, e.source_type, e.source.names) for e in entries]
        chosen = choose_types(
            file_type.name, described, self.facts, pure=settings.pure, overrides=tuple(settings.overrides.items()),
            ignored=settings.ignore, output_type=settings.output_type,
            token_embedding_type=settings.token_embedding_type, has_imatrix=matrix is not None or bool(calibrated),
            missing_importance=unweighed, rules=rules, notes=said,
        )  # fmt: skip
        choices, unscaled = self._with_scales(chosen, file_type.name)
        notes = (*unscaled, *notes, *said)
        entries = tuple(entry for entry in entries if not self._is_lost(entry.name, choices))
        tensors = tuple(
            _planned(entry, choices[entry.name], matrix, entry.name in calibrated, self._is_scaled(entry))
            for entry in entries
        )
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
        fallbacks = fallback_summary(chosen, described)
        return GGUFPlan(
            tensors, settings, FORMATS["gguf"], self.arch, file_type.name, "search", torch.float32, self.architecture,
            ((fallbacks, *notes) if fallbacks else notes), key_values, self.modelfile,
        )  # fmt: skip

    def _is_scaled(self, entry: _Entry) -> bool:
        """True if a scale of the whole matrix may lie beside this weight: llama.cpp applies it, or the source has it,
        and no other tensor has its name."""
        if isinstance(entry.source, FileTensor) and entry.source_type == "NVFP4":
            return entry.source.is_scaled
        names = {other.name for other in self.entries}
        return scale_name(entry.name) not in names and applies_scale(self.arch, entry.name, names)

    def _is_lost(self, name: str, choices: Mapping[str, TypeChoice]) -> bool:
        """True for the scale of activations of a weight that was NVFP4, and is no longer."""
        weight = weight_of(name)
        if weight is None or weight not in choices or not name.endswith(INPUT_SCALE):
            return False
        return choices[weight].type_name != "NVFP4" and self._source_types.get(weight) == "NVFP4"

    @cached_property
    def _source_types(self) -> dict[str, str | None]:
        return {entry.name: entry.source_type for entry in self.entries}

    def _with_scales(
        self, choices: Mapping[str, TypeChoice], file_type: str
    ) -> tuple[dict[str, TypeChoice], tuple[str, ...]]:
        """(the choices, with another type for NVFP4 where no scale of the whole matrix may be stored, notes on that).

        Without that scale the scales of blocks, which reach down to 2⁻⁹, hold small weights badly. Of a folder that is
        NVFP4 already, what it has in 16 bits stays so.
        """
        changed, whys = dict(choices), Counter[str]()
        from_nvfp4 = "NVFP4" in self._source_types.values() and self.architecture is not None
        for entry in self.entries:
            choice = choices[entry.name]
            if file_type == "NVFP4" and from_nvfp4 and entry.source_type is None and not choice.asked:
                if choice.type_name not in PLAIN:
                    changed[entry.name] = TypeChoice(self.facts.float_type, "not quantized in the source")
            elif choice.type_name == "NVFP4" and not self._is_scaled(entry):
                same = isinstance(entry.source, FileTensor) and entry.source_type == "NVFP4"
                if not same and not choice.asked:
                    own = scale_name(entry.name) in self._source_types
                    why = "a scale lies beside it" if own else why_not_applied(self.arch, entry.name)
                    changed[entry.name] = TypeChoice(UNSCALED, f"{why}, so NVFP4 became {UNSCALED}")
                    whys[f"{why}, so NVFP4 became {UNSCALED}"] += 1
        return changed, tuple(f"{count} tensors: {why}" for why, count in whys.items())


def _refuse_beside_no_tokenizer(settings: Settings) -> None:
    """UsageError for an option about the tokenizer of a file that gets none."""
    for flag, given in (("--pre-tokenizer", settings.pre_tokenizer), ("--modelfile", settings.modelfile)):
        if given:
            raise UsageError(f"{flag} is about a tokenizer, and --no-tokenizer writes none",
                             "leave one of the two out")  # fmt: skip


def _of_model(request: Request) -> tuple[Checkpoint, _Mapped]:
    """A Hugging Face model, opened and mapped to GGUF."""
    settings = request.settings
    checkpoint, architecture = open_described(request.model, request.options, True, request.unties)
    check_patterns("--method-override", settings.method_overrides, architecture.linears)
    mapped = describe_gguf(checkpoint, architecture)
    float_type = "BF16" if model_dtype(checkpoint) is torch.bfloat16 else "F16"
    values, notes = mapped.key_values, mapped.notes
    has_none = checkpoint.kind == "gguf" and checkpoint.metadata.get("tokenizer.ggml.model") in NO_TOKENIZER
    if has_none:
        values |= WITHOUT_TOKENIZER
    elif settings.no_tokenizer:
        _refuse_beside_no_tokenizer(settings)
        values, notes = values | WITHOUT_TOKENIZER, (*notes, LEFT_OUT)
    elif not request.lacks_tokenizer:
        embedding = next(tensor for tensor in mapped.tensors if tensor.name == "token_embd.weight")
        tokenizer = tokenizer_key_values(
            checkpoint.folder, embedding.shape[0], settings.pre_tokenizer, mapped.vocabulary
        )
        values, notes = values | tokenizer.key_values, (*notes, *tokenizer.notes)
        if checkpoint.kind == "gguf":
            name, note = loadable_name(values[NAME][0], tokenizer.key_values[TOKENS][0])
        else:
            name, note = name_for_tokenizer(values[NAME][0], tokenizer.strips_as_phi3)
        values, notes = values | {NAME: (name, GGUFValueType.STRING)}, notes if note is None else (*notes, note)
    linears = {f"{linear.name}.weight": linear for linear in architecture.linears.values()}
    nvfp4 = {name for name, scheme in checkpoint.schemes.items()
             if scheme.weight == SCHEMES["NVFP4"].weight
             and name not in checkpoint.rotations}  # whose codes are of other columns  # fmt: skip
    # A source tensor that several tensors of the file are cut from counts once, in proportion.
    cut_from: Counter[str] = Counter()
    for t in mapped.tensors:
        cut_from.update(dict.fromkeys(t.names, math.prod(t.shape)))
    entries = tuple(
        _Entry(
            t.name, t.role, t.block, t.shape, t,
            sum(checkpoint.tensors[name].nbytes * math.prod(t.shape) // cut_from[name]
                for name in t.names if name in checkpoint.tensors),
            "NVFP4" if t.names and t.keeps_rows and nvfp4.issuperset(t.names) else None,
            linear=linears.get(t.names[0]) if len(t.names) == 1 and t.keeps_rows else None,
        )
        for t in mapped.tensors
    )  # fmt: skip
    if nvfp4 and any(name in nvfp4 for name in checkpoint.input_scales):
        notes = (*notes, "scales of activations are left out: llama.cpp does not use them")
    facts = model_facts(mapped.arch, {key: value[0] for key, value in mapped.key_values.items()}, float_type)
    of_blocks = {name: linear for name, linear in linears.items() if linear.block is not None}
    made = None
    if settings.modelfile:
        ends = TokenizerFiles(checkpoint.folder).end_ids()
        made = make_modelfile({key: value[0] for key, value in values.items()}, request.name or checkpoint.source,
                              checkpoint.folder, ends)  # fmt: skip
        notes = (*notes, *made.notes)
    packed_values = packed_key_values(values)
    return checkpoint, _Mapped(mapped.arch, entries, packed_values, facts, notes, of_blocks, architecture, made)


def _of_file(raw: RawGGUF, modelfile: bool) -> _Mapped:
    """A GGUF file to be requantized: all its tensors, and all key-values but those about the file."""
    arch = str(raw.metadata.get("general.architecture", ""))
    entries, beside = [], {scale.name for scale in raw.weight_scales.values()}
    for tensor in raw.tensors:
        ggml_type(tensor, str(raw.file_of(tensor).path))  # a type that has no size can be neither read nor copied
        if tensor.name in beside:  # read and written with its weight
            continue
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
    made = make_modelfile(raw.metadata, str(raw.path)) if modelfile else None
    notes += made.notes if made is not None else ()
    facts = model_facts(arch, raw.metadata, "F16")
    return _Mapped(arch, tuple(entries), key_values, facts, notes, modelfile=made)


def kept_plan(raw: RawGGUF, settings: Settings) -> GGUFPlan:
    """The plan of a file whose tensors all keep their types; every one of them is copied."""
    mapped = _of_file(raw, False)
    tensors = []
    for entry in mapped.entries:
        assert entry.source_type is not None, "a file states the type of each tensor"
        choice = TypeChoice(entry.source_type)
        scaled = isinstance(entry.source, FileTensor) and entry.source.is_scaled
        tensors.append(_planned(entry, choice, None, False, scaled))
    stated = raw.metadata.get("general.file_type")
    named = next((kind.name for kind in FILE_TYPES.values() if kind.number == stated), "GGUF")
    return GGUFPlan(tuple(tensors), settings, FORMATS["gguf"], mapped.arch, named, "kept", torch.float32,
                    key_values=mapped.key_values)  # fmt: skip


def _planned(
    entry: _Entry, choice: TypeChoice, matrix: ImportanceMatrix | None, calibrated: bool, may_scale: bool
) -> PlannedTensor:
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
    stored, scaled = [StoredTensor(entry.name, torch.uint8, (rows, kind.row_bytes(columns)))], False
    if kind.name == "NVFP4" and may_scale:
        experts, scaled = entry.shape[0] if len(entry.shape) == 3 else 1, True
        stored.append(StoredTensor(scale_name(entry.name), torch.float32, (experts,)))
    elif kind.name == "NVFP4" and not same:
        notes.append("without a scale of the whole matrix, which holds small weights badly")
    return PlannedTensor(
        entry.name, entry.role, entry.block, entry.shape, entry.source, entry.source_bytes, making,
        tuple(stored),
        target=GgmlTarget(kind.name, scaled),
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


def _stored_blocks(tensor: PlannedTensor) -> list[StoredBlocks]:
    """The tensor, and the scale that lies beside it."""
    if tensor.target is None:
        assert isinstance(tensor.source, FileTensor)
        kept = tensor.source.tensor
        return [StoredBlocks(tensor.name, kept.shape, kept.type_id, tensor.stored_bytes)]
    weight, *scales = tensor.stored
    return [
        StoredBlocks(tensor.name, tensor.shape, TYPES[tensor.stored_as].number, weight.nbytes),
        *(StoredBlocks(scale.name, scale.shape, TYPES["F32"].number, scale.nbytes) for scale in scales),
    ]


def model_facts(arch: str, metadata: dict[str, Any], float_type: str) -> MixFacts:
    """The numbers that the rules of file types use, from the key-values of a model."""

    def number(name: str) -> int:
        value = metadata.get(f"{arch}.{name}", 0)
        first = value if isinstance(value, int) else next(iter(value), 0) if hasattr(value, "__iter__") else 0
        return int(first)

    heads = number("attention.head_count")
    kv_heads = number("attention.head_count_kv") or heads
    return MixFacts(arch, number("block_count"), number("expert_count"), heads, kv_heads, float_type)


def _importance_matrix(
    request: Request, shapes: Mapping[str, Sequence[int]]
) -> tuple[ImportanceMatrix | None, CalibrationText | None]:
    """(the matrix, the text it was measured on now): of a file, or measured if the settings ask for it; a preview only
    promises one."""
    settings, options = request.settings, request.options
    if settings.imatrix is None:
        return None, None
    if settings.imatrix != MEASURE:
        return read_imatrix(Path(settings.imatrix)), None
    if request.preview:
        text = stream_text(settings.calib) if request.text is None else request.text
        matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
        name = str(settings.calib) if text is None else text.name
        return promised_matrix(matrices, name, settings.samples, settings.seqlen), None
    from lowbit.formats.gguf.imatrix import measure_importance, text_of

    source = open_checkpoint(request.model, options)  # under its own names
    try:
        if request.text is not None:
            windows = given_windows(request.text, source, settings, options, settings.samples)
        else:
            windows = text_of(source, settings.calib, settings.samples, settings.seqlen, options, settings.seed)
        matrix = measure_importance(source, windows, options=options, progress=request.progress).matrix
    finally:
        source.close()
    return matrix, CalibrationText.of(windows)
