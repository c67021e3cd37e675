"""What each scheme costs one model: mean KLD of all schemes of folders, same model, same text. A table in Markdown.

usage: scheme_quality.py MODEL [--text T] [--windows 8] [--samples 32] [--rows "W4A16 gptq,FP8_DYNAMIC rtn"]

    MODEL  as for `lowbit quantize`: a folder, demo:smollm2
    T      as for `lowbit evaluate`; by default the packaged evaluation text. Calibration is on the packaged other text

Activations are simulated where a scheme quantizes them. `lowbit.advice.quality` has these figures for the demo model.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import lowbit
from lowbit.knobs import Facts
from lowbit.settings import facts_of, make_settings

ROWS = (
    "W8A16 rtn,W4A16 rtn,W4A16 gptq,W4A16 awq,W4A16_ASYM gptq,W4A16_ASYM awq,W3A16 gptq,W2A16 gptq,W8A8 rtn,"
    "W8A8 smoothquant,W8A8_STATIC smoothquant,W4AFP8 gptq,FP8 rtn,FP8_DYNAMIC rtn,FP8_BLOCK rtn,MXFP8 rtn,NVFP4 gptq,"
    "NVFP4A16 gptq,MXFP4 gptq,MXFP4A16 gptq,NF4 rtn,FP4 rtn,INT8 rtn"
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model")
    arguments.add_argument("--text")
    arguments.add_argument("--windows", type=int, default=8)
    arguments.add_argument("--samples", type=int, default=32)
    arguments.add_argument("--rows", default=ROWS, help="SCHEME METHOD, separated by commas")
    args = arguments.parse_args()
    print("| scheme | method | bits per weight | mean KLD | PPL ratio | same top-1 |\n|---|---|---:|---:|---:|---:|")
    for row in args.rows.split(","):
        scheme, method = row.split()
        with tempfile.TemporaryDirectory() as scratch:
            print(measure(args, scheme, method, Path(scratch) / "out"), flush=True)


def measure(args: argparse.Namespace, scheme: str, method: str, output: Path) -> str:
    reads_text = facts_of(make_settings(None, scheme=scheme, method=method), Facts()).reads_text
    samples = {"samples": args.samples} if reads_text else {}
    lowbit.quantize(args.model, output, scheme=scheme, method=method, **samples)
    row = lowbit.evaluate(output, reference=args.model, text=args.text, windows=args.windows)[-1]
    shutil.rmtree(output)
    return (
        f"| {scheme} | {method} | {row.bits_per_weight:.3f} | {row.kld_mean:.4f} ± {row.kld_se:.4f} | "
        f"{row.ppl_ratio:.4f} | {100 * (row.same_top1 or 0):.1f} % |"
    )


if __name__ == "__main__":
    main()
