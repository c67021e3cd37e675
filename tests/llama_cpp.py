"""Real llama.cpp, through the wheel xllamacpp, for interop tests."""

from __future__ import annotations

from pathlib import Path


def top_logprobs(path: Path, ids: list[int], count: int = 10, adapter: Path | None = None) -> dict[int, float]:
    """Token → log-probability of the most likely next tokens, by llama.cpp, with a LoRA adapter or without."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    params.n_ctx = 128
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    answer = server.handle_completions({"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": count})
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
