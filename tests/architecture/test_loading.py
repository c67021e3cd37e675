import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluation.tiny_models import CONFIGS, FakeCheckpoint, save_model
from lowbit.architecture import build_without_weights, discover, loading
from lowbit.architecture.building import auto_class
from lowbit.architecture.loading import load_model, load_tokenizer, module_names
from lowbit.checkpoint.base import OpenOptions
from lowbit.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.errors import CheckpointError, UnsafeError
from lowbit.schemes import SCHEMES
from models import config_of, make_model

# A tokenizer as a model's own code has it.
CODE = """
from transformers import PreTrainedTokenizer

class TikTokenTokenizer(PreTrainedTokenizer):
    vocab_size = 1

    def get_vocab(self):
        return {"a": 0}

    def _convert_id_to_token(self, index):
        return "a"
"""
IDS = torch.arange(40)[None] * 7 % 300


def fake(folder, family="llama"):
    model = save_model(folder, family)
    stored = {k: v.clone() for k, v in model.state_dict().items() if k in SafetensorsCheckpoint(folder).tensors}
    return FakeCheckpoint(stored, folder)


@pytest.mark.parametrize("family", CONFIGS)
@torch.inference_mode()
def test_logits_equal_those_of_from_pretrained(family, tmp_path):
    save_model(tmp_path, family)
    ours = load_model(SafetensorsCheckpoint(tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    for (name, buffer), (_, expected) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name


@torch.inference_mode()
def test_bfloat16_equals_from_pretrained(tmp_path):
    save_model(tmp_path, "gemma3")
    ours = load_model(SafetensorsCheckpoint(tmp_path), torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("architecture", ["deepseek_v3", "mixtral", "gpt_oss", "gpt2", "gemma3"])
@torch.inference_mode()
def test_bfloat16_equals_from_pretrained_in_every_kind_of_layout(architecture, tmp_path):
    from transformers import AutoConfig

    make_model(tmp_path, architecture, dtype=torch.float32)
    ours = load_model(SafetensorsCheckpoint(tmp_path), torch.bfloat16)
    parsed = AutoConfig.from_pretrained(tmp_path)
    theirs = auto_class(parsed).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {n: p.dtype for n, p in ours.state_dict().items()} == {n: p.dtype for n, p in theirs.state_dict().items()}
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_modules_are_named_as_transformers_names_them():
    found = discover(config_of("gemma3"), "x")
    names = module_names(build_without_weights(config_of("gemma3"), "x"), found)
    assert names["language_model.model.layers.1.mlp.up_proj"] == "model.language_model.layers.1.mlp.up_proj"
    experts = discover(config_of("mixtral"), "x")
    names = module_names(build_without_weights(config_of("mixtral"), "x"), experts)
    assert set(experts.linears) - set(names) == {name for of in experts.expert_sets.values() for name in of}


def test_quantization_config_is_left_out(tmp_path):
    save_model(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "quantization_config": {"quant_method": "compressed-tensors"}}')
    assert not hasattr(load_model(SafetensorsCheckpoint(tmp_path)).config, "quantization_config")


def test_reading_is_by_slabs_that_are_released(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SLAB_BYTES", 4096)  # less than SLAB_ROWS rows: one slab is 128
    checkpoint = fake(tmp_path)
    model = load_model(checkpoint)
    assert checkpoint.largest_read == 128 * 64 * 4 < checkpoint.values["model.embed_tokens.weight"].nbytes
    assert set(checkpoint.released) == set(checkpoint.tensors)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, checkpoint.values["model.layers.1.mlp.up_proj.weight"])


def test_tied_parameters_are_one(tmp_path):
    model = load_model(fake(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_parameters_may_be_stored_under_the_other_name(tmp_path):
    checkpoint = fake(tmp_path)
    embedding = checkpoint.values["model.embed_tokens.weight"]
    checkpoint.rename("model.embed_tokens.weight", "lm_head.weight")
    model = load_model(checkpoint)
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_tied_parameters_stored_twice_are_tied_only_if_they_are_equal(tmp_path):
    checkpoint = fake(tmp_path)
    embedding = checkpoint.values["model.embed_tokens.weight"]
    same = load_model(FakeCheckpoint({**checkpoint.values, "lm_head.weight": embedding.clone()}, tmp_path))
    assert same.lm_head.weight is same.model.embed_tokens.weight
    other = load_model(FakeCheckpoint({**checkpoint.values, "lm_head.weight": embedding + 1}, tmp_path))
    assert torch.equal(other.lm_head.weight, embedding + 1)
    assert torch.equal(other.model.embed_tokens.weight, embedding)


def test_a_missing_tensor_is_named(tmp_path):
    checkpoint = fake(tmp_path)
    del checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \[96, 64\] is absent"):
        load_model(checkpoint)


def test_an_unexpected_tensor_is_named(tmp_path):
    checkpoint = fake(tmp_path)
    checkpoint.rename("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.w3.weight")
    with pytest.raises(CheckpointError, match=r"no place for model\.layers\.0\.mlp\.w3\.weight"):
        load_model(checkpoint)


def test_a_wrong_shape_is_named(tmp_path):
    checkpoint = fake(tmp_path)
    name = "model.norm.weight"
    wrong = FakeCheckpoint({**checkpoint.values, name: torch.ones(65)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[65\].*\[64\]"):
        load_model(wrong)


def test_old_rotary_buffers_are_no_parameters(tmp_path):
    checkpoint = fake(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_model(FakeCheckpoint({**checkpoint.values, name: torch.ones(8)}, tmp_path))


def test_biases_of_zeros_are_passed_over_and_others_are_not(tmp_path):
    """AutoGPTQ writes one for every linear."""
    checkpoint = fake(tmp_path)
    owner = "model.layers.0.self_attn.q_proj"
    schemes = {f"{owner}.weight": SCHEMES["W4A16"]}
    load_model(FakeCheckpoint({**checkpoint.values, f"{owner}.bias": torch.zeros(64)}, tmp_path, schemes))
    load_model(FakeCheckpoint({**checkpoint.values, f"{owner}.bias": torch.zeros(64)}, tmp_path))
    with pytest.raises(CheckpointError, match=rf"{owner}\.bias: LlamaForCausalLM has no such bias unless .* attention"):
        load_model(FakeCheckpoint({**checkpoint.values, f"{owner}.bias": torch.ones(64)}, tmp_path, schemes))


def test_remote_code_needs_trust(tmp_path):
    checkpoint = fake(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "auto_map": {"AutoModelForCausalLM": "evil.Model"}}')
    with pytest.raises(UnsafeError):
        load_model(checkpoint)


def test_tokenizer_of_the_folder(tmp_path):
    tokenizer = load_tokenizer(fake(tmp_path))
    assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"


def test_a_tokenizer_that_needs_code_needs_trust(tmp_path):
    checkpoint = fake(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tiktoken.model").write_bytes(b"YQ== 0\n")
    auto_map = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto_map))
    with pytest.raises(UnsafeError, match=r"how tiktoken\.model cuts text .*tokenization_kimi\.Tik") as caught:
        load_tokenizer(checkpoint)
    assert caught.value.hint == "read that code, then pass --trust-remote-code"
    (tmp_path / "tokenization_kimi.py").write_text(CODE)
    assert load_tokenizer(checkpoint, OpenOptions(trust_remote_code=True)).decode([0]) == "a"


def test_a_folder_without_tokenizer_is_named(tmp_path):
    checkpoint = fake(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="there is no tokenizer in"):
        load_tokenizer(checkpoint)
