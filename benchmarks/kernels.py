"""Speed of the inner loops on one thread, per instruction set.

    python benchmarks/kernels.py [--dtype bfloat16] [--group-size 128] [--isa avx512 --isa reference …]

Prints one table: kernel × instruction set, million weights per second, best of several repeats over a slab of rows that
stays in the second-level cache (256 × 1024 weights; bytes read and written per weight differ by kernel). The reference
is torch on one thread. It needs no model and takes less than half a minute.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from lowbit import kernels
from lowbit.kernels.tables import E2M1, E4M3

ROWS, COLUMNS = 256, 1024
SECONDS_PER_CELL = 0.1


def cases(dtype: torch.dtype, group_size: int) -> dict[str, Callable[[], object]]:
    """Name → a call that processes ROWS × COLUMNS weights."""
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    low, high = kernels.group_range(w, group_size)
    scale = (high - low) / 15
    zero_point = (-8 - torch.round(low / scale)).to(torch.int32)
    fp_scale = {fmt: torch.maximum(-low, high) / fmt.max_value for fmt in (E4M3, E2M1)}
    importance = torch.rand(COLUMNS) + 0.5
    codes = kernels.round_int(w, group_size, scale, None, -8, 7)
    fp_codes = kernels.round_minifloat(w, group_size, fp_scale[E4M3], E4M3)
    small_codes = codes >> 1
    packed = {bits: kernels.pack_dense(small_codes, bits) for bits in (3, 4)}
    return {
        "group_range": lambda: kernels.group_range(w, group_size),
        "round_int": lambda: kernels.round_int(w, group_size, scale, None, -8, 7),
        "round_int, zero points": lambda: kernels.round_int(w, group_size, scale, zero_point, -8, 7),
        "error_int": lambda: kernels.error_int(w, group_size, scale, None, -8, 7),
        "error_int, importance": lambda: kernels.error_int(w, group_size, scale, zero_point, -8, 7, importance),
        "decode_int": lambda: kernels.decode_int(codes, group_size, scale, zero_point),
        "round_minifloat e4m3": lambda: kernels.round_minifloat(w, group_size, fp_scale[E4M3], E4M3),
        "round_minifloat e2m1": lambda: kernels.round_minifloat(w, group_size, fp_scale[E2M1], E2M1),
        "error_minifloat e2m1": lambda: kernels.error_minifloat(w, group_size, fp_scale[E2M1], E2M1, importance),
        "decode_table e4m3": lambda: kernels.decode_table(fp_codes, group_size, fp_scale[E4M3], E4M3),
        "squared_error": lambda: kernels.squared_error(w, codes, group_size, scale),
        "pack_dense 3 bits": lambda: kernels.pack_dense(small_codes, 3),
        "pack_dense 4 bits": lambda: kernels.pack_dense(codes, 4),
        "pack_dense 8 bits": lambda: kernels.pack_dense(codes, 8),
        "unpack_dense 3 bits": lambda: kernels.unpack_dense(packed[3], 3, COLUMNS),
        "unpack_dense 4 bits": lambda: kernels.unpack_dense(packed[4], 4, COLUMNS),
    }


def million_weights_per_second(call: Callable[[], object]) -> float:
    """Best of the repeats that fit into SECONDS_PER_CELL."""
    call()
    best, deadline = float("inf"), time.perf_counter() + SECONDS_PER_CELL
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return ROWS * COLUMNS / best / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--isa", action="append", choices=kernels.available_isas())
    options = parser.parse_args()
    torch.set_num_threads(1)
    isas = options.isa or kernels.available_isas()
    calls = cases(getattr(torch, options.dtype), options.group_size)
    table = Table(
        title=f"million weights per second, {options.dtype}, group {options.group_size}, 1 thread, {_machine()}",
        title_justify="left",
    )
    table.add_column("kernel")
    for isa in isas:
        table.add_column(isa, justify="right")
    for name, call in calls.items():
        cells = []
        for isa in isas:
            with kernels.use_isa(isa):
                cells.append(f"{million_weights_per_second(call):,.0f}")
        table.add_row(name, *cells)
    Console(file=sys.stdout, width=120).print(table)


def _machine() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            model = next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), "")
    except OSError:
        model = platform.processor()
    return f"{model or platform.machine()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
