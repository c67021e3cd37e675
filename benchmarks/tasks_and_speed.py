"""What one small model can still do, and how fast it is, in five schemes: two tables in Markdown.

usage: tasks_and_speed.py tasks WORK [--model demo:smollm2] [--rows "W4A16 gptq,Q2_K rtn"] [--items N] [--seconds S]
       tasks_and_speed.py speed WORK [--model demo:smollm2] [--rows …] [--rounds 5] [--context 128] [--tokens 32]

    WORK  a folder for the files; those that are there are not made again, answers that are there not asked again
    S     each model is asked for at most so long; the same command goes on, and prints the table when all is answered

tasks: the packaged items of `lowbit evaluate --tasks`, asked once of the reference and of each file, paired.
speed: `lowbit bench` in transformers (folders) and llama.cpp (GGUF). The files of an engine run in turns, the 16-bit
file first in every round; a figure is the median over rounds of the ratio to the 16-bit file of the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from pathlib import Path

import torch

import lowbit
from lowbit.benchmark.result import BenchRow
from lowbit.checkpoint.base import OpenOptions
from lowbit.evaluation.opening import Opener
from lowbit.evaluation.perplexity import variants_of
from lowbit.tasks.answering import answers
from lowbit.tasks.items import CATEGORIES, Item, packaged_items
from lowbit.tasks.kept import kept, key_of
from lowbit.tasks.models import WholeModel
from lowbit.tasks.result import rows_of

ROWS = "W8A8 rtn,W4A16 rtn,W4A16 gptq,Q4_K_M rtn,Q2_K rtn"
_AT_ONCE = 4  # items; their choices are two batches
_FILE_TYPES = "Q"  # how the names of llama.cpp's file types begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tasks", "speed"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--rows", default=ROWS, help="SCHEME METHOD, separated by commas")
    parser.add_argument("--samples", type=int, default=16, help="windows of the packaged text for calibrated methods")
    parser.add_argument("--items", type=int, help="of each category; all by default")
    parser.add_argument("--categories", default=",".join(CATEGORIES))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = args.rows.split(",")
    if args.what == "speed":  # the method changes no shape
        rows = list({row.split()[0]: row for row in reversed(rows)}.values())[::-1]
    files = {row: made(args, *row.split()) for row in rows}
    print_tasks(args, files) if args.what == "tasks" else print_speed(args, files)


def made(args: argparse.Namespace, scheme: str, method: str) -> Path:
    """The file of a row, in WORK."""
    gguf = scheme.startswith(_FILE_TYPES)
    path = args.work / f"{scheme}-{method}{'.gguf' if gguf else ''}"
    if not path.exists():
        samples = {} if method == "rtn" else {"samples": args.samples}
        lowbit.quantize(args.model, path, scheme=scheme, method=method, **samples)
    return path


def size(path: Path) -> int:
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.glob("*.safetensors")))


def print_tasks(args: argparse.Namespace, files: dict[str, Path]) -> None:
    names = tuple(args.categories.split(","))
    every = [[item for item in packaged_items(0, names) if item.category == name][: args.items] for name in names]
    items = [item for some in every for item in some]
    categories = [(item.category, "") for item in items]
    for name, path in (("reference", args.model), *((path.name, path) for path in files.values())):
        if not ask(args, name, path, items):
            sys.exit(f"{name}: not all of {len(items)} items are answered yet; run the same command again")
    reference = kept_answers(args, "reference", items)
    print("| | MB | " + " | ".join(names) + " | all | difference | lost | gained | p |")
    print("|---|---:|" + "---:|" * (len(names) + 5))
    shares = " | ".join(str(row.right) for row in rows_of(categories, reference, None))
    print(f"| reference (of {', '.join(str(categories.count((name, ''))) for name in names)}) | | {shares} | | | | |")
    for row, path in files.items():
        rows = rows_of(categories, kept_answers(args, path.name, items), reference)
        last = rows[-1]
        shares = " | ".join(f"{each.right} (−{each.lost} +{each.gained})" for each in rows[:-1])
        difference = f"{100 * (last.difference or 0):+.1f} % ± {100 * (last.difference_se or 0):.1f} %"
        flips = f"{last.lost} | {last.gained} | {last.p:.2g}"
        print(f"| {row} | {size(path) / 1e6:.1f} | {shares} | {last.right} | {difference} | {flips} |", flush=True)


def ask(args: argparse.Namespace, name: str, path: Path | str, items: list[Item]) -> bool:
    """Ask a model what is missing, with activations as the scheme rounds them; whether all is answered then."""
    with kept(args.work / f"{name}.answers.jsonl") as (known, add):
        missing = [item for item in items if key_of(repr(item)) not in known]
        if not missing:
            return True
        with contextlib.ExitStack() as stack:
            opened = Opener(stack, torch.float32, "cpu", OpenOptions()).open(path)
            context = list(variants_of(opened.checkpoint, "auto").values())[-1]
            opened.loader.fill()
            stop = time.monotonic() + args.seconds
            with context(opened.model):
                for begin in range(0, len(missing), _AT_ONCE):
                    some = missing[begin : begin + _AT_ONCE]
                    for item, right in zip(
                        some, answers(WholeModel(opened.model, opened.tokenizer), some), strict=True
                    ):
                        add(key_of(repr(item)), right)
                    if time.monotonic() > stop:
                        break
        gc.collect()
        return all(key_of(repr(item)) in known for item in items)


def kept_answers(args: argparse.Namespace, name: str, items: list[Item]) -> list[bool]:
    """Whether a model has each item right."""
    with kept(args.work / f"{name}.answers.jsonl") as (known, _):
        return [bool(known[key_of(repr(item))]) for item in items]


def print_speed(args: argparse.Namespace, files: dict[str, Path]) -> None:
    print("| | engine | MB | prefill ÷ 16 bits | decode ÷ 16 bits | decode of the 16-bit file, tok/s |")
    print("|---|---|---:|---:|---:|---:|")
    for engine, gguf in (("transformers", False), ("llama.cpp", True)):
        chosen = {row: path for row, path in files.items() if (path.suffix == ".gguf") is gguf}
        if not chosen:
            continue
        base = sixteen_bits(args, gguf)
        rounds = [{name: timed(args, path) for name, path in {"16 bits": base, **chosen}.items()}
                  for _ in range(args.rounds)]  # fmt: skip
        for name, path in {"16 bits": base, **chosen}.items():
            scheme = name.removesuffix(" rtn")
            ratios = [[getattr(each[name], what) / getattr(each["16 bits"], what) for each in rounds]
                      for what in ("prefill", "decode")]  # fmt: skip
            shown = " | ".join(f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios)
            own = statistics.median(each["16 bits"].decode for each in rounds)
            print(f"| {scheme} | {engine} | {size(path) / 1e6:.1f} | {shown} | {own:.1f} |", flush=True)


def sixteen_bits(args: argparse.Namespace, gguf: bool) -> Path:
    """The model in 16 bits, as the engine reads it."""
    path = args.work / ("F16.gguf" if gguf else "BF16")
    if gguf and not path.exists():
        lowbit.quantize(args.model, path, scheme="F16", format="gguf")
    elif not path.exists():
        model, tokenizer = lowbit.load(args.model, dtype=torch.bfloat16)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def timed(args: argparse.Namespace, path: Path) -> BenchRow:
    """One run of the load, after one that does not count."""
    found = lowbit.bench(path, engine=None if path.suffix == ".gguf" else "transformers", contexts=(args.context,),
                         tokens=args.tokens, repeats=1, warmups=1, threads=torch.get_num_threads())  # fmt: skip
    return found.rows[0]


if __name__ == "__main__":
    main()
