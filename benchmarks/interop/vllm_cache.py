"""Runs inside vLLM's environment: the distributions that a model predicts with each type of KV cache, as numpy files.

usage: vllm_cache.py FOLDER --ids FILE --out FOLDER --types auto,fp8_e4m3,fp8_e5m2

FILE is JSON, a list of windows of token ids; OUT gets TYPE.npy, float32 [windows, tokens − 1, vocabulary], logarithms.
The computations are in float32, so that what differs is the cache. compare_cache_with_vllm.py calls this.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import vllm_perplexity  # noqa: F401  sets the environment before vLLM is imported
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", default="auto,fp8_e4m3,fp8_e5m2")
    args = parser.parse_args()
    windows = json.loads(args.ids.read_text())
    for name in args.types.split(","):
        llm = LLM(model=args.folder, dtype="float32", kv_cache_dtype=name, enforce_eager=True, max_num_seqs=2,
                  max_model_len=len(windows[0]) + 8, max_logprobs=-1, enable_prefix_caching=False,
                  num_gpu_blocks_override=64)  # fmt: skip
        asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, flat_logprobs=True,
                               detokenize=False)  # fmt: skip
        prompts = [TokensPrompt(prompt_token_ids=window) for window in windows]
        found = [distributions(said.prompt_logprobs) for said in llm.generate(prompts, asked, use_tqdm=False)]
        np.save(args.out / f"{name}.npy", np.stack(found))
        del llm
        cleanup_dist_env_and_memory()
    os._exit(0)  # vLLM's threads outlive main


def distributions(flat) -> np.ndarray:
    """Log-probabilities by token id, [tokens − 1, vocabulary], of vLLM's flat lists; the first token has none."""
    rows = []
    for start, stop in list(zip(flat.start_indices, flat.end_indices, strict=True))[1:]:
        row = np.full(max(flat.token_ids[start:stop]) + 1, np.nan, dtype=np.float32)
        row[flat.token_ids[start:stop]] = flat.logprobs[start:stop]
        rows.append(row)
    return np.stack(rows)


if __name__ == "__main__":
    main()
