"""Does a real vLLM lose what `lowbit evaluate --kv-cache` says of its FP8 caches? Mean KL divergence from its own cache
in float32, beside the simulated one, on the same tokens.

usage: compare_cache_with_vllm.py --vllm PYTHON [--text FILE] [--model demo:smollm2] [--tokens 128] [--windows 1]
                                  [--types fp8_e4m3,fp8_e5m2]

    --vllm   the python of an environment with vLLM; vllm_perplexity.py beside this file says how to make it

Both compute in float32, vLLM's CPU backend with scales of 1, as it takes them of a checkpoint that stores none. Exits
with 1 if a pair differs by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import lowbit
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
    ours = lowbit.evaluate_kv_cache(args.model, args.types, contexts=(args.tokens,), windows=args.windows,
                                    text=args.text, bos=False)  # fmt: skip
    theirs = real_divergences(args)
    wrong = False
    for row in ours:
        real = theirs[row.type]
        difference = row.kld_mean / real - 1
        wrong |= abs(difference) > LARGEST_DIFFERENCE
        print(f"{row.type:10}   lowbit evaluate {row.kld_mean:.6f}   vLLM {real:.6f}   {difference:+.2%}", flush=True)
    sys.exit(wrong)


def real_divergences(args: argparse.Namespace) -> dict[str, float]:
    """Cache type → mean KL(cache in float32 ‖ this type) of vLLM, over the same windows."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lowbit.convert(args.model, folder / "float", format="float")
        _, tokenizer = lowbit.load(folder / "float")
        cut = cut_windows(read_text(args.text), tokenizer, args.windows, args.tokens, "full", False)
        (folder / "ids.json").write_text(json.dumps(cut.ids.tolist()))
        program = Path(__file__).with_name("vllm_cache.py")
        subprocess.run([args.vllm, program, folder / "float", "--ids", folder / "ids.json", "--out", folder,
                        "--types", f"auto,{args.types}"], check=True, stdout=sys.stderr)  # fmt: skip
        plain = np.load(folder / "auto.npy").astype(np.float64)
        return {name: float((np.exp(plain) * (plain - np.load(folder / f"{name}.npy"))).sum(-1).mean())
                for name in args.types.split(",")}  # fmt: skip


if __name__ == "__main__":
    main()
