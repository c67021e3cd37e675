"""Weight error of fitted codes beside integers, at their true bits: some blocks of a model, rounded to nearest.

    python benchmarks/codebooks.py demo:smollm2 --blocks 0,15,29

Prints Σ (w − ŵ)² / Σ w² over all linears of these blocks, and the bits that the default format of a scheme stores.
What a scheme does to the model is another question: `lowbit evaluate`.
"""

from __future__ import annotations

import argparse

import torch

from lowbit.architecture import open_described
from lowbit.checkpoint.base import OpenOptions
from lowbit.export import default_format, find_exporter
from lowbit.numerics import grid_for
from lowbit.rounding.error import squared_error
from lowbit.rounding.target import GridTarget
from lowbit.settings import make_settings

# (scheme, settings beside it), cheapest first
CASES = (
    ("W3A16", {"group_size": 64}), ("W3A16", {"group_size": 32}), ("KMEANS3", {}), ("KMEANS3", {"outliers": 0.45}),
    ("W4A16", {"group_size": 64}), ("W4A16", {"group_size": 32}), ("LOG4", {"group_size": 64}), ("KMEANS4", {}),
    ("KMEANS4", {"outliers": 0.45}),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--blocks", default="0,15,29")
    parser.add_argument("--schemes", help="only these, by name: KMEANS4,W4A16")
    asked = parser.parse_args()
    chosen = asked.schemes.upper().split(",") if asked.schemes else {name for name, _ in CASES}
    blocks = {int(block) for block in asked.blocks.split(",")}
    checkpoint, architecture = open_described(asked.model, OpenOptions())
    linears = [linear for linear in architecture.linears.values() if linear.block in blocks]
    weights = {linear: checkpoint.read(f"{linear.name}.weight").float() for linear in linears}
    print(f"{len(linears)} linears of {asked.model}\n\n| scheme | bits per weight | relative error |\n|---|---:|---:|")
    for name, beside in [case for case in CASES if case[0] in chosen]:
        settings = make_settings(None, scheme=name, **beside)
        scheme = settings.base_scheme()
        exporter = find_exporter(default_format(scheme))
        grid = grid_for(scheme.weight, exporter.scale_format(scheme, torch.bfloat16))
        target = GridTarget(scheme.weight, grid, settings.range_search(scheme.weight))
        lost = energy = bits = count = 0.0
        for linear, weight in weights.items():
            error = squared_error(weight, target.fit(weight).round(weight))
            lost, energy = lost + error[0], energy + error[1]
            stored = exporter.stored_tensors(linear.name, linear.shape, scheme, torch.bfloat16)
            bits, count = bits + 8 * sum(tensor.nbytes for tensor in stored), count + weight.numel()
        shown = " ".join([name, *(f"--{key.replace('_', '-')} {value}" for key, value in beside.items())])
        print(f"| {shown} | {bits / count:.3f} | {lost / energy:.5f} |", flush=True)


if __name__ == "__main__":
    main()
