"""Looks a device up by name, or measures this machine in about a second.

    bandwidth   bytes read per second: the fastest of some sums over an array of READ_BYTES, on all cores. Decoding
                reads every weight once and writes next to nothing, so reads count (a copy would be slower)
    peak        2 · n³ / seconds of the fastest product of two n × n matrices, in float32, bfloat16 and int8

Both are rates that torch reaches; the models of speed use them in place of a data sheet's. A busy machine measures
less. With a CUDA card, `this_machine` is the card: its row of the table if there is one, else bandwidth and bfloat16
peak measured the same way.
"""

from __future__ import annotations

import difflib
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from lowbit.errors import UsageError
from lowbit.hardware.table import ALIASES, DEVICES, Device, Kind

READ_BYTES = 512 * 1024 * 1024  # larger than the caches of anything sold; a quarter of the memory where that is less
_PRODUCT_SIDE = 1536
_SECONDS_EACH = 0.25
_MEMORY_TOLERANCE = 0.15
_SEVERAL = re.compile(r"(\d{1,9})\s*[x×*]\s*(\D.*|\d{4}.*)", re.IGNORECASE)  # 2xA100, 4 × 4090
_MOST_CARDS = 64
# Words that say nothing which the rest of the name does not.
_NOISE = ("nvidia", "geforce", "apple", "amd", "tensorcore", "gpu", "instinct")


def find_device(name: str) -> Device:
    """The device called `name`, in any spelling: "H100", "rtx 4090", "NVIDIA A100 40GB", "M2 Max", "this", "cpu".

    "2xA100" is two of them. "this" and "cpu" measure for a second or two. UsageError names the nearest rows of the
    table.
    """
    several = _SEVERAL.fullmatch(name.strip())
    if several is not None:
        return _several(int(several[1]), several[2])
    typed = plain(name)
    if typed in ("this", "local", "cpu"):
        return this_processor() if typed == "cpu" else this_machine()
    known = {plain(row): row for row in DEVICES} | ALIASES
    row = known.get(typed) or known.get(typed.removeprefix("rtx")) or known.get(f"rtx{typed}")
    if row is not None:
        return DEVICES[row]
    near = list(dict.fromkeys(known[found] for found in difflib.get_close_matches(typed, known, n=5, cutoff=0.5)))[:3]
    raise UsageError(
        f"there is no device {name!r} in the table",
        f"did you mean {', '.join(near)}?" if near else f"choose one of {', '.join(DEVICES)}, this, cpu",
    )


def _several(count: int, name: str) -> Device:
    device = find_device(name)
    if not 1 <= count <= _MOST_CARDS:
        raise UsageError(f"{count} cards are not something a model is served from", f"give 1 to {_MOST_CARDS}")
    if count > 1 and device.kind in ("cpu", "metal"):
        raise UsageError(f"{device.label} is not a card of which there are several", f"give {name} alone")
    return device.times(count)


def plain(name: str) -> str:
    """Letters and digits in lower case, without the maker's name: "NVIDIA H100 80GB" → "h10080gb"."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    for word in _NOISE:
        letters = letters.replace(word, "")
    return letters


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
    source = (f"measured on this machine, {cores} threads: sums over {READ_BYTES >> 20} MiB, products of "
              f"{_PRODUCT_SIDE} × {_PRODUCT_SIDE} matrices")  # fmt: skip
    label = f"{_processor_name()} ({cores} core{'s' * (cores != 1)})"
    return Device("this", label, "cpu", memory, bandwidth, peak, source)


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
    kind: Kind = "cuda" if torch.version.hip is None else "rocm"
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
