"""What 4- and 8-bit activations cost one model, by method: mean KLD, activations simulated. A table in Markdown.

usage: activation_quality.py MODEL --calib C [--text T] [--work build/bench/activations] [--samples 8] [--seqlen 512]
                             [--windows 4] [--window-tokens 512] [--group-size 64] [--steps 24]
                             [--rows "W4A4 gptq,NVFP4 gptq"] [--distill-samples 48]

    MODEL  as for `lowbit quantize`;  C, T: texts for calibration and evaluation
    steps  of learned rotations
    rows   SCHEME METHOD, separated by commas
    distill-samples  further windows of C that +distill learns from

The codes of a row are judged alone, with the activations of their scheme, and those of W4A4 with the activations of
W4A4_GROUP and W4A8 too: only `input_activations` of config.json changes. Rows that lie in the work folder are not done
again, so that a run can be stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Literal

import lowbit
from lowbit.methods import parse_method
from lowbit.schemes import SCHEMES, ActivationSpec

LEARNED = "spinquant+hadamard-down"
ROWS = (
    "W4A16 gptq,W4A4 rtn,W4A4 gptq,W4A4 hadamard+rotate+gptq,W4A4 hadamard+rotate+hadamard-down+gptq,"
    "W4A4 hadamard+rotate+hadamard-down+gptq+distill,"
    f"W4A4 {LEARNED}+gptq,W4A4 {LEARNED},W4A8_QOQ gptq,NVFP4 gptq,NVFP4 hadamard+rotate+hadamard-down+gptq,"
    "NVFP4 gptq+distill"
)
COLUMNS = ("alone", "own", "W4A4_GROUP", "W4A8")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model")
    arguments.add_argument("--calib", required=True)
    arguments.add_argument("--text")
    arguments.add_argument("--work", type=Path, default=Path("build/bench/activations"))
    numbers = {"samples": 8, "seqlen": 512, "windows": 4, "window-tokens": 512, "group-size": 64, "steps": 24,
               "distill-samples": 48}  # fmt: skip
    for name, default in numbers.items():
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--rows", default=ROWS)
    args = arguments.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print("| scheme | method | weights alone | its activations | W4A4_GROUP | W4A8 |\n|---|---|---:|---:|---:|---:|")
    for row in args.rows.split(","):
        kept = args.work / f"{row.replace(' ', '-')}.json"
        if not kept.exists():
            kept.write_text(json.dumps(measured(args, *row.split())))
        found = json.loads(kept.read_text())
        print(f"| {' | '.join(row.split())} | {' | '.join(found.get(column, '') for column in COLUMNS)} |", flush=True)


def measured(args: argparse.Namespace, scheme: str, method: str) -> dict[str, str]:
    """Column → mean KLD ± its error."""
    output = args.work / "out"
    parsed = parse_method(method)
    text = {"calib": args.calib, "samples": args.samples, "seqlen": args.seqlen}
    grouped = {"group_size": args.group_size} if SCHEMES[scheme].weight.group_size_is_free else {}
    learns = {"rotation_steps": args.steps} if parsed.learns_rotations else {}
    local = scheme == "NVFP4"  # stores a scale of its inputs
    distills = {"distill_samples": args.distill_samples} if parsed.finish else {}
    lowbit.quantize(args.model, output, scheme=scheme, method=method, overwrite=True,
                    **(text if parsed.needs_text or local else {}), **grouped, **learns, **distills)  # fmt: skip
    found = dict(zip(("alone", "own"), judged(args, output), strict=False))  # one of W4A16
    for other in ("W4A4_GROUP", "W4A8") if scheme == "W4A4" else ():
        activation = SCHEMES[other].with_group_size(args.group_size).activation
        assert activation is not None
        state(output, activation)
        [found[other]] = judged(args, output, "simulated")
    shutil.rmtree(output)
    return found


def judged(args: argparse.Namespace, output: Path, activations: Literal["auto", "simulated"] = "auto") -> list[str]:
    rows = lowbit.evaluate(output, reference=args.model, text=args.text, windows=args.windows,
                           window_tokens=args.window_tokens, activations=activations)  # fmt: skip
    return [f"{row.kld_mean:.4f} ± {row.kld_se:.4f}" for row in rows]


def state(folder: Path, activation: ActivationSpec) -> None:
    """Have config.json state other integer activations."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for group in config["quantization_config"]["config_groups"].values():
        stated = {"num_bits": activation.bits, "strategy": activation.per, "group_size": activation.group_size,
                  "symmetric": activation.symmetric}  # fmt: skip
        group["input_activations"] = group["input_activations"] | stated
    path.write_text(json.dumps(config))


if __name__ == "__main__":
    main()
