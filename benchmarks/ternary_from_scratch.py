"""A small model trained from scratch with ternary weights, beside the same training unquantized: two loss curves.

usage: ternary_from_scratch.py [--steps 1000] [--hidden 64] [--layers 2] [--rate 3e-3] [--out build/ternary]

A Llama of bytes (256 tokens), the same start, batches and rates for both. Trained on the packaged calibration text,
judged on the packaged evaluation text, in nats per byte. One has the fake quantization of BitNet (`prepare(model,
"TERNARY")`: weights −1, 0, 1, inputs int8), and is exported: the loss of the folder that transformers loads is the last
line. Both compute in float32.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lowbit
from lowbit.text import read_text

CONTEXT, BATCH, JUDGED = 128, 8, 64  # bytes of a window, windows of a step, windows that are judged
WARMUP = 20  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=Path("build/ternary"))
    args = parser.parse_args()
    shown, judged = windows("calibration"), windows("evaluation")
    judged = judged[:: max(1, len(judged) // JUDGED)][:JUDGED]
    marks = sorted({0, args.steps, *(round(args.steps * share) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4))})
    curves, seconds, ternary, weights = {}, {}, None, 0
    for name in ("float32", "TERNARY"):
        model = small_model(args)
        weights = sum(each.numel() for each in model.parameters())
        if name == "TERNARY":
            lowbit.train.prepare(model, name)
            ternary = model
        start = time.process_time()
        curves[name] = train(model, shown, judged, args, marks)
        seconds[name] = time.process_time() - start
    assert ternary is not None
    shutil.rmtree(args.out, ignore_errors=True)
    done = lowbit.train.export(ternary, args.out)
    print(f"| step | {' | '.join(curves)} |\n|---:|{'---:|' * len(curves)}")
    for index, mark in enumerate(marks):
        print(f"| {mark} | {' | '.join(f'{curve[index]:.3f}' for curve in curves.values())} |")
    print(f"| CPU s | {' | '.join(f'{value:.0f}' for value in seconds.values())} |")
    loaded = AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32)
    print(f"\n{weights / 1e6:.2f}e6 weights; the folder that was exported, loaded by transformers: "
          f"{loss_on(loaded, judged):.3f}")  # fmt: skip


def windows(which: Any) -> Tensor:
    """A packaged text as windows of its bytes, int64 [n, CONTEXT]."""
    ids = torch.tensor(list(read_text(None, which).content.encode()))
    return ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)


def small_model(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
                         num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=4,
                         max_position_embeddings=CONTEXT, tie_word_embeddings=False, bos_token_id=None,
                         eos_token_id=None)  # fmt: skip
    return LlamaForCausalLM(config)


def train(model: Any, shown: Tensor, judged: Tensor, args: argparse.Namespace, marks: list[int]) -> list[float]:
    """Held-out losses at the marks."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.0)
    drawn = torch.Generator().manual_seed(0)
    curve = []
    for step in range(args.steps + 1):
        if step in marks:
            curve.append(loss_on(model, judged))
            model.train()
        if step == args.steps:
            break
        for group in optimizer.param_groups:
            falls = 0.5 * (1 + math.cos(math.pi * step / args.steps))
            group["lr"] = args.rate * min(1.0, (step + 1) / WARMUP) * falls
        batch = shown[torch.randint(len(shown), (BATCH,), generator=drawn)]
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return curve


@torch.no_grad()
def loss_on(model: Any, judged: Tensor) -> float:
    """Mean cross entropy of the next byte, nats."""
    model.eval()
    parts = judged.split(BATCH)
    return sum(model(part, labels=part).loss.item() * len(part) for part in parts) / len(judged)


if __name__ == "__main__":
    main()
