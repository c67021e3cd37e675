"""Codes and results of each finished block on disk, so that a killed run resumes after its last finished block.

    .NAME.lowbit-work/            beside the output
        run.json                  what the codes depend on (`calibrate.identity`)
        blocks.json               SHA-256 of each file below
        block-00003.safetensors   codes and scales (or ggml blocks) of its linears, tensors that transforms rewrote,
                                  and, in the header, its results for the report
        states-00007              hidden states before block 7, written now and then
        token-weights.safetensors weights of tokens in the Hessians (`calibrate.gradients`), where the run has any
        outputs-00012.safetensors the curvature of the loss in the outputs of the block's linears, likewise
        learning.safetensors      what a distillation or a training needs to go on, written now and then
        rotations.safetensors     the same of rotations that are learned, and at their end what they are
        distilled-00003.safetensors   a block with what the distillation learned, read in place of the first

Every file is flushed, then renamed into place. Codes of up to 4 bits are packed (`pack_dense`). A resumed run reads the
last states and replays the blocks finished since; on the same machine its output equals an uninterrupted run's, byte
for byte. Refused: resuming with other settings, another source, text or version. A file whose SHA-256 is not that of
blocks.json is not used: its block, and those after it, are done again. What lowbit did not write is never removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit import kernels
from lowbit.calibrate.identity import differences
from lowbit.errors import OutputError, UsageError
from lowbit.files.claim import OWNER
from lowbit.numerics import ggml
from lowbit.rounding.target import GridTarget, ScaledBlocks, Stored, Target
from lowbit.schemes import WeightSpec
from lowbit.tensors import Grid, NestedScale, QuantizedTensor, SparseOutliers

STORED = re.compile(r"(run\.json|blocks\.json|block-\d{5}\.safetensors|token-weights\.safetensors|states-\d{5}"
                    r"|outputs-\d{5}\.safetensors|(learning|rotations)\.safetensors|distilled-\d{5}\.safetensors)"
                    r"(\.partial)?")  # fmt: skip
_WEIGHTS = "token-weights.safetensors"
_LEARNING = "learning.safetensors"
_SHOWN = 4  # differences in a message
_log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class LinearResult:
    """The result of rounding one linear, for the report.

    method         the rounding that made its codes
    relative_error ‖W − Ŵ‖² / ‖W‖², W after transforms
    max_error      max |W − Ŵ|
    layer_error    tr(ΔW H ΔWᵀ) / tr(W H Wᵀ); `nearest_error`: the same of rounding to nearest; None without a Hessian
    tokens         tokens in the statistics of its input
    start_error    `layer_error` of the codes that it started from, of refined linears
    """

    method: str
    relative_error: float
    max_error: float
    layer_error: float | None = None
    nearest_error: float | None = None
    tokens: int = 0
    notes: tuple[str, ...] = ()
    start_error: float | None = None


@dataclass(frozen=True)
class BlockRecord:
    """The results of one block, without its tensors.

    transforms    notes of the transforms, as plain values
    inputs        name of a distinct input → its summary (`calibrate.summary`), for the blocks that the report shows
    mends_stream  linears of it made up for what the residual stream had lost
    """

    linears: dict[str, LinearResult]
    transforms: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    mends_stream: bool = False


@dataclass(frozen=True)
class TensorResult:
    """The cost of rounding one weight: ‖W − Ŵ‖² / ‖W‖², max |w − ŵ|, and the calibration's result if there is one."""

    relative_error: float
    max_error: float
    linear: LinearResult | None = None


class BlockStore:
    """The folder of one run."""

    def __init__(self, folder: Path, depends_on: dict[str, Any], resume: bool):
        self.folder = folder
        described = json.loads(json.dumps(depends_on, sort_keys=True, default=str))
        folder.mkdir(parents=True, exist_ok=True)
        if resume and (folder / "run.json").exists():
            _check_same(folder, described)
        else:
            self._start_over(resume)
        self._write("run.json", described)
        self._places: dict[str, int] = {}
        self.records: dict[int, BlockRecord] = {}
        self._distilled: set[int] = set()  # blocks that are read from their second file
        self._sums = self._known_sums()
        while self._is_sound(self._file(self.finished)):
            self._open(self.finished)
        if self.finished:
            _log.info("going on behind block %d of an earlier run", self.finished - 1)

    @property
    def finished(self) -> int:
        """Number of finished blocks."""
        return len(self.records)

    def results(self) -> dict[str, TensorResult]:
        """Weight → cost of rounding it, for all rounded linears."""
        return {
            f"{name}.weight": TensorResult(result.relative_error, result.max_error, result)
            for record in self.records.values()
            for name, result in record.linears.items()
        }

    def save(self, index: int, rounded: dict[str, Stored], tensors: dict[str, Tensor], record: BlockRecord) -> None:
        """Write a block: linear → codes or ggml blocks, stored name → rewritten tensor in its output dtype."""
        self._save(self._file(index), rounded, tensors, record)
        self._open(index)

    def save_distilled(
        self, index: int, rounded: dict[str, Stored], tensors: dict[str, Tensor], record: BlockRecord
    ) -> None:
        """Write what a distillation made of a block, arguments as of `save`. The file of `save` stays, for a run that
        has to go on from it; from now on the block is read from this one."""
        path = self.folder / f"distilled-{index:05d}.safetensors"
        self._save(path, rounded, tensors, record)
        self._distilled.add(index)
        self._open(index)

    def _save(self, path: Path, rounded: dict[str, Stored], tensors: dict[str, Tensor], record: BlockRecord) -> None:
        parts: dict[str, Tensor] = {f"tensor|{name}": values.contiguous() for name, values in tensors.items()}
        scalars: dict[str, dict[str, float]] = {}
        for linear, stored in rounded.items():
            if isinstance(stored, ScaledBlocks):
                scalars[linear] = {"scale": stored.scale}
                stored = stored.blocks
            if isinstance(stored, Tensor):
                parts[f"blocks|{linear}"] = stored.contiguous()
                continue
            more, scalars[linear] = _taken_apart(stored)
            parts |= {f"{part}|{linear}": values.contiguous() for part, values in more.items()}
        header = {"record": json.dumps(asdict(record)), "scalars": json.dumps(scalars)}
        beside = self.folder / f"{path.name}.partial"
        save_file(parts, beside, metadata=header)
        self._keep(beside, path)

    def __contains__(self, name: str) -> bool:
        """True for the weight ("….weight") of a rounded linear."""
        return name.removesuffix(".weight") in self._places and f"tensor|{name}" not in self._places

    def rewritten(self) -> set[str]:
        """Stored names of the tensors that transforms rewrote."""
        return {name.removeprefix("tensor|") for name in self._places if name.startswith("tensor|")}

    def tensor(self, name: str) -> Tensor:
        """A rewritten tensor."""
        with self._reading(self._places[f"tensor|{name}"]) as file:
            return file.get_tensor(f"tensor|{name}")

    def blocks(self, linear: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of the ggml blocks of a linear, uint8 [rows, row bytes]."""
        with self._reading(self._places[linear]) as file:
            return file.get_slice(f"blocks|{linear}")[first:last]

    def scale(self, linear: str) -> float:
        """The scale of the whole matrix that `ScaledBlocks` had; 1 where there was none."""
        with self._reading(self._places[linear]) as file:
            return json.loads(file.metadata()["scalars"]).get(linear, {}).get("scale", 1.0)

    def quantized(
        self, linear: str, spec: WeightSpec, grid: Grid, columns: int, first: int = 0, last: int | None = None
    ) -> QuantizedTensor:
        """Rows of the codes of a linear; `first` must begin a block if blocks or nested scales span rows."""
        with self._reading(self._places[linear]) as file:
            scalars = json.loads(file.metadata()["scalars"])[linear]
            names = [name for name in file.keys() if name.endswith(f"|{linear}")]  # noqa: SIM118
            parts = {name.partition("|")[0]: file.get_slice(name) for name in names}
            return _put_together(parts, scalars, spec, grid, columns, first, last)

    def stored(self, linear: str, target: Target, columns: int) -> Stored:
        """All rows of a linear, as its rounding made them."""
        if isinstance(target, GridTarget):
            return self.quantized(linear, target.spec, target.grid, columns)
        with self._reading(self._places[linear]) as file:
            scaled = linear in json.loads(file.metadata()["scalars"])
        blocks = self.blocks(linear)
        return ScaledBlocks(blocks, self.scale(linear)) if scaled else blocks

    def rewritten_in(self, index: int) -> dict[str, Tensor]:
        """The rewritten tensors that lie in the file of a block."""
        return {name: self.tensor(name) for name in self.rewritten() if self._places[f"tensor|{name}"] == index}

    def decoded(self, linear: str, target: Target, columns: int, transposed: bool = False) -> Tensor:
        """The decoded weight of a linear, float32 [N, K], or [K, N]."""
        if isinstance(target, GridTarget):
            weight = self.quantized(linear, target.spec, target.grid, columns).decode()
        else:
            weight = ggml.decode(target.name, self.blocks(linear)) * self.scale(linear)
        return weight.t() if transposed else weight

    def save_states(self, index: int, streams: Iterable[Tensor]) -> None:
        """Write the inputs of block `index` of every stream, replacing earlier ones."""
        path = self.folder / f"states-{index:05d}"
        beside = path.with_name(path.name + ".partial")
        with beside.open("wb") as file:
            for values in streams:
                for window in values:
                    file.write(window.contiguous().view(torch.uint8).numpy().tobytes())
        self._keep(beside, path)
        for other in self.folder.glob("states-*"):
            if other != path:
                other.unlink()

    def load_states(self, streams: Iterable[Tensor]) -> int:
        """Fill the streams with the last saved states; returns the block they belong before, 0 if there are none."""
        found = sorted(path for path in self.folder.glob("states-*") if path.suffix != ".partial")
        found = [path for path in found if int(path.name.removeprefix("states-")) <= self.finished]
        if not found or not self._is_sound(found[-1]):
            return 0
        with found[-1].open("rb") as file:
            for values in streams:
                for window in values:
                    raw = file.read(window.numel() * window.element_size())
                    window.copy_(torch.frombuffer(bytearray(raw), dtype=window.dtype).reshape(window.shape))
        return int(found[-1].name.removeprefix("states-"))

    def save_weights(self, weights: dict[str, Tensor], missing: dict[str, str]) -> None:
        """Write the weights of tokens by linear, and why others have none."""
        beside = self.folder / f"{_WEIGHTS}.partial"
        save_file({name: values.contiguous() for name, values in weights.items()}, beside,
                  metadata={"missing": json.dumps(missing)})  # fmt: skip
        self._keep(beside, self.folder / _WEIGHTS)

    def load_weights(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """What `save_weights` wrote; None if there is nothing sound."""
        path = self.folder / _WEIGHTS
        if not self._is_sound(path):
            return None
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return weights, json.loads(file.metadata()["missing"])

    def save_curvature(self, index: int, curvature: dict[str, tuple[Tensor, ...]]) -> None:
        """Write float32 [n, n] of the parts of a block's linears, in bfloat16: 8 bits say which outputs go together."""
        tensors = {f"{part}:{name}": values.to(torch.bfloat16).contiguous()
                   for name, parts in curvature.items() for part, values in enumerate(parts)}  # fmt: skip
        path = self.folder / f"outputs-{index:05d}.safetensors"
        beside = path.with_name(path.name + ".partial")
        save_file(tensors, beside)
        self._keep(beside, path)

    def has_curvature(self, index: int) -> bool:
        """True if what `save_curvature` wrote of a block is there and sound."""
        return self._is_sound(self.folder / f"outputs-{index:05d}.safetensors")

    def load_curvature(self, index: int) -> dict[str, tuple[Tensor, ...]]:
        """What `save_curvature` wrote of a block, float32; linears that have none are missing."""
        path = self.folder / f"outputs-{index:05d}.safetensors"
        if not path.is_file():  # no gradient came so far back
            return {}
        found: dict[str, dict[int, Tensor]] = {}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part, _, name = key.partition(":")
                found.setdefault(name, {})[int(part)] = file.get_tensor(key).float()
        return {name: tuple(parts[part] for part in sorted(parts)) for name, parts in found.items()}

    def save_learning(self, tensors: dict[str, Tensor], facts: dict[str, Any], what: str = "learning") -> None:
        """Write the state of what learns (a distillation, a training; "rotations"), replacing an earlier one."""
        path = self.folder / f"{what}.safetensors"
        beside = path.with_name(path.name + ".partial")
        save_file(tensors, beside, metadata={"facts": json.dumps(facts)})
        self._keep(beside, path)

    def load_learning(self, what: str = "learning") -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last saved state; None if there is none."""
        path = self.folder / f"{what}.safetensors"
        if not self._is_sound(path):
            return None
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118

    def remove(self) -> None:
        """Delete the files, once the output is complete; and the folder, unless something else lies in it."""
        for path in self._files():
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _start_over(self, resume: bool) -> None:
        """Remove the files of an earlier run, which has no run.json if it was to be resumed; OutputError where the
        folder holds others."""
        foreign = sorted(path.name for path in set(self.folder.iterdir()) - set(self._files()) if path.name != OWNER)
        if foreign:
            raise OutputError(f"{self.folder} holds what lowbit did not write: {', '.join(foreign[:3])}",
                              "move it elsewhere, or choose another name with -o")  # fmt: skip
        blocks = [path for path in self._files() if path.name.startswith("block-") and path.suffix == ".safetensors"]
        left = ""
        if blocks:
            one = len(blocks) == 1
            left = f"{len(blocks)} finished block{'' if one else 's'} of an earlier run {'is' if one else 'are'}"
        elif (self.folder / _LEARNING).exists():
            left = "the state of an earlier training is"
        if left:
            why = (
                "run.json, which says what it depends on, is missing"
                if resume
                else "--resume would have gone on from it"
            )
            _log.warning("%s removed: %s", left, why)
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if STORED.fullmatch(path.name)]

    def _write(self, name: str, content: dict[str, Any]) -> None:
        beside = self.folder / f"{name}.partial"
        beside.write_bytes(json.dumps(content, indent=2).encode())
        _rename_durably(beside, self.folder / name)

    def _keep(self, beside: Path, path: Path) -> None:
        """Give a complete file its name, and note its SHA-256 first."""
        self._sums[path.name] = _sha256(beside)
        self._write("blocks.json", self._sums)
        _rename_durably(beside, path)

    def _known_sums(self) -> dict[str, str]:
        path = self.folder / "blocks.json"
        try:
            sums = json.loads(path.read_bytes()) if path.exists() else {}
        except (OSError, ValueError, RecursionError):
            sums = None
        if not isinstance(sums, dict):
            _log.warning("%s is damaged: all blocks are done again", path)
            return {}
        return sums

    def _is_sound(self, path: Path) -> bool:
        """True for a file with the bytes that were written; a damaged one is reported, and will be replaced."""
        if not path.is_file():
            return False
        sound = self._sums.get(path.name) == _sha256(path)
        beside = self.folder / f"{path.name}.partial"
        if not sound and beside.is_file() and self._sums.get(path.name) == _sha256(beside):
            _rename_durably(beside, path)  # a kill came between the note of its SHA-256 and its name
            sound = True
        if not sound:
            again = ("hidden states are computed again" if "states" in path.name else
                     "the weights of tokens are computed again"
                     if path.name == _WEIGHTS or path.name.startswith("outputs-") else
                     "the learning begins anew" if "learning" in path.name else
                     "its block, and those after it, are done again")  # fmt: skip
            _log.warning("%s is damaged: %s", path, again)
        return sound

    def _file(self, index: int) -> Path:
        kind = "distilled" if index in self._distilled else "block"
        return self.folder / f"{kind}-{index:05d}.safetensors"

    def _open(self, index: int) -> None:
        with self._reading(index) as file:
            record = json.loads(file.metadata()["record"])
            record["linears"] = {
                name: LinearResult(**{**each, "notes": tuple(each["notes"])})
                for name, each in record["linears"].items()
            }
            record["transforms"], record["notes"] = tuple(record["transforms"]), tuple(record["notes"])
            self.records[index] = BlockRecord(**record)
            for name in file.keys():  # noqa: SIM118
                self._places[name if name.startswith("tensor|") else name.partition("|")[2]] = index

    def _reading(self, index: int) -> Any:
        return safe_open(self._file(index), framework="pt")


def tell_of_blocks(folder: Path, error: BaseException) -> None:
    """Say that an interrupted run left finished blocks; not where it was refused, and would be again."""
    blocks = len(list(folder.glob("block-*.safetensors")))
    if blocks and not isinstance(error, UsageError):
        kept, them = ("1 finished block is", "it") if blocks == 1 else (f"{blocks} finished blocks are", "them")
        _log.warning("%s kept in %s; the same command with --resume goes on from %s", kept, folder, them)


def joined_results(parts: Sequence[TensorResult]) -> TensorResult:
    """The result of stacked experts, weights of one shape: mean errors, the largest error, all notes."""
    if len(parts) == 1:
        return parts[0]
    linears = [part.linear for part in parts if part.linear is not None]

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    whole = replace(
        linears[0],
        method=" and ".join(sorted({each.method for each in linears})),
        layer_error=mean([each.layer_error for each in linears]),
        nearest_error=mean([each.nearest_error for each in linears]),
        start_error=mean([each.start_error for each in linears]),
        tokens=sum(each.tokens for each in linears),
        notes=tuple(f"expert {index}: {note}" for index, each in enumerate(linears) for note in each.notes),
    )
    relative = sum(part.relative_error for part in parts) / len(parts)
    return TensorResult(relative, max(part.max_error for part in parts), whole)


def _taken_apart(stored: QuantizedTensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    codes, scalars = stored.codes, {"global_scale": stored.global_scale, "signed": float(stored.codes.dtype.is_signed)}
    if stored.grid.bits <= 4:
        offset = None if codes.dtype.is_signed else 0
        parts = {"packed": kernels.pack_dense(codes, int(stored.grid.bits), offset), "scale": stored.scale}
    else:
        parts = {"codes": codes, "scale": stored.scale}
    if stored.zero_point is not None:
        parts["zero_point"] = stored.zero_point
    if stored.g_idx is not None:
        parts["g_idx"] = stored.g_idx
    if stored.nested is not None:
        parts |= {"nested_codes": stored.nested.codes, "nested_absmax": stored.nested.absmax}
        scalars |= {"nested_offset": stored.nested.offset, "nested_block": stored.nested.block}
    if stored.table is not None:
        parts["table"] = stored.table
    if stored.outliers is not None:
        parts |= {"outlier_columns": stored.outliers.columns, "outlier_values": stored.outliers.values}
    return parts, scalars


def _put_together(parts, scalars, spec: WeightSpec, grid: Grid, columns: int, first, last) -> QuantizedTensor:
    rows = slice(first, last)
    if "packed" in parts:
        signed = bool(scalars["signed"])
        codes = kernels.unpack_dense(parts["packed"][rows], int(grid.bits), columns, None if signed else 0)
    else:
        codes = parts["codes"][rows]
    group_size = spec.columns_per_scale(columns)
    scale_rows = rows
    if spec.granularity == "tensor":
        scale_rows = slice(None)
    elif spec.granularity == "block":
        assert first % group_size == 0, "slabs begin where a block does"
        scale_rows = slice(first // group_size, None if last is None else -(-last // group_size))
    nested = None
    if "nested_codes" in parts:
        nested_codes, block = parts["nested_codes"][rows], int(scalars["nested_block"])
        begin = first * nested_codes.shape[1]
        assert begin % block == 0, "slabs begin where a block of scales does"
        absmax = parts["nested_absmax"][begin // block : -(-(begin + nested_codes.numel()) // block)]
        nested = NestedScale(nested_codes, absmax, scalars["nested_offset"], block)
    zero_point = parts["zero_point"][scale_rows] if "zero_point" in parts else None
    g_idx = parts["g_idx"][:] if "g_idx" in parts else None
    table = parts["table"][rows] if "table" in parts else None
    outliers = None
    if "outlier_columns" in parts:
        outliers = SparseOutliers(parts["outlier_columns"][rows], parts["outlier_values"][rows])
    return QuantizedTensor(codes, parts["scale"][scale_rows], grid, spec.granularity, group_size, zero_point,
                           scalars["global_scale"], g_idx, nested, table, outliers)  # fmt: skip


def _check_same(folder: Path, described: dict[str, Any]) -> None:
    path = folder / "run.json"
    try:
        began_with = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "leave --resume out to start over") from error
    changed = differences(began_with, described) if isinstance(began_with, dict) else ["its run.json is damaged"]
    if changed:
        shown = "; ".join(changed[:_SHOWN]) + (f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else "")
        raise UsageError(f"{folder} holds another run: {shown}", "leave --resume out to start over")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rename_durably(beside: Path, path: Path) -> None:
    for place in (beside, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if place is beside:
            os.replace(beside, path)
