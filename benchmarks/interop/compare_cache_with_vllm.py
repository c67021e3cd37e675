"""What do FP8 caches cost in a real vLLM on the CPU? Mean KL divergence from its own cache in float32, beside what
`lowbit evaluate --kv-cache` says, and beside the arithmetic of vLLM's CPU kernel, on the same tokens.

usage: compare_cache_with_vllm.py --vllm PYTHON [--text FILE] [--model demo:smollm2] [--tokens 128] [--windows 1]
                                  [--types fp8_e4m3,fp8_e5m2]

    --vllm   the python of an environment with vLLM; vllm_perplexity.py beside this file says how to make it

All compute in float32, with scales of 1, as vLLM takes them of a checkpoint that stores none. vLLM's GPU kernels round
to nearest, as `lowbit evaluate` does; its CPU kernel cuts the bits off (csrc/cpu/cpu_attn_fp8.hpp), which is simulated
here as well. Exits with 1 if that differs from vLLM by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lowbit
from lowbit.kv import CACHE_TYPES
from lowbit.kv.codecs import Minifloat, SideFacts
from lowbit.kv.simulated import simulated_cache
from lowbit.text import cut_windows, read_text

LARGEST_DIFFERENCE = 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True)
    parser.add_argument("--text")
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--types", default="fp8_e4m3,fp8_e5m2")
    args = parser.parse_args()
    model, tokenizer = lowbit.load(args.model, dtype=torch.float32)
    ids = cut_windows(read_text(args.text), tokenizer, args.windows, args.tokens, "full", False).ids
    real = real_divergences(args, ids)
    print("type       rounded    cut off    vLLM, CPU")
    wrong = False
    for name in args.types.split(","):
        rounded = divergence(model, ids, CACHE_TYPES[name])
        codec = CutOff("e4m3" if "e4m3" in name else "e5m2")
        cut = divergence(model, ids, replace(CACHE_TYPES[name], keys=codec, values=codec))
        wrong |= abs(cut / real[name] - 1) > LARGEST_DIFFERENCE
        print(f"{name:8}   {rounded:.6f}   {cut:.6f}   {real[name]:.6f}   {cut / real[name] - 1:+.2%}", flush=True)
    sys.exit(wrong)


@dataclass(frozen=True)
class CutOff(Minifloat):
    """The value of largest magnitude that is no further from zero than x."""

    def round_trip(self, states: Tensor, facts: SideFacts | None = None) -> Tensor:
        mantissa, least, largest = (3, -6, 448.0) if self.number == "e4m3" else (2, -14, 57344.0)
        magnitude = states.abs().clamp(max=largest)
        exponent = (torch.frexp(magnitude)[1] - 1).clamp(min=least)
        step = torch.exp2((exponent - mantissa).float())
        return torch.copysign((magnitude / step).floor() * step, states)


@torch.inference_mode()
def divergence(model, ids: Tensor, cache) -> float:
    """Mean KL(cache in float32 ‖ this type) over all tokens that something is before."""

    def predicted(within) -> Tensor:
        with within:
            return model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)

    plain, found = predicted(nullcontext()), predicted(simulated_cache(model, cache))
    return float((plain.exp() * (plain - found)).sum(-1).mean())


def real_divergences(args: argparse.Namespace, ids: Tensor) -> dict[str, float]:
    """Cache type → the same of vLLM."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lowbit.convert(args.model, folder / "float", format="float")
        (folder / "ids.json").write_text(json.dumps(ids.tolist()))
        program = Path(__file__).with_name("vllm_cache.py")
        subprocess.run([args.vllm, program, folder / "float", "--ids", folder / "ids.json", "--out", folder,
                        "--types", f"auto,{args.types}"], check=True, stdout=sys.stderr)  # fmt: skip
        plain = np.load(folder / "auto.npy").astype(np.float64)
        return {name: float((np.exp(plain) * (plain - np.load(folder / f"{name}.npy"))).sum(-1).mean())
                for name in args.types.split(",")}  # fmt: skip


if __name__ == "__main__":
    main()
