"""Targets of rounding behind one interface: a grid of `numerics`, or a ggml type.

    fit      weight [N, K] → scales and the like      Fitted, or the params of ggml blocks
    nearest  weight → Rounded                         round to nearest with the scales of `fit`

Every algorithm of this stage returns `Rounded`: a `QuantizedTensor` for folders, packed blocks for GGUF files.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from lowbit.kernels.tables import Codebook, MinifloatFormat
from lowbit.numerics import ggml
from lowbit.numerics.ggml.grid import GgmlGrid, IntLevels
from lowbit.numerics.ggml.types import Blocks
from lowbit.numerics.scalar_grids import CodebookGrid, IntGrid, MinifloatGrid
from lowbit.rounding.error import squared_error
from lowbit.rounding.hessian import InputData
from lowbit.rounding.histogram import RowReader, rows_decoder
from lowbit.rounding.rtn import Fitted, TensorRange, fit_weight, measure_range, needs_tensor_range
from lowbit.schemes import WeightSpec
from lowbit.tensors import Granularity, Grid, QuantizedTensor, RangeSearch, SparseOutliers

# The values of codes that stand for one column.
Levels = IntLevels | MinifloatFormat | Codebook
Params = TypeVar("Params")


@dataclass(frozen=True)
class ScaledBlocks:
    """Blocks of a GGUF file, uint8 [N, row bytes], and the scale of the whole matrix, which lies beside them."""

    blocks: Tensor
    scale: float


# Codes and scales; or the blocks of a GGUF file, uint8 [N, row bytes].
Stored = QuantizedTensor | Tensor | ScaledBlocks
Sums = tuple[float, float, float]  # (Σ (w − ŵ)², Σ w², max |w − ŵ|)


@dataclass(frozen=True)
class Rounded:
    """A weight [N, K] after rounding.

    stored     codes and scales, or the blocks of a GGUF file (uint8 [N, row bytes])
    decoded    float32 [N, K], the weight in an engine
    notes      for the user: "damping raised to 0.1", "rounded to nearest: the Hessian has no inverse"
    fell_back  True if the algorithm failed and the weight was rounded to nearest
    """

    stored: Stored
    decoded: Tensor
    notes: tuple[str, ...] = ()
    fell_back: bool = False

    def in_rows(self, order: Tensor) -> Rounded:
        """Its rows in another order, int64 [N]; each row has scales of its own."""
        stored = self.stored
        if isinstance(stored, QuantizedTensor):
            zero_point = None if stored.zero_point is None else stored.zero_point[order]
            stored = replace(stored, codes=stored.codes[order], scale=stored.scale[order], zero_point=zero_point)
        elif isinstance(stored, ScaledBlocks):
            stored = replace(stored, blocks=stored.blocks[order])
        else:
            stored = stored[order]
        return replace(self, stored=stored, decoded=self.decoded[order])


@dataclass(frozen=True)
class ColumnParams:
    """Params of `Target.fit` for each of G groups of `columns` consecutive columns.

    scale, offset  float32 [N, G];  zero_point  int32 [N, G];  table  float32 [N, G, 2^b];  None if there is none
    """

    scale: Tensor
    columns: int
    offset: Tensor | None = None
    zero_point: Tensor | None = None
    table: Tensor | None = None


class Target(ABC, Generic[Params]):
    """The grid or ggml type of one weight. `fit` returns `Params`."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def columns_per_code(self) -> int:
        """Columns that are rounded together: 1, or 4 or 8 for points of a lattice."""

    @property
    @abstractmethod
    def levels(self) -> Levels | None:
        """The values of codes of single columns; None for lattices, floats and fitted tables."""

    @property
    def is_ggml(self) -> bool:
        """True for a type of GGUF files, whose scales are codes inside its blocks."""
        return False

    @property
    def holds_floats(self) -> bool:
        """True for F32, F16 and BF16, which have no scales."""
        return False

    @property
    def rows_are_apart(self) -> bool:
        """True if each row has its own scales, independent of other rows."""
        return True

    @property
    def columns_per_minimum(self) -> int | None:
        """Columns that share a minimum stored as a float of its own, which can be `shifted`; None if none is stored."""
        return None

    @property
    def needs_range(self) -> bool:
        """True if scales need the range of the whole tensor."""
        return False

    @property
    def is_nested(self) -> bool:
        """True if scales are codes themselves (double quantization), which no fused set shares."""
        return False

    @property
    def fused_sets_share(self) -> bool:
        """True if scales need the range of the whole fused set, because engines have one for all its members."""
        return False

    @property
    def fits_tables(self) -> bool:
        """True if the values of codes are fitted to the weights of each row or group; then there are no `levels`."""
        return False

    @property
    def is_llm_int8(self) -> bool:
        """True for bitsandbytes' INT8, which keeps outlier columns in 16 bits at run time."""
        return False

    def ranged(self, extent: TensorRange) -> Target[Params]:
        """This target with the range of the whole tensor, or fused set."""
        return self

    def measured(self, weight: Tensor) -> TensorRange:
        """The range of rows [n, K], as `ranged` takes it."""
        return measure_range(weight)

    def with_range(self, weights: Sequence[Tensor]) -> Target[Params]:
        """This target with the range of these weights, if it `needs_range`."""
        if not self.needs_range:
            return self
        return self.ranged(reduce(TensorRange.joined, [self.measured(weight) for weight in weights]))

    def with_search(self, search: RangeSearch) -> Target[Params]:
        """This target with another range search, if it has one."""
        return self

    @abstractmethod
    def nearest(self, weight: Tensor, importance: Tensor | None = None) -> Rounded:
        """Round to nearest; importance float32 [K] weighs the squared errors that scales are chosen by."""

    def shifted(self, stored: Stored, shift: Tensor) -> Rounded:
        """With the minimum of every group moved by float32 [N, G], and rounded as it is stored; codes stay. Of targets
        with `columns_per_minimum`."""
        raise NotImplementedError(self.name)

    @abstractmethod
    def encode(self, rows: Tensor, importance: Tensor | None = None) -> tuple[Stored, Sums]:
        """Round rows to nearest without decoding them; the error sums are not finite if the rows are not."""

    @abstractmethod
    def error(self, rows: Tensor, rounded: Stored) -> Sums:
        """Error sums of rows of a weight against their rounded form."""

    @abstractmethod
    def reader(self, rounded: Stored) -> RowReader:
        """A reader that decodes chosen rows of `rounded`, to float32 [m, K]."""

    @abstractmethod
    def columns_per_fit(self, columns: int, scales: Literal["auto", "static", "compensated"]) -> int:
        """Columns whose scales error feedback fits at once (`gptq.GPTQOptions.scales`)."""

    @abstractmethod
    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        """Scales of whole runs of `columns_per_fit`; importance as above."""

    @abstractmethod
    def column_params(self, fitted: Params, weight: Tensor) -> ColumnParams:
        """The params fitted to `weight`, group by group."""

    @abstractmethod
    def with_codes(self, fitted: Sequence[Sequence[Params]], codes: Tensor) -> Stored:
        """The stored form of codes and params; `fitted` holds slabs of rows, each a sequence of runs of columns."""


def nearest(weight: Tensor, target: Target, data: InputData, options: None = None) -> Rounded:
    """Round to nearest. ggml types weigh errors with the importance, as llama-quantize does; grids do not."""
    return target.nearest(weight, data.importance if target.is_ggml else None)


@dataclass(frozen=True)
class LinearSlot:
    """One linear of a block that is tuned as a whole.

    module  holds the float weight [N, K], restored afterwards
    target  of its codes
    start   initial codes and scales (GPTQ's); None: round to nearest
    """

    module: nn.Linear
    target: Target
    start: Rounded | None = None


@dataclass(frozen=True)
class GridTarget(Target[Fitted]):
    """A grid with scales as `spec` has them.

    tensor_range  of the whole tensor or fused set, if `rounding.rtn.needs_tensor_range`
    """

    spec: WeightSpec
    grid: Grid
    search: RangeSearch
    tensor_range: TensorRange | None = None

    @property
    def name(self) -> str:
        return self.grid.name

    @property
    def columns_per_code(self) -> int:
        return self.grid.columns_per_code

    @property
    def fits_tables(self) -> bool:
        return self.spec.is_fitted

    @property
    def levels(self) -> Levels | None:
        if self.fits_tables:
            return None
        if isinstance(self.grid, IntGrid):
            return IntLevels(self.grid.qmin, self.grid.qmax)
        assert isinstance(self.grid, MinifloatGrid | CodebookGrid)
        return self.grid.format

    @property
    def rows_are_apart(self) -> bool:
        return self.spec.granularity in (Granularity.CHANNEL, Granularity.GROUP) and not self.is_nested

    @property
    def needs_range(self) -> bool:
        return needs_tensor_range(self.spec)

    @property
    def is_nested(self) -> bool:
        return self.spec.scale_format == "nested"

    @property
    def fused_sets_share(self) -> bool:
        # kernels for integers take one scale per member (vLLM's convert_to_channelwise), and so does BitNet
        return (
            self.needs_range and not self.is_nested and (self.spec.number not in ("int", "ternary") or self.spec.ranged)
        )

    @property
    def is_llm_int8(self) -> bool:
        return self.spec.narrow

    def ranged(self, extent: TensorRange) -> GridTarget:
        return replace(self, tensor_range=extent)

    def measured(self, weight: Tensor) -> TensorRange:
        return measure_range(weight, self.spec)

    def with_search(self, search: RangeSearch) -> GridTarget:
        return self if self.search.method == "absmax" else replace(self, search=search)

    def nearest(self, weight: Tensor, importance: Tensor | None = None) -> Rounded:
        quantized = self.fit(weight, importance).round(weight)
        return Rounded(quantized, quantized.decode())

    def encode(self, rows: Tensor, importance: Tensor | None = None) -> tuple[QuantizedTensor, Sums]:
        quantized = self.fit(rows, importance).round(rows)
        return quantized, squared_error(rows, quantized)

    def error(self, rows: Tensor, rounded: Stored) -> Sums:
        assert isinstance(rounded, QuantizedTensor)
        return squared_error(rows, rounded)

    def reader(self, rounded: Stored) -> RowReader:
        assert isinstance(rounded, QuantizedTensor)
        return rows_decoder(rounded)

    def columns_per_fit(self, columns: int, scales: Literal["auto", "static", "compensated"]) -> int:
        at_once = scales == "static" or (scales == "auto" and self.spec.scale_format == "e8m0")
        at_once |= self.spec.scale_format == "qoq"  # whose steps are of whole rows
        if at_once or self.spec.granularity is not Granularity.GROUP or not self.rows_are_apart:
            return columns
        return min(self.spec.columns_per_scale(columns), columns)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Fitted:
        return fit_weight(weight, self.spec, self.grid, self.search, self.tensor_range, importance)

    def column_params(self, fitted: Fitted, weight: Tensor) -> ColumnParams:
        params, columns = fitted.grouped(weight)
        return ColumnParams(params.scale, columns, zero_point=params.zero_point, table=params.table)

    def with_codes(self, fitted: Sequence[Sequence[Fitted]], codes: Tensor) -> QuantizedTensor:
        first = fitted[0][0]
        if len(fitted) == len(fitted[0]) == 1:
            return first.with_codes(codes)
        scale = torch.cat([torch.cat([part.scale for part in row], dim=1) for row in fitted])
        zero_point = None
        if first.zero_point is not None:
            zero_point = torch.cat([torch.cat([part.zero_point for part in row if part.zero_point is not None], dim=1)
                                    for row in fitted])  # fmt: skip
        table, outliers = None, None
        if first.table is not None:
            table = torch.cat([torch.cat([part.table for part in row if part.table is not None], dim=1)
                               for row in fitted])  # fmt: skip
        if first.outliers is not None:
            kept = [row[0].outliers for row in fitted if row[0].outliers is not None]
            outliers = SparseOutliers(
                torch.cat([part.columns for part in kept]), torch.cat([part.values for part in kept])
            )
        return replace(first, scale=scale, zero_point=zero_point, table=table, outliers=outliers).with_codes(codes)


# A block scale of NVFP4 is at most 448, and its values at most 6. A power of two puts the largest weight at half of
# that or less, so that the search for a block's scale has room on both sides.
_LARGEST_SCALED = 448.0 * 6.0 / 2


@dataclass(frozen=True)
class GgmlTarget(Target[Blocks]):
    """A ggml type. Its encoder chooses scales and codes together.

    scaled  a float32 scale of the whole matrix is stored beside the blocks (NVFP4); rounding gives `ScaledBlocks`
    scale   that scale, a power of two, by which weights are divided exactly
    """

    type_name: str
    scaled: bool = False
    scale: float = 1.0

    @property
    def name(self) -> str:
        return self.type_name

    @cached_property
    def grid(self) -> GgmlGrid:
        return GgmlGrid(self.type_name)

    @property
    def columns_per_code(self) -> int:
        return self.grid.columns_per_code

    @property
    def is_ggml(self) -> bool:
        return True

    @property
    def levels(self) -> Levels | None:
        return self.grid.levels

    @property
    def holds_floats(self) -> bool:
        return self.grid.kind.family == "plain"

    @property
    def columns_per_minimum(self) -> int | None:
        return self.grid.kind.group if self.grid.float_minima else None

    @property
    def needs_range(self) -> bool:
        return self.scaled

    def ranged(self, extent: TensorRange) -> GgmlTarget:
        largest = max(-extent.low, extent.high)
        if not largest or not math.isfinite(largest):
            return replace(self, scale=1.0)
        fraction, exponent = math.frexp(largest / _LARGEST_SCALED)
        return replace(self, scale=2.0 ** min(max(exponent - (fraction == 0.5), -126), 127))

    def nearest(self, weight: Tensor, importance: Tensor | None = None) -> Rounded:
        blocks = ggml.encode(self.type_name, self._divided(weight), importance)
        return Rounded(self._stored(blocks), ggml.decode(self.type_name, blocks) * self.scale)

    def shifted(self, stored: Stored, shift: Tensor) -> Rounded:
        assert isinstance(stored, Tensor)
        blocks = self.grid.shifted(stored, shift)
        return Rounded(blocks, ggml.decode(self.type_name, blocks))

    def encode(self, rows: Tensor, importance: Tensor | None = None) -> tuple[Stored, Sums]:
        blocks, sums = ggml.encode_measured(self.type_name, self._divided(rows), importance)
        return self._stored(blocks), self._multiplied(sums)

    def error(self, rows: Tensor, rounded: Stored) -> Sums:
        assert not isinstance(rounded, QuantizedTensor)
        blocks = rounded.blocks if isinstance(rounded, ScaledBlocks) else rounded
        return self._multiplied(ggml.squared_error(self.type_name, self._divided(rows), blocks))

    def reader(self, rounded: Stored) -> RowReader:
        assert not isinstance(rounded, QuantizedTensor)
        if isinstance(rounded, ScaledBlocks):
            return lambda chosen: ggml.decode(self.type_name, rounded.blocks[chosen]) * rounded.scale
        return lambda chosen: ggml.decode(self.type_name, rounded[chosen])

    def columns_per_fit(self, columns: int, scales: Literal["auto", "static", "compensated"]) -> int:
        return self.grid.block

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Blocks:
        """Params of whole blocks of columns, of the weight over the scale of the matrix."""
        return self.grid.fit(self._divided(weight), importance)

    def column_params(self, fitted: Blocks, weight: Tensor) -> ColumnParams:
        scale = fitted.scale * self.scale if self.scaled else fitted.scale
        return ColumnParams(scale, weight.shape[1] // fitted.scale.shape[1], fitted.offset)

    def with_codes(self, fitted: Sequence[Sequence[Blocks]], codes: Tensor) -> Stored:
        blocks = [self.grid.join(row) for row in fitted]
        levels = self.grid.levels
        if isinstance(levels, IntLevels) and levels.zero:
            codes = (codes.to(torch.int16) + levels.zero).to(torch.uint8)
        if isinstance(levels, IntLevels) and levels.lowest == 0:
            codes = codes.to(torch.uint8)
        slabs = codes.split([len(params.scale) for params in blocks])
        return self._stored(
            torch.cat([self.grid.pack(part, params) for part, params in zip(slabs, blocks, strict=True)])
        )

    def _divided(self, rows: Tensor) -> Tensor:
        return rows.float() / self.scale if self.scaled else rows

    def _stored(self, blocks: Tensor) -> Stored:
        return ScaledBlocks(blocks, self.scale) if self.scaled else blocks

    def _multiplied(self, sums: Sums) -> Sums:
        return (sums[0] * self.scale**2, sums[1] * self.scale**2, sums[2] * self.scale)
