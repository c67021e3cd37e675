"""Runs inside vLLM's environment: each folder's log-probabilities of one sequence and its quantized modules, as JSON.

usage: vllm_logprobs.py FOLDER ... --json FILE

FILE is written after each folder: folder → {"logprobs": [...], "quantized": {module: method}} or {"refused": "why"}.
The process ends early where a model is refused as the one before it was: the caller tries it in a new one.
Images and sound are left out (language_model_only), so a folder needs no processor. vllm_architectures.py calls this.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path
from typing import Any

import vllm_perplexity  # sets the environment before vLLM is imported
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry
from vllm_architectures import ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    vllm_perplexity.offer_emulation()
    inspect_here()
    gc.collect = lambda generation=2: 0  # vLLM collects seven times a model, which is most of the time of a tiny one
    found: dict[str, Any] = {}
    before: tuple[str, str | None] | None = None
    for folder in args.folders:
        try:
            found[folder] = run(folder)
        except Exception as error:  # whatever vLLM raises is what it says of the folder
            found[folder] = {"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        outcome = (folder.removesuffix("-16bit"), found[folder].get("refused"))
        if before is not None and outcome[1] is not None and outcome[1] == before[1] and outcome[0] != before[0]:
            break  # another model is refused with the same words: perhaps because of what the one before it left behind
        before = outcome
        args.json.write_text(json.dumps(found))
        cleanup_dist_env_and_memory()
    os._exit(0)


def inspect_here() -> None:
    """vLLM imports each model class in a process of its own first, which takes longer than all else."""

    def inspected(registered: Any) -> Any:
        return registry._ModelInfo.from_model_cls(registered.load_model_cls())

    registry._LazyRegisteredModel.inspect_model_cls = inspected


def run(folder: str) -> dict[str, Any]:
    llm = LLM(model=folder, dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=2,
              enable_prefix_caching=False, language_model_only=True, max_num_batched_tokens=256,
              num_gpu_blocks_override=32)  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (said,) = llm.generate([TokensPrompt(prompt_token_ids=ids())], sampling, use_tqdm=False)
    scored = zip(said.prompt_token_ids[1:], said.prompt_logprobs[1:], strict=True)
    (quantized,) = llm.apply_model(quantized_modules)
    return {"logprobs": [logprobs[token].logprob for token, logprobs in scored], "quantized": quantized}


def quantized_modules(model: Any) -> dict[str, str]:
    """Module → its method, of every module that vLLM does not keep as floats."""
    methods = {
        name: type(module.quant_method).__name__
        for name, module in model.named_modules()
        if getattr(module, "quant_method", None) is not None
    }
    return {name: method for name, method in methods.items() if "Unquantized" not in method and "KV" not in method}


if __name__ == "__main__":
    main()
