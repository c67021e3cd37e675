"""The same codes with inputs rounded on other grids of 4 bits, or of some linears alone: mean KLD of each.

usage: activation_grids.py OUT --reference MODEL --text T [--windows 4] [--window-tokens 256] [--grids G,…]

    OUT    a folder of `lowbit quantize`; what its scheme says of inputs is not read
    grids  PER[/DIVISOR][*CLIP][:LINEARS]: token or a group size; largest / DIVISOR is the scale, or "zero" for a range
           with a zero point; CLIP takes that share of the range; LINEARS: parts of names joined by +, the other inputs
           stay as they are

The grid of W4A4 is token/7.5, that of W4A4_GROUP with groups of 64 is 64/zero.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from lowbit.checkpoint.base import OpenOptions
from lowbit.evaluation import activations
from lowbit.evaluation.metrics import token_kld
from lowbit.evaluation.opening import Opened, Opener
from lowbit.numerics.activations import quantize_activation
from lowbit.schemes import ActivationSpec
from lowbit.text import cut_windows, read_text

GRIDS = ("none,token/7,token/7.5,token/zero,token/7.5*0.9,64/7,64/7.5,64/zero,32/7,32/zero,"
         "token/7:down_proj,token/7:o_proj,token/7:q_proj+k_proj+v_proj,token/7:gate_proj+up_proj")  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("output")
    arguments.add_argument("--reference", required=True)
    arguments.add_argument("--text", required=True)
    arguments.add_argument("--windows", type=int, default=4)
    arguments.add_argument("--window-tokens", type=int, default=256)
    arguments.add_argument("--grids", default=GRIDS)
    args = arguments.parse_args()
    with contextlib.ExitStack() as stack, torch.inference_mode():
        opener = Opener(stack, torch.float32, "cpu", OpenOptions())
        reference, quantized = opener.open(args.reference), opener.open(args.output)
        for each in (reference, quantized):
            each.loader.fill()
        ids = cut_windows(read_text(args.text), reference.tokenizer, args.windows, args.window_tokens).ids
        exact = [log_probabilities(reference, window) for window in ids]
        for grid in args.grids.split(","):
            with rounded(quantized, grid):
                found = torch.cat([token_kld(p, log_probabilities(quantized, window))
                                   for p, window in zip(exact, ids, strict=True)])  # fmt: skip
            print(f"| {grid} | {found.mean():.4f} ± {found.std() / len(found) ** 0.5:.4f} |", flush=True)


def log_probabilities(opened: Opened, window: Tensor) -> Tensor:
    return opened.model(window[None]).logits[0, :-1].float().log_softmax(-1)


@contextlib.contextmanager
def rounded(opened: Opened, grid: str):
    """Inside, the model rounds its inputs on this grid, behind the rotations of its files."""
    match = re.fullmatch(r"(token|\d+)/([\d.]+|zero)(?:\*([\d.]+))?(?::(.+))?", grid)
    if grid == "none":
        yield
        return
    if match is None:
        raise SystemExit(f"{grid} is no grid, such as token/7.5 or 64/zero")
    per, divisor, clip, linears = match.groups()
    size = None if per == "token" else int(per)
    spec = ActivationSpec("int", 4, "group" if size else "token", group_size=size, symmetric=divisor != "zero")

    def quantize(x: Tensor, spec: ActivationSpec, *_) -> Tensor:
        if divisor == "zero":
            return quantize_activation(x, spec)
        parts = x.float() if spec.group_size is None else x.float().unflatten(-1, (-1, spec.group_size))
        scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30) * float(clip or 1) / float(divisor)
        return ((parts / scale).round().clamp(-8, 7) * scale).reshape(x.shape)

    checkpoint = opened.checkpoint
    schemes = {name: replace(scheme, activation=spec) for name, scheme in checkpoint.schemes.items()
               if linears is None or any(part in name for part in linears.split("+"))}  # fmt: skip
    with (
        patch.object(activations, "quantize_activation", quantize),
        activations.simulated_activations(opened.model, schemes, {}, checkpoint.rotations),
    ):
        yield


if __name__ == "__main__":
    main()
