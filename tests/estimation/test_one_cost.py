"""What `estimate`, `advise` and `--dry-run` say of the same thing is the same number, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lowbit
from lowbit.advice import advise
from lowbit.cli.main import app
from lowbit.estimation import run_memory
from models import make_model

# Two blocks of an 8B: what is equal of two blocks is equal of thirty-two, and the plans of the 70B below have eighty.
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B = LLAMA | {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672,
}  # fmt: skip
MISTRAL = LLAMA | {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096, "vocab_size": 32768,
    "max_position_embeddings": 32768,
}  # fmt: skip


def compare(config: dict[str, Any], engine: str, scheme: str, context: int, batch: int, **device: Any) -> bool:
    """Whether it fits, after every option of the scheme was found to be the same in both."""
    load: dict[str, Any] = {"engine": engine, "context": context, "batch": batch, **device}
    options = [option for option in advise(config, **load).options if option.scheme == scheme]
    assert options
    for option in options:
        assert option.settings is not None
        told = lowbit.estimate(config, **load, **option.settings)
        serving, fit, memory = told.serving, told.fit, option.memory
        assert serving is not None
        assert fit is not None
        assert (serving.weights, serving.kv_cache) == (memory.weights, memory.cache)
        assert serving.activations + serving.framework == memory.overhead
        assert serving.total == memory.total
        assert (fit.usable, fit.fits) == (memory.usable, memory.fits)
    return options[0].memory.fits


@pytest.mark.parametrize(("engine", "scheme", "hardware"), [
    ("vllm", "W4A16", "rtx-4090"), ("vllm", "W4A16", "a100-80gb"), ("vllm", "FP8_DYNAMIC", "b200"),
    ("vllm", "W8A8", "a100-40gb"), ("sglang", "W8A16", "h100"), ("sglang", "FP8_DYNAMIC", "mi300x"),
    ("tensorrt-llm", "FP8", "h100"), ("tensorrt-llm", "NVFP4", "b200"), ("transformers", "NF4", "rtx-3090"),
    ("transformers", "INT8", "a100-40gb"), ("llama.cpp", "Q4_K_M", "m2-max"), ("llama.cpp", "IQ4_XS", "rtx-4090"),
])  # fmt: skip
@pytest.mark.parametrize("config", [LLAMA, MISTRAL], ids=["llama", "mistral"])
def test_advice_and_estimate_count_the_same_bytes(config, engine, scheme, hardware):
    compare(config, engine, scheme, 16384, 16, hardware=hardware)


@pytest.mark.parametrize(("memory", "fits"), [(40 << 30, False), (46_500_000_000, True)])
def test_a_70b_on_a_small_a100_fits_in_both_or_in_neither(memory, fits):
    """42.2 GB of 42.8: a pass of 2048 tokens, as vLLM has it on such a card, leaves room, and one of 8192 does not."""
    assert compare(LLAMA_70B, "vllm", "W4A16", 2048, 1, hardware="a100-40gb", memory=memory) is fits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("cost") / "llama", hidden_size=256, intermediate_size=512, head_dim=64,
                      num_hidden_layers=1)  # fmt: skip


def test_advice_on_a_folder_counts_as_estimate_does(tiny):
    for option in advise(str(tiny), hardware="h100", engine="vllm", context=512).options:
        if option.settings is not None:
            told = lowbit.estimate(tiny, engine="vllm", hardware="h100", context=512, batch=8, **option.settings)
            assert told.serving is not None
            assert told.serving.total == option.memory.total, option.label


RUNS = [
    ("W4A16", "rtn"), ("W4A16", "gptq"), ("W4A16_ASYM", "awq"), ("Q4_K_M", "rtn"), ("Q4_K_M", "gptq"),
    ("Q4_K_M", "awq"), ("FP8_DYNAMIC", "rtn"), ("NF4", "rtn"),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "method"), RUNS)
@pytest.mark.parametrize("limit", [None, "400MiB"])
def test_a_dry_run_prints_the_memory_of_an_estimate(tiny, monkeypatch, scheme, method, limit):
    monkeypatch.setattr(run_memory, "resident_memory", lambda: 300_000_000)
    words = [str(tiny), "--scheme", scheme, "--threads", "3", "--json"]
    if method != "rtn":  # which reads neither a text nor a bound of its memory
        words += ["--method", method, "--samples", "512", *([] if limit is None else ["--max-memory", limit])]
    planned = json.loads(CliRunner().invoke(app, ["quantize", *words, "--dry-run"]).stdout)
    told = json.loads(CliRunner().invoke(app, ["estimate", *words]).stdout)
    assert planned["peak_memory_bytes"] == told["run"]["peak_memory"] == sum(told["run"]["memory"].values())
    if method != "rtn":
        assert told["run"]["memory"]["hidden states"] > 0
