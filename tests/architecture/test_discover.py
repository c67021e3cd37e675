from __future__ import annotations

import pytest

from lowbit.architecture import discover
from lowbit.errors import ArchitectureError
from models import FAMILIES, SIZES


def config(model_type: str, **changes) -> dict:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**SIZES, **changes}).to_dict()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_linear_of_every_block_has_a_role(model_type):
    architecture = discover(config(model_type), "x")
    in_blocks = [linear for linear in architecture.linears.values() if linear.block is not None]
    assert len(architecture.blocks) == 2
    assert [linear.role for linear in in_blocks[:7]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert len(in_blocks) == 14
    assert architecture.linears["model.layers.1.mlp.down_proj"].shape == (128, 192)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_linears_that_share_an_input_say_so(model_type):
    linears = discover(config(model_type), "x").linears
    block = "model.layers.0"
    assert len({linears[f"{block}.self_attn.{leaf}_proj"].reads for leaf in "qkv"}) == 1
    assert linears[f"{block}.mlp.gate_proj"].reads == linears[f"{block}.mlp.up_proj"].reads
    assert linears[f"{block}.mlp.down_proj"].reads != linears[f"{block}.mlp.up_proj"].reads


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_feeds_a_linear_is_a_module_of_the_model(model_type):
    from lowbit.architecture import build_on_meta

    modules = dict(build_on_meta(config(model_type), "x").named_modules())
    for linear in discover(config(model_type), "x").linears.values():
        if linear.fed_by is not None:
            assert linear.fed_by in modules


def test_gemma_feeds_its_mlp_from_its_own_norm():
    linears = discover(config("gemma3_text"), "x").linears
    assert linears["model.layers.0.mlp.gate_proj"].fed_by == "model.layers.0.pre_feedforward_layernorm"


def test_fused_sets_are_those_of_engines():
    sets = discover(config("llama"), "x").fused_sets
    assert sets["model.layers.1.self_attn.qkv_proj"] == tuple(f"model.layers.1.self_attn.{x}_proj" for x in "qkv")
    assert sets["model.layers.1.mlp.gate_up_proj"] == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")


def test_tied_embeddings_are_stored_once():
    tied = discover(config("llama", tie_word_embeddings=True), "x")
    assert tied.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in tied.parameters
    assert "lm_head.weight" in discover(config("llama", tie_word_embeddings=False), "x").parameters


def test_every_parameter_has_a_role():
    roles = discover(config("qwen3"), "x").roles
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles["model.layers.0.self_attn.q_norm.weight"] == "norm"
    assert roles["model.layers.0.self_attn.q_proj.weight"] == "q_proj"
    assert discover(config("qwen2"), "x").roles["model.layers.0.self_attn.q_proj.bias"] == "bias"
    assert "other" not in roles.values()


def test_block_of_a_parameter():
    architecture = discover(config("llama"), "x")
    assert architecture.block_of("model.layers.1.input_layernorm.weight") == 1
    assert architecture.block_of("model.norm.weight") is None


def test_unknown_model_type_is_named_with_the_known_ones():
    with pytest.raises(ArchitectureError, match="'mamba2' \\(Mamba2ForCausalLM\\)") as caught:
        discover({"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}, "folder")
    assert "qwen3" in caught.value.hint


def test_config_that_transformers_cannot_build_is_named():
    with pytest.raises(ArchitectureError, match="cannot build"):
        discover(config("llama") | {"hidden_size": "wide"}, "folder")


def test_linear_without_a_role_is_refused():
    import torch

    from lowbit.architecture import build_on_meta
    from lowbit.architecture.discover import describe
    from lowbit.architecture.table import FAMILIES as TABLE

    model = build_on_meta(config("llama"), "x")
    with torch.device("meta"):
        model.model.layers[0].mlp.extra = torch.nn.Linear(4, 4)
    with pytest.raises(ArchitectureError, match=r"mlp\.extra"):
        describe(model, TABLE["llama"])
