"""Round to nearest (RTN): the baseline every other algorithm has to beat.

    scale, zero_point = fit(range of each group)      codes = clamp(rint(w / scale) + zero_point)

No calibration. Works on any slab of whole rows: rows do not influence each other, except where one scale spans the
tensor (or two levels of scales do), whose range the caller measures first and hands in. With double quantization the
scales are quantized first and codes chosen for what they decode to; slabs must begin where a block of scales does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.numerics.grid import Grid, RangeSearch
from lowbit.numerics.nested import decode_scales, quantize_scales
from lowbit.numerics.scales import global_scale_for
from lowbit.schemes import WeightSpec
from lowbit.tensors import Granularity, GroupParams, NestedScale, QuantizedTensor


@dataclass(frozen=True)
class TensorRange:
    """Smallest and largest weight of a whole tensor (of a whole fused set, for two-level scales).

    absmax_sum   Σ of the groups' largest |w|, in float64; double quantization needs their mean, of each tensor by
                 itself: do not join fused sets for it
    groups       how many groups are not all zero
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
        """Of the groups that are not all zero; 1 where there is none."""
        if self.groups == 0 and (self.low != 0 or self.high != 0):
            raise AssertionError("double quantization needs a range that was measured for it")
        return self.absmax_sum / self.groups if self.groups else 1.0


def measure_range(weight: Tensor, spec: WeightSpec | None = None) -> TensorRange:
    """Range of a slab [rows, K], with the mean over groups where `spec` needs it; NaN and inf are kept."""
    nested = spec is not None and spec.scale_format == "nested"
    columns = weight.shape[1]
    low, high = kernels.group_range(weight, spec.columns_per_scale(columns) if spec is not None and nested else columns)
    found = TensorRange(low.min().item(), high.max().item())
    if not nested:
        return found
    absmax = torch.maximum(-low, high)
    return replace(found, absmax_sum=absmax.sum(dtype=torch.float64).item(), groups=int((absmax != 0).sum()))


def needs_tensor_range(weight: WeightSpec) -> bool:
    """True where no slab can be rounded before the whole tensor was seen."""
    return weight.two_level or weight.granularity is Granularity.TENSOR or weight.scale_format == "nested"


def round_to_nearest(
    weight: Tensor,
    spec: WeightSpec,
    grid: Grid,
    search: RangeSearch,
    tensor_range: TensorRange | None = None,
    importance: Tensor | None = None,
) -> QuantizedTensor:
    """Quantize rows of a weight; arguments as of `fit_weight`."""
    return fit_weight(weight, spec, grid, search, tensor_range, importance).round(weight)


@dataclass(frozen=True)
class Fitted:
    """All of a `QuantizedTensor` but its codes.

    scale, zero_point   of the shape that the granularity has; `params` repeats them for every row
    """

    scale: Tensor
    grid: Grid
    granularity: Granularity
    group_size: int
    zero_point: Tensor | None = None
    global_scale: float = 1.0
    nested: NestedScale | None = None

    def with_codes(self, codes: Tensor) -> QuantizedTensor:
        return QuantizedTensor(
            codes, self.scale, self.grid, self.granularity, self.group_size, self.zero_point, self.global_scale,
            nested=self.nested,
        )  # fmt: skip

    def grouped(self, weight: Tensor) -> tuple[GroupParams, int]:
        """(params [N, G] of the rows of `weight` [N, K], consecutive columns that one of them is for)."""
        return self.with_codes(weight).grouped()

    def round(self, weight: Tensor) -> QuantizedTensor:
        """The nearest codes of the weight [N, K] that this was fitted to, or of one close to it."""
        return self.with_codes(self.grid.round(weight, *self.grouped(weight)))


def fit_weight(
    weight: Tensor,
    spec: WeightSpec,
    grid: Grid,
    search: RangeSearch,
    tensor_range: TensorRange | None = None,
    importance: Tensor | None = None,
) -> Fitted:
    """Scales of rows of a weight.

    weight        float32, bfloat16 or float16 [rows, K]; rows divide by the block for BLOCK, but for the last slab
    tensor_range  of the whole tensor, where `needs_tensor_range`
    importance    float32 [K], weighs squared errors in an "mse" search

    BLOCK and TENSOR ranges are always absmax: their only scale format here is FP8, whose relative precision hardly
    depends on the scale.
    """
    group_size = spec.columns_per_scale(weight.shape[1])
    if spec.granularity is Granularity.TENSOR:
        scale = _tensor_scale(grid, _known(tensor_range), weight.device)
        return Fitted(scale, grid, spec.granularity, group_size)
    if spec.granularity is Granularity.BLOCK:
        return Fitted(_block_scale(grid, weight, group_size), grid, spec.granularity, group_size)
    global_scale = _global_scale(grid, _known(tensor_range)) if spec.two_level else 1.0
    params = grid.fit(weight, group_size, search, importance, global_scale)
    nested = None
    if spec.scale_format == "nested":
        nested = _nested_scale(weight, params, group_size, _known(tensor_range))
        params = GroupParams(decode_scales(nested))
    return Fitted(params.scale, grid, spec.granularity, group_size, params.zero_point, global_scale, nested)


def _known(tensor_range: TensorRange | None) -> TensorRange:
    if tensor_range is None:
        raise AssertionError("this scheme needs the range of the whole tensor")
    return tensor_range


def _global_scale(grid: Grid, tensor_range: TensorRange) -> float:
    """Second level of a two-level grid: brings the largest group scale within the first level's range."""
    largest = max(-tensor_range.low, tensor_range.high)
    return global_scale_for(largest / grid.format.max_value)  # type: ignore[attr-defined]


def _nested_scale(weight: Tensor, params: GroupParams, group_size: int, tensor_range: TensorRange) -> NestedScale:
    low, high = kernels.group_range(weight, group_size)
    return quantize_scales(params.scale, tensor_range.mean_absmax, unused=(low == 0) & (high == 0))


def _tensor_scale(grid: Grid, tensor_range: TensorRange, device: torch.device) -> Tensor:
    low = torch.tensor([[tensor_range.low]], dtype=torch.float32, device=device)
    high = torch.tensor([[tensor_range.high]], dtype=torch.float32, device=device)
    return grid.params_from_range(low, high).scale


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
