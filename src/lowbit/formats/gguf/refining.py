"""The plan of a GGUF file that is refined: see `plan.refining`.

The reference, mapped to GGUF as if it were to be quantized (`describe_gguf`), says which Hugging Face tensors each
tensor of the file is made of, and in which order of rows. A tensor is refined if it is made of whole linears of decoder
blocks, row by row, in a type that has codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.architecture import Architecture
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import UsageError
from lowbit.export import Piece
from lowbit.export.patched_files import BytesPlace, PatchedFiles
from lowbit.formats.gguf.model import GGUFTensorSource, describe_gguf
from lowbit.formats.gguf.plan import PLAIN, GGUFPlan, kept_plan
from lowbit.formats.gguf.raw import RawGGUF, rows_and_columns
from lowbit.numerics.ggml import TYPES
from lowbit.plan.plan import Making, PlannedTensor
from lowbit.plan.refining import Kept
from lowbit.rounding.target import GgmlTarget, ScaledBlocks, Stored, Target
from lowbit.settings import Settings


@dataclass(frozen=True)
class KeptGGUFPlan(GGUFPlan):
    """A GGUF file, in one or several parts, that stays as it is."""

    raw: Any = field(default=None, repr=False, compare=False)

    @property
    def origin(self) -> Path:
        """The first part."""
        return self.raw.path

    @cached_property
    def _part_sizes(self) -> list[int]:
        return [file.path.stat().st_size for file in self.raw.files]

    def _names(self, output: Path) -> list[str]:
        count, stem = len(self.raw.files), output.name.removesuffix(".gguf")
        parts = [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
        return [output.name] if count == 1 else parts

    def places(self, output: Path) -> list[Path]:
        reports = super().places(output)[-2:]
        return [*(output.with_name(name) for name in self._names(output)), *reports]

    def opened_at(self, output: Path) -> Path:
        return output.with_name(self._names(output)[0])

    def pack(self, tensor: PlannedTensor, rows: Stored, first: int) -> list[Piece]:
        """Blocks only: the scale of a whole NVFP4 matrix stays."""
        blocks = rows.blocks if isinstance(rows, ScaledBlocks) else rows
        assert isinstance(blocks, Tensor)
        return [Piece(tensor.name, blocks, first)]

    def vector_piece(self, tensor: PlannedTensor, values: Tensor) -> Piece:
        return Piece(tensor.name, values.contiguous().view(torch.uint8).reshape(1, -1), 0)

    def copied(self, work: Path, output: Path) -> PatchedFiles:
        raw: RawGGUF = self.raw
        copies = dict(
            zip((file.path for file in raw.files), (work / name for name in self._names(output)), strict=True)
        )
        places = {}
        for tensor in raw.tensors:
            rows, _ = rows_and_columns(tensor.shape)
            row_bytes = (tensor.stop - tensor.start) // rows if rows else 0
            file = copies[raw.file_of(tensor).path]
            places[tensor.name] = BytesPlace(file, tensor.start, (rows, row_bytes), torch.uint8)
        return PatchedFiles(copies, places)


def keep_file(checkpoint: Checkpoint, reference: Checkpoint, architecture: Architecture, settings: Settings) -> Kept:
    """The plan of a GGUF file that is refined; UsageError for one of another architecture, shapes or tensors."""
    raw = checkpoint.files.raw
    described = describe_gguf(reference, architecture)
    arch = str(raw.metadata.get("general.architecture"))
    if described.arch != arch:
        raise UsageError(
            f"{checkpoint.source} is a model of llama.cpp's architecture {arch!r}, and {reference.source} one of "
            f"{described.arch!r}",
            "--reference is the model that the file was made of",
        )
    sources = {tensor.name: tensor for tensor in described.tensors}
    by_name = {tensor.name: tensor for tensor in raw.tensors}
    for name, source in sources.items():
        held = by_name.get(name)
        if held is not None and tuple(held.shape) != tuple(source.shape):
            raise UsageError(
                f"{checkpoint.source}: {name} is {list(held.shape)}, and {list(source.shape)} in {reference.source}",
                "--reference is the model that the file was made of",
            )
    plan = kept_plan(raw, settings)
    in_blocks = {f"{linear.name}.weight" for linear in architecture.linears.values() if linear.block is not None}
    tensors = tuple(_kept_tensor(tensor, sources.get(tensor.name), in_blocks) for tensor in plan.tensors)
    kept = KeptGGUFPlan(**{**vars(plan), "tensors": tensors, "architecture": architecture}, raw=raw)
    places = {name: (tensor.name, index) for tensor in kept.tensors if tensor.making is Making.calibrated
              for index, name in enumerate(tensor.source.names)}  # fmt: skip
    if not places:
        types = ", ".join(sorted({tensor.type_name for tensor in raw.tensors}))
        raise UsageError(
            f"{checkpoint.source} has no quantized linear in its blocks (types: {types}); there are no codes to refine",
            f"quantize it: lowbit quantize {checkpoint.source} --method gptq -o OUT.gguf --scheme Q4_K_M",
        )

    def target(weight: str) -> GgmlTarget:
        name, index = places[weight]
        scales = raw.scales(by_name[name])
        kind = GgmlTarget(by_name[name].type_name, scales is not None)
        return kind if scales is None else replace(kind, scale=scales[index].item())

    def codes(linear: str) -> Stored:
        name, index = places[f"{linear}.weight"]
        blocks = _source_rows(raw, by_name[name], sources[name], index)
        chosen = target(f"{linear}.weight")
        return ScaledBlocks(blocks, chosen.scale) if chosen.scaled else blocks

    targets: dict[str, Target] = {weight.removesuffix(".weight"): target(weight) for weight in places}
    vectors = {source.names[0]: replace(tensor, source=source) for tensor in kept.tensors
               if len(tensor.shape) == 1 and by_name[tensor.name].type_name == "F32"
               and (source := sources.get(tensor.name)) is not None and len(source.names) == 1}  # fmt: skip
    return Kept(kept, targets, codes, frozenset(file.path for file in raw.files), vectors)


def _source_rows(raw: RawGGUF, tensor: Any, source: GGUFTensorSource, index: int) -> Tensor:
    """The blocks of one of a tensor's linears, uint8 [N, row bytes], in the rows of the linear."""
    each = rows_and_columns(tensor.shape)[0] // len(source.sources)
    blocks = raw.blocks(tensor, index * each, (index + 1) * each)
    assert source.arranged is not None
    if source.arranged.rows is None:
        return blocks.clone()
    ordered = torch.empty_like(blocks)
    ordered[torch.from_numpy(source.arranged.rows)] = blocks
    return ordered


def _kept_tensor(tensor: PlannedTensor, source: GGUFTensorSource | None, in_blocks: set[str]) -> PlannedTensor:
    """A tensor as the file has it; `Making.calibrated`, with the reference's linears as its source, where refined."""
    kind = None if tensor.target is None else TYPES[tensor.target.name]
    if kind is None or kind.name in PLAIN:
        return tensor
    why = None
    if source is None:
        why = "the reference has no tensor for it"
    elif not source.keeps_rows:
        why = "its rows are not those of a linear"
    elif not source.names or not in_blocks.issuperset(source.names):
        why = "it is no linear of a decoder block, so no text is measured for it"
    if why is not None or source is None:
        return replace(tensor, notes=(f"not refined: {why}",))
    return replace(tensor, making=Making.calibrated, source=source, notes=())
