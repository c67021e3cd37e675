"""Errors of one linear: rounded to nearest, by GPTQ, and refined from the nearest codes.

usage: refining_linears.py [TYPE,…]        types of ggml; group size of W2A16 … W4A16 is 64

A random weight [128, 512] with inputs that are correlated (4096 tokens, singular values over two decades), one seed.
Prints tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) in percent.
"""

from __future__ import annotations

import sys

import torch

from lowbit.numerics import grid_for
from lowbit.numerics.ggml.types import TYPES
from lowbit.rounding.descent import RefineOptions, refine
from lowbit.rounding.gptq import SEARCH, GPTQOptions, gptq
from lowbit.rounding.hessian import InputData
from lowbit.rounding.target import GgmlTarget, GridTarget, Target
from lowbit.schemes import SCHEMES
from lowbit.tensors import LayerStats, RangeSearch

KINDS = "Q4_0,Q4_K,Q3_K,Q2_K,IQ4_XS,IQ3_S,IQ2_XS,IQ1_S,W4A16,W3A16,W2A16"


def target_of(name: str) -> Target:
    if name in TYPES:
        return GgmlTarget(name)
    spec = SCHEMES[name].with_group_size(64).weight
    return GridTarget(spec, grid_for(spec, "bfloat16"), RangeSearch("wmse"))


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 512) @ (torch.randn(512, 512) * torch.logspace(0, -2, 512)[:, None])
    hessian, weight = x.T @ x, torch.randn(128, 512) * 0.05
    stats = LayerStats(len(x), x.abs().amax(0), x.square().mean(0), x.abs().mean(0), hessian)
    size = ((weight @ hessian) * weight).sum()

    def percent(decoded: torch.Tensor) -> float:
        return 100 * ((((decoded - weight) @ hessian) * (decoded - weight)).sum() / size).item()

    print(f"{'type':8s} {'nearest':>9s} {'GPTQ':>9s} {'codes only':>11s} {'refined':>9s}")
    for name in (sys.argv[1] if len(sys.argv) > 1 else KINDS).split(","):
        target, data = target_of(name), InputData(stats)
        start = target.nearest(weight, data.importance if target.is_ggml else None)
        found = [start.decoded, gptq(weight, target, data, GPTQOptions(search=SEARCH)).decoded]
        for options in (RefineOptions(anew=False, reround=False), RefineOptions()):
            found.append(refine(weight, target, data, options, start.stored).decoded)
        nearest, feedback, alone, refined = map(percent, found)
        print(f"{name:8s} {nearest:9.3f} {feedback:9.3f} {alone:11.3f} {refined:9.3f}", flush=True)


if __name__ == "__main__":
    main()
