"""Where llama.cpp computes something else than transformers: how much of the difference is left without it.

    python benchmarks/gguf_differences.py [CASE ...]

For the tiny random models of tests/gguf_models.py that differ by more than float32 explains, as GGUF files in F32: the
largest difference of llama.cpp's ten best log-probabilities behind a prompt of 40 tokens from transformers', in nats,
while transformers computes as its own class says, and as tests/as_llama_cpp.py has it. The last way of Gemma 3n puts a
table of GELU with steps of 1 into both programs.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests")]

from as_llama_cpp import one_epsilon, sample_deviation, steps_of_gelu, table_of_gelu  # noqa: E402

# What transformers computes as llama.cpp does: in words, how.
_GEMMA3N = {
    "nothing": [],
    "deviation of a sample": [sample_deviation],
    "GELU by ggml's table": [table_of_gelu],
    "both": [sample_deviation, table_of_gelu],
    "both, with steps of 1 in both programs' tables": [sample_deviation, steps_of_gelu],
}
WAYS: dict[str, dict[str, list[Any]]] = {
    "kimi_linear": {"nothing": [], "epsilons": [partial(one_epsilon, 1e-5)]},
    "gemma3n_text": _GEMMA3N,
    "gemma3n_shared": _GEMMA3N,
}


def main() -> int:
    torch.set_num_threads(1)
    print("| case | computed as by llama.cpp | difference, nats |\n|---|---|---:|")
    for case in sys.argv[1:] or WAYS:
        with tempfile.TemporaryDirectory() as scratch:
            for words, imitated in WAYS[case].items():
                print(f"| {case} | {words} | {difference(case, imitated, Path(scratch) / words):.1e} |", flush=True)
    return 0


def difference(case: str, imitated: list[Any], scratch: Path) -> float:
    """Nats; see above."""
    from gguf_models import describe_folder, make_case, prompt_and_logprobs, write_plain
    from llama_cpp import top_logprobs

    folder = make_case(scratch / "hf", case)
    path = write_plain(*describe_folder(folder), scratch / "f32.gguf")
    with ExitStack() as stack:
        contexts: list[AbstractContextManager[None]] = [each() for each in imitated]
        for context in contexts:
            stack.enter_context(context)
        ids, expected = prompt_and_logprobs(folder)
        found = top_logprobs(path, ids)
    return max(abs(value - expected[token].item()) for token, value in found.items())


if __name__ == "__main__":
    sys.exit(main())
