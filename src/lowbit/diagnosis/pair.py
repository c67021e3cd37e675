"""A quantized model and its reference under the same tensor names, and a comparison tensor by tensor.

Names are those of the quantized checkpoint's architecture (experts one by one), and tensors have its orientation, so
that one can replace the other: if only one of the two stores a linear transposed (Conv1D in 16 bits), the reference's
is transposed.

Refused: a model type without a row in the table of families, and a reference of another architecture; the error names
the first tensor that is absent or of another shape.

`look_at_tensors` compares every tensor of the quantized model with the reference's:

    gain      ⟨Ŵ, W⟩ / ⟨W, W⟩        1 if the error is uncorrelated with W; 2 if scales are doubled. Of ternary codes,
                                     over that of the reference rounded so, which is 0.6 for normal weights
    error     ‖Ŵ − W‖² / ‖W‖²
    the same per row, for rows that are not nearly 0

    broken    NaN or inf · all zero, unlike the reference · rows of one value, unlike the reference's
    scaled    gain outside 1/FACTOR … FACTOR; of more than ROWS_SHARE of the rows outside 1/ROW_FACTOR … ROW_FACTOR
              (a row of 2-bit codes with error feedback may be off by 1.5)
    replaced  |gain| under 0.5 and error over 0.5: other weights, or another basis
    changed   an unquantized tensor that differs by more than its dtype rounds

Both models are read by slabs of rows; sums are float64. The gain of a tensor that a transform rewrote (`tied`) is
ignored, since its columns were scaled on purpose.

    at the ends   share of codes that are the smallest or the largest of the grid, of a sample of rows,
                  beside the share that rounding the reference's rows to nearest anew gives
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.architecture.own_names import under_own_names
from lowbit.architecture.view import canonical_view, holds_single_experts
from lowbit.checkpoint.base import Checkpoint, row_slabs
from lowbit.errors import ArchitectureError, UsageError

if TYPE_CHECKING:
    from lowbit.architecture.structure import Architecture, Linear
    from lowbit.evaluation.opening import Opened

PLAIN_BITS = 15.5  # tensors with fewer bits per weight are quantized


@dataclass(frozen=True)
class Pair:
    """See the module docstring. `names` are the tensors of both, in the order of the architecture."""

    judged: Opened
    reference: Opened

    @cached_property
    def architecture(self) -> Architecture:
        architecture = self.judged.loader.architecture
        if architecture is None or self.reference.loader.architecture is None:
            kind = self.judged.model.config.model_type
            raise ArchitectureError(
                f"model type {kind!r} is not known to lowbit and cannot be run block by block",
                "lowbit evaluate judges it as a whole",
            )
        return architecture

    @property
    def quantized(self) -> Checkpoint:
        return self.judged.loader.checkpoint

    @cached_property
    def original(self) -> Checkpoint:
        """The reference under the architecture's names."""
        loader = self.reference.loader
        if self.architecture.own_names and loader.architecture is not None:
            single = holds_single_experts(self.quantized)
            return under_own_names(loader.checkpoint, loader.architecture, False, single)[1]
        return canonical_view(self.reference.checkpoint, self.architecture)

    @cached_property
    def names(self) -> list[str]:
        of_reference = self.reference.loader.architecture
        blocks = [0 if each is None else len(each.blocks) for each in (self.architecture, of_reference)]
        if blocks[0] != blocks[1]:
            raise UsageError(f"{self.quantized.source} has {blocks[0]} blocks, its reference {self.original.source} "
                             f"{blocks[1]}", "the reference must be the model that was quantized")  # fmt: skip
        names = [name for name in self.architecture.parameters if name in self.quantized.tensors]
        for name in names:
            info = self.original.tensors.get(name)
            shape = None if info is None else self._seen_shape(name)
            if shape != tuple(self.quantized.tensors[name].shape):
                found = "absent" if info is None else f"{list(info.shape)}"
                raise UsageError(
                    f"{name} is {list(self.quantized.tensors[name].shape)} in {self.quantized.source} and {found} in "
                    f"its reference {self.original.source}",
                    "the reference must be the model that was quantized",
                )
        return names

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Weight → its linear, of the tensors in `names`."""
        known = set(self.names)
        found = {f"{linear.name}.weight": linear for linear in self.architecture.linears.values()}
        return {name: linear for name, linear in found.items() if name in known}

    def bits(self, name: str) -> float:
        """Stored bits per weight, scales included."""
        info = self.quantized.tensors[name]
        weights = math.prod(info.shape)
        return 8 * info.nbytes / weights if weights else 0.0

    def is_quantized(self, name: str) -> bool:
        return len(self.quantized.tensors[name].shape) > 1 and self.bits(name) < PLAIN_BITS

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the quantized model's tensor, decoded, float32."""
        return self.quantized.read(name, start, stop).float()

    def read_original(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The same rows as the reference has them, float32."""
        if not self._turned(name):
            return self.original.read(name, start, stop).float()
        return self.original.read(name).t()[start:stop].float().contiguous()

    def release(self, name: str) -> None:
        self.quantized.release(name)
        self.original.release(name)

    def _turned(self, name: str) -> bool:
        linear = self.architecture.linears.get(name.removesuffix(".weight"))
        if linear is None or not linear.transposed or not name.endswith(".weight"):
            return False
        return (name in self.quantized.schemes) != (name in self.original.schemes)

    def _seen_shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self.original.tensors[name].shape)
        return shape[::-1] if self._turned(name) else shape


SLAB_WEIGHTS = 4_000_000
FACTOR = 1.4
ROW_FACTOR = 1.75
ROWS_SHARE = 0.01
FAINT = 1e-3  # rows with less than this share of the mean square of all are ignored
ROUNDING = 2e-4  # relative difference between two 16-bit types is below this
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class TensorFacts:
    """The comparison of one tensor; see the module.

    gain        None if the reference is all zero
    row_gains   float32, gains of the rows outside the limits; rows: number of rows compared
    """

    name: str
    role: str
    block: int | None
    shape: tuple[int, ...]
    bits: float
    quantized: bool
    nonfinite: int
    zero: bool
    original_zero: bool
    constant_rows: int
    gain: float | None
    error: float
    row_gains: Tensor
    rows: int

    @property
    def is_zeroed(self) -> bool:
        return self.zero and not self.original_zero

    @property
    def is_replaced(self) -> bool:
        return not self.zero and self.gain is not None and abs(self.gain) < 0.5 and self.error > 0.5

    @property
    def is_scaled(self) -> bool:
        """Off by a factor as a whole, or in many rows."""
        if self.zero or self.nonfinite or self.is_replaced or self.gain is None:
            return False
        return not 1 / FACTOR < self.gain < FACTOR or len(self.row_gains) > ROWS_SHARE * self.rows

    @property
    def factor(self) -> float:
        """The wrong factor of the tensor, or of its rows outside the limits."""
        assert self.gain is not None, "asked of scaled tensors"
        if not 1 / FACTOR < self.gain < FACTOR or not len(self.row_gains):
            return self.gain
        return float(self.row_gains.median())


class _TensorSums:
    def __init__(self):
        self.qq = self.rr = self.qr = 0.0
        self.nonfinite = self.constant_rows = 0
        self.rows: list[Tensor] = []

    def add(self, q: Tensor, r: Tensor) -> None:
        """Rows [rows, …] of both, float32."""
        q, r = q.reshape(len(q), -1) if q.dim() > 1 else q[None], r.reshape(len(r), -1) if r.dim() > 1 else r[None]
        finite = torch.isfinite(q)
        self.nonfinite += int((~finite).sum())
        q = torch.where(finite, q, 0.0)
        qr, rr = (q * r).sum(1, dtype=torch.float64), (r * r).sum(1, dtype=torch.float64)
        self.qq += (q * q).sum(dtype=torch.float64).item()
        self.rr += rr.sum().item()
        self.qr += qr.sum().item()
        self.rows.append(torch.stack([qr, rr]).float())
        if q.shape[1] > 1:
            flat = (q == q[:, :1]).all(1) & (q[:, 0] != 0) & ~(r == r[:, :1]).all(1)
            self.constant_rows += int(flat.sum())


def look_at_tensors(pair: Pair, progress: Callable[[str, int, int], None] | None = None) -> list[TensorFacts]:
    """Facts of every tensor of both models, in the order of the architecture."""
    facts = []
    for index, name in enumerate(pair.names):
        facts.append(_facts(pair, name))
        if progress is not None:
            progress("tensors", index + 1, len(pair.names))
    return facts


def _facts(pair: Pair, name: str) -> TensorFacts:
    shape = tuple(pair.quantized.tensors[name].shape)
    sums = _TensorSums()
    for start, stop in row_slabs(shape, SLAB_WEIGHTS):
        sums.add(*(torch.atleast_1d(read(name, start, stop)) for read in (pair.read, pair.read_original)))
    pair.release(name)
    qr, rr = torch.cat(sums.rows, dim=1)
    usual = _gain_of_rounding(pair, name)
    qr, whole = qr / usual, sums.qr / usual
    judged = rr > FAINT * rr.mean() if len(shape) > 1 else torch.zeros(len(rr), dtype=torch.bool)
    gains = qr[judged] / rr[judged]
    off = (gains < 1 / ROW_FACTOR) | (gains > ROW_FACTOR)
    error = (sums.qq - 2 * sums.qr + sums.rr) / sums.rr if sums.rr > 0 else float(sums.qq > 0)
    return TensorFacts(
        name=name, role=pair.architecture.roles[name], block=pair.architecture.block_of(name), shape=shape,
        bits=pair.bits(name), quantized=pair.is_quantized(name), nonfinite=sums.nonfinite,
        zero=sums.qq == 0 and not sums.nonfinite, original_zero=sums.rr == 0, constant_rows=sums.constant_rows,
        gain=whole / sums.rr if sums.rr > 0 else None, error=max(0.0, error), row_gains=gains[off],
        rows=int(judged.sum()),
    )  # fmt: skip


def _gain_of_rounding(pair: Pair, name: str) -> float:
    """The gain of a sound tensor: 1, as errors of rounding have little of the weight in them. Ternary codes at the mean
    |w| of the matrix are smaller than the weights on the whole, by what rounding the reference so gives."""
    checkpoint = pair.quantized
    if name not in checkpoint.schemes:
        return 1.0
    if checkpoint.schemes[name].weight.number != "ternary":
        return 1.0
    weight = pair.read_original(name).double()
    scale = weight.abs().mean()
    rounded = (weight / scale).round().clamp(-1, 1) * scale
    pair.release(name)
    gain = ((rounded * weight).sum() / weight.square().sum()).item()
    return gain if gain > 0 else 1.0


def median_bits(facts: Iterable[TensorFacts]) -> float:
    """Stored bits per weight of the typical quantized linear of the blocks; 16 where there is none."""
    return median([each.bits for each in facts if each.quantized and each.block is not None] or [16.0])


@dataclass(frozen=True)
class Ends:
    """Share of codes at the ends of the grid, and what rounding the reference to nearest gives."""

    name: str
    share: float
    expected: float


def codes_at_ends(pair: Pair, name: str) -> Ends | None:
    """Codes at the ends, in a sample of rows of an integer weight; None if its codes cannot be read."""
    from lowbit.numerics.scalar_grids import IntGrid
    from lowbit.rounding.rtn import needs_tensor_range, round_to_nearest
    from lowbit.tensors import RangeSearch

    checkpoint = pair.quantized
    if name not in checkpoint.schemes:
        return None
    spec = checkpoint.schemes[name].weight
    if spec.number != "int" or needs_tensor_range(spec):
        return None
    multiple = checkpoint.row_multiple(name)
    rows = min(checkpoint.tensors[name].shape[0], -(-SAMPLED_ROWS // multiple) * multiple)
    stored = checkpoint.read_quantized(name, 0, rows)
    grid = stored.grid
    if not isinstance(grid, IntGrid) or stored.g_idx is not None:
        return None
    search = RangeSearch("wmse" if spec.bits <= 4 else "absmax")
    original, rotation = pair.read_original(name, 0, rows), checkpoint.rotations.get(name)
    original = original if rotation is None else rotation.columns(original)
    fresh = round_to_nearest(original, spec, grid, search)
    share, expected = (
        ((each.codes == grid.qmin) | (each.codes == grid.qmax)).float().mean().item() for each in (stored, fresh)
    )
    return Ends(name, share, expected)
