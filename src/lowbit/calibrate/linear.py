"""One linear: weight + statistics + target → codes.

A linear that cannot be rounded as asked (too few tokens reached its expert, its input has no statistics) is rounded to
nearest, and its result says so.

Behind it: how many input channels of a linear LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) would take for
outliers.

    y = x[:, O] · W[:, O]ᵀ  in 16 bits   +   int8(x[:, R]) · int8(W[:, R])ᵀ          O: max |x| ≥ 6,  R: the others

A few input channels carry values far above the rest. One of them sets the step of all int8 values of a token, so
bitsandbytes' INT8 multiplies those columns in 16 bits, and chooses them for every batch at run time. Nothing is
stored; the report says how many channels are affected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.calibrate.store import LinearResult
from lowbit.methods import RTN, Rounding
from lowbit.registry import load
from lowbit.rounding.error import squared_error_of
from lowbit.rounding.extremes import find_extreme
from lowbit.rounding.hessian import InputData
from lowbit.rounding.target import Rounded, Stored, Target, nearest
from lowbit.tensors import LayerStats

_ERROR_ROWS = 128  # sampled for the layer errors of the report
LayerErrors = tuple[float | None, float | None]  # (layer_error, nearest_error) of `LinearResult`


def round_linear(
    weight: Tensor,
    target: Target,
    rounding: Rounding,
    data: InputData,
    options: Any,
    least_tokens: int,
    start: Stored | None = None,
) -> tuple[Rounded, LinearResult]:
    """Round a weight, float32 [N, K].

    options       of the rounding, as in its row
    least_tokens  with fewer tokens than this the Hessian is too poor: round to nearest
    start         what a finished file holds, for a rounding that `refines`: kept where that is not possible
    """
    if rounding.refines:
        assert start is not None, "the loop was given a file to start from"
        return _refined(weight, target, rounding, data, options, least_tokens, start)
    note = None
    if rounding.needs_hessian and not (data.has_hessian and data.tokens >= least_tokens):
        note = f"rounded to nearest: {data.tokens} tokens reached it, {rounding.name} needs {least_tokens}"
    elif rounding.grids_only and target.is_ggml:
        note = f"rounded to nearest: {rounding.name} does not work on {target.name}"
    if note is None:
        rounded = load(rounding.function)(weight, target, data, options)
    else:
        rounded = replace(nearest(weight, target, data), fell_back=True)
    outliers = (outlier_note(data.stats),) if data.stats is not None and target.is_llm_int8 else ()
    notes = (*rounded.notes, *outliers, *(() if note is None else (note,)))
    method = RTN.name if rounded.fell_back else rounding.name
    errors = _layer_errors(weight, rounded.decoded, target, data)
    return rounded, linear_result(weight, rounded, target, method, errors, data.tokens, notes)


def _refined(
    weight: Tensor, target: Target, rounding: Rounding, data: InputData, options: Any, least_tokens: int, start: Stored
) -> tuple[Rounded, LinearResult]:
    before = target.reader(start)(torch.arange(len(weight)))
    if data.has_hessian and data.tokens >= least_tokens:
        rounded = load(rounding.function)(weight, target, data, options, start)
    else:
        note = f"kept as it is: {data.tokens} tokens reached it, {rounding.name} needs {least_tokens}"
        rounded = Rounded(start, before, (note,), fell_back=True)
    errors = (None, None)
    rows = _sampled(weight, target)
    if data.has_hessian and (energy := data.energy(weight[rows])) > 0:
        errors = tuple(data.energy((weight - decoded)[rows]) / energy for decoded in (rounded.decoded, before))
    method = "kept" if rounded.fell_back else rounding.name
    result = linear_result(weight, rounded, target, method, (errors[0], None), data.tokens, rounded.notes)
    return rounded, replace(result, start_error=errors[1])


def linear_result(
    weight: Tensor, rounded: Rounded, target: Target, method: str, errors: LayerErrors, tokens: int,
    notes: tuple[str, ...],
) -> LinearResult:  # fmt: skip
    """The report's figures of a rounded weight, and a note on values that its format cannot hold."""
    error, size, largest = sums = squared_error_of(weight, rounded.decoded)
    extreme = find_extreme(weight, rounded.stored, sums, target, target.name, 0)
    notes = notes if extreme is None else (*notes, extreme)
    return LinearResult(method, error / size if size else 0.0, largest, *errors, tokens, notes)


def _sampled(weight: Tensor, target: Target) -> slice:
    """At most `_ERROR_ROWS` evenly spaced rows; all rows if scales span them."""
    return slice(None, None, -(-len(weight) // _ERROR_ROWS) if target.rows_are_apart else 1)


def relative_error_of_nearest(weight: Tensor, target: Target, data: InputData) -> float | None:
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) of rounding to nearest, over the sampled rows; None without a Hessian."""
    return _layer_errors(weight, weight, target, data)[1]


def _layer_errors(weight: Tensor, decoded: Tensor, target: Target, data: InputData) -> LayerErrors:
    """(tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), the same of rounding to nearest), over at most `_ERROR_ROWS` evenly spaced rows; over
    all rows if scales span them. H as the rounding saw it; sums over the groups of rows with an H each."""
    if not data.has_hessian:
        return None, None
    rows = _sampled(weight, target)
    energy = error = by_nearest = 0.0
    for group, part in data.by_rows(len(weight)):
        w, w_decoded = weight[group][rows], decoded[group][rows]
        energy += part.energy(w)
        error += part.energy(w - w_decoded)
        by_nearest += part.energy(w - nearest(w, target, part).decoded)
    if energy <= 0:
        return 0.0, 0.0
    return error / energy, by_nearest / energy


THRESHOLD = 6.0


@dataclass(frozen=True)
class Outliers:
    """columns  int64, ascending; share of the K columns; energy: the share of Σ x² that they carry"""

    columns: Tensor
    share: float
    energy: float


def outlier_columns(stats: LayerStats, threshold: float = THRESHOLD) -> Outliers:
    """The input channels whose |x| reached the threshold in calibration."""
    columns = (stats.absmax >= threshold).nonzero()[:, 0]
    energy, total = stats.mean_sq[columns].sum(dtype=torch.float64), stats.mean_sq.sum(dtype=torch.float64)
    return Outliers(columns, len(columns) / max(1, len(stats.absmax)), (energy / total).item() if total > 0 else 0.0)


def outlier_note(stats: LayerStats) -> str:
    """How much of an input LLM.int8() would keep in 16 bits, for the report."""
    outliers = outlier_columns(stats)
    return (
        f"{len(outliers.columns)} of {len(stats.absmax)} input channels reach {THRESHOLD:g}, with "
        f"{100 * outliers.energy:.1f} % of their squares; bitsandbytes multiplies those in 16 bits"
    )
