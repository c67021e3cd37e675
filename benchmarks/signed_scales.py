"""What the sign of scales gains and zero points gain, in squared error of nearest rounding: a table in Markdown.

usage: signed_scales.py MODEL [--blocks 2,4] [--groups 64,128]

    MODEL   a folder with safetensors; the linears of `blocks` are rounded with `--range mse`

The columns are relative to scales above 0: both signs tried; the sign of the larger end alone; a zero point per group,
which takes a code more for each.
"""

from __future__ import annotations

import argparse

import torch

import lowbit
from lowbit.numerics.scalar_grids import IntGrid
from lowbit.tensors import RangeSearch

SEARCH = RangeSearch("mse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--blocks", default="2,4")
    parser.add_argument("--groups", default="64,128")
    args = parser.parse_args()
    checkpoint = lowbit.inspect(args.model)
    blocks = tuple(f".layers.{block}." for block in args.blocks.split(","))
    names = [name for name in checkpoint.tensors if name.endswith("proj.weight") and any(b in name for b in blocks)]
    print("| bits | group | both signs | sign of the larger end | zero points |\n|---|---|---:|---:|---:|")
    for bits in (4, 3, 2):
        for size in map(int, args.groups.split(",")):
            sums = sum(errors(checkpoint.read(name).float(), bits, size) for name in names)
            positive, *others = sums.tolist()
            print(f"| {bits} | {size} |", " | ".join(f"{other / positive:.3f}" for other in others), "|")


def errors(weight: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Summed squared errors of a weight [N, K]: positive scales, both signs, the larger end's, zero points."""
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size)).reshape(-1, size)
    plain = IntGrid(bits)
    positive, flipped = (plain.error(w, plain.fit(w, size, SEARCH), size) for w in (groups, -groups))
    larger_above = groups.amax(1, keepdim=True) > -groups.amin(1, keepdim=True)
    found = [positive, torch.where(larger_above, flipped, positive)]
    for grid in (IntGrid(bits, signed_scales=True), IntGrid(bits, symmetric=False)):
        found.append(grid.error(groups, grid.fit(groups, size, SEARCH), size))
    positive, larger, both, zero_points = (error.sum() for error in found)
    return torch.stack([positive, both, larger, zero_points])


if __name__ == "__main__":
    main()
