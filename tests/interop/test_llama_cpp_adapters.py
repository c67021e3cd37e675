"""llama.cpp with a base and an adapter file computes what the merged model computes."""

from __future__ import annotations

import pytest
import torch

from gguf_models import write_plain
from llama_cpp import top_logprobs
from lora import linears_of, matrices, write_adapter
from lowbit.architecture.describing import open_described
from lowbit.architecture.loading import load_model
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions
from lowbit.formats.gguf.adapter import convert_adapter
from lowbit.formats.gguf.model import describe_gguf
from models import make_model

pytestmark = pytest.mark.interop

pytest.importorskip("xllamacpp")

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS = ("q_proj", "k_proj", "w1", "w2", "w3")
CASES = {
    "llama": (LINEAR, {}, 2e-5),
    "qwen2": (LINEAR, {"alpha_pattern": {"k_proj": 3, "up_proj": 5}}, 2e-5),
    "mixtral": (EXPERTS, {"use_rslora": True}, 2e-5),
    "gpt2": (("c_attn", "c_proj", "c_fc"), {}, 2e-3),  # GELU is a float16 table
}


@pytest.mark.parametrize("family", CASES)
def test_base_and_adapter_are_the_merged_model(tmp_path, family):
    leaves, config, tolerance = CASES[family]
    base = make_model(tmp_path / "base", family, dtype=torch.float32)
    if family == "gpt2":
        shapes = {f"transformer.h.{block}.{module}": shape for block in range(2) for module, shape in
                  (("attn.c_attn", (384, 128)), ("attn.c_proj", (128, 128)), ("mlp.c_fc", (512, 128)))}  # fmt: skip
    else:
        shapes = linears_of(base, *leaves)
    adapter = write_adapter(tmp_path / "adapter", matrices(shapes), **config)
    checkpoint, architecture = open_described(base, OpenOptions(), split_experts=True)
    path = write_plain(describe_gguf(checkpoint, architecture), checkpoint, tmp_path / "base.gguf")
    beside = convert_adapter(adapter, tmp_path / "adapter.gguf", base=base).path
    merged = load_model(open_checkpoint(base, OpenOptions(adapter=str(adapter))))
    for seed in range(100):
        ids = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            logits = merged(ids).logits[0, -1].double()
        if 3 <= int(logits.argmax()) < 97:
            break
    found = top_logprobs(path, ids[0].tolist(), adapter=beside)
    expected = logits.log_softmax(-1)
    assert max(abs(logprob - expected[token].item()) for token, logprob in found.items()) < tolerance
    plain = top_logprobs(path, ids[0].tolist())
    assert max(abs(logprob - expected[token].item()) for token, logprob in plain.items()) > 0.05
