"""Histograms of weights before and after rounding, sampled during a run.

Each tensor is sampled by evenly spaced rows: about one weight in 32, at least 16 384 and at most about 32 768 weights,
which costs about a percent of rounding to nearest. Rows arrive in slabs, from several threads and in any order; samples
are kept in float32 until the last sampled row of their tensor arrives.

    reach = min(max |w|, 6 · rms(w))         63 equal bins over −reach … +reach; w beyond it falls into the outermost

Both histograms have the bins of the source, so that they share an axis.
"""

from __future__ import annotations

import base64
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lowbit.records import Count, NonNegative, Record
from lowbit.tensors import GroupParams, QuantizedTensor

BINS = 63  # odd, so that 0 lies in the middle of one
Counts = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{168}$")]  # 63 numbers of 2 bytes in base64
# Row numbers within a slab, int64 [m] → values of those rows, float [m, …].
RowReader = Callable[[Tensor], Tensor]
_SHARE, _LEAST, _MOST, _LEAST_ROWS = 32, 16_384, 32_768, 4
_REACH = 6.0


class WeightHistogram(Record):
    """Distribution of the values of one tensor, on an evenly spaced sample of its rows.

    reach    BINS equal bins span −reach … +reach; the first and the last include values beyond
    rows, values   of the sample
    source   little-endian uint16 [BINS], round(65535 · count / largest), in base64
    decoded  the same of the decoded codes; None if the tensor is not quantized
    largest  the count encoded as 65535
    """

    reach: NonNegative
    rows: Count
    values: Count
    largest: Count
    source: Counts
    decoded: Counts | None = None


@dataclass
class _Sample:
    """The sampled rows of one tensor so far, float32; wanted: number of rows to sample."""

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
        self, name: str, shape: tuple[int, ...], first: int, last: int, source: RowReader,
        decode: RowReader | None = None,
    ) -> None:  # fmt: skip
        """Rows first … last of a tensor.

        shape    of the whole tensor, [rows, …]
        source   reads rows of the source
        decode   reads the same rows of the output, decoded; None if the tensor is copied
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
        """Tensor → histogram, for completed tensors."""
        return self._done


def sampled_rows(rows: int, columns: int) -> list[int]:
    """The rows of a tensor [rows, columns] to sample: evenly spaced, off both ends."""
    weights = min(max(rows * columns // _SHARE, _LEAST), _MOST)
    count = min(rows, max(_LEAST_ROWS, weights // max(columns, 1)))
    return [(2 * index + 1) * rows // (2 * count) for index in range(count)]


def rows_decoder(quantized: QuantizedTensor) -> RowReader:
    """A reader that decodes only the requested rows, to float32 [m, K]."""

    def decode(chosen: Tensor) -> Tensor:
        params, columns = quantized.grouped()
        zero_point = None if params.zero_point is None else params.zero_point[chosen]
        table = None if params.table is None else params.table[chosen]
        part = GroupParams(params.scale[chosen], zero_point, params.global_scale, table)
        decoded = quantized.grid.decode(quantized.codes[chosen], part, columns)
        return decoded if quantized.outliers is None else quantized.outliers.rows(chosen).placed(decoded)

    return decode


def weight_histogram(source: Tensor, decoded: Tensor | None, rows: int) -> WeightHistogram:
    """The histogram of finite values float32 [n], n > 0, and of their decoded values."""
    values = source.numpy()
    absmax = float(max(values.max(), -values.min()))
    reach = min(absmax, _REACH * float(np.linalg.norm(values.astype(np.float64))) / math.sqrt(len(values))) or 1.0
    counts = [_count(each, reach) for each in (values, *(() if decoded is None else (decoded.numpy(),)))]
    largest = int(max(each.max() for each in counts))
    scaled = (np.rint(each * (65535 / max(largest, 1))).astype("<u2") for each in counts)
    coded = [base64.b64encode(each.tobytes()).decode() for each in scaled]
    return WeightHistogram(reach=reach, rows=rows, values=len(values), largest=largest, source=coded[0],
                           decoded=None if decoded is None else coded[1])  # fmt: skip


def _count(values: np.ndarray, reach: float) -> np.ndarray:
    """int64 [BINS]"""
    bins = values * np.float32(
        min(BINS / 2 / reach, float(np.finfo(np.float32).max))
    )  # finite for subnormal weights too
    bins += np.float32(BINS / 2)
    np.clip(bins, 0, BINS - 1, out=bins)
    return np.bincount(bins.astype(np.intp), minlength=BINS)
