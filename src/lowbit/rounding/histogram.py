"""Histograms of weights, before and after rounding, taken while a run has both at hand.

Of each tensor an evenly spaced subsample of rows is looked at: about one weight in 32, at least 4 096 and at most about
32 768 weights, so that taking them costs a percent or so of rounding to nearest. Rows arrive in slabs, from several
threads and in any order; what was sampled of a tensor is kept in float32 until its last sampled row is there.

    reach = min(max |w|, 6 · rms(w))         63 equal bins over −reach … +reach; w beyond it falls into the outermost

The bins are those of the source, so that both pictures share an axis.
"""

from __future__ import annotations

import base64
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lowbit.numerics.learned_codebook import LearnedCodebookGrid
from lowbit.tensors import GroupParams, QuantizedTensor

BINS = 63  # odd, so that 0 lies in the middle of one
# Row numbers within a slab, int64 [m] → values of those rows, float [m, …].
RowReader = Callable[[Tensor], Tensor]
_SHARE, _LEAST, _MOST, _LEAST_ROWS = 32, 16_384, 32_768, 4
_REACH = 6.0


@dataclass(frozen=True)
class WeightHistogram:
    """Of one tensor; the fields are those of the report's `Histogram`.

    source, decoded  base64 of little-endian uint16 [BINS], round(65535 · count / largest)
    """

    reach: float
    rows: int
    values: int
    largest: int
    source: str
    decoded: str | None


@dataclass
class _Sample:
    """What has been seen of one tensor: row → (source, decoded), float32 [K] each."""

    wanted: int
    source: list[Tensor] = field(default_factory=list)
    decoded: list[Tensor] = field(default_factory=list)
    rows: int = 0


class WeightHistograms:
    """Collects the histograms of a run; safe to call from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[str, _Sample] = {}
        self._done: dict[str, WeightHistogram] = {}

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        first: int,
        last: int,
        source: RowReader,
        decode: RowReader | None = None,
    ) -> None:
        """Rows first … last of a tensor.

        shape    of the whole tensor, [rows, …]
        source   rows of the source
        decode   the same rows of what is written, decoded; None where the tensor is copied
        """
        if not math.prod(shape):
            return
        chosen = sampled_rows(shape[0] if shape else 1, math.prod(shape[1:]))
        inside = [row - first for row in chosen if first <= row < last]
        if not inside:
            return
        here = torch.tensor(inside)
        read = source(here)
        if not read.dtype.is_floating_point:
            return
        values = read.float().flatten()
        decoded = None if decode is None else decode(here).float().flatten()
        with self._lock:
            sample = self._pending.setdefault(name, _Sample(len(chosen)))
            sample.rows += len(here)
            sample.source.append(values)
            if decoded is not None:
                sample.decoded.append(decoded)
            complete = sample.rows == sample.wanted
            if complete:
                del self._pending[name]
        if complete:
            made = weight_histogram(torch.cat(sample.source), torch.cat(sample.decoded) if sample.decoded else None,
                                    sample.rows)  # fmt: skip
            with self._lock:
                self._done[name] = made

    @property
    def done(self) -> dict[str, WeightHistogram]:
        """Tensor → histogram, of the tensors that were seen whole."""
        return self._done


def sampled_rows(rows: int, columns: int) -> list[int]:
    """The rows of a tensor [rows, columns] that are looked at: evenly spaced, off both ends."""
    weights = min(max(rows * columns // _SHARE, _LEAST), _MOST)
    count = min(rows, max(_LEAST_ROWS, weights // max(columns, 1)))
    return [(2 * index + 1) * rows // (2 * count) for index in range(count)]


def rows_decoder(quantized: QuantizedTensor) -> RowReader:
    """Decodes the rows that are asked for and no others, to float32 [m, K]."""

    def decode(chosen: Tensor) -> Tensor:
        params, columns = quantized.grouped()
        zero_point = None if params.zero_point is None else params.zero_point[chosen]
        grid = quantized.grid
        if isinstance(grid, LearnedCodebookGrid):  # a table per row
            grid = LearnedCodebookGrid(grid.table[chosen], grid.scale_format)
        part = GroupParams(params.scale[chosen], zero_point, params.global_scale)
        return grid.decode(quantized.codes[chosen], part, columns)

    return decode


def weight_histogram(source: Tensor, decoded: Tensor | None, rows: int) -> WeightHistogram:
    """Of finite values float32 [n], n > 0, and of what they became."""
    values = source.numpy()
    absmax = float(max(values.max(), -values.min()))
    reach = min(absmax, _REACH * float(np.linalg.norm(values)) / math.sqrt(len(values))) or 1.0
    counts = [_count(each, reach) for each in (values, *(() if decoded is None else (decoded.numpy(),)))]
    largest = int(max(each.max() for each in counts))
    coded = [_coded(each, largest) for each in counts]
    return WeightHistogram(reach, rows, len(values), largest, coded[0], None if decoded is None else coded[1])


def _count(values: np.ndarray, reach: float) -> np.ndarray:
    """int64 [BINS]"""
    bins = values * np.float32(BINS / 2 / reach)
    bins += np.float32(BINS / 2)
    np.clip(bins, 0, BINS - 1, out=bins)
    return np.bincount(bins.astype(np.intp), minlength=BINS)


def _coded(counts: np.ndarray, largest: int) -> str:
    return base64.b64encode(np.rint(counts * (65535 / max(largest, 1))).astype("<u2").tobytes()).decode()
