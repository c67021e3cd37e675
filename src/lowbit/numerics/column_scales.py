"""`InputBasis`: the basis in which a loader gives a linear its input as the model runs; `ColumnScales` is diagonal.

    x' = x T        W' = W T⁻ᵀ        x' W'ᵀ = x Wᵀ

A rotation T is its own T⁻ᵀ, so weights and inputs turn alike; a diagonal T multiplies inputs and divides weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class InputBasis(Protocol):
    """An invertible T [K, K]. reason: why codes of W' are no codes of W"""

    @property
    def reason(self) -> str: ...

    def columns(self, values: Tensor) -> Tensor:
        """A weight [..., K] → as it is stored, W'."""
        ...

    def back(self, values: Tensor) -> Tensor:
        """A stored weight [..., K] → W."""
        ...

    def inputs(self, values: Tensor) -> Tensor:
        """An input [..., K] → what the engine rounds, x'."""
        ...

    def inputs_back(self, values: Tensor) -> Tensor:
        """x' [..., K] → x."""
        ...


@dataclass(frozen=True)
class ColumnScales:
    """T = diag(scale): ModelOpt's `pre_quant_scale`. scale: float32 [K], finite and above 0"""

    scale: Tensor
    reason: str = "its codes are of scaled columns, for an engine that scales the input (pre_quant_scale)"

    def columns(self, values: Tensor) -> Tensor:
        return values / self.scale

    def back(self, values: Tensor) -> Tensor:
        return values * self.scale

    def inputs(self, values: Tensor) -> Tensor:
        return values * self.scale

    def inputs_back(self, values: Tensor) -> Tensor:
        return values / self.scale
