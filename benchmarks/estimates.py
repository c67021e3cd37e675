"""Estimates beside what happened: file bytes, peak memory and time of `lowbit quantize`, for runs of several kinds.

    python benchmarks/estimates.py demo:smollm2 [MODEL …] [--samples 128] [--only rtn] [--measure]

Each run is two commands, `lowbit estimate … --json` and `lowbit quantize … --json`, so that both start as a user's do.
Peak memory is that of the run's report. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

# what it shows → output and settings
RUNS = {
    "rtn, folder": ("out", ["--scheme", "W4A16"]),
    "rtn, 8 bits": ("out", ["--scheme", "FP8_DYNAMIC"]),
    "rtn, transposed": ("out", ["--scheme", "W4A16", "--format", "gptq"]),
    "rtn, GGUF": ("out.gguf", ["--scheme", "Q4_K_M"]),
    "gptq, folder": ("out", ["--scheme", "W4A16", "--method", "gptq"]),
    "gptq, GGUF": ("out.gguf", ["--scheme", "Q4_K_M", "--method", "gptq"]),
    "awq, folder": ("out", ["--scheme", "W4A16", "--method", "awq"]),
}


def lowbit(*arguments: str) -> dict:
    """What a command prints as JSON."""
    done = subprocess.run([sys.executable, "-m", "lowbit", *arguments, "--json"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    if done.returncode:
        sys.exit(f"lowbit {' '.join(arguments)}\n{done.stderr}")
    return json.loads(done.stdout)


def row(model: str, name: str, samples: int, measure: bool) -> str:
    """One line of the table."""
    output, settings = RUNS[name]
    if not name.startswith("rtn"):
        settings = [*settings, "--samples", str(samples)]
    estimated = lowbit("estimate", model, *settings, *(["--measure"] if measure else []))
    with tempfile.TemporaryDirectory() as work:
        report = lowbit("quantize", model, "-o", str(Path(work) / output), *settings)
        files = [*Path(work).rglob("*.safetensors"), *Path(work).glob("*.gguf")]
        written = sum(path.stat().st_size for path in files)
    run, totals = estimated["run"], report["totals"]
    peak, predicted = totals["peak_memory_bytes"], run["peak_memory"]
    low, high = run["seconds"]
    exact = "equal" if written == estimated["files"]["bytes"] else f"{estimated['files']['bytes'] - written:+,} bytes"
    return (
        f"| {Path(model).name} | {name} | {written:,} | {exact} | {peak / 1e6:.0f} MB | {predicted / 1e6:.0f} MB | "
        f"{100 * (predicted / peak - 1):+.0f} % | {totals['seconds']:.0f} s | {low:.0f} to {high:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimates beside what happened.")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--samples", type=int, default=128, help="windows of calibration text")
    parser.add_argument("--only", default="", help="runs whose name begins so")
    parser.add_argument("--measure", action="store_true", help="let estimates measure this machine")
    options = parser.parse_args()
    print("| model | run | files, bytes | estimate | peak | estimate | off by | time | estimate |")
    print("|---|---|---:|---|---:|---:|---:|---:|---:|")
    for model in options.models:
        for name in RUNS:
            if name.startswith(options.only):
                print(row(model, name, options.samples, options.measure), flush=True)


if __name__ == "__main__":
    main()
