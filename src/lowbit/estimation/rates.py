"""How fast this machine rounds, multiplies and writes: constants, or measured in under two seconds.

    rounding     weights per second and thread, of every number format in the plan: a slab of random weights is rounded
    products     operations per second and thread of a matrix product in the compute dtype (a multiplication and an
                 addition are two)
    write        bytes per second of a file that is flushed to the disk, in the folder of the output

Seconds are those of the thread's processor, so that a busy machine gives the same rates. A time made of them is good to
a factor: SPREAD of constants (docs/benchmarks.md), MEASURED_SPREAD of measured ones.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowbit.calibrate.precision import compute_dtype
from lowbit.gguf_pipeline import PreparedGGUF
from lowbit.numerics import ggml
from lowbit.pipeline import Prepared, grid_of, search_of
from lowbit.rounding.rtn import measure_range, needs_tensor_range, round_to_nearest

SPREAD, MEASURED_SPREAD = 3.0, 1.7
_ROWS, _COLUMNS = 128, 2048
_WRITTEN = 32 << 20
_SIDE = 768
_SECONDS = 0.15

# Weights per second and core where nothing is measured, by how much a format searches: docs/benchmarks.md, halved for
# its two cores.
_ROUNDING = {"plain": 3e8, "searched": 7e7, "legacy": 2e8, "kquant": 9e7, "iquant": 3e7}
# Operations per second and core: bfloat16 where it is fast (AMX), else AVX2.
_PRODUCTS = {torch.float32: 8e10, torch.bfloat16: 5e11, torch.float16: 8e10}
_WRITE, _READ = 5e8, 1e9
# Weights that verification decodes and compares per second and core.
VERIFIED = 1e8
# N·K² of a linear [N, K] that rounding with error feedback gets through per second and core: 26 s for SmolLM2-135M on
# two (docs/benchmarks.md).
FEEDBACK = 1.7e9


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
        """A time is between 1/spread and spread times what these rates give."""
        return MEASURED_SPREAD if self.measured else SPREAD


def assumed_rates(prepared: Prepared | PreparedGGUF, compute: str) -> Rates:
    """The constants, for what is in a plan."""
    rounding = {name: _ROUNDING[_effort(name, prepared)] for name in _examples(prepared)}
    return Rates(rounding, _PRODUCTS.get(compute_dtype(compute), _PRODUCTS[torch.float32]))


def measure_rates(prepared: Prepared | PreparedGGUF, compute: str, folder: Path | None = None) -> Rates:
    """Measured now, with one thread; folder  where the output would be written."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounding = {name: _ROWS * _COLUMNS / _seconds(call) for name, call in _examples(prepared).items()}
        dtype = compute_dtype(compute)
        left = torch.ones(_SIDE, _SIDE, dtype=dtype)
        products = 2 * _SIDE**3 / _seconds(lambda: left @ left)
    finally:
        torch.set_num_threads(threads)
    return Rates(rounding, products, _write_rate(folder), measured=True)


def _examples(prepared: Prepared | PreparedGGUF) -> dict[str, Callable[[], object]]:
    """Name of each scheme or type in the plan → what rounds a slab of it."""
    found: dict[str, Callable[[], object]] = {}
    weight = torch.randn(_ROWS, _COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02
    if isinstance(prepared, PreparedGGUF):
        for tensor in prepared.plan.quantized:
            name = tensor.kind.name
            if not tensor.copied and name not in found:
                importance = torch.ones(_COLUMNS) if prepared.matrix is not None else None
                found[name] = lambda name=name, importance=importance: ggml.encode(name, weight, importance)
        return found
    for tensor in prepared.plan.quantized:
        scheme = tensor.scheme
        if scheme is None or scheme.name in found:
            continue
        grid, search, spec = grid_of(tensor, prepared.plan), search_of(scheme, prepared.plan), scheme.weight
        whole = measure_range(weight, spec) if needs_tensor_range(spec) else None
        found[scheme.name] = lambda spec=spec, grid=grid, search=search, whole=whole: round_to_nearest(
            weight, spec, grid, search, whole
        )
    return found


def _effort(name: str, prepared: Prepared | PreparedGGUF) -> str:
    if isinstance(prepared, PreparedGGUF):
        if name.startswith("IQ") and not name.startswith("IQ4"):
            return "iquant"
        return "kquant" if name.endswith("_K") or name.startswith("IQ4") else "legacy"
    scheme = next(tensor.scheme for tensor in prepared.plan.quantized if tensor.scheme and tensor.scheme.name == name)
    return "plain" if search_of(scheme, prepared.plan).method == "absmax" else "searched"


def _seconds(call: Callable[[], object]) -> float:
    """Of one call, by the thread's clock, after one to warm up; the least of a few."""
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
