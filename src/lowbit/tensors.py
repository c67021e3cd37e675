"""The types that stages pass to each other: grids, quantized tensors, layer statistics.

    x ≈ scale * (codes - zero_point)                      integer grids
    x ≈ scale * value(codes)                              minifloat and codebook grids
    x ≈ scale * table[codes]                              grids with fitted tables (k-means, logarithmic)
    with scale = scale * global_scale for two-level grids (NVFP4)

Shapes: N = out_features, K = in_features, g = group size, G = ceil(K / g) groups. Weights are [N, K] row-major, as in
`torch.nn.Linear`. Codes are *logical and unpacked*: rounding chooses them, exporters pack them, the evaluator decodes
them; only the modules of a format know its bit order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Granularity(StrEnum):
    """Which weights share one scale. The shape is that of `scale` for a weight [N, K]."""

    TENSOR = "tensor"  # [1, 1]
    CHANNEL = "channel"  # [N, 1]: one per output row
    GROUP = "group"  # [N, G]: g consecutive columns of one row
    BLOCK = "block"  # [ceil(N / g), ceil(K / g)]: a g × g square

    def scale_shape(self, rows: int, columns: int, group_size: int) -> tuple[int, int]:
        """Shape of `scale` for a weight [rows, columns]; a group size of 0 is that of a row without columns."""
        groups = -(-columns // max(1, group_size))
        if self is Granularity.TENSOR:
            return (1, 1)
        if self is Granularity.CHANNEL:
            return (rows, 1)
        if self is Granularity.GROUP:
            return (rows, groups)
        return (-(-rows // group_size), groups)


@dataclass(frozen=True)
class InputRange:
    """What a static activation scale covers: low ≤ x ≤ high, with 0 between them. A symmetric scale covers ±absmax."""

    low: float
    high: float

    @classmethod
    def within(cls, absmax: float) -> InputRange:
        """−absmax … absmax."""
        return cls(-absmax, absmax)

    @property
    def absmax(self) -> float:
        return max(-self.low, self.high)

    def affine(self, bits: int) -> tuple[float, int]:
        """(scale, zero point, a signed code) of an integer grid over the range: x ≈ scale · (code − zero point)."""
        least, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = (self.high - self.low) / (largest - least)
        return scale, self.zero_point(scale, bits)

    def zero_point(self, scale: float, bits: int) -> int:
        """The code of 0 with a scale as it is stored: rint(least code − low / scale), ties to even."""
        least = -(2 ** (bits - 1))
        return min(max(round(least - self.low / scale), least), -least - 1)


@dataclass(frozen=True)
class GroupParams:
    """Scale and zero point of every row and group.

    scale        float32 [N, G]   > 0; multiplies on decode; already rounded to a value that the format stores
    zero_point   int32 [N, G]     code that decodes to exactly 0; None on symmetric and minifloat grids; float32, and
                                  between codes, on HQQ's
    global_scale float            second level: scale [N, G] is stored as (scale / global_scale); 1 where there is none
    table        float32 [N, G, 2^b]   value of every code at scale 1, of grids that fit it; else None
    """

    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: float = 1.0
    table: Tensor | None = None


RangeMethod = Literal["absmax", "mse", "wmse", "percentile"]


@dataclass(frozen=True)
class RangeSearch:
    """How the range of a group is chosen before rounding.

    absmax      the range just covers the group
    mse         the range of smallest squared error, over `steps` ratios down to `smallest`; on asymmetric grids both
                ends are searched
    wmse        the same with each squared error weighed by |w|: a plain mse clips the largest weights, which are few
                but matter most, since they tend to meet the largest activations (llama.cpp's encoders weigh likewise)
    percentile  clip to this percentile of |w| within the group (of w, both ends, on asymmetric grids)
    """

    method: RangeMethod = "absmax"
    steps: int = 48
    smallest: float = 0.35
    percentile: float = 99.9


class Grid(Protocol):
    """One number format, as seen by the algorithms that round to it. Implementations are frozen dataclasses: equal
    settings compare equal.

    A grid can do three things, always on a weight [N, K] cut along K into groups of g columns (the last may be short):

        fit     weights → GroupParams      the scale (and zero point) of each row and group
        round   weights, params → codes    nearest code; ties to even unless the format says otherwise
        decode  codes, params → weights    float32

    `round` takes any slice of columns with the params of those columns, so error feedback (GPTQ) can round the next
    `columns_per_code` columns, correct the rest, and go on. Fitting is separate from rounding, so an algorithm can fit
    the weights it has already compensated. Everything else about a format (bit order, file layout) belongs to the
    exporters.

    Degenerate groups: an all-zero group gets scale 1 and the code of zero. NaN and inf are the caller's to refuse:
    `fit` and `round` are undefined on them.
    """

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> int:
        """Bits of one stored code."""
        ...

    @property
    def symmetric(self) -> bool:
        """True where no zero point is stored."""
        ...

    @property
    def columns_per_code(self) -> int:
        """1 for scalar grids; 4 or 8 for vector codebooks."""
        ...

    def params_from_range(self, low: Tensor, high: Tensor, global_scale: float | Tensor = 1.0) -> GroupParams:
        """The params that just cover [low, high]; float32 tensors of any one shape."""
        ...

    def fit(
        self,
        weight: Tensor,
        group_size: int,
        search: RangeSearch,
        importance: Tensor | None = None,
        global_scale: float | Tensor = 1.0,
    ) -> GroupParams:
        """Params of each row and group of weight [N, K]; importance float32 [K] weighs the squared errors."""
        ...

    @property
    def signs(self) -> tuple[float, ...]:
        """Of the scales that a range search tries: 1.0, or 1.0 and −1.0."""
        ...

    def clip_ratios(self, search: RangeSearch) -> list[float]:
        """What a range search multiplies the range with, widest first."""
        ...

    def error(
        self,
        weight: Tensor,
        params: GroupParams,
        group_size: int,
        importance: Tensor | None = None,
        by_magnitude: bool = False,
    ) -> Tensor:
        """Σ importance · (w − decode(round(w)))² of each group, times |w| if `by_magnitude`; float32 [N, G]."""
        ...

    def round(self, weight: Tensor, params: GroupParams, group_size: int) -> Tensor:
        """Codes [N, K] of weight [N, K] (float32, bfloat16 or float16; computed in float32)."""
        ...

    def decode(self, codes: Tensor, params: GroupParams, group_size: int) -> Tensor:
        """Float32 [N, K]."""
        ...


@dataclass(frozen=True)
class NestedScale:
    """Scales that are themselves codes: scale = table[codes] · absmax[block] + offset (QLoRA's double quantization).

    codes   uint8 [N, G]     in row-major order cut into blocks of `block` scales, which may cross rows
    absmax  float32 [blocks] of these rows
    offset  float            the mean scale of the whole tensor
    """

    codes: Tensor
    absmax: Tensor
    offset: float
    block: int = 256


@dataclass(frozen=True)
class SparseOutliers:
    """Weights that are kept in 16 bits and take the place of what their codes decode to, n in every row.

    columns  int64 [N, n]     ascending, each once
    values   float32 [N, n]   each of them a float16
    """

    columns: Tensor
    values: Tensor

    def placed(self, decoded: Tensor) -> Tensor:
        """`decoded` float32 [N, K] with these in their places; the argument is not changed."""
        return decoded.scatter(1, self.columns, self.values)

    def rows(self, chosen: Tensor | slice) -> SparseOutliers:
        return SparseOutliers(self.columns[chosen], self.values[chosen])


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight after rounding: logical, unpacked, on a named grid.

    codes        int8 or uint8 [N, K]   within the grid's range; minifloats: the bit pattern
    scale        float32, shape by granularity   the *effective* scale: what codes are multiplied with
    zero_point   int32, shape of scale   None on symmetric grids; float32 on HQQ's
    global_scale float   two-level grids store scale / global_scale; a power of two when we made it, so both the
                         multiplier (ModelOpt) and the divisor (compressed-tensors) are exact
    group_size   g; K where one scale spans the row
    g_idx        int32 [K]   the group of every column, where it is not column // g (GPTQ with activation order)
    nested       how the scales themselves are quantized, where they are (bitsandbytes' double quantization)
    table        float32 [N, G, 2^b]   see `GroupParams`
    outliers     what stands beside the codes in 16 bits; None where nothing does
    """

    codes: Tensor
    scale: Tensor
    grid: Grid
    granularity: Granularity
    group_size: int
    zero_point: Tensor | None = None
    global_scale: float = 1.0
    g_idx: Tensor | None = None
    nested: NestedScale | None = None
    table: Tensor | None = None
    outliers: SparseOutliers | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def params(self) -> GroupParams:
        """The scale and zero point of every row and group, [N, G], whatever the granularity."""
        return GroupParams(
            scale=self._per_row_and_group(self.scale),
            zero_point=None if self.zero_point is None else self._per_row_and_group(self.zero_point),
            global_scale=self.global_scale,
            table=self.table,
        )

    def decode(self) -> Tensor:
        """The weights that the codes and the outliers stand for, float32 [N, K]."""
        decoded = self.grid.decode(self.codes, *self.grouped())
        return decoded if self.outliers is None else self.outliers.placed(decoded)

    def grouped(self) -> tuple[GroupParams, int]:
        """(params, g): the params of every g consecutive columns of every row, as kernels take them.

        Every column is a group of its own where groups are not of consecutive columns (g_idx).
        """
        params = self.params()
        if self.g_idx is None:
            return params, self.columns_per_scale
        columns = self.g_idx.long()
        zero_point = None if params.zero_point is None else params.zero_point[:, columns]
        return GroupParams(params.scale[:, columns], zero_point, params.global_scale), 1

    def to(self, device) -> QuantizedTensor:
        moved = {name: getattr(self, name).to(device) for name in ("codes", "scale")}
        for name in ("zero_point", "g_idx", "table"):
            if getattr(self, name) is not None:
                moved[name] = getattr(self, name).to(device)
        outliers = self.outliers
        if outliers is not None:
            outliers = SparseOutliers(outliers.columns.to(device), outliers.values.to(device))
        return replace(self, **moved, outliers=outliers)

    @property
    def columns_per_scale(self) -> int:
        """Consecutive columns of a row that one entry of `params()` is for."""
        spans_row = self.granularity in (Granularity.TENSOR, Granularity.CHANNEL)
        return self.codes.shape[1] if spans_row else self.group_size

    def _per_row_and_group(self, values: Tensor) -> Tensor:
        rows = self.codes.shape[0]
        if self.granularity is Granularity.TENSOR:
            return values.expand(rows, 1)
        if self.granularity is Granularity.BLOCK:
            return values.repeat_interleave(self.group_size, dim=0)[:rows]
        return values


@dataclass(frozen=True)
class LayerStats:
    """Calibration statistics of one input, which several linears may share (q, k and v).

    tokens    number of input vectors
    absmax    float32 [K]      largest |x| per channel
    mean_sq   float32 [K]      mean x² per channel = diag(H) / tokens; the imatrix
    mean_abs  float32 [K]      mean |x| per channel
    hessian   float32 [K, K]   Σ x xᵀ; None if only the diagonal is needed
    drift     float32 [K, K]   C (H + λ)⁻¹, C = Σ (x₀ − x) xᵀ: predicts x₀ − x from x, where x₀ is the same input in the
                               unquantized model; None if that model was not run
    lost      float32 [N, K]   the same for C = Σ (r₀ − r) xᵀ, r the residual stream that the output is added to:
                               predicts r₀ − r from x; None where the output is not added to a stream
    mean      float32 [K]      mean x per channel, for bias correction; None otherwise
    weighted  linear → for each group of its output rows, these statistics with the `hessian` of tokens that are weighed
              by the gradient of the loss (`calibrate.gradients`); empty where every token counts alike
    """

    tokens: int
    absmax: Tensor
    mean_sq: Tensor
    mean_abs: Tensor
    hessian: Tensor | None = None
    drift: Tensor | None = None
    lost: Tensor | None = None
    mean: Tensor | None = None
    weighted: Mapping[str, tuple[LayerStats, ...]] = field(default_factory=dict)
