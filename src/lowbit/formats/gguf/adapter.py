"""A LoRA adapter of PEFT as the GGUF file that llama.cpp's --lora loads.

    general.type "adapter", adapter.type "lora", general.architecture of the base, adapter.lora.alpha
    NAME.lora_a [r, K], NAME.lora_b [N, r]      NAME as in the base's GGUF; llama.cpp adds scale · alpha / r · B·A
    … of stacked experts [E, r, K], [E, N, r]
    token_embd.weight.lora_a [V, r], lora_b [K, r]

Names and the order of rows are those of the base's own GGUF: `describe_gguf` maps the base from its config.json alone,
and rows of B go where rows of W go. Where s·r is not the same for all matrices (alpha_pattern, or rslora with several
ranks) one alpha cannot say it: the most common stands in the file, and the rest is multiplied into B, in float32.

Refused: what llama.cpp has no place for: DoRA, saved modules, biases, norms; a base that llama.cpp cannot run; experts
of which some are without matrices; a head or an embedding that the base ties to the other.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGML_QUANT_VERSION, GGUFValueType
from torch import Tensor

from lowbit.architecture.cache import discover_once
from lowbit.architecture.merged import Change, Update
from lowbit.architecture.merging import find_changes, missed_training
from lowbit.architecture.structure import Architecture
from lowbit.checkpoint.adapter import Adapter, open_adapter
from lowbit.checkpoint.base import OpenOptions, TensorInfo, read_config, refuse_remote_code
from lowbit.checkpoint.companions import refuse_lone_adapter
from lowbit.checkpoint.hub import download_files, is_hub_id, list_files, local_copy
from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.checkpoint.opening import refuse_revision
from lowbit.checkpoint.stated import refuse_absurd
from lowbit.errors import CheckpointError, FormatError, OutputError, UsageError
from lowbit.export import Piece
from lowbit.export.atomic import atomic_files
from lowbit.files.system import refuse_sources
from lowbit.formats.gguf.header import read_header
from lowbit.formats.gguf.model import GGUFTensorSource, describe_gguf
from lowbit.formats.gguf.write import GGUFWriter, StoredBlocks, packed_key_values
from lowbit.numerics.ggml import TYPES

TYPES_OF_ADAPTERS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MERGE = "merge it instead: lowbit quantize MODEL -o OUT --adapter ADAPTER"
_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class AdapterFile:
    """What was written. pairs: tensors of the base that it changes; notes: for the user"""

    path: Path
    arch: str
    alpha: float
    pairs: int
    bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Pair:
    """A and B of one GGUF tensor. updates: one, or one per expert; flipped: the base stores [K, N]; factor: of B"""

    source: GGUFTensorSource
    updates: tuple[Update, ...]
    rank: int
    flipped: bool
    factor: float = 1.0

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of lora_a and lora_b."""
        *experts, rows, columns = self.source.shape
        if self.source.name == _EMBEDDING:
            return (rows, self.rank), (columns, self.rank)
        return (*experts, self.rank, columns), (*experts, rows, self.rank)

    def read(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """lora_a and lora_b, float32."""
        factors = [replace(update, scale=1.0).factors(adapter) for update in self.updates]
        if self.flipped:
            factors = [(right.t(), left.t()) for left, right in factors]
        if self.source.name == _EMBEDDING:
            (left, right), *_ = factors
            return left.float(), right.t().float() * self.factor
        by_name = dict(zip(self.source.sources, (left.float() for left, _ in factors), strict=True))
        rows = sum(len(left) for left in by_name.values())
        b = self.source.with_columns(self.rank).read(_Rows(by_name), 0, rows)  # type: ignore[arg-type]
        a = torch.stack([right.float() for _, right in factors])
        shape_a, shape_b = self.shapes
        return a.reshape(shape_a), b.reshape(shape_b) * self.factor


class _Rows:
    """Stands for the checkpoint in `GGUFTensorSource.read`: B [N, r] under the name of the weight."""

    def __init__(self, rows: dict[str, Tensor]):
        self.tensors = self.schemes = rows  # rows are [N, r], even where the base stores the transpose

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.tensors[name][start:stop]


@dataclass
class _Base:
    """A base model of which config.json is known and no weight; what `describe_gguf` asks of a checkpoint."""

    source: str
    folder: Path
    parsed: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kind: str = "safetensors"

    def config(self) -> dict[str, Any]:
        return self.parsed


def convert_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    scheme: str | None = None,
    options: OpenOptions | None = None,
    overwrite: bool = False,
    write: bool = True,
) -> AdapterFile:
    """Write an adapter as a GGUF file for llama.cpp's --lora.

    adapter  folder or Hugging Face id
    base     the model it was trained on: a folder of which config.json is read, or a Hugging Face id; None: what
             adapter_config.json names
    scheme   F32 (the default), F16 or BF16
    write    False: refuse what would be refused, and write nothing

    After a LowbitError `output` is unchanged.
    """
    output, options, kind = Path(output), options or OpenOptions(), (scheme or "F32").upper()
    if kind not in TYPES_OF_ADAPTERS:
        raise UsageError(f"an adapter is not written as {scheme}", f"types: {', '.join(TYPES_OF_ADAPTERS)}")
    if output.suffix != ".gguf":
        raise UsageError(f"{output}: an adapter for llama.cpp is one GGUF file", f"name it -o {output}.gguf")
    opened = open_adapter(adapter)
    model = _open_base(opened, base, options)
    refuse_sources([output], [opened.folder, model.folder])
    arch, pairs, notes = _find_pairs(opened, model, options)
    alpha, pairs, folded = _with_one_alpha(pairs)
    notes += folded
    tensors = []
    for pair in pairs:
        for end, shape in zip(("lora_a", "lora_b"), pair.shapes, strict=True):
            nbytes = torch.Size(shape).numel() * TYPES_OF_ADAPTERS[kind].itemsize
            tensors.append(StoredBlocks(f"{pair.source.name}.{end}", shape, TYPES[kind].number, nbytes))
    values = packed_key_values({
        "general.architecture": (arch, GGUFValueType.STRING),
        "general.type": ("adapter", GGUFValueType.STRING),
        "adapter.type": ("lora", GGUFValueType.STRING),
        "general.name": (opened.folder.resolve().name, GGUFValueType.STRING),
        "adapter.lora.alpha": (alpha, GGUFValueType.FLOAT32),
        "general.quantization_version": (GGML_QUANT_VERSION, GGUFValueType.UINT32),
    })  # fmt: skip
    size = sum(tensor.nbytes for tensor in tensors)
    if write:
        _refuse_existing(output, overwrite)
        with atomic_files(output, overwrite) as work:
            writer = GGUFWriter(work, output.name, tensors, values)
            try:
                for name, data in _read(pairs, opened):
                    rows = data.to(TYPES_OF_ADAPTERS[kind]).contiguous()
                    writer.write(Piece(name, rows.view(torch.uint8).reshape(-1, rows.shape[-1] * rows.itemsize), 0))
                writer.close()
            finally:
                writer.abandon()
        size = output.stat().st_size
    return AdapterFile(output, arch, alpha, len(pairs), size, tuple(notes))


def _read(pairs: list[_Pair], adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for pair in pairs:
        for end, data in zip(("lora_a", "lora_b"), pair.read(adapter), strict=True):
            yield f"{pair.source.name}.{end}", data


def _open_base(adapter: Adapter, base: str | Path | None, options: OpenOptions) -> _Base:
    named = str(base) if base is not None else adapter.base
    if named is None:
        raise UsageError(f"{adapter.source}: adapter_config.json does not name the base", "give it: --base MODEL")
    folder = Path(named).expanduser()
    if folder.is_dir():
        refuse_revision(named, options)
    else:
        if folder.exists() or not is_hub_id(named):
            raise UsageError(f"{named}: the base is no folder and no Hugging Face id (org/name)",
                             "give the folder that holds its config.json: --base MODEL")  # fmt: skip
        files = list_files(named, options)
        wanted = [name for name in ("config.json", "generation_config.json") if files is not None and name in files]
        folder = local_copy(named, options) if files is None else download_files(named, options, wanted)
    refuse_lone_adapter(folder, named)
    config = read_config(folder)
    refuse_remote_code(config, named, options)
    refuse_absurd(config, named)
    return _Base(named, folder, config)


def _find_pairs(adapter: Adapter, base: _Base, options: OpenOptions) -> tuple[str, list[_Pair], list[str]]:
    """(architecture, a pair for each tensor of the base's GGUF that changes, notes)."""
    architecture = discover_once(base.parsed, str(base.folder), options.trust_remote_code, True)
    base.tensors = {name: TensorInfo(name, shape, torch.float32, "F32", 0, base.folder)
                    for name, shape in architecture.parameters.items()}  # fmt: skip
    model = describe_gguf(base, architecture)  # type: ignore[arg-type]
    found = find_changes(adapter, architecture, architecture)
    notes = missed_training(adapter, architecture)
    if found.vocabulary is not None:
        raise FormatError(f"{adapter.source}: it changes the size of the vocabulary, which llama.cpp's adapters cannot",
                          _MERGE)  # fmt: skip
    kept = [name for name in adapter.replaced.values() if ".base_layer." in name]
    if kept:
        notes.append(f"passed over: {', '.join(kept)}, the base's own, which llama.cpp takes from its model")
    changes: dict[str, Change] = {}
    for name, change in found.tensors.items():
        what = "DoRA" if change.magnitude else "a bias" if change.shift or name.endswith(".bias") else None
        if change.replaced is not None and change.replaced not in kept:
            what = what or "a saved module"
        if what is not None:
            raise FormatError(
                f"{adapter.source}: {name} has {what}, for which llama.cpp's adapters have no place", _MERGE
            )
        if change.updates:
            changes[name] = change
    _refuse_tied(adapter, architecture, model.tensors, changes)
    pairs = [_pair(adapter, architecture, source, changes) for source in model.tensors
             if source.name != "output.weight" or source.sources[0] not in _names(model.tensors, _EMBEDDING)
             if any(name in changes for name in source.sources)]  # fmt: skip
    return model.arch, pairs, notes


def _names(tensors: tuple[GGUFTensorSource, ...], name: str) -> tuple[str, ...]:
    return next((tensor.sources for tensor in tensors if tensor.name == name), ())


def _refuse_tied(
    adapter: Adapter, architecture: Architecture, tensors: tuple[GGUFTensorSource, ...], changes: dict[str, Change]
) -> None:
    """llama.cpp computes the head of a model with tied tensors with token_embd.weight, unless the file has both."""
    for alias, stored in architecture.tied.items():
        if alias in changes or (stored in changes and not _names(tensors, "output.weight")):
            changed = alias if alias in changes else stored
            raise FormatError(f"{adapter.source}: it changes {changed}; the base ties {alias} to {stored}, and "
                              "llama.cpp has one tensor for both", _MERGE)  # fmt: skip


def _pair(
    adapter: Adapter, architecture: Architecture, source: GGUFTensorSource, changes: dict[str, Change]
) -> _Pair:  # fmt: skip
    missing = [name for name in source.sources if name not in changes]
    if missing:
        raise FormatError(f"{adapter.source}: {missing[0]} has no matrices, and llama.cpp wants those of all "
                          f"experts of {source.name}", _MERGE)  # fmt: skip
    updates = [changes[name].updates for name in source.sources]
    ranks = {update.factors(adapter)[1].shape[0] for each in updates for update in each}
    if any(len(each) != 1 for each in updates) or len(ranks) != 1 or len({each[0].scale for each in updates}) != 1:
        raise FormatError(f"{adapter.source}: {source.name} would have matrices of several ranks or scales", _MERGE)
    if not source.keeps_rows or (len(source.sources) > 1 and len(source.shape) != 3):
        raise FormatError(
            f"{adapter.source}: {source.name} of {source.sources[0]} is not made of its rows alone", _MERGE
        )
    name = next(iter(source.sources))
    linear = architecture.linears.get(name.removesuffix(".weight"))
    flipped = linear is not None and linear.transposed
    return _Pair(source, tuple(update for each in updates for update in each), ranks.pop(), flipped)


def _with_one_alpha(pairs: list[_Pair]) -> tuple[float, list[_Pair], list[str]]:
    """(alpha of the file, pairs with the factors that B needs beside it, notes)."""
    alphas = {pair.source.name: pair.updates[0].scale * pair.rank for pair in pairs}
    rounded = {name: float(torch.tensor(alpha, dtype=torch.float32)) for name, alpha in alphas.items()}
    ((common, _),) = Counter(rounded.values()).most_common(1)
    others = [name for name, alpha in rounded.items() if alpha != common]
    scaled = [replace(pair, factor=alphas[pair.source.name] / common if pair.source.name in others else 1.0)
              for pair in pairs]  # fmt: skip
    notes = [f"adapter.lora.alpha {common:g} is not that of {len(others)} of {len(pairs)} tensors, the first "
             f"{others[0]}: the difference was multiplied into their lora_b"] if others else []  # fmt: skip
    return common, scaled, notes


def _refuse_existing(output: Path, overwrite: bool) -> None:
    """OutputError where something has the name, unless it is an adapter that may be replaced."""
    if not os.path.lexists(output):
        return
    ours = output.is_file() and not output.is_symlink() and _is_adapter(output)
    if not overwrite:
        raise OutputError(f"{output} exists already", "choose another name with -o" + (
            ", or replace it with --overwrite" if ours else ", or remove it first"))  # fmt: skip
    if not ours:
        raise OutputError(f"{output} exists already, and is no adapter", "choose another name with -o")


def _is_adapter(path: Path) -> bool:
    file = MappedFile(path)
    try:
        return read_header(file).metadata.get("general.type") == "adapter"
    except CheckpointError:
        return False
    finally:
        file.close()
