"""What has been decided for each finished block, durable: a run that is killed goes on behind its last finished block.

    .NAME.lowbit-work/            beside the output
        run.json                  what the decisions depend on: settings, source, text, arithmetic, versions
        block-00003.safetensors   codes and scales (or ggml blocks) of its linears, tensors that transforms rewrote,
                                  and, in the header, what the report will say
        states-00007              hidden states in front of block 7, written now and then

A file appears by a rename after it was flushed. Codes of up to 4 bits are kept as nibbles-and-less (`pack_dense`).
A resumed run reads the last states and runs what blocks were finished since, so its files are those of a run that was
never stopped, byte for byte, on the same machine.

Refused: resuming with other settings, another source, text or version than the run began with.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit import kernels
from lowbit.errors import CheckpointError, UsageError
from lowbit.numerics import ggml
from lowbit.numerics.grid import Grid
from lowbit.rounding.target import GridTarget, Target
from lowbit.schemes import WeightSpec
from lowbit.tensors import NestedScale, QuantizedTensor

WORK = ".lowbit-work"


@dataclass(frozen=True)
class LinearResult:
    """What the report says of one linear.

    method         how it was rounded in the end
    relative_error ‖W − Ŵ‖² / ‖W‖² against the weight that was rounded, after transforms
    max_error      max |W − Ŵ|
    layer_error    tr(ΔW H ΔWᵀ) / tr(W H Wᵀ); `nearest_error` the same of rounding to nearest; None without a Hessian
    tokens         that its input was measured on
    """

    method: str
    relative_error: float
    max_error: float
    layer_error: float | None = None
    nearest_error: float | None = None
    tokens: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockRecord:
    """Everything of one block but its tensors.

    transforms    what transforms did, as plain values
    input_absmax  linear → the range of its input, where a static activation scale is stored
    cache_absmax  "k" and "v" → largest value of each head, where a cache scale is stored
    inputs        name of a distinct input → its summary (`calibrate.summary`), of the blocks that the report shows
    """

    linears: dict[str, LinearResult]
    transforms: tuple[dict[str, Any], ...] = ()
    input_absmax: dict[str, float] = field(default_factory=dict)
    cache_absmax: dict[str, list[float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)


class BlockStore:
    """The folder of one run."""

    def __init__(self, folder: Path, depends_on: dict[str, Any], resume: bool):
        self.folder = folder
        described = json.loads(json.dumps(depends_on, sort_keys=True, default=str))
        if resume and folder.is_dir():
            _check_same(folder, described)
        elif folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_durably(folder / "run.json", json.dumps(described, indent=2).encode())
        self._places: dict[str, int] = {}
        self.records: dict[int, BlockRecord] = {}
        for index in range(10**5):
            if not self._file(index).is_file():
                break
            self._open(index)

    @property
    def finished(self) -> int:
        """Number of finished blocks."""
        return len(self.records)

    def save(
        self, index: int, rounded: dict[str, QuantizedTensor | Tensor], tensors: dict[str, Tensor], record: BlockRecord
    ) -> None:
        """Keep a block: linear → codes or ggml blocks, stored name → rewritten tensor as it will be written."""
        parts: dict[str, Tensor] = {f"tensor|{name}": values.contiguous() for name, values in tensors.items()}
        scalars: dict[str, dict[str, float]] = {}
        for linear, stored in rounded.items():
            if isinstance(stored, Tensor):
                parts[f"blocks|{linear}"] = stored.contiguous()
                continue
            more, scalars[linear] = _taken_apart(stored)
            parts |= {f"{part}|{linear}": values.contiguous() for part, values in more.items()}
        header = {"record": json.dumps(asdict(record)), "scalars": json.dumps(scalars)}
        beside = self.folder / f"{self._file(index).name}.partial"
        save_file(parts, beside, metadata=header)
        _rename_durably(beside, self._file(index))
        self._open(index)

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

    def quantized(
        self, linear: str, spec: WeightSpec, grid: Grid, columns: int, first: int = 0, last: int | None = None
    ) -> QuantizedTensor:
        """Rows of the codes of a linear; where blocks or nested scales span rows, `first` begins one."""
        with self._reading(self._places[linear]) as file:
            scalars = json.loads(file.metadata()["scalars"])[linear]
            names = [name for name in file.keys() if name.endswith(f"|{linear}")]  # noqa: SIM118
            parts = {name.partition("|")[0]: file.get_slice(name) for name in names}
            return _put_together(parts, scalars, spec, grid, columns, first, last)

    def decoded(self, linear: str, target: Target, columns: int) -> Tensor:
        """The weight that a linear was rounded to, float32 [N, K]."""
        if isinstance(target, GridTarget):
            return self.quantized(linear, target.spec, target.grid, columns).decode()
        return ggml.decode(target.name, self.blocks(linear))

    def save_states(self, index: int, streams: Iterable[Tensor]) -> None:
        """Keep what goes into block `index`, of every stream, in place of earlier ones."""
        path = self.folder / f"states-{index:05d}"
        beside = path.with_name(path.name + ".partial")
        with beside.open("wb") as file:
            for values in streams:
                for window in values:
                    file.write(window.contiguous().view(torch.uint8).numpy().tobytes())
        _rename_durably(beside, path)
        for other in self.folder.glob("states-*"):
            if other != path:
                other.unlink()

    def load_states(self, streams: Iterable[Tensor]) -> int:
        """Fill the streams with the last states that were kept; in front of which block, 0 where there are none."""
        found = sorted(path for path in self.folder.glob("states-*") if path.suffix != ".partial")
        if not found:
            return 0
        with found[-1].open("rb") as file:
            for values in streams:
                for window in values:
                    raw = file.read(window.numel() * window.element_size())
                    window.copy_(torch.frombuffer(bytearray(raw), dtype=window.dtype).reshape(window.shape))
        return int(found[-1].name.removeprefix("states-"))

    def remove(self) -> None:
        """The output is complete; nothing here is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

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


def work_folder(output: Path) -> Path:
    """Where the decisions for an output are kept while it is made."""
    output = Path(os.path.abspath(output))
    return output.with_name(f".{output.name}{WORK}")


def _taken_apart(stored: QuantizedTensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    assert stored.g_idx is None, "our own rounding keeps groups of consecutive columns"
    codes, scalars = stored.codes, {"global_scale": stored.global_scale, "signed": float(stored.codes.dtype.is_signed)}
    if stored.grid.bits <= 4:
        offset = None if codes.dtype.is_signed else 0
        parts = {"packed": kernels.pack_dense(codes, int(stored.grid.bits), offset), "scale": stored.scale}
    else:
        parts = {"codes": codes, "scale": stored.scale}
    if stored.zero_point is not None:
        parts["zero_point"] = stored.zero_point
    if stored.nested is not None:
        parts |= {"nested_codes": stored.nested.codes, "nested_absmax": stored.nested.absmax}
        scalars |= {"nested_offset": stored.nested.offset, "nested_block": stored.nested.block}
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
    shape = QuantizedTensor(codes, parts["scale"][scale_rows], grid, spec.granularity, group_size,
                            global_scale=scalars["global_scale"])  # fmt: skip
    if "zero_point" in parts:
        shape = replace(shape, zero_point=parts["zero_point"][scale_rows])
    if "nested_codes" not in parts:
        return shape
    nested_codes, block = parts["nested_codes"][rows], int(scalars["nested_block"])
    begin = first * nested_codes.shape[1]
    assert begin % block == 0, "slabs begin where a block of scales does"
    absmax = parts["nested_absmax"][begin // block : -(-(begin + nested_codes.numel()) // block)]
    return replace(shape, nested=NestedScale(nested_codes, absmax, scalars["nested_offset"], block))


def _check_same(folder: Path, described: dict[str, Any]) -> None:
    path = folder / "run.json"
    try:
        began_with = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", "leave --resume out to begin anew") from error
    changed = [key for key in {**began_with, **described} if began_with.get(key) != described.get(key)]
    if changed:
        shown = "; ".join(f"{key} was {began_with.get(key)!r}, is {described.get(key)!r}" for key in changed[:3])
        raise UsageError(f"{folder} holds a run that began otherwise: {shown}", "leave --resume out to begin anew")


def _write_durably(path: Path, content: bytes) -> None:
    beside = path.with_name(path.name + ".partial")
    beside.write_bytes(content)
    _rename_durably(beside, path)


def _rename_durably(beside: Path, path: Path) -> None:
    for place, flags in ((beside, os.O_RDONLY), (path.parent, os.O_RDONLY)):
        descriptor = os.open(place, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if place is beside:
            os.replace(beside, path)
