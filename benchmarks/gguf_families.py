"""Every GGUF architecture, written by lowbit and computed by llama.cpp: how far from transformers.

    python benchmarks/gguf_families.py [CASE ...] [--json FILE] [--write docs/gguf-architectures.md] [--workers 2]

For each case of tests/gguf_models.py, a tiny random model, in a process of its own:

    F32    worst difference, in nats, between llama.cpp's ten best log-probabilities after a prompt of 40 tokens and
           transformers' of the same tokens, both in float32
    Q8_0   the same for the file of `lowbit quantize --scheme Q8_0`, which verifies it; larger where rounding makes a
           router choose other experts
    back   True if `lowbit.load` of the F32 file gives the logits of the source, bit for bit

llama.cpp is that of the package xllamacpp. The exit status is 1 if a case fails at any of the three.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

SECONDS = 240


def main() -> int:
    from gguf_models import CASES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--write", type=Path, help="a document whose table between <!-- families --> and <!-- end --> is renewed"
    )
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    prepare()
    with ThreadPoolExecutor(args.workers) as pool:
        rows = []
        for row in pool.map(run_apart, args.cases or CASES):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        table = f"<!-- families -->\n\n{markdown(rows)}\n\n<!-- end -->"
        args.write.write_text(re.sub(r"<!-- families -->.*?<!-- end -->", lambda _: table, text, flags=re.S), "utf-8")
    return int(any("failed" in row for row in rows))


def prepare() -> None:
    """What every process needs is imported here once: the processes are forks of this one."""
    import torch
    import transformers

    import lowbit

    del lowbit
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run_apart(case: str) -> dict[str, Any]:
    """The row of one case, from a process of its own: llama.cpp aborts where it finds a fault."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, writer))
    process.start()
    writer.close()
    row: dict[str, Any] = {"case": case}
    try:
        while reader.poll(SECONDS):
            row |= reader.recv()
    except EOFError:
        pass
    if process.is_alive():
        process.join(5)
        process.kill()
    process.join()
    if "back" not in row and "failed" not in row:
        row["failed"] = f"its process ended with {process.exitcode}"
    return row


def _child(case: str, writer: Any) -> None:
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for found in measured(case, Path(scratch)):
                writer.send(found)
        except Exception as error:  # whatever it is, the row says it
            writer.send({"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"})
    writer.close()
    os._exit(0)  # a fork of a thread has the pool's exit handler, but not the threads that it joins


def measured(case: str, scratch: Path) -> Any:
    """{"f32": nats}, {"q8_0": nats}, {"back": …}, one after the other."""
    import torch

    import lowbit
    from gguf_models import (
        CASES,
        LLAMA_OPTIONS,
        LOOSER,
        TOLERANCE,
        describe_folder,
        make_case,
        prompt_and_logprobs,
        write_plain,
    )
    from llama_cpp import top_logprobs
    from lowbit.architecture.loading import load_model
    from lowbit.checkpoint import open_gguf, open_safetensors

    folder = make_case(scratch / "hf", case)
    model, checkpoint = describe_folder(folder)
    path = write_plain(model, checkpoint, scratch / "f32.gguf")
    ids, expected = prompt_and_logprobs(folder)

    def worst(file: Path) -> float:
        found = top_logprobs(file, ids, options=LLAMA_OPTIONS.get(case))
        return max(abs(value - expected[token].item()) for token, value in found.items())

    yield {"arch": model.arch, "f32": (f32 := worst(path))}
    if f32 > LOOSER.get(case, TOLERANCE):
        raise AssertionError(f"F32 differs by {f32:.2g} nats")
    lowbit.quantize(folder, scratch / "q8.gguf", scheme="Q8_0")
    yield {"q8_0": worst(scratch / "q8.gguf")}
    if CASES[case][3] is None:
        yield {"back": None}
        return
    with torch.no_grad():
        tokens = torch.tensor([ids])
        same = load_model(open_safetensors(folder))(tokens).logits, load_model(open_gguf(path))(tokens).logits
    yield {"back": torch.equal(*same) or bool(torch.allclose(*same, atol=1e-5))}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| case | architecture | F32, nats | Q8_0, nats | read back |", "|---|---|---:|---:|---|"]
    for row in rows:
        numbers = [f"{row[key]:.1e}" if key in row else "–" for key in ("f32", "q8_0")]
        back = row.get("failed") or {True: "yes", False: "differs", None: "no"}[row["back"]]
        lines.append(f"| {row['case']} | `{row.get('arch', '')}` | {numbers[0]} | {numbers[1]} | {back} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
