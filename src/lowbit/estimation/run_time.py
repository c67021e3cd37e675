"""Disk and time of the quantization itself, and the rates that times follow from.

    disk    the files + of a calibrated run, codes of every block beside them, and hidden states that do not fit
    time    read + round + write + verify, and of a calibrated run: forward passes + Hessians + rounding with feedback

Work is counted, in bytes, weights and operations, and divided by rates. Operations of a calibrated run, T tokens, per
linear [N, K]:

    forward     2 N K T · passes      one in the quantized stream, two with transforms; one in the unquantized stream
    Hessian     K² T per input, and 2 K² T for the difference to the unquantized stream; with weights of tokens, K² T
                more per linear and group of rows
    gradients   with weights of tokens: three passes, and three times the head
    GPTQ        N K², at a rate of its own: updates of later columns, a sweep of refinement, the errors reported; with
                feedback between rows _ROW_BY_ROW times as much, and N² T for the curvature of the outputs

Rates are constants, or measured in under two seconds:

    rounding     weights per second and thread, of every number format in the plan: a slab of random weights is rounded
    products     operations per second and thread of a matrix product in the compute dtype (a multiplication and an
                 addition are two)
    write        bytes per second of a file that is flushed to the disk, in the folder of the output

Rates are per second of thread CPU time, so that a busy machine gives the same ones. Times are accurate to a factor:
SPREAD with the constants (docs/benchmarks.md), MEASURED_SPREAD with measured rates.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from lowbit.architecture import Architecture
from lowbit.architecture.shape import ModelShape
from lowbit.architecture.structure import Linear
from lowbit.distillation.descent import EVALUATIONS, PASSES, Split, windows_per_step
from lowbit.distillation.memory import distillation_dtype
from lowbit.distillation.rotations import rotation_steps
from lowbit.estimation.result import Run
from lowbit.estimation.run_memory import hidden_state_bytes, source_shape, two_streams
from lowbit.methods import parse_method
from lowbit.numerics.precision import compute_dtype
from lowbit.plan.plan import Making, PlannedTensor, Prepared
from lowbit.rounding.row_feedback import parts_of
from lowbit.rounding.target import GridTarget, Target
from lowbit.settings import MEASURE, Settings

SPREAD, MEASURED_SPREAD = 3.0, 1.7
_ROWS, _COLUMNS = 128, 2048
_WRITTEN = 32 << 20
_SIDE = 768
_SECONDS = 0.15
_ROW_BY_ROW = 8  # few rows at a time: the search of their scales dominates

# Weights per second and core if nothing is measured, by the search effort of a format: docs/benchmarks.md, halved for
# its two cores.
_ROUNDING = {"plain": 3e8, "searched": 7e7, "legacy": 2e8, "kquant": 9e7, "iquant": 3e7}
# Operations per second and core: bfloat16 with AMX, the others with AVX2.
_PRODUCTS = {torch.float32: 8e10, torch.bfloat16: 5e11, torch.float16: 8e10}
_WRITE, _READ = 5e8, 1e9
VERIFIED = 1e8  # weights that verification decodes and compares, per second and core
# N·K² of linears [N, K] per second and core, in error feedback: 26 s for SmolLM2-135M on two (docs/benchmarks.md).
FEEDBACK = 1.7e9
_EFFICIENCY = 0.5  # of many small products with Python between them, against one large product
_PROGRAM_SECONDS = 3.0  # imports, plan, report


def run_of(prepared: Prepared, memory: dict[str, int], rates: Rates) -> Run:
    """Disk, memory and time of the run on this machine. memory: of `peak_memory`."""
    settings, shape = prepared.plan.settings, source_shape(prepared)
    work = _work(prepared, shape, rates)
    seconds = sum(work.values())
    disk = prepared.plan.file_bytes
    if settings.is_blockwise:
        disk *= settings.copies_on_disk
        if shape is not None:
            disk += max(0, hidden_state_bytes(settings, shape) - memory.get("hidden states", 0))
    spread = (seconds / rates.spread, seconds * rates.spread)
    return Run(disk, sum(memory.values()), memory, spread, work, prepared.threads)


def _work(prepared: Prepared, shape: ModelShape | None, rates: Rates) -> dict[str, float]:
    """Kind of work → seconds."""
    plan, settings, threads = prepared.plan, prepared.plan.settings, prepared.threads
    source = sum(tensor.source_bytes for tensor in plan.tensors)
    weights = sum(tensor.weights for tensor in plan.tensors)
    rounding = 0.0
    for tensor in plan.quantized:
        if tensor.making is Making.rounded:
            rounding += tensor.weights / rates.rounding[tensor.stored_as]
    work = {
        "program": _PROGRAM_SECONDS,
        "read": source / rates.read,
        "round": rounding / threads,
        "write": plan.file_bytes / rates.write,
        "verify": weights / VERIFIED / threads,
    }
    measures = settings.is_blockwise or settings.kv_cache is not None or settings.imatrix == MEASURE
    architecture = plan.architecture
    if measures and shape is not None and architecture is not None:
        work |= _calibration(architecture, settings, shape, rates, threads)
    return work


def _calibration(
    architecture: Architecture, settings: Settings, shape: ModelShape, rates: Rates, threads: int
) -> dict[str, float]:
    method = parse_method(settings.method)
    tokens = settings.samples * settings.seqlen
    linears = [linear for linear in architecture.linears.values() if linear.block is not None]
    two = two_streams(settings)
    passes = 1 + two + bool(settings.is_blockwise and method.transforms)
    products = gram = feedback = gradients = 0.0
    groups = settings.hessian_groups
    seen: set[str] = set()
    for linear in linears:
        rows, columns = linear.shape
        share = 1.0 if linear.expert is None or not shape.experts else shape.experts_per_token / shape.experts
        products += 2 * rows * columns * tokens * passes * share
        weighed = groups if linear.expert is None else 0
        gradients += 2 * rows * columns * tokens * share * 3 if groups else 0
        if settings.is_blockwise and linear.reads is not None:
            own = 0 if linear.reads in seen else 3 if two else 1
            gram += columns**2 * tokens * share * (own + weighed)
            seen.add(linear.reads)
        if method.rounding.needs_hessian:
            feedback += rows * columns**2 * (_ROW_BY_ROW if settings.feeds_rows and linear.expert is None else 1)
            gram += sum((part.stop - part.start) ** 2 for part in parts_of(rows)) * tokens if settings.feeds_rows else 0
    per_second = rates.products * threads * _EFFICIENCY
    work = {"forward": products / per_second}
    if groups:
        gradients += 2 * shape.vocab * shape.hidden * tokens * 3
        work["gradients"] = gradients / per_second
    if settings.is_blockwise:
        work |= {"Hessians": gram / per_second, "rounding with feedback": feedback / FEEDBACK / threads}
    if method.learned:  # forward and backward of a batch of 8 windows, for every step
        batch = min(8, settings.samples) * settings.seqlen
        weights = sum(math.prod(linear.shape) for linear in linears)
        work["learning"] = 6 * weights * batch * settings.iterations / per_second
    dtype, exact = compute_dtype(settings.compute), distillation_dtype(settings)
    slower = _PRODUCTS.get(dtype, _PRODUCTS[torch.float32]) / _PRODUCTS.get(exact, _PRODUCTS[torch.float32])
    if method.learns_rotations:
        steps = rotation_steps(settings, settings.samples, settings.seqlen)
        folded = 8 * steps * shape.hidden * sum(math.prod(linear.shape) for linear in linears)  # and back
        work["rotations"] = (
            (_descent(steps, settings.samples, settings.seqlen, shape, linears) + folded) * slower / per_second
        )
    if method.finish:
        samples = settings.learned_windows
        batch = windows_per_step(samples, settings.seqlen)
        steps = settings.distill_steps or PASSES * (len(Split.of(samples).train) // batch)
        work["distillation"] = _descent(steps, samples, settings.seqlen, shape, linears) * slower / per_second
    return work


def _descent(steps: int, samples: int, seqlen: int, shape: ModelShape, linears: list[Linear]) -> float:
    """Floating point operations. Of a step: two forward passes and a backward pass through blocks, the teacher's head,
    the student's with its gradient. Of an evaluation: a forward pass and both heads."""
    weights = sum(
        math.prod(linear.shape) * (1.0 if linear.expert is None or not shape.experts else
                                   shape.experts_per_token / shape.experts) for linear in linears
    )  # fmt: skip
    head, split = shape.vocab * shape.hidden, Split.of(samples)
    batch = windows_per_step(samples, seqlen)
    trained, judged = steps * batch, (EVALUATIONS + 1) * len(split.held_out)
    windows = trained * (8 * weights + 6 * head) + judged * (2 * weights + 4 * head) + samples * 2 * weights
    return windows * seqlen


@dataclass(frozen=True)
class Rates:
    """Per second; `rounding` by the name of the scheme or ggml type, of one thread."""

    rounding: dict[str, float] = field(default_factory=dict)
    products: float = _PRODUCTS[torch.float32]
    write: float = _WRITE
    read: float = _READ
    measured: bool = False

    @property
    def spread(self) -> float:
        """The true time is between 1/spread and spread times the predicted one."""
        return MEASURED_SPREAD if self.measured else SPREAD


def assumed_rates(prepared: Prepared, compute: str) -> Rates:
    """The constants, for the formats of a plan."""
    rounding = {name: _ROUNDING[effort] for name, (effort, _) in _roundings(prepared).items()}
    return Rates(rounding, _PRODUCTS.get(compute_dtype(compute), _PRODUCTS[torch.float32]))


def measure_rates(prepared: Prepared, compute: str, folder: Path | None = None) -> Rates:
    """Rates measured now, with one thread; folder: of the output."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounding = {
            name: _ROWS * _COLUMNS / _seconds(round_slab) for name, (_, round_slab) in _roundings(prepared).items()
        }
        dtype = compute_dtype(compute)
        left = torch.ones(_SIDE, _SIDE, dtype=dtype)
        products = 2 * _SIDE**3 / _seconds(lambda: left @ left)
    finally:
        torch.set_num_threads(threads)
    return Rates(rounding, products, _write_rate(folder), measured=True)


def _roundings(prepared: Prepared) -> dict[str, tuple[str, Callable[[], object]]]:
    """Name of each scheme or ggml type in the plan → (a key of `_ROUNDING`, function that rounds a random slab)."""
    roundings: dict[str, tuple[str, Callable[[], object]]] = {}
    weight = torch.randn(_ROWS, _COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02
    for tensor in prepared.plan.quantized:
        target: Target | None = tensor.target
        if target is None or tensor.making is not Making.rounded or tensor.stored_as in roundings:
            continue
        target = target.with_range([weight])
        importance = None if tensor.importance is None else torch.ones(_COLUMNS)
        roundings[tensor.stored_as] = (_effort(tensor), partial(target.encode, weight, importance))
    return roundings


def _effort(tensor: PlannedTensor) -> str:
    """The search effort of rounding: a key of `_ROUNDING`."""
    if isinstance(tensor.target, GridTarget):
        return "plain" if tensor.target.search.method == "absmax" else "searched"
    name = tensor.stored_as
    if name.startswith("IQ4") or name.endswith("_K"):
        return "kquant"
    return "iquant" if name.startswith("IQ") else "legacy"


def _seconds(call: Callable[[], object]) -> float:
    """Least thread time of a few calls, after one to warm up."""
    call()
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < _SECONDS:
        start = time.thread_time()
        call()
        best = min(best, time.thread_time() - start)
    return max(best, 1e-9)


def _write_rate(folder: Path | None) -> float:
    data = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(_WRITTEN >> 20):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return _WRITTEN / (time.perf_counter() - start)
    except OSError:
        return _WRITE
