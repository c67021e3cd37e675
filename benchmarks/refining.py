"""What `lowbit refine` gains on files of llama.cpp's encoders and of rounding to nearest.

usage: refining.py MODEL OUT --calib C --text T [--kinds Q4_K_M,Q2_K,W4A16] [--samples 64] [--windows 40]

    MODEL    a Hugging Face folder (Llama-like), the reference
    OUT      folder for the files; those that exist are taken as they are
    --calib  calibration text, for the importance matrix and for refine
    --text   text on which both files are judged: `lowbit evaluate`
    --kinds  file types of llama.cpp, whose blocks are made by its own encoder (ggml_quantize_chunk, of the wheel
             xllamacpp) with an importance matrix and the types of llama-quantize's mix, which lowbit's tests compare
             with the program's; or schemes of folders (W4A16: group size 64), rounded to nearest without a search, as
             llm-compressor's QuantizationModifier does

Prints, for each, bytes, KLD and PPL ratio before and after, CPU minutes and peak memory of the refinement.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import lowbit
from lowbit.export import Piece
from lowbit.export.patched_files import BytesPlace, PatchedFiles
from lowbit.formats.gguf.imatrix_file import read_imatrix
from lowbit.formats.gguf.raw import open_raw_gguf, rows_and_columns
from lowbit.numerics.ggml import TYPES

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from llama_cpp import quantized


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--calib", required=True)
    arguments.add_argument("--text", required=True)
    arguments.add_argument("--kinds", default="Q4_K_M,Q2_K,W4A16")
    arguments.add_argument("--samples", type=int, default=64)
    arguments.add_argument("--windows", type=int, default=40)
    arguments.add_argument("--options", default="", help="more options of `lowbit refine`")
    args = arguments.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds.split(","):
        start = args.out / f"{kind}-start{'' if kind.startswith('W') else '.gguf'}"
        if not start.exists():
            make_start(args, kind, start)
        refined = start.with_name(start.name.replace("start", "refined"))
        began = time.monotonic()
        if not refined.exists():
            options = ["--calib", args.calib, "--samples", str(args.samples), *args.options.split()]
            program = [sys.executable, "-m", "lowbit", "refine", start, "--reference", args.model, "-o", refined]
            subprocess.run([*program, *options], check=True)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        minutes, busy = (time.monotonic() - began) / 60, (spent.ru_utime + spent.ru_stime) / 60
        print(f"{kind}: {minutes:.1f} min, CPU {busy:.1f} min, peak {spent.ru_maxrss / 1e6:.2f} GB", flush=True)
        for path in (start, refined):
            (row,) = lowbit.evaluate(path, reference=args.model, text=args.text, windows=args.windows)
            size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
            ppl = json.loads(row.model_dump_json()).get("ppl_ratio")
            print(f"    {path.name:24s} {size:12,d} bytes  KLD {row.kld_mean:.5f} ± {row.kld_se:.5f}  PPL ratio {ppl}",
                  flush=True)  # fmt: skip


def make_start(args: argparse.Namespace, kind: str, start: Path) -> None:
    """The file that is refined: of llama.cpp's encoder, or rounded to nearest."""
    if kind.startswith("W"):
        lowbit.quantize(args.model, start, scheme=kind, group_size=64, range="absmax")
        return
    matrix, plain = args.out / "imatrix.gguf", args.out / "f32.gguf"
    if not matrix.exists():
        lowbit.imatrix(args.model, matrix, calib=args.calib, samples=args.samples)
    if not plain.exists():
        lowbit.quantize(args.model, plain, scheme="F32")
    ours = start.with_name(f"{kind}-types.gguf")
    lowbit.quantize(plain, ours, scheme=kind, imatrix=str(matrix), overwrite=True)
    importance, types, source = read_imatrix(matrix), open_raw_gguf(ours), open_raw_gguf(plain)
    floats = {tensor.name: tensor for tensor in source.tensors}
    places = {}
    for tensor in types.tensors:
        rows, _ = rows_and_columns(tensor.shape)
        places[tensor.name] = BytesPlace(start, tensor.start, (rows, (tensor.stop - tensor.start) // rows), torch.uint8)
    files = PatchedFiles({ours: start}, places)
    for tensor in types.tensors:
        if TYPES[tensor.type_name].family != "plain":
            weighed = importance.importance(tensor.name, tensor.shape)
            row = None if weighed is None else weighed[0].float()
            weight = source.decode(floats[tensor.name]).float()
            blocks = quantized(TYPES[tensor.type_name].number, weight, places[tensor.name].shape[1], row)
            files.write(Piece(tensor.name, blocks))
    for path in (ours, *ours.parent.glob(f"{kind}-types.*")):
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
