"""PEFT itself trains and saves the adapter; the merged model computes what its adapted one does."""

from __future__ import annotations

import pytest
import torch

from lowbit.architecture.loading import load_model
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions
from models import make_model

pytestmark = pytest.mark.interop

peft = pytest.importorskip("peft")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "linears": ("llama", {"target_modules": LINEAR}),
    "patterns": ("llama", {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 8},
                           "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 3}}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias of B": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "tied embedding": ("phi4", {"target_modules": ["qkv_proj", "embed_tokens"]}),
    "tied head": ("phi4", {"target_modules": ["qkv_proj"], "modules_to_save": ["lm_head"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d, dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "fused experts": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "vision": ("gemma3", {"target_modules": ["q_proj", "up_proj"]}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_merged_logits_are_those_of_the_adapted_model(tmp_path, case):
    from transformers import AutoModelForCausalLM

    family, config = CASES[case]
    base = make_model(tmp_path / "base", family, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=4,
                                                       lora_alpha=8, **config)).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(5, 17)[None]
    checkpoint = open_checkpoint(base, OpenOptions(adapter=str(tmp_path / "adapter")))
    with torch.no_grad():
        torch.testing.assert_close(load_model(checkpoint)(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
