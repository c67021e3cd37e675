"""Round to nearest (RTN): the baseline every other algorithm has to beat.

    scale, zero_point = fit(range of each group)      codes = clamp(rint(w / scale) + zero_point)

No calibration. Works on any slab of whole rows: rows are independent, unless one scale (or the upper of two levels)
spans the tensor; then the caller measures its range first and passes it in. With double quantization the scales are
quantized first and codes fitted to the decoded scales; slabs must begin where a block of scales does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.numerics.scales import decode_scales, global_scale_for, quantize_scales, row_steps
from lowbit.schemes import WeightSpec
from lowbit.tensors import Granularity, Grid, GroupParams, NestedScale, QuantizedTensor, RangeSearch, SparseOutliers


@dataclass(frozen=True)
class TensorRange:
    """Smallest and largest weight of a whole tensor (of a whole fused set, for two-level scales).

    absmax_sum   Σ of the groups' largest |w|, in float64, whose mean double quantization needs, per tensor: do not join
                 fused sets for it
    groups       number of groups that are not all zero
                 of ternary weights: Σ |w|, and the number of weights
    """

    low: float
    high: float
    absmax_sum: float = 0.0
    groups: int = 0

    def joined(self, other: TensorRange) -> TensorRange:
        return TensorRange(
            min(self.low, other.low), max(self.high, other.high),
            self.absmax_sum + other.absmax_sum, self.groups + other.groups,
        )  # fmt: skip

    @property
    def mean_absmax(self) -> float:
        """Mean over the groups that are not all zero; 1 without any."""
        if self.groups == 0 and (self.low != 0 or self.high != 0):
            raise AssertionError("double quantization needs a range that was measured for it")
        return self.absmax_sum / self.groups if self.groups else 1.0


def measure_range(weight: Tensor, spec: WeightSpec | None = None) -> TensorRange:
    """Range of a slab [rows, K], with the mean over groups if `spec` needs it; keeps NaN and inf."""
    nested = spec is not None and spec.scale_format == "nested"
    if spec is not None and spec.number == "ternary":
        magnitude = weight.float().abs()
        largest = magnitude.max().item()
        return TensorRange(-largest, largest, magnitude.sum(dtype=torch.float64).item(), weight.numel())
    columns = weight.shape[1]
    low, high = kernels.group_range(weight, spec.columns_per_scale(columns) if spec is not None and nested else columns)
    found = TensorRange(low.min().item(), high.max().item())
    if not nested:
        return found
    absmax = torch.maximum(-low, high)
    return replace(found, absmax_sum=absmax.sum(dtype=torch.float64).item(), groups=int((absmax != 0).sum()))


def needs_tensor_range(weight: WeightSpec) -> bool:
    """True if rounding a slab needs the range of the whole tensor."""
    return (
        weight.two_level or weight.ranged or weight.granularity is Granularity.TENSOR or weight.scale_format == "nested"
    )


def round_to_nearest(
    weight: Tensor, spec: WeightSpec, grid: Grid, search: RangeSearch, tensor_range: TensorRange | None = None,
    importance: Tensor | None = None,
) -> QuantizedTensor:  # fmt: skip
    """Quantize rows of a weight; arguments as of `fit_weight`."""
    return fit_weight(weight, spec, grid, search, tensor_range, importance).round(weight)


@dataclass(frozen=True)
class Fitted:
    """A `QuantizedTensor` without its codes; scale and zero_point have the shape of the granularity."""

    scale: Tensor
    grid: Grid
    granularity: Granularity
    group_size: int
    zero_point: Tensor | None = None
    global_scale: float = 1.0
    nested: NestedScale | None = None
    table: Tensor | None = None
    outliers: SparseOutliers | None = None

    @classmethod
    def of(cls, stored: QuantizedTensor) -> Fitted:
        """The scales of a weight that was rounded before."""
        return cls(stored.scale, stored.grid, stored.granularity, stored.group_size, stored.zero_point,
                   stored.global_scale, stored.nested)  # fmt: skip

    def with_codes(self, codes: Tensor) -> QuantizedTensor:
        return QuantizedTensor(
            codes, self.scale, self.grid, self.granularity, self.group_size, self.zero_point, self.global_scale,
            nested=self.nested, table=self.table, outliers=self.outliers,
        )  # fmt: skip

    def grouped(self, weight: Tensor) -> tuple[GroupParams, int]:
        """(params [N, G] of the rows of `weight` [N, K], columns per group)."""
        return self.with_codes(weight).grouped()

    def round(self, weight: Tensor) -> QuantizedTensor:
        """The nearest codes of a weight [N, K], given these scales; its own values where outliers are kept."""
        codes = self.grid.round(weight, *self.grouped(weight))
        if self.outliers is None:
            return self.with_codes(codes)
        return self.keeping(weight).with_codes(codes)

    def keeping(self, weight: Tensor) -> Fitted:
        """With the outliers' values taken from a weight [N, K]."""
        assert self.outliers is not None
        kept = self.grid.storable(weight.gather(1, self.outliers.columns).float())  # type: ignore[attr-defined]
        return replace(self, outliers=replace(self.outliers, values=kept))


def fit_weight(
    weight: Tensor, spec: WeightSpec, grid: Grid, search: RangeSearch, tensor_range: TensorRange | None = None,
    importance: Tensor | None = None,
) -> Fitted:  # fmt: skip
    """Scales of rows of a weight.

    weight        float32, bfloat16 or float16 [rows, K]; rows divide by the block for BLOCK, but for the last slab
    tensor_range  of the whole tensor, if `needs_tensor_range`
    importance    float32 [K], weighs squared errors in an "mse" search

    BLOCK and TENSOR ranges are always absmax: their only scale format here is FP8, whose relative precision hardly
    depends on the scale; of ternary weights the mean |w|, whose multiples by −1, 0 and 1 they become.
    """
    group_size = spec.columns_per_scale(weight.shape[1])
    if spec.is_fitted:
        return _fit_tables(weight, spec, grid, search, importance)
    if spec.granularity is Granularity.TENSOR:
        known = _known(tensor_range)
        ends = (-known.mean_absmax, known.mean_absmax) if spec.number == "ternary" else (known.low, known.high)
        low, high = (torch.tensor([[end]], dtype=torch.float32, device=weight.device) for end in ends)
        return Fitted(grid.params_from_range(low, high).scale, grid, spec.granularity, group_size)
    if spec.granularity is Granularity.BLOCK:
        return Fitted(_block_scale(grid, weight, group_size), grid, spec.granularity, group_size)
    global_scale = _global_scale(grid, _known(tensor_range)) if spec.two_level else 1.0
    if spec.scale_format == "qoq":
        params = grid.fit(weight, group_size, search, importance, row_steps(weight.float().abs().amax(1, keepdim=True)))
    else:
        params = grid.fit(weight, group_size, search, importance, global_scale)
    nested = None
    if spec.scale_format == "nested":
        low, high = kernels.group_range(weight, group_size)
        mean = _known(tensor_range).mean_absmax
        nested = quantize_scales(params.scale, mean, unused=(low == 0) & (high == 0))
        params = GroupParams(decode_scales(nested))
    if spec.ranged:
        global_scale = _range_over_fp8(grid, _known(tensor_range))
    return Fitted(params.scale, grid, spec.granularity, group_size, params.zero_point, global_scale, nested)


def _fit_tables(weight: Tensor, spec: WeightSpec, grid: Grid, search: RangeSearch, importance: Tensor | None) -> Fitted:
    """Tables and scales; outliers are chosen first, and the tables do not see them."""
    rows, columns = weight.shape
    count, outliers = spec.outliers_per_row(columns), None
    if count:
        cost = weight.float().square() if importance is None else weight.float().square() * importance
        chosen = cost.topk(min(count, columns), dim=1).indices.sort(dim=1).values
        seen = torch.ones_like(cost) if importance is None else importance.expand(rows, columns)
        importance = seen.scatter(1, chosen, 0.0)
        outliers = SparseOutliers(chosen, torch.zeros_like(chosen, dtype=torch.float32))
    group_size = spec.columns_per_scale(columns)
    params = grid.fit(weight, group_size, search, importance)
    fitted = Fitted(params.scale, grid, spec.granularity, group_size, table=params.table, outliers=outliers)
    return fitted if outliers is None else fitted.keeping(weight)


def _known(tensor_range: TensorRange | None) -> TensorRange:
    if tensor_range is None:
        raise AssertionError("this scheme needs the range of the whole tensor")
    return tensor_range


def _global_scale(grid: Grid, tensor_range: TensorRange) -> float:
    """Second level of a two-level grid: brings the largest group scale within the first level's range."""
    largest = max(-tensor_range.low, tensor_range.high)
    return global_scale_for(largest / grid.format.max_value)  # type: ignore[attr-defined]


def _range_over_fp8(grid: Grid, tensor_range: TensorRange) -> float:
    """A power of two by which no decoded integer is above 448; the lowest code decodes to a bit beyond the range."""
    beyond = 2.0 * grid.qmin / (grid.qmin - grid.qmax)  # type: ignore[attr-defined]
    return global_scale_for(beyond * max(-tensor_range.low, tensor_range.high))


def _block_scale(grid: Grid, weight: Tensor, block: int) -> Tensor:
    """Scales [ceil(rows / block), ceil(K / block)]: the row-wise group ranges, reduced over each block's rows."""
    low, high = kernels.group_range(weight, block)
    missing = -low.shape[0] % block
    if missing:
        low = torch.cat([low, low[-1:].expand(missing, -1)])
        high = torch.cat([high, high[-1:].expand(missing, -1)])
    low = low.reshape(-1, block, low.shape[1]).amin(dim=1)
    high = high.reshape(-1, block, high.shape[1]).amax(dim=1)
    params: GroupParams = grid.params_from_range(low, high)
    return params.scale
