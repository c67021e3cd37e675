"""Real llama.cpp, through the wheel xllamacpp, for interop tests."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor


def ggml() -> ctypes.CDLL:
    """ggml's own functions, which the wheel exports."""
    import xllamacpp

    library = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    found = ctypes.CDLL(str(library))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return found


def quantized(number: int, weight: Tensor, row_bytes: int, importance: Tensor | None = None) -> Tensor:
    """Blocks, uint8 [N, row bytes], by llama.cpp's encoder."""
    weight, blocks = weight.contiguous(), torch.empty((len(weight), row_bytes), dtype=torch.uint8)
    by = None if importance is None else importance.contiguous().data_ptr()
    done = ggml().ggml_quantize_chunk(number, weight.data_ptr(), blocks.data_ptr(), 0, *weight.shape, by)
    assert done == blocks.numel()
    return blocks


def dequantized(name: str, blocks: Tensor, columns: int) -> Tensor:
    """Float32 [N, K] of blocks, by llama.cpp's decoder."""
    weight = torch.empty((len(blocks), columns))
    decode = getattr(ggml(), f"dequantize_row_{name.lower()}")
    decode(ctypes.c_void_p(blocks.contiguous().data_ptr()), ctypes.c_void_p(weight.data_ptr()),
           ctypes.c_int64(weight.numel()))  # fmt: skip
    return weight


def top_logprobs(
    path: Path, ids: list[int], count: int = 10, adapter: Path | None = None, options: dict[str, float] | None = None,
    letter: bool = False,
) -> dict[int, float]:  # fmt: skip
    """Token → log-probability of the most likely next tokens, by llama.cpp, with a LoRA adapter or without.

    options  of its command line, by the names of xllamacpp
    letter   it is made to say a letter, whatever is likely: it gives no probabilities of half a character
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    params.n_ctx = 128
    for name, value in (options or {}).items():
        setattr(params, name, value)
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    bias = {"logit_bias": [[97, 100.0]]} if letter else {}
    answer = server.handle_completions({"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": count, **bias})
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}


def embedding(path: Path, ids: list[int]) -> list[float]:
    """The embedding of a text by llama.cpp, pooled as the file says and of length 1."""
    return _embedding_server(path).handle_embeddings({"input": ids})["data"][0]["embedding"]


def ranks(path: Path, query: str, documents: list[str]) -> list[float]:
    """The score of each document by llama.cpp."""
    results = _embedding_server(path, ranking=True).handle_rerank({"query": query, "documents": documents})["results"]
    return [result["relevance_score"] for result in sorted(results, key=lambda result: result["index"])]


class _ByValue(ctypes.Structure):
    """A struct of llama.h that only goes from one of its functions to another; longer than any of them."""

    _fields_ = (("bytes", ctypes.c_char * 1024),)


def last_logits(path: Path, ids: list[int], vocabulary: int) -> Tensor:
    """Logits [vocabulary] behind the last id, by llama.cpp's library alone: xllamacpp's server wants a tokenizer."""
    import numpy as np

    class Batch(ctypes.Structure):
        _fields_ = (("n_tokens", ctypes.c_int32), ("rest", ctypes.c_void_p * 6))

    called = ggml()
    for name, result, arguments in (
        ("llama_model_default_params", _ByValue, []),
        ("llama_context_default_params", _ByValue, []),
        ("llama_model_load_from_file", ctypes.c_void_p, [ctypes.c_char_p, _ByValue]),
        ("llama_init_from_model", ctypes.c_void_p, [ctypes.c_void_p, _ByValue]),
        ("llama_batch_get_one", Batch, [ctypes.c_void_p, ctypes.c_int32]),
        ("llama_decode", ctypes.c_int32, [ctypes.c_void_p, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int32]),
        ("llama_free", None, [ctypes.c_void_p]),
        ("llama_model_free", None, [ctypes.c_void_p]),
    ):
        function = getattr(called, name)
        function.restype, function.argtypes = result, arguments
    called.llama_backend_init()
    model = called.llama_model_load_from_file(str(path).encode(), called.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    context = called.llama_init_from_model(model, called.llama_context_default_params())
    tokens = (ctypes.c_int32 * len(ids))(*ids)
    assert called.llama_decode(context, called.llama_batch_get_one(tokens, len(ids))) == 0
    logits = np.ctypeslib.as_array(called.llama_get_logits_ith(context, -1), (vocabulary,)).copy()
    called.llama_free(context)
    called.llama_model_free(model)
    return torch.from_numpy(logits)


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


def next_token_logprobs(
    path: Path, texts: list[list[int]], first: int, vocabulary: int, cache: tuple[str, str] = ("F32", "F32")
) -> Tensor:
    """Log-probabilities [texts · (T − first), vocabulary] of the token behind each ids[:t], first ≤ t < T, by llama.cpp
    with these types of cached keys and values. Tokens come one at a time, so that each is read from the cache."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 256
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    kinds = (getattr(xllamacpp.ggml_type, f"GGML_TYPE_{name.upper()}") for name in cache)
    params.cache_type_k, params.cache_type_v = kinds
    flash = xllamacpp.llama_flash_attn_type
    quantized = set(cache) != {"F32"}  # quantized values need flash attention, which has no cache in F32
    params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_ENABLED if quantized else flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    rows = []
    for ids in texts:
        for stop in range(first, len(ids)):
            # The bias makes it say a letter, as it gives no probabilities of half a character; they are from before it.
            answer = server.handle_completions({"prompt": ids[:stop], "max_tokens": 1, "temperature": 0,
                                                "logprobs": vocabulary, "logit_bias": [[97, 100.0]]})  # fmt: skip
            row = torch.full((vocabulary,), -100.0)
            for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
            rows.append(row)
    return torch.stack(rows)
