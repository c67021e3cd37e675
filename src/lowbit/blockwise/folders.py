"""Calibration of a model that becomes a folder: what `pipeline.write_checkpoint` needs to know beyond the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lowbit.blockwise.prepare import decide, read_windows
from lowbit.calibrate.input_ranges import measure_ranges
from lowbit.calibrate.precision import compute_dtype
from lowbit.pipeline import CalibrationText, Prepared, Progress, grid_of, needs_input_ranges, search_of
from lowbit.plan import Plan
from lowbit.rounding.target import GridTarget, Target
from lowbit.settings import RunOptions


def calibrate(
    prepared: Prepared, output: Path, run: RunOptions | None = None, progress: Progress | None = None
) -> Prepared:
    """The same with everything that a text must decide: codes of methods that work block by block, then input ranges of
    static activation scales and of the KV cache, in the model as the engine will run it. Nothing is run where nothing
    asks for it.
    """
    plan, run = prepared.plan, run or RunOptions()
    needed = needs_input_ranges(plan) - plan.input_absmax.keys()
    if plan.settings.is_blockwise:
        prepared = _decide(prepared, output, run, progress)
    if not needed and not plan.needs_kv_ranges:
        return prepared
    return _with_ranges(prepared, needed, run, progress)


def _decide(prepared: Prepared, output: Path, run: RunOptions, progress: Progress | None) -> Prepared:
    plan = prepared.plan
    dtypes = {tensor.name: tensor.plain.dtype for tensor in plan.tensors}
    decided = decide(
        prepared.checkpoint, plan.architecture, targets_of(plan), dtypes, plan.settings, prepared.options, run, output,
        progress,
    )  # fmt: skip
    return replace(prepared, decided=decided, calibration=CalibrationText.of(decided.windows))


def targets_of(plan: Plan) -> dict[str, Target]:
    """Linear of a decoder block → the grid that it is rounded to."""
    return {
        tensor.linear.name: GridTarget(tensor.scheme.weight, grid_of(tensor, plan), search_of(tensor.scheme, plan))
        for tensor in plan.quantized
        if tensor.linear is not None and tensor.linear.block is not None and tensor.scheme is not None
    }


def _with_ranges(prepared: Prepared, needed: set[str], run: RunOptions, progress: Progress | None) -> Prepared:
    plan, settings = prepared.plan, prepared.plan.settings
    checkpoint, decided = prepared.checkpoint, prepared.decided
    if decided is None:
        windows = read_windows(checkpoint, settings, prepared.options, run, progress)
    else:
        windows = decided.windows
        checkpoint = decided.decoded(targets_of(plan), plan.architecture, plan.dtype)
    activations = {name: scheme.activation for name, scheme in plan.schemes.items() if scheme.activation is not None}
    found = measure_ranges(
        checkpoint, needed, windows.ids, cache=plan.needs_kv_ranges,
        dtype=compute_dtype(settings.compute, run.device), device=run.device, options=prepared.options,
        progress=progress, method=settings.activation_range, percentile=settings.activation_percentile,
        activations=activations,
    )  # fmt: skip
    plan = replace(
        plan,
        input_absmax=plan.input_absmax | found.inputs,
        kv_absmax=plan.kv_absmax if found.cache is None else found.cache.absmax(),
        notes=(*plan.notes, *found.notes),
    )
    return replace(prepared, plan=plan, calibration=CalibrationText.of(windows))
