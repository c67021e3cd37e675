"""What a weight is rounded to, the same to every algorithm: a grid of `numerics`, or a ggml type.

    fit      weight [N, K] → what turns codes into weights       Fitted, or the params of ggml blocks
    nearest  weight → Rounded                                    round to nearest with what `fit` chose

`Rounded` is what every algorithm of this stage makes: a `QuantizedTensor` for folders, packed blocks for GGUF files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from lowbit.numerics import ggml
from lowbit.numerics.ggml.blocks import Blocks
from lowbit.numerics.ggml.grid import GgmlGrid
from lowbit.numerics.grid import Grid, RangeSearch
from lowbit.rounding.rtn import Fitted, TensorRange, fit_weight
from lowbit.schemes import WeightSpec
from lowbit.tensors import Granularity, QuantizedTensor


@dataclass(frozen=True)
class Rounded:
    """A weight [N, K] after rounding.

    stored   codes and scales, or the blocks of a GGUF file (uint8 [N, row bytes])
    decoded  float32 [N, K], what an engine multiplies with
    notes    what the user should know: "damping raised to 0.1", "rounded to nearest: the Hessian has no inverse"
    """

    stored: QuantizedTensor | Tensor
    decoded: Tensor
    notes: tuple[str, ...] = ()


class Target(Protocol):
    """Where the codes of one weight may lie."""

    @property
    def name(self) -> str: ...

    @property
    def columns_per_code(self) -> int: ...

    def nearest(self, weight: Tensor, importance: Tensor | None = None) -> Rounded:
        """Round to nearest; importance float32 [K] weighs the squared errors that scales are chosen by."""
        ...


@dataclass(frozen=True)
class GridTarget:
    """A grid with scales as `spec` has them.

    tensor_range  of the whole tensor, or fused set, where `rounding.rtn.needs_tensor_range`
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

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Fitted:
        return fit_weight(weight, self.spec, self.grid, self.search, self.tensor_range, importance)

    @property
    def rows_are_apart(self) -> bool:
        """True where each row has scales of its own, which do not depend on other rows."""
        return self.spec.granularity in (Granularity.CHANNEL, Granularity.GROUP) and self.spec.scale_format != "nested"

    def nearest(self, weight: Tensor, importance: Tensor | None = None) -> Rounded:
        quantized = self.fit(weight, importance).round(weight)
        return Rounded(quantized, quantized.decode())


@dataclass(frozen=True)
class GgmlTarget:
    """A ggml type. Its encoder chooses scales and codes together."""

    type_name: str

    @property
    def name(self) -> str:
        return self.type_name

    @cached_property
    def grid(self) -> GgmlGrid:
        return GgmlGrid(self.type_name)

    @property
    def columns_per_code(self) -> int:
        return self.grid.columns_per_code

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Blocks:
        """Params of whole blocks of columns."""
        return self.grid.fit(weight, importance)

    def nearest(self, weight: Tensor, importance: Tensor | None = None) -> Rounded:
        blocks = ggml.encode(self.type_name, weight, importance)
        return Rounded(blocks, ggml.decode(self.type_name, blocks))
