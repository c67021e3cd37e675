"""The quality of GGUF files of the same size: mean KLD of ours and of llama-quantize's, same imatrix, same text.

usage: gguf_quality.py MODEL --llama-quantize PROGRAM --text T [--imatrix FILE] [--types Q4_K_M,…] [--windows 10]

    MODEL      a Hugging Face folder (Llama-like); it is written as F32 GGUF once, which both start from
    --imatrix  for both; without it types that need one are left out

Figures are `lowbit evaluate`'s: KL divergence from MODEL per token, with the standard error, and its ratio. The files
are of equal size, since the types of all tensors are the same.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import tempfile
from pathlib import Path

import lowbit

TYPES = (
    "Q2_K,Q3_K_M,Q4_K_M,IQ4_XS,IQ3_S,Q5_K_M,Q6_K,Q4_0,Q4_1,Q5_0,Q5_1,Q8_0,"
    "IQ4_NL,IQ3_XXS,IQ2_S,IQ2_XS,IQ2_XXS,IQ1_M,IQ1_S"
)
HEADLINE = ("Q3_K_M", "Q4_K_M", "IQ4_XS", "IQ3_S", "Q2_K")
NEED_IMPORTANCE = ("IQ2_XS", "IQ2_XXS", "IQ2_S", "IQ1_S", "IQ1_M", "IQ3_S", "IQ3_XXS")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--llama-quantize", type=Path, required=True)
    arguments.add_argument("--text", required=True)
    arguments.add_argument("--imatrix", type=Path)
    arguments.add_argument("--types", default=TYPES)
    arguments.add_argument("--windows", type=int, default=10)
    args = arguments.parse_args()
    types = [name for name in args.types.split(",") if args.imatrix is not None or name not in NEED_IMPORTANCE]
    print(f"{'type':8s} {'bytes':>12s}  {'lowbit KLD':>19s}  {'llama-quantize KLD':>19s}  ratio")
    ratios = {}
    with tempfile.TemporaryDirectory(dir=args.model.parent) as scratch:
        source = Path(scratch) / "source.gguf"
        lowbit.quantize(args.model, source, scheme="F32")
        for name in types:
            ratios[name] = compare(args, name, source, Path(scratch))
    chosen = [ratios[name] for name in HEADLINE if name in ratios]
    if len(chosen) == len(HEADLINE):
        mean = math.exp(sum(math.log(ratio) for ratio in chosen) / len(chosen))
        print(f"geometric mean over {', '.join(HEADLINE)}: {mean:.4f}")


def compare(args: argparse.Namespace, name: str, source: Path, scratch: Path) -> float:
    ours, theirs = scratch / f"ours-{name}.gguf", scratch / f"theirs-{name}.gguf"
    weighed = {"imatrix": str(args.imatrix)} if args.imatrix else {}
    lowbit.quantize(source, ours, scheme=name, overwrite=True, **weighed)
    options = ["--imatrix", str(args.imatrix)] if args.imatrix else []
    subprocess.run([args.llama_quantize, *options, source, theirs, name, "2"], check=True, capture_output=True)
    figures = []
    for path in (ours, theirs):
        (row,) = lowbit.evaluate(path, reference=args.model, text=args.text, windows=args.windows, bos=False)
        figures.append((row.kld_mean, row.kld_se))
    (mine, my_se), (other, other_se) = figures
    print(
        f"{name:8s} {ours.stat().st_size:12,d}  {mine:9.5f} ± {my_se:7.5f}  {other:9.5f} ± {other_se:7.5f}  "
        f"{mine / other:.4f}",
        flush=True,
    )
    for path in scratch.glob(f"*-{name}.*"):
        path.unlink()
    return mine / other


if __name__ == "__main__":
    main()
