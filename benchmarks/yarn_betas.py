"""What llama.cpp computes of Kimi-K2's YaRN with and without --yarn-beta-fast 1, by the length of the text.

    python benchmarks/yarn_betas.py [TOKENS ...]

A tiny random model with Kimi-K2's rotary embedding (64 dimensions, base 50000, factor 32 of 4096, beta_fast 1), as a
GGUF file in F32. For each length, behind a random text: the Kullback-Leibler divergence of llama.cpp's next-token
distribution from transformers', and the largest difference of a log-probability, in nats.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests")]

LENGTHS = (10, 40, 160, 640, 2560)


def main() -> int:
    from gguf_models import describe_folder, make_case, write_plain
    from llama_cpp import top_logprobs
    from lowbit.architecture.loading import load_model
    from lowbit.checkpoint import open_safetensors

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_case(Path(scratch) / "hf", "kimi_k2")
        path = write_plain(*describe_folder(folder), Path(scratch) / "f32.gguf")
        model = load_model(open_safetensors(folder))
        print("| tokens | KLD without | largest difference without | largest difference with |\n|---:|---:|---:|---:|")
        for length in [int(word) for word in sys.argv[1:]] or LENGTHS:
            ids = torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                expected = model(ids).logits[0, -1].double().log_softmax(-1)
            divergence, largest = [], []
            for beta in ({}, {"yarn_beta_fast": 1.0}):
                # the bias makes it say a letter, as it gives no probabilities of half a character
                found = top_logprobs(
                    path, ids[0].tolist(), len(expected), options={"n_ctx": 4096, "n_batch": 4096, **beta}, letter=True
                )
                theirs = torch.tensor([found[token] for token in range(len(expected))], dtype=torch.float64)
                divergence.append((expected.exp() * (expected - theirs)).sum().item())
                largest.append((expected - theirs).abs().max().item())
            print(f"| {length} | {divergence[0]:.1e} | {largest[0]:.1e} | {largest[1]:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
