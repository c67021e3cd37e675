"""`Grid`: one number format, as seen by the algorithms that round to it.

A grid can do three things, always on a weight [N, K] cut along K into groups of g columns (the last may be short):

    fit     weights → GroupParams      the scale (and zero point) of each row and group
    round   weights, params → codes    nearest code; ties to even unless the format says otherwise
    decode  codes, params → weights    float32

`round` takes any slice of columns with the params of those columns, so error feedback (GPTQ) can round the next
`columns_per_code` columns, correct the rest, and go on. Fitting is separate from rounding, so an algorithm can fit the
weights it has already compensated. Everything else about a format (bit order, file layout) belongs to the exporters.

Degenerate groups: an all-zero group gets scale 1 and the code of zero. NaN and inf are the caller's to refuse:
`fit` and `round` are undefined on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from lowbit.tensors import GroupParams

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
    """One number format. Implementations are frozen dataclasses: equal settings compare equal."""

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

    def params_from_range(self, low: Tensor, high: Tensor, global_scale: float = 1.0) -> GroupParams:
        """The params that just cover [low, high]; float32 tensors of any one shape."""
        ...

    def fit(
        self,
        weight: Tensor,
        group_size: int,
        search: RangeSearch,
        importance: Tensor | None = None,
        global_scale: float = 1.0,
    ) -> GroupParams:
        """Params of each row and group of weight [N, K]; importance float32 [K] weighs the squared errors."""
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
