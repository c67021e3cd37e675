"""This machine as a `Device`: measured in about a second, since no data sheet knows its memory modules.

    bandwidth   bytes read per second: the quickest of some sums over an array of READ_BYTES, on all cores. Decoding
                reads every weight once and writes next to nothing, so reading is what counts (a copy would be slower)
    peak        2 · n³ / seconds of the quickest product of two n × n matrices, in float32, bfloat16 and int8

Both are what torch reaches, not what the makers promise; the models of speed take them as they take a data sheet's. A
busy machine measures less. With a CUDA card in the machine `this_machine` is the card: a row of the table where its
name is in there, else bandwidth and bfloat16 peak measured in the same way.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from lowbit.hardware.device import Device

READ_BYTES = 512 * 1024 * 1024  # larger than the caches of anything sold; a quarter of the memory where that is less
_PRODUCT_SIDE = 1536
_SECONDS_EACH = 0.25
_MEMORY_TOLERANCE = 0.15


def this_machine() -> Device:
    """The first CUDA card if there is one, else the processor; measured, once a process."""
    import torch

    return _this_card() if torch.cuda.is_available() else this_processor()


@lru_cache(maxsize=1)
def this_processor() -> Device:
    """The processors and the memory of this machine."""

    memory = machine_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with _threads(cores):
        bandwidth = _reading_speed(min(READ_BYTES, memory // 4))
        peak = _processor_peaks()
    return Device(
        "this",
        f"{_processor_name()} ({cores} core{'s' * (cores != 1)})",
        "cpu",
        memory,
        bandwidth,
        peak,
        f"measured on this machine, {cores} threads: sums over {READ_BYTES >> 20} MiB, products of "
        f"{_PRODUCT_SIDE} × {_PRODUCT_SIDE} matrices",
    )


def _reading_speed(size: int, device: str = "cpu", finish: Callable[[], object] = lambda: None) -> float:
    """bytes/s of the quickest sum over an array of `size` bytes."""
    import torch

    values = torch.ones(size // 4, dtype=torch.float32, device=device)
    return values.nbytes / _quickest(lambda: values.sum(), finish)


def _processor_peaks() -> dict[str, float]:
    import torch

    side = _PRODUCT_SIDE
    floats = torch.randn(side, side)
    halves = floats.bfloat16()
    codes = torch.randint(-127, 127, (side, side), dtype=torch.int8)
    products: dict[str, Callable[[], object]] = {
        "f32": lambda: floats @ floats,
        "bf16": lambda: halves @ halves,
        "int8": lambda: torch._int_mm(codes, codes),  # pyright: ignore[reportPrivateImportUsage]
    }
    peaks = {dtype: 2 * side**3 / _quickest(product) for dtype, product in products.items()}
    # A processor without instructions for a dtype converts it, and is slower than in float32: no peak of its own.
    return {dtype: value for dtype, value in peaks.items() if dtype == "f32" or value > peaks["f32"]}


@lru_cache(maxsize=1)
def _this_card() -> Device:
    import torch

    from lowbit.hardware.lookup import plain
    from lowbit.hardware.table import ALIASES, DEVICES

    card = torch.cuda.get_device_properties(0)
    capability = (card.major, card.minor)
    known = {plain(row): row for row in DEVICES} | ALIASES
    matching = [row for spelling, row in known.items() if plain(card.name).startswith(spelling)]
    if matching and torch.version.hip is None:
        row = DEVICES[max(matching, key=len)]
        alike = abs(card.total_memory / row.memory_bytes - 1) < _MEMORY_TOLERANCE
        if row.compute_capability == capability and alike:  # an "RTX 4090 Laptop GPU" is not the desktop's card
            return replace(row, name="this", label=card.name, memory_bytes=card.total_memory)
    bandwidth = _reading_speed(min(2 << 30, card.total_memory // 4), "cuda", torch.cuda.synchronize)
    matrix = torch.randn(8192, 8192, device="cuda").bfloat16()
    peak = 2 * 8192**3 / _quickest(lambda: matrix @ matrix, torch.cuda.synchronize)
    kind = "cuda" if torch.version.hip is None else "rocm"
    return Device("this", card.name, kind, card.total_memory, bandwidth, {"bf16": peak, "fp16": peak},
                  "measured on this machine: sums over 2 GiB, products of 8192 × 8192 matrices in bfloat16",
                  capability if kind == "cuda" else None)  # fmt: skip


def _quickest(work: Callable[[], object], finish: Callable[[], object] = lambda: None) -> float:
    """Seconds of the quickest of the runs that fit in `_SECONDS_EACH`, of at least three; the first is not counted."""
    work()
    finish()
    began, best, runs = time.perf_counter(), float("inf"), 0
    while runs < 3 or time.perf_counter() - began < _SECONDS_EACH:
        start = time.perf_counter()
        work()
        finish()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine_memory() -> int:
    """Bytes of memory of this machine, as the operating system counts them."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return " ".join(line.split(":", 1)[1].replace("(R)", "").replace("(TM)", "").split())
    return platform.processor() or platform.machine()
