"""Decoders with experts as GGUF: latent attention in two parts, what is left out, what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from gguf_cases_experts import CASES
from gguf_models import describe_folder, make_case, write_plain
from lowbit.checkpoint import open_checkpoint, open_gguf, requires_remote_code
from lowbit.errors import ArchitectureError
from lowbit.formats.gguf.imatrix import measure_importance, text_of
from lowbit.formats.gguf.rope import yarn_speeds
from lowbit.formats.gguf.table import REFUSED as TYPES_REFUSED
from lowbit.formats.gguf.table import row_of_model
from models import SHORT_TEXT, make_model

_DENSE_LAST = {"mlp_layer_types": ["sparse", "sparse", "dense"]}
# what the message names → (case, changes)
REFUSED = {
    "topk_method": ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    "norm_topk_prob is True": ("deepseek_v2", {"norm_topk_prob": True}),
    "q_lora_rank is 64": ("deepseek_v2", {"num_hidden_layers": 27}),
    "mscale 0.707 and mscale_all_dim 1.0": ("deepseek_v3_yarn", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
        "mscale": 0.707, "mscale_all_dim": 1.0}}),
    "mscale_all_dim None": ("deepseek_v3", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}}),
    "rope_interleave": ("deepseek_v3", {"rope_interleave": False}),
    "biases on ATTN_KV_A_MQA": ("deepseek_v3", {"attention_bias": True}),
    "'yarn' that llama.cpp": ("glm_moe_dsa", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}}),
    r"mlp_layer_types is \['sparse', 'sparse', 'dense'\]": ("glm4_moe_lite", _DENSE_LAST),
    "num_key_value_heads is 2": ("dots1", {"num_key_value_heads": 2}),
    "clip_qkv": ("olmoe", {"clip_qkv": 8.0}),
    "moe_layer_interval": ("ernie4_5_moe", {"moe_layer_interval": 2}),
    "moe_layer_end_index": ("ernie4_5_moe", {"moe_layer_end_index": 1}),
    "moe_topk": ("hunyuan_v1_moe", {"moe_topk": [2, 1, 2]}),
    "computes exaone-moe models with .*sliding": ("exaone_moe", {
        "sliding_window": 0, "layer_types": ["full_attention"] * 5}),
    "mup_enabled": ("afmoe", {"mup_enabled": False}),
    "layer_types": ("afmoe", {"layer_types": ["full_attention"] * 4}),
    "routed_scaling_factor": ("mimo_v2_flash", {"routed_scaling_factor": 2.0}),
    "another part of a head": ("mimo_v2_flash", {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}}),
    "gating is per-element": ("laguna", {"gating": "per-element"}),
    "moe_router_logit_softcapping": ("laguna", {"moe_router_logit_softcapping": 30.0}),
    "shared_expert_combination_strategy": ("cohere2_moe", {"shared_expert_combination_strategy": "sum"}),
    "prefix_dense_sliding_window_pattern": ("cohere2_moe", {"prefix_dense_sliding_window_pattern": 2}),
    "attention_chunk_size": ("llama4_text", {"attention_chunk_size": 128}),
    "attn_temperature_tuning": ("llama4_text", {"attn_temperature_tuning": False}),
    "use_qk_norm": ("llama4_text", {"use_qk_norm": False}),
    "no_rope_layers": ("llama4_text", {"no_rope_layers": [1, 1, 0, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("found", REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(tmp_path, found):
    case, changes = REFUSED[found]
    architecture, others, _, _ = CASES[case]
    folder = make_model(tmp_path / "hf", architecture, **(others | changes))
    with pytest.raises(ArchitectureError, match=found) as caught:
        describe_folder(folder)
    assert caught.value.hint


@pytest.mark.parametrize("model_type", ["phimoe", "dbrx", "flex_olmo", "jetmoe"])
def test_a_model_type_without_a_row_is_refused_with_the_reason(model_type):
    with pytest.raises(ArchitectureError, match=re.escape(TYPES_REFUSED[model_type])):
        row_of_model({"model_type": model_type}, "here")


def test_the_ends_of_the_yarn_ramp_are_written_with_the_option_that_llama_cpp_needs(tmp_path):
    model, checkpoint = describe_folder(make_case(tmp_path / "hf", "kimi_k2"))
    assert model.key_values["deepseek2.rope.scaling.yarn_beta_fast"][0] == 1.0
    assert [note for note in model.notes if "--yarn" in note] == [
        "start llama.cpp with --yarn-beta-fast 1: it does not read that from a file of deepseek2, and without the "
        "option 11 of 32 rotary pairs turn at 11 to 92 % of their speed"
    ]
    config = open_gguf(write_plain(model, checkpoint, tmp_path / "model.gguf")).config()
    assert config["rope_parameters"]["beta_fast"] == 1.0


def test_no_option_is_asked_for_where_the_loader_reads_the_ends_of_the_yarn_ramp(tmp_path):
    model, _ = describe_folder(make_case(tmp_path / "hf", "ministral3_betas"))
    assert model.key_values["mistral3.rope.scaling.yarn_beta_fast"][0] == 4.0
    assert not [note for note in model.notes if "--yarn" in note]


def test_speeds_of_yarn_are_those_of_transformers(tmp_path):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "beta_fast": 8.0, "beta_slow": 2.0}  # fmt: skip
    config = AutoConfig.for_model("llama", head_dim=64, rope_parameters=yarn, max_position_embeddings=131072)
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    speeds = yarn_speeds(50000.0, 64, 4096, 32.0, {"beta_fast": 8.0, "beta_slow": 2.0})
    torch.testing.assert_close(speeds / 50000.0 ** (torch.arange(0, 64, 2) / 64), expected)


def test_sparse_mixer_weighs_experts_otherwise_than_softmax():
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    weights, chosen = sparsemixer(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)), 0.01, False)
    assert chosen.shape == (4000, 2)
    assert f"{weights.sum(-1).mean():.2f}" == "1.95"
    assert "sum to 1.95 of 2" in TYPES_REFUSED["phimoe"]


def test_kimi_models_need_no_code_of_their_own():
    config = {"model_type": "kimi_k2", "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}}
    assert not requires_remote_code(config)
    assert not requires_remote_code({"model_type": "kimi_k25", "auto_map": {"AutoModel": "m.X"}, "text_config": config})
    assert not requires_remote_code(config | {"model_type": "kimi_linear"})
    assert requires_remote_code(config | {"model_type": "kimi_next"})


def test_kimi_k25_is_written_as_its_text_model(tmp_path):
    folder = make_case(tmp_path / "hf", "kimi_k25")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "kimi_k2"  # as published
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = describe_folder(folder)
    assert model.arch == "deepseek2"
    assert {tensor.name for tensor in model.tensors} == {
        tensor.name for tensor in describe_folder(make_case(tmp_path / "text", "kimi_k2"))[0].tensors
    }
    assert "left out (23 tensors): vision: llama.cpp keeps it in a file of its own (mmproj)" in model.notes


def test_keys_and_values_of_latent_attention_are_split_as_the_converter_does(tmp_path):
    folder = make_case(tmp_path / "hf", "deepseek_v3")
    model, checkpoint = describe_folder(folder)
    sources = {tensor.name: tensor for tensor in model.tensors}
    whole = checkpoint.read("model.layers.1.self_attn.kv_b_proj.weight").reshape(4, 32 + 64, 96)
    keys, values = whole.split([32, 64], dim=1)
    found = sources["blk.1.attn_k_b.weight"]
    assert found.shape == (4, 96, 32)
    assert torch.equal(found.read(checkpoint, 0, 4 * 96).reshape(4, 96, 32), keys.transpose(1, 2))
    found = sources["blk.1.attn_v_b.weight"]
    assert found.shape == (4, 64, 96)
    assert torch.equal(found.read(checkpoint, 0, 4 * 64).reshape(4, 64, 96), values)


def test_importance_of_the_values_stands_once_for_each_head_and_the_keys_have_none(tmp_path):
    checkpoint = open_checkpoint(make_case(tmp_path / "hf", "deepseek_v3"))
    matrix = measure_importance(checkpoint, text_of(checkpoint, SHORT_TEXT, 1, 32)).matrix
    values = matrix.entries["blk.1.attn_v_b.weight"].values
    assert values.shape == (4, 96)
    assert torch.equal(values, values[:1].expand(4, 96))
    assert (values > 0).all()
    assert "blk.1.attn_k_b.weight" not in matrix.entries


def test_blocks_for_multi_token_prediction_are_left_out_and_said_to_be(tmp_path):
    folder = make_case(tmp_path / "hf", "deepseek_v3")
    tensors = load_file(folder / "model.safetensors")
    block = {
        name.replace("layers.2.", "layers.3."): value.clone() for name, value in tensors.items() if "layers.2." in name
    }
    block["model.layers.3.eh_proj.weight"] = torch.zeros(128, 256, dtype=torch.bfloat16)
    save_file(tensors | block, folder / "model.safetensors", {"format": "pt"})
    model, _ = describe_folder(folder)
    assert not any(tensor.block == 3 for tensor in model.tensors)
    assert any(f"left out ({len(block)} tensors): blocks for multi-token prediction" in note for note in model.notes)


def test_a_file_with_a_block_for_multi_token_prediction_is_read_without_it(tmp_path):
    folder = make_case(tmp_path / "hf", "glm4_moe")
    model, checkpoint = describe_folder(folder)
    values = model.key_values | {"glm4moe.nextn_predict_layers": (1, model.key_values["glm4moe.block_count"][1])}
    path = write_plain(type(model)(model.arch, model.tensors, values, ()), checkpoint, tmp_path / "model.gguf")
    back = open_gguf(path)
    assert back.config()["num_hidden_layers"] == 2
    assert not any(name.startswith("model.layers.2.") for name in back.tensors)
    left = sum(tensor.block == 2 for tensor in model.tensors)
    assert f"left out ({left} tensors): blocks for multi-token prediction" in back.notes


def test_dense_blocks_and_groups_come_back(tmp_path):
    model, checkpoint = describe_folder(make_case(tmp_path / "hf", "deepseek_v3"))
    config = open_gguf(write_plain(model, checkpoint, tmp_path / "model.gguf")).config()
    expected = {
        "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "q_lora_rank": 64, "kv_lora_rank": 96,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 64, "num_key_value_heads": 4,
        "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("architecture", ["deepseek_v3", "phi3", "mixtral"])
def test_the_bytes_of_the_source_are_counted_once(tmp_path, architecture):
    """Also where one of its tensors becomes two of the file: keys and values of latent attention, gate and up."""
    source = make_model(tmp_path / "model", architecture)
    report = lowbit.quantize(source, tmp_path / "x.gguf", scheme="Q8_0").report
    stored = sum(info.nbytes for info in open_checkpoint(str(source)).tensors.values())
    assert sum(each.bytes_in for each in report.totals.accounts) == stored
