"""Where a file in Q8_0 is far from the model: whose the difference is, ours, llama.cpp's, or the random model's.

    python benchmarks/gguf_q8_0.py [CASE ...] [--prompts 8] [--write docs/gguf-architectures.md]

For the cases of tests/gguf_models.py whose Q8_0 file is further than 0.1 nats from transformers in the table of
`gguf_families.py`, over some random prompts of 40 tokens, the largest difference in log-probability of the ten tokens
that llama.cpp finds most likely, as median and largest of the prompts:

    lowbit        llama.cpp with the file of `lowbit quantize --scheme Q8_0`
    its own       llama.cpp with the same file, whose codes come from llama.cpp's encoder (ggml_quantize_chunk)
    weights       transformers with the weights of lowbit's file, in float32: what rounding them costs without the
                  rounding of activations, which llama.cpp adds
    other choice  in that run: the share of choices (experts of a token, tokens that an indexer keeps) that differ from
                  the source's, `torch.topk` of every row; – where nothing is chosen
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks" / "peers")]

MISSES = (
    "solar_open", "exaone_moe", "afmoe", "deepseek_v32", "deepseek_v32_yarn", "glm_moe_dsa", "laguna_yarn",
    "qwen3_5_moe_text", "qwen3_5_moe", "kimi_linear", "gemma3n_text", "gemma3n_shared", "gemma4_text", "gemma4_plain",
    "gemma4_experts",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--write", type=Path, help="a document whose table behind <!-- q8_0 --> is renewed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| case | lowbit | its own | weights | other choice |", "|---|---:|---:|---:|---:|"]
    print("\n".join(lines), flush=True)
    for case in args.cases or MISSES:
        with tempfile.TemporaryDirectory() as scratch:
            found = measured(case, Path(scratch), args.prompts)
        cells = [f"{statistics.median(found[key]):.2f}, {max(found[key]):.2f}" for key in ("ours", "theirs", "weights")]
        choices = "–" if found["chosen"] is None else f"{found['chosen']:.1%}"
        lines.append(f"| {case} | {' | '.join(cells)} | {choices} |")
        print(lines[-1], flush=True)
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        table = "<!-- q8_0 -->\n\n" + "\n".join(lines) + "\n\n<!-- end -->"
        args.write.write_text(re.sub(r"<!-- q8_0 -->.*?<!-- end -->", lambda _: table, text, flags=re.S), "utf-8")
    return 0


def measured(case: str, scratch: Path, prompts: int) -> dict[str, Any]:
    """ "ours", "theirs" and "weights": nats of each prompt; "chosen": a share or None."""
    import shutil

    from llama_encoders import encode_again

    import lowbit
    from gguf_models import LLAMA_OPTIONS, make_case
    from llama_cpp import top_logprobs
    from lowbit.architecture.loading import load_model
    from lowbit.checkpoint import open_gguf, open_safetensors

    folder = make_case(scratch / "hf", case)
    ours, theirs, plain = (scratch / name for name in ("ours.gguf", "theirs.gguf", "plain.gguf"))
    lowbit.quantize(folder, ours, scheme="Q8_0")
    lowbit.quantize(folder, plain, scheme="F32")
    encode_again(Path(shutil.copy(ours, theirs)), plain)
    source, decoded = load_model(open_safetensors(folder)), load_model(open_gguf(ours))
    found: dict[str, Any] = {"ours": [], "theirs": [], "weights": []}
    differ = total = 0
    for seed in range(prompts):
        ids = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(seed))
        (expected, chosen), (rounded, chosen_too) = run(source, ids), run(decoded, ids)
        found["weights"].append(max(abs(rounded[token] - expected[token]).item() for token in rounded.topk(10).indices))
        for key, path in (("ours", ours), ("theirs", theirs)):
            best = top_logprobs(path, ids[0].tolist(), options=LLAMA_OPTIONS.get(case), letter=True)
            found[key].append(max(abs(value - expected[token].item()) for token, value in best.items()))
        for one, other in zip(chosen, chosen_too, strict=True):
            differ += int((one != other).any(-1).sum())
            total += one[..., 0].numel()
    return found | {"chosen": differ / total if total else None}


@torch.no_grad()
def run(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities behind a prompt, float64; what was chosen on the way, sorted."""
    with chosen_by_topk() as chosen:
        logits = model(ids).logits[0, -1]
    return logits.double().log_softmax(-1), chosen


@contextmanager
def chosen_by_topk() -> Iterator[list[Tensor]]:
    """The indices of every topk, sorted, of rows that leave some out."""
    chosen: list[Tensor] = []
    topk = torch.topk

    def recorded(values: Tensor, k: int, *args: Any, **options: Any) -> Any:
        best = topk(values, k, *args, **options)
        if k < values.shape[-1]:
            chosen.append(best.indices.sort(-1).values)
        return best

    with patch.object(torch, "topk", recorded), patch.object(Tensor, "topk", recorded):
        yield chosen


if __name__ == "__main__":
    sys.exit(main())
