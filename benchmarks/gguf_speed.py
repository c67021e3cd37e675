"""`lowbit quantize` to GGUF beside llama-quantize: same file in, same type out, same threads, page cache warm.

usage: gguf_speed.py MODEL.gguf --llama-quantize PROGRAM [--types Q4_0,Q4_K,…] [--imatrix FILE] [--threads 2]
                     [--repeat 3] [--no-error]

    MODEL.gguf   of floats; make_random_gguf.py makes one of any size
    --imatrix    for both; types that need one are left out without it

Of each type, the best of --repeat runs, in millions of weights per second:

    lowbit           the seconds between reading the first weight and the last fsync
    llama-quantize   the "quantize time" that it prints, which leaves out its start and the last flush to disk
    commands         wall seconds of either command as a user types it; ours verifies what it wrote
    error            Σ importance · (w − ŵ)² of ours ÷ of theirs, over all matrices

Types are the mixes that users choose, the same ones in both files. "copy" is read-and-write of the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from throughput import copy_bytes, run, warm

from lowbit.formats.gguf.imatrix_file import read_imatrix
from lowbit.formats.gguf.raw import open_raw_gguf

TYPES = (
    "Q4_0,Q8_0,Q2_K,Q3_K_M,Q4_K_M,Q5_K_M,Q6_K,Q4_1,Q5_0,Q5_1,"
    "IQ4_NL,IQ4_XS,IQ3_S,IQ3_XXS,IQ2_S,IQ2_XS,IQ2_XXS,IQ1_M,IQ1_S"
)
NEED_IMPORTANCE = ("IQ2_XS", "IQ2_XXS", "IQ2_S", "IQ1_S", "IQ1_M", "IQ3_S", "IQ3_XXS")

ENGINE = """
import json, sys, time
from pathlib import Path
from lowbit.pipeline import write_checkpoint
from lowbit.plan.plan import Request, prepare
from lowbit.settings import make_settings
settings = make_settings(**json.loads(sys.argv[3]) | {"format": "gguf"})
prepared = prepare(Request(sys.argv[1], settings, threads=int(sys.argv[4])))
began = time.perf_counter()
write_checkpoint(prepared, Path(sys.argv[2]))
print(json.dumps({"seconds": time.perf_counter() - began}))
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--llama-quantize", type=Path, required=True)
    arguments.add_argument("--types", default=TYPES)
    arguments.add_argument("--imatrix", type=Path)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--no-error", action="store_true", help="leave the error out; it takes longer than the rest")
    args = arguments.parse_args()
    warm([args.model])
    raw = open_raw_gguf(args.model)
    weights = sum(torch.Size(tensor.shape).numel() for tensor in raw.tensors)
    print(f"{args.model.name}: {weights / 1e6:.1f} M weights; {args.threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'type':9s} {'lowbit':>9s} {'llama':>9s} {'ratio':>6s} {'copy':>9s}   {'commands, s':>14s}   {'error':>6s}")
    with tempfile.TemporaryDirectory(dir=args.model.parent) as scratch:
        for name in args.types.split(","):
            if args.imatrix is not None or name not in NEED_IMPORTANCE:
                print(measure(args, name, weights, Path(scratch)), flush=True)


def measure(args: argparse.Namespace, name: str, weights: int, scratch: Path) -> str:
    """One row of the table."""
    ours, theirs = scratch / "ours.gguf", scratch / "theirs.gguf"
    settings = {"scheme": name} | ({"imatrix": str(args.imatrix)} if args.imatrix else {})
    engine = [sys.executable, "-c", ENGINE, str(args.model), str(ours), json.dumps(settings), str(args.threads)]
    command = [
        str(Path(sys.executable).parent / "lowbit"),
        "quantize",
        str(args.model),
        "-o",
        str(ours),
        "--scheme",
        name,
    ]
    command += ["--threads", str(args.threads), "--json"]
    peer = [str(args.llama_quantize)]
    if args.imatrix:
        command += ["--imatrix", str(args.imatrix)]
        peer += ["--imatrix", str(args.imatrix)]
    peer += [str(args.model), str(theirs), name, str(args.threads)]
    seconds, whole, their_seconds, their_whole = [], [], [], []
    for _ in range(args.repeat):
        ours.unlink(missing_ok=True)
        seconds.append(json.loads(run(engine)[2])["seconds"])
        for beside in scratch.glob("ours*"):
            beside.unlink()
        whole.append(run(command)[0])
        began = time.perf_counter()
        done = subprocess.run(peer, capture_output=True, text=True, check=True)
        their_whole.append(time.perf_counter() - began)
        printed = re.search(r"quantize time\s*=\s*([\d.]+) ms", done.stdout + done.stderr)
        assert printed is not None, "llama-quantize says how long it took"
        their_seconds.append(float(printed[1]) / 1000)
    copied = min(copy_bytes([args.model], scratch / "copy", ours.stat().st_size) for _ in range(args.repeat))
    error = "" if args.no_error else f"{weighted_error(args, ours) / weighted_error(args, theirs):6.3f}"
    rate, their_rate = weights / 1e6 / min(seconds), weights / 1e6 / min(their_seconds)
    commands = f"{min(whole):6.2f} / {min(their_whole):6.2f}"
    for beside in scratch.glob("ours*"):
        beside.unlink()
    return (
        f"{name:9s} {rate:9.1f} {their_rate:9.1f} {rate / their_rate:6.2f} {weights / 1e6 / copied:9.1f}   "
        f"{commands:>14s}   {error}"
    )


def weighted_error(args: argparse.Namespace, path: Path) -> float:
    """Σ importance · (w − ŵ)² over the matrices of a file."""
    source, encoded = open_raw_gguf(args.model), open_raw_gguf(path)
    matrix = read_imatrix(args.imatrix) if args.imatrix else None
    originals = {tensor.name: tensor for tensor in source.tensors}
    total = 0.0
    for tensor in encoded.tensors:
        if len(tensor.shape) < 2:
            continue
        importance = matrix.importance(tensor.name, tensor.shape) if matrix else None
        error = (source.decode(originals[tensor.name]).float() - encoded.decode(tensor)).square()
        total += (error if importance is None else error * importance[0]).sum(dtype=torch.float64).item()
    return total


if __name__ == "__main__":
    main()
