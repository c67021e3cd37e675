"""Real llama.cpp, through the wheel xllamacpp, for interop tests."""

from __future__ import annotations

from pathlib import Path


def top_logprobs(path: Path, ids: list[int], count: int = 10) -> dict[int, float]:
    """Token → log-probability of the most likely next tokens, by llama.cpp."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
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


def embedding(path: Path, ids: list[int]) -> list[float]:
    """The embedding of a text by llama.cpp, pooled as the file says and of length 1."""
    return _embedding_server(path).handle_embeddings({"input": ids})["data"][0]["embedding"]


def ranks(path: Path, query: str, documents: list[str]) -> list[float]:
    """The score of each document by llama.cpp."""
    results = _embedding_server(path, ranking=True).handle_rerank({"query": query, "documents": documents})["results"]
    return [result["relevance_score"] for result in sorted(results, key=lambda result: result["index"])]


def _embedding_server(path: Path, ranking: bool = False):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = params.n_batch = params.n_ubatch = 1024
    params.embedding = True
    if ranking:
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)
