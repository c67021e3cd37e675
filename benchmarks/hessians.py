"""Hessians of GPTQ compared on a few blocks: what each costs in KL divergence when these alone are rounded.

usage: hessians.py MODEL VARIANT… --calib TEXT --judge NAME=TEXT [--judge …] [--scheme W3A16] [--group-size 64]
                   [--samples 32] [--windows 6] [--blocks 2,7,12,17,22,27]

A variant is a way to weigh the tokens of H = Σ s x xᵀ of each linear; f is the mean over its outputs (of one of G
consecutive groups of them) of the squared gradient of −log p(y) by that output, y drawn from the model:

    inputs         s = 1
    guided:P       s = f^P         guided:1 is GuidedQuant (arXiv 2505.07004), guided:0.5 is `--hessian guided`
    guided:P:G     the same with an H for each of G groups of rows
    mixed:P        s = P f + 1 − P
    kronecker:P[:ρ]  guided:P, and errors of rows fed to other rows (`rounding.row_feedback`), the off-diagonals of G
                   shrunk by ρ; kronecker:0.5 is `--hessian kronecker`

Inputs and gradients are those of the unquantized model, for all blocks, once; no correction. So variants differ in the
Hessian alone, on the same tokens, and one takes a minute where a whole run takes ten. Standard errors are over tokens.
Columns: mean KL divergence in nats and its 99th percentile for each judged text; `share` is (Σ s)² / (T Σ s²), the part
of the tokens that count, mean and least over the linears.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit.numerics import grid_for
from lowbit.numerics.precision import fast_products
from lowbit.rounding import row_feedback
from lowbit.rounding.gptq import SEARCH, GPTQOptions, gptq
from lowbit.rounding.hessian import InputData, row_groups
from lowbit.rounding.rtn import measure_range
from lowbit.rounding.target import GgmlTarget, GridTarget, Target
from lowbit.schemes import find_scheme, is_gguf_name
from lowbit.tensors import LayerStats

TOKENS = 512
AT_ONCE = 2  # windows
SHRINKAGE = row_feedback.SHRINKAGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--judge", action="append", required=True)
    parser.add_argument("--scheme", default="W3A16")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--blocks", default="2,7,12,17,22,27")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def cut(path: Path, windows: int) -> Tensor:
        text = path.read_text(encoding="utf-8")[: 10 * windows * TOKENS + 20_000]
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        return ids[: windows * TOKENS].reshape(windows, TOKENS)

    calib = cut(args.calib, args.samples)
    texts = {name: cut(Path(path), args.windows) for name, path in (each.split("=", 1) for each in args.judge)}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval().requires_grad_(False)
    linears = {
        f"{block}.{name}": module
        for block in map(int, args.blocks.split(","))
        for name, module in model.model.layers[block].named_modules()
        if isinstance(module, nn.Linear)
    }
    inputs, gradients = capture(model, linears, calib)
    model = model.float()
    weights = {name: module.weight.detach().clone() for name, module in linears.items()}
    reference = {name: [log_p(model, window) for window in ids] for name, ids in texts.items()}
    for variant in args.variants:
        began, shares = time.perf_counter(), []
        for name, weight in weights.items():
            parts = []
            for s in weights_of(variant, gradients[name]):
                shares.append((s.sum().square() / s.square().sum() / len(s)).item())
                parts.append(InputData(statistics(inputs[name], s)))
            data = InputData(parts[0].stats, tuple(parts) if len(parts) > 1 else (), rows_of(variant, gradients[name]))
            target = target_of(args.scheme, args.group_size, weight)
            options = GPTQOptions(correction=0.0, search=None if target.is_ggml else SEARCH)
            linears[name].weight.data.copy_(gptq(weight, target, data, options).decoded)
        seconds = time.perf_counter() - began
        judged = []
        for name, ids in texts.items():
            pairs = zip(reference[name], ids, strict=True)
            kl = torch.cat([(p.exp() * (p - log_p(model, window))).sum(-1) for p, window in pairs])
            error = (kl.std() / len(kl) ** 0.5).item()
            judged.append(f"{name} {kl.mean():.4f} ± {error:.4f}, p99 {kl.quantile(0.99):.2f}")
        share = f"share {sum(shares) / len(shares):.3f}, least {min(shares):.4f}"
        print(f"{variant:14s} {'   '.join(judged)}   {share}   {seconds:.0f} s", flush=True)


def capture(model: nn.Module, linears: dict[str, nn.Module], ids: Tensor) -> tuple[dict[str, Tensor], ...]:
    """(inputs [tokens, K], gradients by outputs [tokens, N]) of each linear, in the model's dtype."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in linears}
    gradients: dict[str, list[Tensor]] = {name: [] for name in linears}
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _module, arguments, out: (inputs[name].append(arguments[0].flatten(0, 1)),
                                                outputs.update({name: out}), None)[2]  # fmt: skip

    hooks = [module.register_forward_hook(keep(name)) for name, module in linears.items()]
    generator = torch.Generator().manual_seed(0)
    for windows in ids.split(AT_ONCE):
        embedded = model.get_input_embeddings()(windows).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        slope = logits.detach().float().softmax(-1)
        sums = slope.flatten(0, 1).cumsum(-1)
        drawn = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]
        label = torch.searchsorted(sums, drawn).clamp_(max=sums.shape[1] - 1)
        slope.flatten(0, 1).scatter_add_(1, label, torch.full_like(drawn, -1.0))
        found = torch.autograd.grad(logits, list(outputs.values()), slope.to(logits.dtype))
        for name, gradient in zip(outputs, found, strict=True):
            gradients[name].append(gradient.flatten(0, 1))
    for hook in hooks:
        hook.remove()
    return tuple({name: torch.cat(parts).detach() for name, parts in each.items()} for each in (inputs, gradients))


def weights_of(variant: str, gradient: Tensor) -> list[Tensor]:
    """Weights of tokens [tokens] with mean 1, for each group of rows."""
    kind, *numbers = variant.split(":")
    squares = gradient.float().square()
    if kind == "inputs":
        return [torch.ones(len(squares))]
    power, groups = float(numbers[0]), int(numbers[1]) if kind == "guided" and len(numbers) > 1 else 1
    means = [squares[:, rows].mean(dim=1) for rows in row_groups(squares.shape[1], groups)]
    if kind == "mixed":
        return [power * mean / mean.mean() + 1 - power for mean in means]
    if kind not in ("guided", "kronecker"):
        raise SystemExit(f"there is no variant {variant!r}")
    return [mean.pow(power) / mean.pow(power).mean() for mean in means]


def rows_of(variant: str, gradient: Tensor) -> tuple[Tensor, ...]:
    """G of the parts of the rows of a linear."""
    kind, *numbers = variant.split(":")
    if kind != "kronecker":
        return ()
    row_feedback.SHRINKAGE = float(numbers[1]) if len(numbers) > 1 else SHRINKAGE
    power = float(numbers[0])
    return tuple(
        row_feedback.curvature_of(gradient[:, part], power) for part in row_feedback.parts_of(gradient.shape[1])
    )


def statistics(x: Tensor, s: Tensor) -> LayerStats:
    weighed = x.float() * s.sqrt()[:, None]
    with fast_products(torch.bfloat16):
        hessian = weighed.T @ weighed
    squares = x.float().square().mean(dim=0)
    return LayerStats(len(x), squares.sqrt(), squares, squares.sqrt(), hessian)


def target_of(scheme: str, group_size: int, weight: Tensor) -> Target:
    if is_gguf_name(scheme):
        return GgmlTarget(scheme)
    spec = find_scheme(scheme).with_group_size(group_size).weight
    return GridTarget(spec, grid_for(spec, "bfloat16"), SEARCH, measure_range(weight, spec))


@torch.no_grad()
def log_p(model: nn.Module, window: Tensor) -> Tensor:
    return model(window[None], use_cache=False).logits[0, :-1].log_softmax(-1)


if __name__ == "__main__":
    main()
