"""The range of an input that a static activation scale covers, chosen from a histogram of |x|.

A static scale maps the range r to the largest code, s = r / max, and values beyond r saturate. Three choices:

    minmax      r = max |x|
    percentile  r = the p-th percentile of |x|
    mse         r = argmin E[(x − s·Q(x / s))²], Q the nearest value of the grid, over r = max|x| · 2^(−j/16), j < 128

The histogram cuts every power of two into 16 equal parts, bin edges (1 + i/16) · 2^e, which are the top bits of a
float32: 64 octaves around 1 give 1024 counts, whatever the number of tokens. |x| beyond an end counts in the end bin.
Within a bin x is taken as evenly spread, and the error is integrated: with values v_0 < v_1 < … of a grid (the positive
half; it is symmetric) and m_i the middle of v_i and v_{i+1},

    F(t) = ∫₀ᵗ (u − Q(u))² du = Σ_{i<n} [(m_i − v_i)³ + (v_{i+1} − m_i)³] / 3 + (t − v_n)³ / 3,    v_n nearest to t

which also holds beyond the largest value, where n is the last and everything saturates. In float64.

A scale with a zero point covers low … high in 2^b − 1 equal steps s. `mse_ends` chooses both ends, each over the
extreme · 2^(−j/16), j < 128, by the least Σ s²/12 of the values inside + Σ (x − end)² of those beyond: inside, the
error is that of a value anywhere in its step.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lowbit.kernels import tables
from lowbit.schemes import Number

RangeMethod = Literal["minmax", "percentile", "mse"]
RANGE_METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "mse")

_PER_OCTAVE = 16
_FIRST_EXPONENT, _LAST_EXPONENT = -32, 32
BINS = (_LAST_EXPONENT - _FIRST_EXPONENT) * _PER_OCTAVE
_MANTISSA_BITS_LEFT_OUT = 23 - 4  # of float32; 2^4 bins an octave
_FIRST_CODE = (127 + _FIRST_EXPONENT) << 4
_CANDIDATES = 128


def histogram(x: Tensor) -> Tensor:
    """int64 [BINS]: how many |x| lie in each bin; x finite, of any shape."""
    bits = x.reshape(-1).float().abs().view(torch.int32)
    bins = (bits >> _MANTISSA_BITS_LEFT_OUT).sub_(_FIRST_CODE).clamp_(0, BINS - 1)
    return torch.bincount(bins, minlength=BINS)


def signed_histogram(x: Tensor) -> Tensor:
    """int64 [2, BINS]: |x| of the values below 0, and of the others; x finite, of any shape."""
    negative = x.reshape(-1) < 0
    return torch.stack([histogram(x.reshape(-1)[negative]), histogram(x.reshape(-1)[~negative])])


def bin_edges() -> Tensor:
    """float64 [BINS + 1]; the first is 0, since zeros are in the first bin."""
    octave = torch.arange(_FIRST_EXPONENT, _LAST_EXPONENT, dtype=torch.float64)
    part = 1 + torch.arange(_PER_OCTAVE, dtype=torch.float64) / _PER_OCTAVE
    edges = (torch.exp2(octave)[:, None] * part).reshape(-1)
    edges[0] = 0
    return torch.cat((edges, torch.tensor([2.0**_LAST_EXPONENT], dtype=torch.float64)))


def percentile_range(counts: Tensor, absmax: float, percentile: float) -> float:
    """The |x| that `percentile` percent of the values do not exceed, evenly spread within its bin; at most absmax."""
    cumulative = counts.cumsum(0).double()
    wanted = cumulative[-1] * percentile / 100
    index = int(torch.searchsorted(cumulative, wanted).clamp(max=BINS - 1))
    before = cumulative[index - 1] if index else cumulative.new_zeros(())
    share = (wanted - before) / counts[index].clamp(min=1)
    edges = bin_edges()
    return min(absmax, (edges[index] + share * (edges[index + 1] - edges[index])).item())


def mse_range(counts: Tensor, absmax: float, number: Number, bits: int) -> float:
    """The range with the least expected squared error; of equal ones the widest."""
    values, middles, prefix = _grid(number, bits)
    occupied = counts.nonzero().reshape(-1)
    low = bin_edges()[occupied].clamp(max=absmax)
    high = bin_edges()[occupied + 1].clamp(max=absmax)
    ranges = absmax * torch.exp2(-torch.arange(_CANDIDATES, dtype=torch.float64) / 16)
    scale = (ranges / values[-1])[:, None]
    integral = _integral(high / scale, values, middles, prefix) - _integral(low / scale, values, middles, prefix)
    width = (high - low).clamp(min=1e-300)
    errors = (integral * scale**3 / width * counts[occupied]).sum(dim=1)
    return ranges[int(errors.argmin())].item()


def mse_ends(counts: Tensor, low: float, high: float, bits: int) -> tuple[float, float]:
    """(low, high) of least expected squared error on 2^bits equal steps; of equal ones the widest.

    counts     int64 [2, BINS], as `signed_histogram` makes them
    low, high  extremes of the values, low ≤ 0 ≤ high, not both 0
    """
    kept = torch.exp2(-torch.arange(_CANDIDATES, dtype=torch.float64) / 16)
    sides = [_beyond(counts[side], extreme, extreme * kept) for side, extreme in ((0, -low), (1, high))]
    (below, inside_low), (above, inside_high) = sides
    step = (-low * kept[:, None] + high * kept[None, :]) / (2**bits - 1)
    errors = step**2 / 12 * (inside_low[:, None] + inside_high[None, :]) + below[:, None] + above[None, :]
    first, second = divmod(int(errors.argmin()), _CANDIDATES)
    return low * kept[first].item(), high * kept[second].item()


def _beyond(counts: Tensor, extreme: float, ends: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ (|x| − end)² of the values beyond each end, how many are not beyond it), float64 [ends]; values are spread
    evenly within their bins."""
    edges, counts = bin_edges().clamp(max=extreme), counts.double()
    low, high = edges[:-1], edges[1:]
    width = (high - low).clamp(min=1e-300)
    first = (low - ends[:, None]).clamp(min=0)  # [ends, BINS]
    last = (high - ends[:, None]).clamp(min=0)
    error = (last**3 - first**3) / (3 * width) * counts
    beyond = ((last - first) / width).clamp(max=1) * counts
    return error.sum(1), (counts - beyond).sum(1)


def _integral(t: Tensor, values: Tensor, middles: Tensor, prefix: Tensor) -> Tensor:
    """F(t) of the module docstring."""
    nearest = torch.searchsorted(middles, t)
    return prefix[nearest] + (t - values[nearest]) ** 3 / 3


@lru_cache
def _grid(number: Number, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values from 0 up, the middles between them, Σ of the first n cells), float64."""
    if number == "int":
        values = torch.arange(2 ** (bits - 1), dtype=torch.float64)
    else:
        fmt = tables.MINIFLOATS[number]
        values = tables.values(fmt)[: fmt.finite_magnitudes].double()
    middles = (values[1:] + values[:-1]) / 2
    cells = ((middles - values[:-1]) ** 3 + (values[1:] - middles) ** 3) / 3
    return values, middles, torch.cat((torch.zeros(1, dtype=torch.float64), cells.cumsum(0)))
