"""lowbit imatrix beside llama-imatrix on the same model and text: time, CPU time, and how far apart the values are.

    python benchmarks/imatrix.py LLAMA_IMATRIX MODEL-F32.gguf --text TEXT --samples 128 --threads 2

llama-imatrix runs as its users run it (`--no-ppl -ngl 0`), and with --exact once more with a float32 KV cache:
its default rounds keys and values to float16, which is most of the difference in the values. An F32 GGUF of a model is
what `lowbit quantize MODEL -o x.gguf --scheme F32` writes.

CPU seconds are user and system time of the process: where other work runs they say more than wall time. Both
programs wait for their threads by spinning, so compare them with --threads 1 there.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lowbit.formats.gguf.imatrix_file import read_imatrix
from lowbit.formats.gguf.importance import ImportanceMatrix

WINDOW_TOKENS = 512
EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")


@dataclass(frozen=True)
class Run:
    name: str
    wall: float
    cpu: float
    matrix: ImportanceMatrix


def run(name: str, command: list[str], output: Path, threads: int) -> Run:
    before, began = _children_cpu(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return Run(name, time.perf_counter() - began, _children_cpu() - before, read_imatrix(output))


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def apart(one: ImportanceMatrix, two: ImportanceMatrix) -> str:
    """The worst relative difference of a tensor (norms) and of a single channel."""
    norms, channels = [], []
    for name, entry in one.entries.items():
        other, difference = two.entries[name], entry.values - two.entries[name].values
        norms.append((difference.norm() / other.values.norm()).item())
        channels.append((difference.abs() / other.values.clamp(min=1e-20)).max().item())
    return f"tensors {max(norms):.1e}, channels {max(channels):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_imatrix")
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--exact", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for name, extra in (("llama-imatrix", ()), ("llama-imatrix, KV cache F32", EXACT))[: 1 + given.exact]:
            output = Path(folder) / f"{len(runs)}.gguf"
            command = [given.llama_imatrix, "-m", given.model, "-f", given.text, "-o", str(output), "--no-ppl",
                       "-ngl", "0", "-c", str(WINDOW_TOKENS), "--chunks", str(given.samples), "-t", str(given.threads),
                       *extra]  # fmt: skip
            runs.append(run(name, command, output, given.threads))
        for dtype in given.dtype:
            output = Path(folder) / f"{len(runs)}.gguf"
            command = [sys.executable, "-m", "lowbit", "imatrix", given.model, "-o", str(output), "--calib", given.text,
                       "--samples", str(given.samples), "--seqlen", str(WINDOW_TOKENS), "--dtype", dtype]  # fmt: skip
            runs.append(run(f"lowbit, {dtype}", command, output, given.threads))
    print(f"{given.samples} x {WINDOW_TOKENS} tokens, {given.threads} threads, {os.cpu_count()} cores")
    for each in runs:
        difference = apart(each.matrix, runs[given.exact].matrix)
        times = f"wall {each.wall:7.1f} s   cpu {each.cpu:7.1f} s"
        print(f"{each.name:30} {times}   from {runs[given.exact].name}: {difference}")


if __name__ == "__main__":
    main()
