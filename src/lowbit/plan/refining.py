"""The plan of a refinement: a finished model that is written again, byte for byte but for codes and scales.

    every file of the source  → copied
    refined linears           → their codes and scales, in the places that they had

So names, types, shapes, order, config and size stay. Only linears are refined whose stored bytes lowbit's own writer
reproduces: `pack(read(linear))` is compared with the file before anything runs, in every stored tensor that depends on
codes or scales. What is not refined keeps its bytes, and the plan has the reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.architecture import Architecture, Linear, model_dtype
from lowbit.checkpoint.base import HTML_NAME, REPORT_NAME, Checkpoint
from lowbit.checkpoint.companions import find_companions
from lowbit.checkpoint.quantized import FLOATS, KINDS
from lowbit.errors import LowbitError, UsageError
from lowbit.export import Exporter, Piece, find_exporter
from lowbit.export.patched_files import BytesPlace, PatchedFiles, same_bytes
from lowbit.plan.folder import FolderPlan, make_plan
from lowbit.plan.linears import stored_as
from lowbit.plan.plan import Making, PlannedTensor
from lowbit.registry import FORMATS
from lowbit.rounding.target import Stored, Target
from lowbit.schemes import Scheme
from lowbit.settings import Settings
from lowbit.tensors import InputRange, QuantizedTensor

# Stands for the range of an input: writers store static activation scales beside codes, and a refinement keeps those.
_SOME = InputRange.within(1.0)


class KeepsFiles(Protocol):
    """What plans of refinements have beside `Plan`. origin: the model on this machine, whatever it was called"""

    @property
    def origin(self) -> Path: ...

    def copied(self, work: Path, output: Path) -> PatchedFiles:
        """The source's files, copied into the hidden folder and open for the refined tensors."""
        ...

    def vector_piece(self, tensor: PlannedTensor, values: Tensor) -> Piece:
        """A whole vector of floats, [n] in the dtype that the file has it in, as its bytes lie there."""
        ...


@dataclass(frozen=True)
class Kept:
    """
    plan     a `Plan` that `KeepsFiles`
    targets  linear → grid or ggml type of its codes, of the linears that are refined
    codes    linear → what the file holds of it, in the rows of the linear
    files    of the model
    vectors  stored name, as the architecture has it → norms, biases and their like, of floats, which a distillation may
             change where the file has them
    """

    plan: Any
    targets: dict[str, Target]
    codes: Callable[[str], Stored]
    files: frozenset[Path]
    vectors: dict[str, PlannedTensor]


@dataclass(frozen=True)
class KeptFolderPlan(FolderPlan):
    """A folder that stays as it is.

    source   its safetensors files, as they are stored
    layout   the output format that stores linears as these files do ("gptq_v2")
    refined  stored tensors that hold codes and scales of refined linears
    """

    source: Any = field(default=None, repr=False, compare=False)
    layout: str = ""
    refined: frozenset[str] = frozenset()

    @property
    def exporter(self) -> Exporter:
        return find_exporter(self.layout)

    def pack(self, tensor: PlannedTensor, rows: QuantizedTensor | Tensor, first: int) -> list[Piece]:
        return [piece for piece in super().pack(tensor, rows, first) if piece.name in self.refined]

    def vector_piece(self, tensor: PlannedTensor, values: Tensor) -> Piece:
        return Piece(tensor.name, values, 0)

    @property
    def origin(self) -> Path:
        """The folder on this machine, whatever it was called."""
        return self.source.folder

    @cached_property
    def _weights(self) -> list[Path]:
        return sorted({info.file for info in self.source.tensors.values()})

    @property
    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._weights)

    @property
    def largest_file(self) -> int:
        return max(path.stat().st_size for path in self._weights)

    def copied(self, work: Path, output: Path) -> PatchedFiles:
        for path in _beside(self.source.folder):
            (work / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.source.folder / path, work / path)
        places = {}
        for name, info in self.source.tensors.items():
            file, start = self.source.position(name)
            places[name] = BytesPlace(work / file.name, start, tuple(info.shape), info.dtype)
        return PatchedFiles({path: work / path.name for path in self._weights}, places)


def _beside(folder: Path) -> list[Path]:
    """Every file that belongs to the model, but its weights and what lowbit reported of it."""
    ours = {Path(REPORT_NAME), Path(HTML_NAME)}
    stated = [path.relative_to(folder) for path in sorted(folder.iterdir())
              if path.is_file() and (path.name == "config.json" or path.name.endswith(".index.json"))]  # fmt: skip
    formats = [Path(row.beside[0]) for row in FORMATS.values() if row.beside and (folder / row.beside[0]).is_file()]
    return sorted({*find_companions(folder), *stated, *formats} - ours)


def keep_folder(checkpoint: Checkpoint, reference: Checkpoint, architecture: Architecture, settings: Settings) -> Kept:
    """The plan of a quantized folder that is refined; UsageError for one that has no codes, or is in a format that
    lowbit does not write."""
    if checkpoint.kind not in KINDS:
        raise UsageError(
            f"{checkpoint.source} is not quantized ({checkpoint.kind}); there are no codes to refine",
            f"quantize it: lowbit quantize {checkpoint.source} --method gptq -o OUT",
        )
    row = FORMATS[checkpoint.kind]
    if row.write is None:
        raise UsageError(
            f"{checkpoint.source} is in the format {checkpoint.kind}, which lowbit reads and does not write",
            "convert it first: lowbit convert … --format compressed-tensors",
        )
    source = checkpoint.files
    shapes = {linear.name: linear for linear in architecture.linears.values()}
    schemes = {weight.removesuffix(".weight"): scheme for weight, scheme in checkpoint.schemes.items()
               if weight.removesuffix(".weight") in shapes}  # fmt: skip
    fitted = next((scheme.name for scheme in schemes.values() if scheme.weight.is_fitted), None)
    if fitted is not None:
        raise UsageError(
            f"{checkpoint.source} has the scheme {fitted}: a refinement moves the scales of fixed values, and those of "
            f"{fitted} are fitted to the weights",
            f"quantize it again, with more --samples: lowbit quantize MODEL -o OUT --scheme {fitted} --method gptq",
        )
    settings = settings.model_copy(update={"format": row.name})
    planned = make_plan(checkpoint, architecture, settings, model_dtype(checkpoint), schemes)
    # Variants of a format (GPTQ v1, v2) have rows of their own; the one that reproduces the first linear is the file's.
    layouts = [name for name, each in FORMATS.items()
               if each.write is not None and (name == row.name or name.startswith(f"{row.name}_v"))]  # fmt: skip
    for layout in layouts:
        refined: set[str] = set()
        exporter = find_exporter(layout)
        tensors = tuple(_kept_tensor(t, checkpoint, source, exporter, settings, refined) for t in planned.tensors)
        if refined:
            break
    names = sorted({scheme.name for scheme in schemes.values()})
    plan = KeptFolderPlan(
        tensors, settings, row, planned.model_class, " + ".join(names), "kept", planned.dtype, architecture,
        input_ranges=dict.fromkeys(schemes, _SOME), source=source, layout=layout, refined=frozenset(refined),  # type: ignore[possibly-undefined]
    )  # fmt: skip

    def codes(linear: str) -> QuantizedTensor:
        return checkpoint.read_quantized(f"{linear}.weight")

    vectors = {tensor.source.names[0]: tensor for tensor in plan.tensors
               if len(tensor.shape) == 1 and len(tensor.source.names) == 1 and tensor.linear is None
               and source.tensors[tensor.name].dtype == tensor.plain_dtype}  # fmt: skip
    return Kept(plan, plan.targets, codes, frozenset(info.file for info in source.tensors.values()), vectors)


def _kept_tensor(
    tensor: PlannedTensor, checkpoint: Checkpoint, source: Any, exporter: Exporter, settings: Settings,
    refined: set[str],
) -> PlannedTensor:  # fmt: skip
    """A tensor as the file has it; `Making.calibrated` where it is a linear that can be refined, whose stored tensors
    are then put among `refined`."""
    linear, scheme = tensor.linear, tensor.scheme
    if linear is None or scheme is None:
        return tensor
    dtype = checkpoint.scale_dtype(tensor.name)
    dtype = dtype if dtype in FLOATS else tensor.dtype
    why = "it lies outside the decoder blocks, where no text is measured" if linear.block is None else None
    if tensor.name in checkpoint.rotations:
        why = checkpoint.rotations[tensor.name].reason
    why = why or unrefinable(scheme)
    if why is None:
        names, why = _reproduced(linear, scheme, checkpoint, source, exporter, dtype)
        if why is None:
            refined |= names
            stored = stored_as(linear, scheme, dtype, exporter, settings)
            return replace(tensor, making=Making.calibrated, **stored)
    return replace(tensor, making=Making.repacked, notes=(*tensor.notes, f"not refined: {why}"))


def unrefinable(scheme: Scheme) -> str | None:
    """Why the codes of a scheme are not refined; None where they can be."""
    if scheme.weight.narrow:
        return "bitsandbytes' INT8 scales whole rows by their largest weight"
    return None


def _reproduced(
    linear: Linear, scheme: Scheme, checkpoint: Checkpoint, source: Any, exporter: Exporter, dtype: torch.dtype
) -> tuple[set[str], str | None]:
    """(stored tensors that depend on codes and scales, why lowbit's writer does not make their bytes again from what
    its reader returns; None where it does).

    Tensors that do not depend on them (g_idx, a shape, symmetric zero points) need not be the same: they are not
    written. Which do, shows when rows change places.
    """
    names: set[str] = set()
    try:
        held = checkpoint.read_quantized(f"{linear.name}.weight")
        pieces = exporter.pack(linear.name, held, scheme, 0, linear.shape, dtype, _SOME)
        others = exporter.pack(linear.name, _rolled(held), scheme, 0, linear.shape, dtype, _SOME)
    except LowbitError as error:
        return names, str(error)
    for piece, other in zip(pieces, others, strict=True):
        if same_bytes(piece.values, other.values):
            continue
        info = source.tensors.get(piece.name)
        if info is None:
            return names, f"it is not stored as {piece.name}"
        place = source.read(piece.name)[piece.index] if piece.index else source.read(piece.name)
        if piece.row or piece.column or not same_bytes(piece.values, place):
            return names, f"lowbit stores {piece.name.rpartition('.')[2]} otherwise than this file"
        names.add(piece.name)
    return names, None


def _rolled(held: QuantizedTensor) -> QuantizedTensor:
    """The same numbers with every row in the place of the next, and codes reversed within each."""
    zero_point = None if held.zero_point is None else held.zero_point.roll(1, 0)
    return replace(held, codes=held.codes.roll(1, 0).flip(1), scale=held.scale.roll(1, 0), zero_point=zero_point)
