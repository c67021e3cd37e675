"""Grids that round one weight at a time: integers, minifloats, codebooks; and the search of their ranges.

    IntGrid        symmetric    x ≈ scale * codes                    codes in −2^(b−1) .. 2^(b−1)−1
                   asymmetric   x ≈ scale * (codes − zero_point)     the same signed codes; zero_point is one of them
    MinifloatGrid               x ≈ scale * value(codes)             bit patterns; ties to even; saturating, never inf
    CodebookGrid                x ≈ scale * values[code]             values within −1 .. 1, both of which occur

`fit` chooses the range of each group before rounding, by the method of its `RangeSearch`:

    absmax      [min w, max w]
    percentile  the given percentile of |w| (symmetric) or of w at both ends (asymmetric), per group
    mse         argmin over ranges of  Σ importance · (w − decode(round(w)))²
    wmse        argmin over ranges of  Σ importance · |w| · (w − decode(round(w)))²

A candidate range gives params, `error` judges them, the best of each group is kept. On a symmetric grid the candidates
shrink both ends together; on an asymmetric one they then move the low end alone and the high end alone, from the best
joint range. Ties keep the wider range. All-zero groups keep scale 1.

Integers whose zero point is a float, between codes, as HQQ finds it: x ≈ (code − zero) · scale, codes 0 .. 2^b − 1.

Decoding subtracts and multiplies in the dtype of the scales, rounding twice, as HQQ's own `Quantizer.dequantize` does:
the float32 values that come out are those of a 16-bit model. Fitting covers the range of a group, which need not hold
0; rounding is to the nearest code, ties to even. A group of equal weights gets the scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.kernels.tables import Codebook, MinifloatFormat
from lowbit.numerics.scales import SCALE_DTYPES, storable_scale
from lowbit.tensors import Grid, GroupParams, RangeSearch

# Candidates are judged together up to so many weights: enough for one call to be worth it, few enough for caches.
_CANDIDATE_WEIGHTS = 1 << 19
# On minifloats and codebooks a *larger* scale can be better too: mapping the largest weight of an E2M1 group to 4
# instead of 6 closes the wide gap between 4 and 6 (Cook et al. 2025, "Four Over Six").
_LARGEST_RATIO = 1.5


class SearchedGrid:
    """What the grids of this file share."""

    @property
    def columns_per_code(self) -> int:
        return 1

    @property
    def signs(self) -> tuple[float, ...]:
        return (1.0,)

    def fit(
        self: Grid, weight: Tensor, group_size: int, search: RangeSearch, importance: Tensor | None = None,
        global_scale: float | Tensor = 1.0,
    ) -> GroupParams:  # fmt: skip
        """global_scale: of two levels; of scales in steps of each row (qoq) those, [N, 1]"""
        if search.method == "percentile":
            low, high = _percentile_range(weight, group_size, search.percentile, self.symmetric)
            return self.params_from_range(low, high, global_scale)
        low, high = kernels.group_range(weight, group_size)
        if search.method == "absmax":
            return self.params_from_range(low, high, global_scale)
        best = _Best(self, weight, group_size, importance, search.method == "wmse", global_scale, low, high)
        ratios = self.clip_ratios(search)
        best.try_ratios([(ratio, ratio, sign) for sign in self.signs for ratio in ratios])
        if not self.symmetric:
            best.try_ratios([(ratio, 1.0, 1.0) for ratio in ratios[::2]])
            best.try_ratios([(1.0, ratio, 1.0) for ratio in ratios[::2]])
        return best.params

    def clip_ratios(self, search: RangeSearch) -> list[float]:
        """Fine steps from 1 down."""
        step = (1.0 - search.smallest) / search.steps
        return [1.0 - step * index for index in range(1, search.steps + 1)]


class DecodedError:
    """The error of grids that have no kernel for it."""

    def error(
        self: Grid, weight: Tensor, params: GroupParams, group_size: int, importance: Tensor | None = None,
        by_magnitude: bool = False,
    ) -> Tensor:  # fmt: skip
        weight = weight.float()
        squares = (weight - self.decode(self.round(weight, params, group_size), params, group_size)).square()
        squares = squares if importance is None else squares * importance
        return grouped(squares * weight.abs() if by_magnitude else squares, group_size).sum(dim=2)


def grouped(values: Tensor, group_size: int) -> Tensor:
    """[N, K] → [N, G, g], the last group filled up with zeros."""
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % group_size))
    return padded.reshape(rows, -1, group_size).contiguous()


@dataclass(frozen=True)
class IntGrid(SearchedGrid):
    """Integers of 2 to 8 bits.

    The scale that covers a symmetric range spreads all 2^b codes over it: absmax / ((2^b − 1) / 2), so for 4 bits the
    largest weight sits at 7.5 and rounds to a code half a step away. (absmax / 7 would represent one weight exactly and
    waste the code −8.) This is also what compressed-tensors' observer does. An asymmetric range is widened to include
    zero, so that 0.0 is representable.

    narrow             no code −2^(b−1), and the scale absmax / (2^(b−1) − 1), as LLM.int8() has it
    lowest_zero_point  where a file cannot store the lowest codes as zero points (GPTQ v1): ranges that would need one
                       are widened downwards, by as many steps
    signed_scales      of symmetric grids: a search tries negative scales too. There is one code more below zero than
                       above, so the sign chooses the side of a group that gets it (AutoRound, ggml's Q4_0)
    """

    bits: int
    symmetric: bool = True
    scale_format: str = "bfloat16"
    narrow: bool = False
    lowest_zero_point: int | None = None
    signed_scales: bool = False

    @property
    def signs(self) -> tuple[float, ...]:
        return (1.0, -1.0) if self.signed_scales else (1.0,)

    @property
    def name(self) -> str:
        return f"int{self.bits}" + ("" if self.symmetric else "_asym") + ("_narrow" if self.narrow else "")

    @property
    def qmin(self) -> int:
        return -self.qmax if self.narrow else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def params_from_range(self, low: Tensor, high: Tensor, global_scale: float | Tensor = 1.0) -> GroupParams:
        steps = self.qmax - self.qmin
        if self.symmetric:
            covering = torch.maximum(-low, high) * (2.0 / steps)
            scale = storable_scale(covering, self.scale_format, global_scale)
            return GroupParams(scale, global_scale=_second_level(global_scale))
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        lowest = self.qmin if self.lowest_zero_point is None else self.lowest_zero_point
        below = lowest - self.qmin  # steps that the range must reach below zero
        low = torch.minimum(low, -high * (below / (steps - below)))
        scale = storable_scale((high - low) / steps, self.scale_format, global_scale)
        zero_point = (self.qmin - torch.round(low / scale)).clamp(lowest, self.qmax)
        return GroupParams(scale, zero_point.to(torch.int32), _second_level(global_scale))

    def round(self, weight: Tensor, params: GroupParams, group_size: int) -> Tensor:
        return kernels.round_int(weight, group_size, params.scale, params.zero_point, self.qmin, self.qmax)

    def decode(self, codes: Tensor, params: GroupParams, group_size: int) -> Tensor:
        return kernels.decode_int(codes, group_size, params.scale, params.zero_point)

    def error(
        self, weight: Tensor, params: GroupParams, group_size: int, importance: Tensor | None = None,
        by_magnitude: bool = False,
    ) -> Tensor:  # fmt: skip
        return kernels.error_int(
            weight, group_size, params.scale, params.zero_point, self.qmin, self.qmax, importance, by_magnitude
        )


class _TableGrid(SearchedGrid):
    """What grids share whose codes stand for the values of a `format`."""

    format: MinifloatFormat | Codebook
    symmetric = True

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def bits(self) -> int:
        return self.format.bits

    def clip_ratios(self, search: RangeSearch) -> list[float]:
        step = (_LARGEST_RATIO - search.smallest) / search.steps
        return [_LARGEST_RATIO - step * index for index in range(search.steps + 1)]

    def decode(self, codes: Tensor, params: GroupParams, group_size: int) -> Tensor:
        return kernels.decode_table(codes, group_size, params.scale, self.format)


@dataclass(frozen=True)
class MinifloatGrid(_TableGrid):
    """FP8 E4M3 and E5M2, FP4 E2M1, with any scale format.

    The scale that covers a range is absmax / max_value. With power-of-two scales (MX) that is rounded up, so nothing
    saturates; the OCP specification's rule, 2^(floor(log2 absmax) − emax), is one power of two lower for some groups
    and clips up to a quarter of their range: a search ("mse") tries both and keeps the better for each group.
    """

    format: MinifloatFormat
    scale_format: str = "bfloat16"

    def params_from_range(self, low: Tensor, high: Tensor, global_scale: float | Tensor = 1.0) -> GroupParams:
        covering = torch.maximum(-low, high) / self.format.max_value
        scale = storable_scale(covering, self.scale_format, global_scale)
        return GroupParams(scale, global_scale=_second_level(global_scale))

    def clip_ratios(self, search: RangeSearch) -> list[float]:
        """A power-of-two scale has one neighbour worth trying."""
        return [0.5] if self.scale_format == "e8m0" else super().clip_ratios(search)

    def round(self, weight: Tensor, params: GroupParams, group_size: int) -> Tensor:
        return kernels.round_minifloat(weight, group_size, params.scale, self.format)

    def error(
        self, weight: Tensor, params: GroupParams, group_size: int, importance: Tensor | None = None,
        by_magnitude: bool = False,
    ) -> Tensor:  # fmt: skip
        return kernels.error_minifloat(weight, group_size, params.scale, self.format, importance, by_magnitude)


@dataclass(frozen=True)
class CodebookGrid(_TableGrid):
    """NF4 and FP4. "nested" scales are fitted as float32; `scales.quantize_scales` quantizes them afterwards.

    Rounding is bitsandbytes': w · (1 / scale), the reciprocal rounded to float32 first, then the nearest value; halfway
    between two, the smaller one. FP4 has two zeros: −0.0026 .. 0 becomes code 0 and what lies just above 0 becomes code
    8, as bitsandbytes has it on the CPU; both decode to 0.
    """

    format: Codebook
    scale_format: str = "float32"

    def params_from_range(self, low: Tensor, high: Tensor, global_scale: float | Tensor = 1.0) -> GroupParams:
        stored_as = "float32" if self.scale_format == "nested" else self.scale_format
        scale = storable_scale(torch.maximum(-low, high), stored_as, global_scale)
        return GroupParams(scale, global_scale=_second_level(global_scale))

    def round(self, weight: Tensor, params: GroupParams, group_size: int) -> Tensor:
        return kernels.round_codebook(weight, group_size, params.scale, self.format)

    def error(
        self, weight: Tensor, params: GroupParams, group_size: int, importance: Tensor | None = None,
        by_magnitude: bool = False,
    ) -> Tensor:  # fmt: skip
        return kernels.error_codebook(weight, group_size, params.scale, self.format, importance, by_magnitude)


def _second_level(global_scale: float | Tensor) -> float:
    """What scales are stored below; steps of rows are a part of them."""
    return 1.0 if isinstance(global_scale, Tensor) else global_scale


class _Best:
    """The best range of every group so far."""

    def __init__(
        self, grid: Grid, weight: Tensor, group_size: int, importance: Tensor | None, by_magnitude: bool,
        global_scale: float | Tensor, low: Tensor, high: Tensor,
    ):  # fmt: skip
        self.grid, self.global_scale, self.weight = grid, global_scale, weight
        self.error_of = lambda rows, params: grid.error(rows, params, group_size, importance, by_magnitude)
        self.low, self.high = low, high
        self.params = grid.params_from_range(low, high, global_scale)
        self.error = self.error_of(weight, self.params)

    def try_ratios(self, ratios: list[tuple[float, float, float]]) -> None:
        """Try (low ratio, high ratio) of the range that was best when this began, with a sign of the scale."""
        base = (self.low, self.high)
        at_once = max(1, _CANDIDATE_WEIGHTS // max(1, self.weight.numel()))
        for first in range(0, len(ratios), at_once):
            self._try(base, ratios[first : first + at_once])

    def _try(self, base: tuple[Tensor, Tensor], ratios: list[tuple[float, float, float]]) -> None:
        """Several candidates in one pass: their rows stand below each other."""
        count, rows = len(ratios), self.low.shape[0]
        lows, highs, signs = torch.tensor(ratios, dtype=torch.float32, device=base[0].device).T[..., None, None]
        low, high = (base[0] * lows).flatten(0, 1), (base[1] * highs).flatten(0, 1)
        above = self.global_scale
        params = self.grid.params_from_range(low, high, above.repeat(count, 1) if isinstance(above, Tensor) else above)
        if any(sign < 0 for _, _, sign in ratios):
            params = GroupParams((params.scale.unflatten(0, (count, rows)) * signs).flatten(0, 1),
                                 global_scale=params.global_scale)  # fmt: skip
        error = self.error_of(self.weight.repeat(count, 1) if count > 1 else self.weight, params)
        error, chosen = error.reshape(count, rows, -1).min(dim=0)  # of equals the first, which is the widest
        better = error < self.error

        def merged(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(better, new.reshape(count, rows, -1).gather(0, chosen[None])[0], old)

        self.error = torch.where(better, error, self.error)
        if not self.grid.symmetric:  # the ends are then tried apart
            self.low, self.high = merged(low, self.low), merged(high, self.high)
        zero_point = params.zero_point
        if zero_point is not None and self.params.zero_point is not None:
            zero_point = merged(zero_point, self.params.zero_point)
        self.params = GroupParams(merged(params.scale, self.params.scale), zero_point, self.params.global_scale)


def _percentile_range(weight: Tensor, group_size: int, percentile: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Low and high [N, G]."""
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    fraction = percentile / 100.0
    lows, highs = [], []
    for group in range(groups):
        values = weight[:, group * group_size : (group + 1) * group_size].to(torch.float32)
        if symmetric:
            high = torch.quantile(values.abs(), fraction, dim=1)
            low = -high
        else:
            low, high = torch.quantile(values, 1.0 - fraction, dim=1), torch.quantile(values, fraction, dim=1)
        lows.append(low)
        highs.append(high)
    return torch.stack(lows, dim=1).reshape(rows, groups), torch.stack(highs, dim=1).reshape(rows, groups)


@dataclass(frozen=True)
class FloatZeroGrid(DecodedError, SearchedGrid):
    """codes uint8. `GroupParams.zero_point` is float32. dtype: of the arithmetic, and of stored scales and zeros"""

    bits: int
    dtype: str = "bfloat16"
    symmetric = False

    @property
    def name(self) -> str:
        return f"int{self.bits}_float_zero"

    def params_from_range(self, low: Tensor, high: Tensor, global_scale: float | Tensor = 1.0) -> GroupParams:
        scale = ((high - low) / ((1 << self.bits) - 1)).to(self._torch_dtype).float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return GroupParams(scale, (-low / scale).to(self._torch_dtype).float())

    def round(self, weight: Tensor, params: GroupParams, group_size: int) -> Tensor:
        scale, zero = (_per_column(each, weight.shape[1], group_size) for each in (params.scale, params.zero_point))
        return (weight.float() / scale + zero).round().clamp(0, (1 << self.bits) - 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams, group_size: int) -> Tensor:
        dtype, columns = self._torch_dtype, codes.shape[1]
        scale, zero = (_per_column(each, columns, group_size).to(dtype) for each in (params.scale, params.zero_point))
        return ((codes.to(dtype) - zero) * scale).float()

    @property
    def _torch_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.dtype]


def _per_column(values: Tensor | None, columns: int, group_size: int) -> Tensor:
    """[N, G] → [N, columns]"""
    assert values is not None, "a grid with zero points"
    return values.repeat_interleave(group_size, dim=1)[:, :columns]
