"""What starting costs, in multiples of what an empty Python process and `import torch` cost on the same machine.

    python benchmarks/startup.py [--repeats 9]

Every row is a fresh process; its time is the least of all repeats, in which the rows take turns, so that other work of
the machine falls on all of them alike. Ratios are what to compare between machines and versions: `lowbit --help` should
stay a small multiple of an empty process, and far below `import torch`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

COMMAND = "import sys; sys.argv[1:] = {flags!r}; from lowbit.cli.main import run; run()"
ROWS = {
    "an empty process": "pass",
    "import torch": "import torch",
    "import lowbit": "import lowbit",
    "lowbit --help": COMMAND.format(flags=["--help"]),
    "lowbit quantize --help": COMMAND.format(flags=["quantize", "--help"]),
}


def seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    least = {name: min(times) for name, times in zip(
        ROWS, zip(*([seconds(code) for code in ROWS.values()] for _ in range(repeats)), strict=True), strict=True
    )}  # fmt: skip
    empty, torch = least["an empty process"], least["import torch"]
    table = Table("", "seconds", "empty processes", "of import torch")
    for name, taken in least.items():
        table.add_row(name, f"{taken:.3f}", f"{taken / empty:.1f}", f"{taken / torch:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
