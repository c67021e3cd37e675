"""Dense decoders as GGUF: what llama.cpp derives from the number of blocks, and what is refused."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from gguf_cases_dense import CASES
from gguf_models import describe_folder, make_case, write_plain
from lowbit.checkpoint import open_gguf
from lowbit.errors import ArchitectureError
from lowbit.formats.gguf.table import row_of_model
from lowbit.formats.gguf.write_pre_tokenizers import identify
from models import make_model

# what the message names → (case, changes)
REFUSED = {
    "sliding_window": ("exaone4", {"sliding_window": 8}),
    "use_qk_norm is False": ("cohere_plus", {"use_qk_norm": False}),
    "use_qk_norm is True": ("cohere", {"use_qk_norm": True}),
    r"lm_head\.weight' has no place": ("cohere2", {"tie_word_embeddings": False}),
    "biases on .*ATTN_OUT": ("cohere2", {"attention_bias": True}),
    "qk_layernorm": ("phi", {"qk_layernorm": True}),
    "scale_depth": ("minicpm3", {"scale_depth": 1.0}),
    "multi_query": ("gpt_bigcode", {"multi_query": False}),
    "layer_rope_theta": ("granite_swa", {"layer_rope_theta": [0.0, 5000.0, 10000.0, 10000.0]}),
    "layer_types has 2 of full attention": ("cohere2", {
        "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2,
    }),
    "with a sliding_window of 0": ("exaone4_windows", {"sliding_window": None, "layer_types": ["full_attention"] * 64}),
    "alibi": ("falcon", {"alibi": True}),
    "parallel_attn": ("falcon", {"parallel_attn": False}),
    r"attn_config\.softmax_scale": ("mpt", {"attn_config": {"softmax_scale": 0.5}}),
    "apply_residual_connection_post_layernorm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "head_dim": ("glm", {"head_dim": 48}),
    "biases on nothing|biases on ATTN_NORM, FFN_NORM": ("starcoder2", {"use_bias": False}),
    "'default' that llama.cpp": ("ministral3", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 16,
    }}),
    "'llama3' that llama.cpp": ("glm4", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128, "partial_rotary_factor": 0.5}}),
}  # fmt: skip


@pytest.mark.parametrize("found", REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(tmp_path, found):
    case, changes = REFUSED[found]
    architecture, others, _, _ = CASES[case]
    folder = make_model(tmp_path / "hf", architecture, **(others | changes))
    with pytest.raises(ArchitectureError, match=found) as caught:
        describe_folder(folder)
    assert caught.value.hint


@pytest.mark.parametrize(("epsilon", "noted"), [(1e-5, True), (1e-6, False)])
def test_another_epsilon_for_the_latents_of_minicpm3_is_noted(tmp_path, epsilon, noted):
    architecture, others, _, _ = CASES["minicpm3"]
    model, _ = describe_folder(make_model(tmp_path / "hf", architecture, **(others | {"rms_norm_eps": epsilon})))
    assert any("norms of latents" in note for note in model.notes) == noted


@pytest.mark.parametrize("model_type", ["bitnet", "cwm", "gptj", "hyperclovax", "vaultgemma"])
def test_a_model_type_without_a_row_is_refused_with_the_reason(model_type):
    with pytest.raises(ArchitectureError, match=rf"{model_type} models do not become GGUF files: llama\.cpp"):
        row_of_model({"model_type": model_type}, "here")


def test_the_numbers_of_xielu_are_key_values(tmp_path):
    model, checkpoint = describe_folder(make_case(tmp_path / "hf", "apertus"))
    values = model.key_values["xielu.alpha_p"][0]
    assert values == [checkpoint.read(f"model.layers.{n}.mlp.act_fn.alpha_p").item() for n in range(2)]
    assert values[0] != values[1]
    back = open_gguf(write_plain(model, checkpoint, tmp_path / "model.gguf"))
    assert back.read("model.layers.1.mlp.act_fn.beta") == torch.tensor(0.5)
    model.key_values["xielu.alpha_p"] = ([0.5], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.FLOAT32)
    path = write_plain(model, checkpoint, tmp_path / "short.gguf")
    with pytest.raises(ArchitectureError, match=r"xielu\.alpha_p .* one number for each of 2 blocks"):
        open_gguf(path)


def test_groups_of_falcon_are_apart_as_the_converter_has_them(tmp_path):
    model, checkpoint = describe_folder(make_case(tmp_path / "hf", "falcon_new"))
    weight = checkpoint.read("transformer.h.1.self_attention.query_key_value.weight").float().numpy()
    groups = weight.reshape(2, 4, 32, 128)  # two heads of q, one of k, one of v
    expected = np.concatenate([groups[:, part].reshape(-1, 128) for part in (slice(0, 2), 2, 3)])
    source = next(tensor for tensor in model.tensors if tensor.name == "blk.1.attn_qkv.weight")
    np.testing.assert_array_equal(source.read(checkpoint, 0, 256).float().numpy(), expected)


def test_a_norm_of_w_plus_one_keeps_its_bias(tmp_path):
    model, checkpoint = describe_folder(make_case(tmp_path / "hf", "nemotron"))
    sources = {tensor.name: tensor for tensor in model.tensors}
    bias = checkpoint.read("model.norm.bias").float()
    assert torch.equal(sources["output_norm.bias"].read(checkpoint, 0, 1)[0].float(), bias)
    weight = checkpoint.read("model.norm.weight").float()
    assert torch.equal(sources["output_norm.weight"].read(checkpoint, 0, 1)[0], weight + 1)


def test_the_pre_tokenizer_of_bloom_is_known_in_the_spelling_of_its_tokenizer_json():
    split = {"type": "Split", "pattern": {"Regex": r" ?[^(\s|[.,!?…。，、।۔،])]+"}, "behavior": "Isolated"}
    steps = [
        split | {"invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    tokenizer = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {}}
    row, notes = identify(tokenizer, "here")
    assert (row.name, notes) == ("bloom", [])


def test_a_window_that_is_a_list_is_refused(tmp_path):
    model, checkpoint = describe_folder(make_case(tmp_path / "hf", "cohere2"))
    model.key_values["cohere2.attention.sliding_window"] = ([1, 2], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)
    with pytest.raises(ArchitectureError, match=r"cohere2\.attention\.sliding_window is .* one positive number"):
        open_gguf(write_plain(model, checkpoint, tmp_path / "model.gguf"))


@pytest.mark.parametrize("case", ["stablelm", "stablelm_parallel", "stablelm_norms"])
def test_blocks_of_stablelm_are_known_by_their_tensors(tmp_path, case):
    """The converter writes use_parallel_residual for models whose config.json does not have it."""
    model, checkpoint = describe_folder(make_case(tmp_path / "hf", case))
    model.key_values["stablelm.use_parallel_residual"] = (True, gguf.GGUFValueType.BOOL)
    config = open_gguf(write_plain(model, checkpoint, tmp_path / "model.gguf")).config()
    assert config["use_parallel_residual"] is (case == "stablelm_parallel")
    assert config["qk_layernorm"] is (case != "stablelm")
