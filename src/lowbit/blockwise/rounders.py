"""One linear: weight + statistics + target → codes, by the method that the user asked for.

What cannot be done as asked is done by rounding to nearest, and the result says so: an expert that too few tokens
reached, an input without statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.calibrate.precision import has_fast_bfloat16
from lowbit.numerics.grid import RangeSearch
from lowbit.rounding.gptq import GPTQOptions, gptq, prepare
from lowbit.rounding.hessian import PreparedHessian
from lowbit.rounding.hqq import hqq
from lowbit.rounding.outliers import THRESHOLD, outlier_columns
from lowbit.rounding.target import GridTarget, Rounded, Target
from lowbit.tensors import LayerStats

# Errors in the report are of so many rows.
_ERROR_ROWS = 128


@dataclass
class InputData:
    """The statistics of one input, and what GPTQ derives from them once for all linears that read it."""

    stats: LayerStats | None
    _prepared: PreparedHessian | None = None
    _factor: Tensor | None = None

    def prepared(self, options: GPTQOptions) -> PreparedHessian:
        if self._prepared is None:
            assert self.stats is not None
            self._prepared = prepare(self.stats, options)
        return self._prepared

    def energy(self, weight: Tensor) -> float:
        """tr(W H Wᵀ)."""
        assert self.stats is not None
        if self._factor is None:
            assert self.stats.hessian is not None
            dtype = torch.bfloat16 if has_fast_bfloat16(str(weight.device)) else torch.float32
            self._factor = self.stats.hessian.to(dtype)
        weight = weight.to(self._factor.dtype)
        return ((weight @ self._factor).float() * weight).sum().item()

    @property
    def importance(self) -> Tensor | None:
        """Mean x² of every channel."""
        return None if self.stats is None else self.stats.mean_sq


@dataclass(frozen=True)
class Outcome:
    """A rounded weight and how it went."""

    rounded: Rounded
    method: str
    layer_error: float | None
    nearest_error: float | None


def round_linear(
    weight: Tensor,
    target: Target,
    method: str,
    data: InputData,
    options: GPTQOptions,
    least_tokens: int,
    search: RangeSearch | None = None,
) -> Outcome:
    """Round a weight, float32 [N, K].

    search        of ranges in GPTQ, where the user leaves it to us
    least_tokens  below so many, an input says too little of a Hessian: round to nearest, weighed with what there is
    """
    stats = data.stats
    note = None
    if method == "hqq" and isinstance(target, GridTarget):
        rounded, used = hqq(weight, target), "hqq"
    elif method == "gptq" and stats is not None and stats.hessian is not None and stats.tokens >= least_tokens:
        rounded, used = gptq(weight, _searched(target, search), data.prepared(options), options), "gptq"
    else:
        rounded, used = round_to_nearest(weight, target, data.importance), "rtn"
        if method == "gptq":
            seen = 0 if stats is None else stats.tokens
            note = f"rounded to nearest: {seen} tokens reached it, gptq wants {least_tokens}"
        elif method != "rtn":
            note = f"rounded to nearest: {method} does not work on {target.name}"
    if stats is not None and is_llm_int8(target):
        rounded = replace(rounded, notes=(*rounded.notes, outlier_note(stats)))
    if note is not None:
        rounded = replace(rounded, notes=(*rounded.notes, note))
    return Outcome(rounded, used, *_errors(weight, rounded.decoded, target, data))


def _searched(target: Target, search: RangeSearch | None) -> Target:
    """With the range search that suits error feedback, in place of the one that suits rounding to nearest."""
    if search is None or not isinstance(target, GridTarget) or target.search.method == "absmax":
        return target
    return replace(target, search=search)


def round_to_nearest(weight: Tensor, target: Target, importance: Tensor | None) -> Rounded:
    """Scales of ggml types weighed with importance, as llama-quantize does; of grids by their range search alone."""
    return target.nearest(weight, None if isinstance(target, GridTarget) else importance)


def _errors(weight: Tensor, decoded: Tensor, target: Target, data: InputData) -> tuple[float | None, float | None]:
    """(tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), what round to nearest would have), both of at most `_ERROR_ROWS` rows.

    Rows in even steps; all of them where scales span rows. Products in bfloat16 where that is fast: good to a percent.
    """
    if data.stats is None or data.stats.hessian is None:
        return None, None
    rows = slice(None, None, -(-len(weight) // _ERROR_ROWS) if _rows_are_apart(target) else 1)
    weight, decoded = weight[rows], decoded[rows]
    nearest = round_to_nearest(weight, target, data.importance).decoded
    energy = data.energy(weight)
    if energy <= 0:
        return 0.0, 0.0
    return data.energy(weight - decoded) / energy, data.energy(weight - nearest) / energy


def _rows_are_apart(target: Target) -> bool:
    return not isinstance(target, GridTarget) or target.rows_are_apart


def is_llm_int8(target: Target) -> bool:
    """True for bitsandbytes' INT8, which multiplies some columns in 16 bits at run time."""
    return isinstance(target, GridTarget) and target.spec.narrow


def outlier_note(stats: LayerStats) -> str:
    """How much of an input LLM.int8() would keep in 16 bits."""
    found = outlier_columns(stats)
    return (
        f"{len(found.columns)} of {len(stats.absmax)} input channels reach {THRESHOLD:g}, with "
        f"{100 * found.energy:.1f} % of their squares; bitsandbytes multiplies those in 16 bits"
    )
