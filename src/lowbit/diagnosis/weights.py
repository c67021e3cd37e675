"""Every tensor of the quantized model beside the reference's: what is broken, and what is off by a factor.

    gain      ⟨Ŵ, W⟩ / ⟨W, W⟩        1 where Ŵ is W with an error that does not follow W; 2 where scales are doubled
    error     ‖Ŵ − W‖² / ‖W‖²
    of a row likewise, for rows that are not nearly 0

    broken    NaN or inf · all zero where the reference is not · rows of one value where the reference's are not
    scaled    gain outside 1/FACTOR … FACTOR; of more than ROWS_SHARE of the rows outside 1/ROW_FACTOR … ROW_FACTOR
              (a row of 2-bit codes with error feedback may be off by 1.5)
    replaced  |gain| under 0.5 and error over 0.5: other weights, or another basis
    changed   a tensor that is not quantized and yet differs by more than its dtype rounds

Both models are read row slab by row slab; sums are float64. A tensor that a transform rewrote (`tied`) is not judged by
its gain, since its columns were scaled on purpose.

    at the ends   share of codes that are the smallest or the largest of the grid, of a sample of rows,
                  beside the share that rounding the reference's rows to nearest anew gives
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from lowbit.checkpoint.base import CanReadCodes
from lowbit.checkpoint.rows import row_slabs
from lowbit.diagnosis.pair import Pair

SLAB_WEIGHTS = 4_000_000
FACTOR = 1.4
ROW_FACTOR = 1.75
ROWS_SHARE = 0.01
# Rows with less than this share of the mean square of all are not judged.
FAINT = 1e-3
# A tensor of 16 bits differs from itself in another 16-bit type by less than this, relative to its norm.
ROUNDING = 2e-4
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class TensorFacts:
    """What was seen of one tensor; see the module.

    gain        None where the reference is all zero
    row_gains   float32: of rows that are off, one for each; rows: how many were judged
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
        """What the tensor, or those of its rows that are off, is multiplied with."""
        assert self.gain is not None, "asked of scaled tensors"
        if not 1 / FACTOR < self.gain < FACTOR or not len(self.row_gains):
            return self.gain
        return float(self.row_gains.median())


class _Sums:
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
    sums = _Sums()
    for start, stop in row_slabs(shape, SLAB_WEIGHTS):
        sums.add(
            torch.atleast_1d(pair.read(name, start, stop)), torch.atleast_1d(pair.read_original(name, start, stop))
        )
    pair.release(name)
    qr, rr = torch.cat(sums.rows, dim=1)
    judged = rr > FAINT * rr.mean() if len(shape) > 1 else torch.zeros(len(rr), dtype=torch.bool)
    gains = qr[judged] / rr[judged]
    off = (gains < 1 / ROW_FACTOR) | (gains > ROW_FACTOR)
    error = (sums.qq - 2 * sums.qr + sums.rr) / sums.rr if sums.rr > 0 else float(sums.qq > 0)
    return TensorFacts(
        name=name, role=pair.architecture.roles[name], block=pair.architecture.block_of(name), shape=shape,
        bits=pair.bits(name), quantized=pair.is_quantized(name), nonfinite=sums.nonfinite,
        zero=sums.qq == 0 and not sums.nonfinite, original_zero=sums.rr == 0, constant_rows=sums.constant_rows,
        gain=sums.qr / sums.rr if sums.rr > 0 else None, error=max(0.0, error), row_gains=gains[off],
        rows=int(judged.sum()),
    )  # fmt: skip


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
    """Of a sample of rows of an integer weight; None where its codes cannot be read."""
    from lowbit.numerics.grid import RangeSearch
    from lowbit.numerics.integer import IntGrid
    from lowbit.rounding.rtn import needs_tensor_range, round_to_nearest

    checkpoint = pair.quantized
    if not isinstance(checkpoint, CanReadCodes) or name not in checkpoint.schemes:
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
    fresh = round_to_nearest(pair.read_original(name, 0, rows), spec, grid, search)
    share, expected = (
        ((each.codes == grid.qmin) | (each.codes == grid.qmax)).float().mean().item() for each in (stored, fresh)
    )
    return Ends(name, share, expected)
