"""The shared currency: what the stages of the flow hand to each other.

    x ≈ scale * (codes - zero_point)                      integer grids
    x ≈ scale * value(codes)                              minifloat and codebook grids
    with scale = scale * global_scale for two-level grids (NVFP4)

Shapes: N = out_features, K = in_features, g = group size, G = ceil(K / g) groups. Weights are [N, K] row-major, as in
`torch.nn.Linear`. Codes are *logical and unpacked*: rounding makes them, exporters pack them, the evaluator decodes
them; nobody else knows a bit order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lowbit.numerics.grid import Grid


class Granularity(StrEnum):
    """Which weights share one scale. The shape is that of `scale` for a weight [N, K]."""

    TENSOR = "tensor"  # [1, 1]
    CHANNEL = "channel"  # [N, 1]: one per output row
    GROUP = "group"  # [N, G]: g consecutive columns of one row
    BLOCK = "block"  # [ceil(N / g), ceil(K / g)]: a g × g square

    def scale_shape(self, rows: int, columns: int, group_size: int) -> tuple[int, int]:
        """Shape of `scale` for a weight [rows, columns]."""
        groups = -(-columns // group_size)
        if self is Granularity.TENSOR:
            return (1, 1)
        if self is Granularity.CHANNEL:
            return (rows, 1)
        if self is Granularity.GROUP:
            return (rows, groups)
        return (-(-rows // group_size), groups)


@dataclass(frozen=True)
class GroupParams:
    """What turns the codes of a group into weights. All tensors are float32 or int32, one entry per row and group.

    scale        float32 [N, G]   > 0; multiplies on decode; already rounded to what the format stores
    zero_point   int32 [N, G]     code that decodes to exactly 0; None on symmetric and minifloat grids
    global_scale float            second level: scale [N, G] is stored as (scale / global_scale); 1 where there is none
    """

    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: float = 1.0


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
class QuantizedTensor:
    """A weight after rounding: logical, unpacked, on a named grid.

    codes        int8 or uint8 [N, K]   within the grid's range; minifloats: the bit pattern
    scale        float32, shape by granularity   the *effective* scale: what codes are multiplied with
    zero_point   int32, shape of scale   None on symmetric grids
    global_scale float   two-level grids store scale / global_scale; a power of two when we made it, so both the
                         multiplier (ModelOpt) and the divisor (compressed-tensors) are exact
    group_size   g; K where one scale spans the row
    g_idx        int32 [K]   the group of every column, where it is not column // g (GPTQ with activation order)
    nested       how the scales themselves are quantized, where they are (bitsandbytes' double quantization)
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

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def params(self) -> GroupParams:
        """The scale and zero point of every row and group, [N, G], whatever the granularity."""
        return GroupParams(
            scale=self._per_row_and_group(self.scale),
            zero_point=None if self.zero_point is None else self._per_row_and_group(self.zero_point),
            global_scale=self.global_scale,
        )

    def decode(self) -> Tensor:
        """The weights the codes stand for, float32 [N, K]."""
        return self.grid.decode(self.codes, *self.grouped())

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
        for name in ("zero_point", "g_idx"):
            if getattr(self, name) is not None:
                moved[name] = getattr(self, name).to(device)
        return replace(self, **moved)

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
    """What calibration measured for one input. One per *distinct input*, not per linear: q, k and v share one.

    tokens    how many input vectors were seen
    absmax    float32 [K]      largest |x| per channel
    mean_sq   float32 [K]      mean x² per channel = diag(H) / tokens; the imatrix
    mean_abs  float32 [K]      mean |x| per channel
    hessian   float32 [K, K]   Σ x xᵀ; None where only the diagonal was asked for
    drift     float32 [K, K]   C (H + λ)⁻¹, C = Σ (x₀ − x) xᵀ, where x₀ is the same input in the unquantized model: what
                               of the difference x₀ − x can be foretold from x; None where only one of them was run
    mean      float32 [K]      mean x per channel; None where nobody asked for it (bias correction does)
    """

    tokens: int
    absmax: Tensor
    mean_sq: Tensor
    mean_abs: Tensor
    hessian: Tensor | None = None
    drift: Tensor | None = None
    mean: Tensor | None = None
