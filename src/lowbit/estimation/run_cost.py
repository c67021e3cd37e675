"""Disk and time of the quantization itself.

    disk    the files + of a calibrated run, decided codes of every block beside them, and hidden states that do not fit
    time    read + round + write + verify, and of a calibrated run: forward passes + Hessians + rounding with feedback

Work is counted, in bytes, weights and operations, and divided by rates (`rates.py`). Operations of a calibrated run, T
tokens, per linear [N, K]:

    forward     2 N K T · passes      one in the quantized stream, two where transforms look first; one in the other
    Hessian     K² T per input, and 2 K² T for what the unquantized stream differs by
    GPTQ        N K², at a rate of its own: updates of later columns, a sweep of refinement, the errors reported
"""

from __future__ import annotations

import math

from lowbit.architecture import Architecture
from lowbit.estimation.rates import FEEDBACK, VERIFIED, Rates
from lowbit.estimation.result import Run
from lowbit.estimation.run_memory import RunMemory, hidden_state_bytes, two_streams
from lowbit.estimation.shapes import ModelShape
from lowbit.gguf_pipeline import PreparedGGUF
from lowbit.methods import parse_method
from lowbit.pipeline import Prepared
from lowbit.settings import Settings

# Small products and Python between them reach a part of what one large product does.
_EFFICIENCY = 0.5
_PROGRAM_SECONDS = 3.0  # imports, plan, report


def run_of(
    prepared: Prepared | PreparedGGUF,
    settings: Settings,
    shape: ModelShape | None,
    memory: RunMemory,
    rates: Rates,
    threads: int,
) -> Run:
    """What the run costs on this machine."""
    work = _work(prepared, settings, shape, rates, threads)
    seconds = sum(work.values())
    disk = prepared.plan.file_bytes
    if settings.is_blockwise:
        disk *= 2
        if shape is not None:
            disk += max(0, hidden_state_bytes(settings, shape) - memory.parts.get("hidden states", 0))
    spread = (seconds / rates.spread, seconds * rates.spread)
    return Run(disk, memory.peak, memory.parts, spread, work, threads)


def _work(
    prepared: Prepared | PreparedGGUF, settings: Settings, shape: ModelShape | None, rates: Rates, threads: int
) -> dict[str, float]:
    """Kind of work → seconds."""
    plan = prepared.plan
    source = sum(tensor.source_bytes for tensor in plan.tensors)
    weights = sum(tensor.weights for tensor in plan.tensors)
    rounding = 0.0
    for tensor in plan.quantized:
        decided = settings.is_blockwise and tensor.block is not None
        if not (tensor.repack or decided) and tensor.scheme is not None:
            name = tensor.kind.name if not hasattr(tensor, "linear") else tensor.scheme.name  # type: ignore[union-attr]
            rounding += tensor.weights / rates.rounding[name]
    work = {
        "program": _PROGRAM_SECONDS,
        "read": source / rates.read,
        "round": rounding / threads,
        "write": plan.file_bytes / rates.write,
        "verify": weights / VERIFIED / threads,
    }
    measures = settings.is_blockwise or getattr(plan, "needs_kv_ranges", False) or settings.imatrix == "measure"
    architecture = _architecture(prepared)
    if measures and shape is not None and architecture is not None:
        work |= _calibration(architecture, settings, shape, rates, threads)
    return work


def _architecture(prepared: Prepared | PreparedGGUF) -> Architecture | None:
    return prepared.architecture if isinstance(prepared, PreparedGGUF) else prepared.plan.architecture


def _calibration(
    architecture: Architecture, settings: Settings, shape: ModelShape, rates: Rates, threads: int
) -> dict[str, float]:
    method = parse_method(settings.method)
    tokens = settings.samples * settings.seqlen
    linears = [linear for linear in architecture.linears.values() if linear.block is not None]
    two = two_streams(settings)
    passes = 1 + two + bool(settings.is_blockwise and method.transforms)
    products = gram = feedback = 0.0
    seen: set[str] = set()
    for linear in linears:
        rows, columns = linear.shape
        share = 1.0 if linear.expert is None or not shape.experts else shape.experts_per_token / shape.experts
        products += 2 * rows * columns * tokens * passes * share
        if settings.is_blockwise and linear.reads is not None and linear.reads not in seen:
            seen.add(linear.reads)
            gram += columns**2 * tokens * share * (3 if two else 1)
        feedback += rows * columns**2 if "gptq" in method.roundings else 0
    per_second = rates.products * threads * _EFFICIENCY
    work = {"forward": products / per_second}
    if settings.is_blockwise:
        work |= {"Hessians": gram / per_second, "rounding with feedback": feedback / FEEDBACK / threads}
    if method.learns:  # forward and backward of a batch of 8 windows, for every step
        batch = min(8, settings.samples) * settings.seqlen
        work["learning"] = sum(6 * math.prod(each.shape) * batch * settings.iterations for each in linears) / per_second
    return work
