"""The plan of a GGUF file: which type each tensor gets, and every byte of the header, before any weight is read.

    model (tensors under GGUF names, key-values) + file type + imatrix → GGUFPlan

The model is a Hugging Face checkpoint (`export/gguf_model.py` maps it) or a GGUF file of any architecture, whose names
and key-values stay as they are. Types come from `export/gguf_mix.py`. A tensor of a GGUF that has its type already is
copied, byte for byte.

Refused: a type that needs an importance matrix without one; an imatrix of another model, or one with NaN; an override
that matches nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from gguf.constants import GGML_QUANT_VERSION, GGUFValueType
from torch import Tensor

from lowbit.calibrate.importance import ImportanceMatrix, check_fits
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.gguf_header import GGUFTensor
from lowbit.checkpoint.gguf_raw import RawGGUF, rows_and_columns
from lowbit.errors import UsageError
from lowbit.export.gguf_mix import Choice, ModelFacts, TensorShape, choose_types, fallback_summary, find_file_type
from lowbit.export.gguf_model import GGUFModel
from lowbit.export.gguf_writer import KeyValues, StoredBlocks, packed, packed_key_values, part_names, total_bytes
from lowbit.numerics.ggml import TYPES, GgmlType
from lowbit.settings import Settings

PLAIN = ("F32", "F16", "BF16")
# About the file that is read, not about the model.
_NOT_COPIED = ("split.no", "split.count", "split.tensors.count", "general.alignment")


class Source(Protocol):
    """One tensor of the file to write and where its rows come from; `GGUFTensorSource` is one."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the tensors it is made of."""
        ...

    @property
    def block(self) -> int | None: ...

    @property
    def role(self) -> str: ...

    def read(self, checkpoint: Any, first: int, last: int) -> Tensor: ...


@dataclass(frozen=True)
class RawSource:
    """A tensor of a GGUF file, under its own name."""

    tensor: GGUFTensor

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.tensor.name,)

    @property
    def block(self) -> int | None:
        parts = self.tensor.name.split(".")
        return int(parts[1]) if parts[0] == "blk" and len(parts) > 1 and parts[1].isdigit() else None

    @property
    def role(self) -> str:
        return self.tensor.name.removesuffix(".weight").rpartition(".")[2]

    def read(self, checkpoint: RawGGUF, first: int, last: int) -> Tensor:
        return checkpoint.decode(self.tensor, first, last)


@dataclass(frozen=True)
class PlannedBlocks:
    """One tensor of the file.

    kind        the ggml type it is stored in
    choice      why it has this type
    importance  float32 [E, K] that errors are weighed with; E is 1 but for stacked experts
    copied      True where the source's bytes are of this type already
    """

    source: Source
    kind: GgmlType
    choice: Choice
    source_bytes: int
    importance: Tensor | None = None
    copied: bool = False

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def role(self) -> str:
        return self.source.role

    @property
    def block(self) -> int | None:
        return self.source.block

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def rows(self) -> int:
        return rows_and_columns(self.shape)[0]

    @property
    def columns(self) -> int:
        return rows_and_columns(self.shape)[1]

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.kind.row_bytes(self.columns)

    @property
    def stored_bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def scheme(self) -> GgmlType | None:
        """The type where it is a quantized one."""
        return None if self.kind.name in PLAIN else self.kind

    @property
    def stored_as(self) -> str:
        """Its type, for tensors that are not quantized."""
        return self.kind.name

    @property
    def reason(self) -> str | None:
        """Why it is not quantized; None where it is."""
        return None if self.scheme is not None else self.choice.reason or f"stored as {self.kind.name}"

    @property
    def repack(self) -> bool:
        """True where a quantized tensor keeps its bytes."""
        return self.copied and self.scheme is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user may not expect."""
        notes = []
        if self.choice.fallback_from is not None:
            block = TYPES[self.choice.fallback_from].weights
            notes.append(f"{self.kind.name}, because rows of {self.columns} do not divide by {block} "
                         f"({self.choice.fallback_from})")  # fmt: skip
        if self.repack:
            notes.append("copied: the source stores it in this type")
        return tuple(notes)


@dataclass(frozen=True)
class GGUFPlan:
    """What will be written, to the byte.

    model_class   the name in general.architecture
    key_values    packed, in the order of the file
    notes         of the mapping, of the tokenizer and of the imatrix
    """

    tensors: tuple[PlannedBlocks, ...]
    model_class: str
    settings: Settings
    file_type: str
    key_values: KeyValues
    notes: tuple[str, ...] = ()

    format = "gguf"
    engine = "llama.cpp"
    dtype = torch.float32  # of what is not a matrix
    range_method = "search"  # encoders choose scales by weighted error

    @property
    def scheme_name(self) -> str:
        return self.file_type

    @property
    def stored(self) -> list[StoredBlocks]:
        return [StoredBlocks(t.name, t.shape, t.kind.number, t.stored_bytes) for t in self.tensors]

    @cached_property
    def file_bytes(self) -> int:
        return total_bytes(self.stored, self.key_values, self.settings.shard_size)

    @property
    def quantized(self) -> list[PlannedBlocks]:
        return [tensor for tensor in self.tensors if tensor.scheme is not None]

    def file_names(self, name: str) -> list[str]:
        """Of the file, or of its parts."""
        return part_names(name, self.stored, self.settings.shard_size)

    def bits_per_weight(self, decoder_only: bool) -> float:
        """Stored bits ÷ weights: of the matrices of the decoder blocks, or of everything in the file."""
        chosen = [t for t in self.tensors if not decoder_only or (t.block is not None and len(t.shape) > 1)]
        weights = sum(tensor.weights for tensor in chosen)
        return 8 * sum(tensor.stored_bytes for tensor in chosen) / weights if weights else 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the plan as a whole."""
        return tuple(note for note in (self.fallbacks, *self.notes) if note)

    @property
    def fallbacks(self) -> str:
        """How many tensors have another type than asked for, and why; "" where none has."""
        shapes = [TensorShape(tensor.name, tensor.shape) for tensor in self.tensors]
        return fallback_summary({tensor.name: tensor.choice for tensor in self.tensors}, shapes)


def plan_from_model(
    checkpoint: Checkpoint,
    model: GGUFModel,
    tokenizer: dict[str, tuple[Any, ...]],
    settings: Settings,
    matrix: ImportanceMatrix | None,
    float_type: str = "F16",
    notes: tuple[str, ...] = (),
    calibrated: frozenset[str] = frozenset(),
) -> GGUFPlan:
    """Plan the GGUF of a Hugging Face model.

    tokenizer   its key-values: (value, type[, type of items])
    float_type  of matrices that stay in 16 bits: BF16 for a bfloat16 model
    calibrated  names of tensors whose blocks calibration will decide: types that need importance may be chosen
    """
    facts = model_facts(model.arch, {key: value[0] for key, value in model.key_values.items()}, float_type)
    sizes = {t.name: sum(checkpoint.tensors[n].nbytes for n in t.sources if n in checkpoint.tensors)
             for t in model.tensors}  # fmt: skip
    key_values = packed_key_values(model.key_values | tokenizer)
    notes = (*model.notes, *notes)
    return _plan(model.tensors, facts, model.arch, key_values, sizes, {}, settings, matrix, notes, calibrated)


def plan_from_gguf(raw: RawGGUF, settings: Settings, matrix: ImportanceMatrix | None) -> GGUFPlan:
    """Plan the same model in other types; every key-value but those about the file stays as it is."""
    sources = tuple(RawSource(tensor) for tensor in raw.tensors)
    arch = str(raw.metadata.get("general.architecture", ""))
    sizes = {tensor.name: tensor.stop - tensor.start for tensor in raw.tensors}
    types = {tensor.name: tensor.type_name for tensor in raw.tensors}
    key_values = {
        key: bytes(raw.key_value_bytes(key))[8 + len(key.encode()) :] for key in raw.metadata if key not in _NOT_COPIED
    }
    facts = model_facts(arch, raw.metadata, "F16")
    return _plan(sources, facts, arch, key_values, sizes, types, settings, matrix, ())


def _plan(
    sources: tuple[Source, ...],
    facts: ModelFacts,
    arch: str,
    key_values: KeyValues,
    source_bytes: dict[str, int],
    source_types: dict[str, str],
    settings: Settings,
    matrix: ImportanceMatrix | None,
    notes: tuple[str, ...],
    calibrated: frozenset[str] = frozenset(),
) -> GGUFPlan:
    shapes = {source.name: source.shape for source in sources}
    if matrix is not None:
        notes += tuple(check_fits(matrix, {n: s for n, s in shapes.items() if len(s) > 1}, settings.imatrix or ""))
    file_type = find_file_type(settings.scheme)
    choices = choose_types(
        file_type.name,
        [TensorShape(name, shape, source_types.get(name)) for name, shape in shapes.items()],
        facts,
        pure=settings.pure,
        overrides=tuple(settings.overrides.items()),
        output_type=settings.output_type,
        token_embedding_type=settings.token_embedding_type,
        has_imatrix=matrix is not None or bool(calibrated),
        missing_importance=_without_importance(shapes, matrix, calibrated),
    )
    planned = tuple(
        _planned(source, choices[source.name], source_bytes[source.name], source_types.get(source.name), matrix)
        for source in sources
    )
    key_values = key_values | {
        "general.file_type": packed(file_type.number, GGUFValueType.UINT32),
        "general.quantization_version": packed(GGML_QUANT_VERSION, GGUFValueType.UINT32),
    }
    if matrix is not None:
        key_values |= _about_imatrix(matrix, settings)
    return GGUFPlan(planned, arch, settings, file_type.name, key_values, notes)


def _without_importance(
    shapes: dict[str, tuple[int, ...]], matrix: ImportanceMatrix | None, calibrated: frozenset[str]
) -> set[str]:
    """Tensors whose errors nothing weighs, though those of others are weighed."""
    if matrix is None and not calibrated:
        return set()
    left = {name: shape for name, shape in shapes.items() if name not in calibrated}
    return {name for name, shape in left.items() if matrix is None or matrix.importance(name, shape) is None}


def _planned(
    source: Source, choice: Choice, nbytes: int, stored_as: str | None, matrix: ImportanceMatrix | None
) -> PlannedBlocks:
    kind = TYPES.get(choice.type_name)
    if kind is None:
        raise UsageError(f"{source.name} cannot be written as {choice.type_name}", f"types: {', '.join(TYPES)}")
    importance = None
    if matrix is not None and kind.name not in PLAIN:
        importance = matrix.importance(source.name, source.shape)
    return PlannedBlocks(source, kind, choice, nbytes, importance, copied=stored_as == kind.name)


def model_facts(arch: str, metadata: dict[str, Any], float_type: str) -> ModelFacts:
    """What the rules of file types look at, from the key-values of a model."""

    def number(name: str) -> int:
        value = metadata.get(f"{arch}.{name}", 0)
        first = value if isinstance(value, int) else next(iter(value), 0) if hasattr(value, "__iter__") else 0
        return int(first)

    heads = number("attention.head_count")
    return ModelFacts(
        arch,
        number("block_count"),
        number("expert_count"),
        heads,
        number("attention.head_count_kv") or heads,
        float_type,
    )


def _about_imatrix(matrix: ImportanceMatrix, settings: Settings) -> KeyValues:
    """Where the importance came from, as llama-quantize notes it."""
    return packed_key_values(
        {
            "quantize.imatrix.file": (settings.imatrix or "", GGUFValueType.STRING),
            "quantize.imatrix.dataset": (", ".join(matrix.datasets), GGUFValueType.STRING),
            "quantize.imatrix.entries_count": (len(matrix.entries), GGUFValueType.UINT32),
            "quantize.imatrix.chunks_count": (matrix.chunks, GGUFValueType.UINT32),
        }
    )


def slabs(tensor: PlannedBlocks, weights: int) -> list[tuple[int, int]]:
    """Row ranges of about so many weights; none crosses from one expert to the next."""
    experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
    rows = tensor.rows // experts if experts else 0
    step = max(1, weights // max(1, tensor.columns))
    return [
        (expert * rows + first, expert * rows + min(first + step, rows))
        for expert in range(experts)
        for first in range(0, rows, step)
    ]


def importance_of(tensor: PlannedBlocks, first: int) -> Tensor | None:
    """What errors of the slab that begins at this row are weighed with, float32 [K]."""
    if tensor.importance is None:
        return None
    expert = first // (tensor.rows // tensor.shape[0]) if len(tensor.shape) == 3 else 0
    return tensor.importance[min(expert, tensor.importance.shape[0] - 1)].to(torch.float32).contiguous()
