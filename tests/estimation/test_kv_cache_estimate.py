"""Bytes of the KV cache against figures worked out by hand, and against caches that transformers fills."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import lowbit
from gguf_models import make_case
from lowbit.architecture.shape import shape_of, shape_of_gguf
from lowbit.engines import find_engine
from lowbit.errors import ArchitectureError, CheckpointError, UsageError
from lowbit.estimation.serving import CACHE_BITS, cache_of
from lowbit.formats.gguf.raw import RawGGUF
from lowbit.numerics.ggml import TYPES
from models import ARCHITECTURES, config_of

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
GEMMA_3_4B = {
    "model_type": "gemma3",
    "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024},
}


@pytest.mark.parametrize(
    ("config", "bits", "expected"),
    [
        (LLAMA_8B, 16, 131072),  # 2 · 32 layers · 8 heads · 128 · 2 bytes
        (LLAMA_8B, 8, 65536),
        (LLAMA_8B, 8.5, 69632),  # q8_0
        (LLAMA_8B, 4.5, 36864),  # q4_0
        ({**LLAMA_8B, "num_key_value_heads": 32}, 16, 524288),  # Llama-2-like: every head has its own
        (DEEPSEEK_V3, 16, 70272),  # 61 · (512 + 64) · 2
        (DEEPSEEK_V3, 8, 35136),
        ({"model_type": "gpt2"}, 16, 36864),  # 2 · 12 · 768 · 2, other names for everything
        (GEMMA_3_4B, 16, 139264),  # 34 · 2 · 4 · 256 · 2, as long as no window is full
    ],
)
def test_bytes_of_one_token(config, bits, expected):
    assert cache_of(shape_of(config), kv_cache=bits).bytes_per_token() == expected


def test_full_windows_no_longer_grow():
    # of Gemma 3's 34 layers every sixth is global: 5 grow, 29 keep 1024 tokens
    cache = cache_of(shape_of(GEMMA_3_4B))
    assert cache.bounded == 29
    assert cache.growth(100) == 34 * 4096
    assert cache.growth(4096) == 5 * 4096
    assert cache.sequence_bytes(32768) == (5 * 32768 + 29 * 1024) * 4096


@pytest.mark.parametrize(
    ("config", "bounded"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 32),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "gemma2"}, 13),
        ({"model_type": "gpt_oss"}, 18),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, 0),
        ({"model_type": "cohere2"}, 30),
    ],
)
def test_windows_of_families(config, bounded):
    assert cache_of(shape_of(config)).bounded == bounded


def test_engines_differ_where_they_say_so():
    mistral = shape_of({"model_type": "mistral", "sliding_window": 4096})
    of = {
        name: cache_of(mistral, find_engine(name)).sequence_bytes(65536)
        for name in ("transformers", "vllm", "llama.cpp")
    }
    assert of["transformers"] == 4096 * 131072
    assert of["vllm"] == (4096 + 2 * 8192) * 131072  # two passes of a prefill in flight
    assert of["llama.cpp"] == 65536 * 131072  # it has no windows for the llama architecture
    small = cache_of(mistral, find_engine("vllm"), memory=24 << 30)
    assert small.sequence_bytes(65536) == (4096 + 2 * 2048) * 131072
    gemma = shape_of(GEMMA_3_4B)
    assert cache_of(gemma, find_engine("llama.cpp")).sequence_bytes(32768) == (5 * 32768 + 29 * (1024 + 512)) * 4096
    assert cache_of(gemma, find_engine("sglang")).bounded == 0


def test_whole_blocks_are_counted():
    shape = shape_of(LLAMA_8B)
    assert cache_of(shape, find_engine("vllm")).sequence_bytes(17) == 32 * 131072
    assert cache_of(shape, find_engine("llama.cpp")).sequence_bytes(17) == 256 * 131072


@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"])
def test_block_types_have_the_bits_of_their_blocks(name):
    kind = TYPES[name.upper()]
    assert CACHE_BITS[name] == 8 * kind.row_bytes(kind.weights) / kind.weights


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "mistral", "deepseek_v2", "deepseek_v3",
                                          "gpt2", "phi3", "qwen3_moe", "bloom", "opt", "gpt_oss"])  # fmt: skip
def test_a_cache_that_transformers_fills_has_these_bytes(architecture):
    from transformers import AutoConfig

    from lowbit.architecture.building import auto_class

    config = AutoConfig.for_model(ARCHITECTURES[architecture][0], **ARCHITECTURES[architecture][1])
    model = auto_class(config).from_config(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        filled = model(torch.zeros(1, 24, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in filled.layers for t in (layer.keys, layer.values))
    assert cache_of(shape_of(config_of(architecture)), find_engine("transformers")).sequence_bytes(24) == held


def test_unknown_names_are_answered_with_neighbours():
    with pytest.raises(UsageError, match="no engine 'vlm'") as caught:
        find_engine("vlm")
    assert "vllm" in caught.value.hint
    with pytest.raises(UsageError, match="no KV cache type 'q8'") as caught:
        cache_of(shape_of(LLAMA_8B), find_engine("llama.cpp"), "q8")
    assert "q8_0" in caught.value.hint
    with pytest.raises(UsageError, match="vllm keeps no KV cache in q8_0") as caught:
        cache_of(shape_of(LLAMA_8B), find_engine("vllm"), "q8_0")
    assert "fp8" in caught.value.hint


def test_keys_and_values_in_two_types():
    """llama.cpp chooses them apart; `lowbit evaluate --kv-cache` takes the same names."""
    shape, engine = shape_of(LLAMA_8B), find_engine("llama.cpp")
    for name in ("q8_0/q4_0", "k=q8_0,v=q4_0"):
        assert cache_of(shape, engine, name).bits == (8.5 + 4.5) / 2
    assert cache_of(shape, engine, "q4_0/q4_0").bits == cache_of(shape, engine, "q4_0").bits
    with pytest.raises(UsageError, match="vllm keeps keys and values in one type, not in q8_0/q4_0"):
        cache_of(shape, find_engine("vllm"), "q8_0/q4_0")
    with pytest.raises(UsageError, match="there is no cache type 'q9_9'"):
        cache_of(shape, engine, "q8_0/q9_9")


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ArchitectureError, match="'linear_attention'"):
        cache_of(shape_of({**LLAMA_8B, "model_type": "other", "layer_types": ["linear_attention"] * 32}))
    with pytest.raises(ArchitectureError, match="no window"):
        cache_of(shape_of({**LLAMA_8B, "model_type": "other", "layer_types": ["sliding_attention"] * 32}))
    with pytest.raises(ArchitectureError, match="has no hidden_size"):
        shape_of({"model_type": "nothing"})
    for wrong in (-1, "8", 2.5, True, 1 << 50):
        with pytest.raises(ArchitectureError, match="hidden_size"):
            shape_of({"model_type": "nothing", "hidden_size": wrong})


def test_overhead_agrees_with_what_engines_have_logged():
    shape = shape_of(LLAMA_8B)
    # vllm pull request 10511: "PyTorch activation peak memory 1.26GiB" on an 80 GB card
    assert find_engine("vllm").memory.activations(shape, 8192, 1) == pytest.approx(1.26 * 2**30, rel=0.02)
    # llama.cpp: "CUDA0 compute buffer size = 258.50 MiB"
    assert find_engine("llama.cpp").memory.activations(shape, 512, 1) == pytest.approx(258.5 * 2**20, rel=0.02)
    assert all(find_engine("vllm").memory.assumptions)


@pytest.mark.parametrize("case", ["llama", "qwen3_moe", "gpt2", "phi3", "olmo2", "granite"])
def test_a_gguf_file_says_the_same_as_config_json(tmp_path, case):
    folder = make_case(tmp_path / "model", case)
    lowbit.quantize(folder, tmp_path / "x.gguf", scheme="BF16")
    told = shape_of_gguf(RawGGUF(tmp_path / "x.gguf").metadata)
    known = shape_of(json.loads((folder / "config.json").read_text()))
    for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "max_positions", "experts", "experts_per_token"):
        assert getattr(told, name) == getattr(known, name), name
    assert told.vocab == known.vocab
    assert cache_of(told).bytes_per_token() == cache_of(known).bytes_per_token()


def test_key_values_of_architectures_that_only_llama_cpp_has():
    told = {
        "general.architecture": "new", "new.block_count": 4, "new.embedding_length": 64, "new.attention.head_count": 4,
        "new.attention.head_count_kv": np.array([2, 2, 1, 1], np.int32), "new.attention.key_length": 24,
        "new.attention.value_length": 8, "new.attention.sliding_window": 16,
        "new.attention.sliding_window_pattern": [True, False],
    }  # fmt: skip
    shape = shape_of_gguf(told)
    assert cache_of(shape) == cache_of(shape, None, 16)
    # 2 heads · (24 + 8) values; two layers keep 16 tokens
    assert cache_of(shape).sequence_bytes(100) == 2 * (2 * (24 + 8)) * (100 + 16) * 2
    assert cache_of(shape_of_gguf(told | {"new.attention.sliding_window_pattern": 4})).bounded == 3
    latent = shape_of_gguf(told | {"new.attention.kv_lora_rank": 32, "new.rope.dimension_count": 8})
    assert cache_of(latent).bytes_per_token() == 4 * (32 + 8) * 2
    for wrong in ({"new.ssm.state_size": 16}, {"new.block_count": 0}, {"new.embedding_length": -1}):
        with pytest.raises(ArchitectureError):
            shape_of_gguf(told | wrong)


def test_a_billion_layers_are_refused_before_a_shape_has_an_entry_for_each():
    told = {"general.architecture": "new", "new.embedding_length": 64, "new.attention.head_count": 2}
    with pytest.raises(ArchitectureError, match="block_count is 1000000000; no model has so many layers"):
        shape_of_gguf(told | {"new.block_count": 10**9})
    with pytest.raises(ArchitectureError, match="embedding_length is 1000000000; no model has so many"):
        shape_of_gguf(told | {"new.block_count": 2, "new.embedding_length": 10**9})
    for key in ("num_hidden_layers", "hidden_size", "num_local_experts"):
        config = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2} | {key: 10**9}
        with pytest.raises(CheckpointError, match=f"{key} is 1000000000, and no model"):
            shape_of(config)
