"""How well the linears of GPTQ do in domains they were not calibrated on, by settings of the Hessian.

usage: hessian_domains.py MODEL --calib TEXT… [--prefix OUT] [--scheme W3A16] [--group-size 64]
                          [--shrinkage 0,0.2,0.4] [--correction 0.75] [--blocks 4,14,24] [--rows 48]
                          [--samples 16] [--windows 4] [--domains prose,code,other code] [--prose FILE]

    --calib   as for `lowbit quantize`; repeatable, one line of the table each
    --prefix  a quantized copy of MODEL, whose inputs the linears then see: what is rounded before them. Without it the
              inputs are MODEL's own, and the correction has nothing to correct

    error = Σ ‖Ŵ x − W x₀‖² / Σ ‖W x₀‖²     over the tokens of a domain, x₀ the input in MODEL, x behind the prefix

The table has geometric means over all linears of the blocks, each relative to the first setting. That is much cheaper
than whole models, and says less: no error meets another. Choices are made on prose and code (`domain_texts.py`).
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from domain_texts import CACHE, domain_texts
from torch import Tensor

from lowbit.architecture.loading import load_tokenizer
from lowbit.calibrate.block_modules import BlockInput
from lowbit.calibrate.blocks import BlockRunner
from lowbit.checkpoint import open_checkpoint
from lowbit.numerics import grid_for
from lowbit.numerics.precision import compute_dtype
from lowbit.rounding.gptq import SEARCH, GPTQOptions, gptq
from lowbit.rounding.hessian import InputData
from lowbit.rounding.target import GgmlTarget, GridTarget, Target
from lowbit.schemes import find_scheme, is_gguf_name
from lowbit.tensors import LayerStats
from lowbit.text import cut_windows, mixed_windows, read_text

DAMPING = 0.01  # of the drift, as in lowbit.calibrate.statistics


@dataclass(frozen=True)
class Sums:
    """Of one input over a text: Σ x xᵀ, Σ x₀ xᵀ, Σ x₀ x₀ᵀ, float32 [K, K], and tokens."""

    inputs: Tensor
    crossed: Tensor
    originals: Tensor
    tokens: int

    def error(self, weight: Tensor, rounded: Tensor) -> float:
        energy = ((weight @ self.originals) * weight).sum()
        lost = ((rounded @ self.inputs) * rounded).sum() - 2 * ((weight @ self.crossed) * rounded).sum() + energy
        return (lost / energy).item()

    def statistics(self, shrinkage: float) -> LayerStats:
        """As calibration has them; the drift is solved with a shrunk Hessian."""
        diagonal = self.inputs.diagonal()
        damped = (1 - shrinkage) * self.inputs + shrinkage * diagonal.diag()
        damped.diagonal().add_(DAMPING * diagonal.mean())
        drift = torch.linalg.solve(damped, (self.crossed - self.inputs).t()).t()
        mean_sq = diagonal / self.tokens
        return LayerStats(self.tokens, mean_sq.sqrt(), mean_sq, mean_sq.sqrt(), self.inputs, drift)


class Keeper:
    """A `BlockVisitor` that keeps the inputs of some blocks."""

    def __init__(self, blocks: set[int]):
        self.blocks, self.inputs = blocks, dict[str, list[Tensor]]()
        self.readers: dict[str, BlockInput] = {}

    def look(self, source: BlockInput, x: Tensor) -> None:
        if source.expert is None and source.linears[0].block in self.blocks:
            self.inputs.setdefault(source.name, []).append(x.clone())
            self.readers[source.name] = source

    def finish(self, block: int) -> None:
        pass


def kept(model: str, ids: Tensor, blocks: set[int]) -> Keeper:
    checkpoint, keeper = open_checkpoint(model), Keeper(blocks)
    BlockRunner(checkpoint, compute_dtype("auto", "cpu")).run(ids, keeper)
    checkpoint.close()
    return keeper


def measured(args: argparse.Namespace, ids: Tensor) -> tuple[dict[str, Sums], dict[str, BlockInput]]:
    """Input → its sums over windows, int64 [windows, tokens], and its readers."""
    original = kept(args.model, ids, args.blocks)
    behind = kept(args.prefix, ids, args.blocks) if args.prefix else original
    sums = {}
    for name, parts in original.inputs.items():
        x0, x = torch.cat(parts).float(), torch.cat(behind.inputs[name]).float()
        sums[name] = Sums(x.t() @ x, x0.t() @ x, x0.t() @ x0, len(x))
    return sums, original.readers


def target_of(scheme: str, group_size: int) -> Target:
    if is_gguf_name(scheme):
        return GgmlTarget(scheme)
    spec = find_scheme(scheme)
    spec = (spec.with_group_size(group_size) if spec.weight.group_size_is_free else spec).weight
    return GridTarget(spec, grid_for(spec, "bfloat16"), SEARCH)


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", action="append", required=True)
    parser.add_argument("--prefix")
    parser.add_argument("--scheme", default="W3A16", help="a scheme of folders, or a ggml type such as Q2_K")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--shrinkage", type=numbers, default=[0.0, 0.2, 0.4])
    parser.add_argument("--correction", type=numbers, default=[0.75])
    parser.add_argument("--blocks", type=lambda text: {int(word) for word in text.split(",")}, default={4, 14, 24})
    parser.add_argument("--rows", type=int, default=48, help="of each weight")
    parser.add_argument("--samples", type=int, default=16, help="windows of calibration")
    parser.add_argument("--windows", type=int, default=4, help="of each domain")
    parser.add_argument("--domains", default="prose,code,other code")
    parser.add_argument("--prose", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    checkpoint = open_checkpoint(args.model)
    tokenizer = load_tokenizer(checkpoint)
    texts = domain_texts(args.prose, CACHE, tuple(args.domains.split(",")))
    judged = {text.domain: measured(args, cut_windows(read_text(text.path), tokenizer, args.windows, 512).ids)[0]
              for text in texts}  # fmt: skip
    target, first = target_of(args.scheme, args.group_size), None
    print(
        f"| {args.scheme}: calibrated on, shrinkage, correction | {' | '.join(judged)} |\n|---|{'---:|' * len(judged)}"
    )
    for calib in args.calib:
        sums, readers = measured(args, mixed_windows(calib, tokenizer, args.samples, 512).ids)
        for shrinkage, correction in itertools.product(args.shrinkage, args.correction):
            logs: dict[str, list[float]] = {domain: [] for domain in judged}
            options = GPTQOptions(shrinkage=shrinkage, correction=correction)
            for name, source in readers.items():
                data = InputData(sums[name].statistics(shrinkage))
                for linear in source.linears:
                    weight = checkpoint.read(f"{linear.name}.weight", 0, args.rows).float()
                    rounded = gptq(weight, target, data, options).decoded
                    for domain, found in judged.items():
                        logs[domain].append(math.log(found[name].error(weight, rounded)))
            means = {domain: sum(values) / len(values) for domain, values in logs.items()}
            first = first or means
            cells = " | ".join(f"{math.exp(means[domain] - first[domain]):.3f}" for domain in judged)
            print(f"| {calib}, {shrinkage:g}, {correction:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
