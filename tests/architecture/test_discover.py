from __future__ import annotations

import pytest

from lowbit.architecture import discover
from lowbit.errors import ArchitectureError
from models import ARCHITECTURES, FAMILIES
from models import config_of as config
from tiny_types import tiny_config


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
    from lowbit.architecture import build_without_weights

    modules = dict(build_without_weights(config(model_type), "x").named_modules())
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


def test_unknown_model_type_is_named():
    with pytest.raises(ArchitectureError, match="'nothing' is not known to transformers"):
        discover({"model_type": "nothing", "architectures": ["NothingForCausalLM"]}, "folder")


def test_config_that_transformers_cannot_build_is_named():
    with pytest.raises(ArchitectureError, match="cannot build"):
        discover(config("llama") | {"hidden_size": "wide"}, "folder")


def test_linear_that_does_not_run_is_known_without_what_feeds_it():
    import torch

    from lowbit.architecture import build_without_weights
    from lowbit.architecture.discover import describe

    model = build_without_weights(config("llama"), "x")
    with torch.device("meta"):
        model.model.layers[0].mlp.extra = torch.nn.Linear(4, 4)
    extra = describe(model).linears["model.layers.0.mlp.extra"]
    assert (extra.block, extra.reads, extra.fed_by) == (0, "model.layers.0.mlp.extra.input", None)


def test_a_norm_that_something_else_reads_too_feeds_nothing():
    """A scale folded into it would change the model."""
    import torch

    from lowbit.architecture import build_without_weights
    from lowbit.architecture.discover import describe

    model = build_without_weights(config("llama"), "x", eager=True)
    norm, mlp = model.model.layers[0].post_attention_layernorm, type(model.model.layers[0].mlp)
    assert describe(model).linears["model.layers.0.mlp.gate_proj"].fed_by == "model.layers.0.post_attention_layernorm"

    class Leaky(mlp):
        def forward(self, x):
            return super().forward(x) + x

    for layer in model.model.layers:
        layer.mlp.__class__ = Leaky
    found = describe(model).linears
    assert found["model.layers.0.mlp.gate_proj"].fed_by is None
    assert found["model.layers.0.mlp.gate_proj"].reads == found["model.layers.0.mlp.up_proj"].reads
    assert found["model.layers.0.self_attn.q_proj"].fed_by == "model.layers.0.input_layernorm"
    assert isinstance(norm, torch.nn.Module)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_unique_and_each_weight_is_a_parameter(architecture):
    found = discover(config(architecture), "x")
    for name, linear in found.linears.items():
        weight = f"{name}.weight"
        assert name == linear.name
        assert weight in found.tied or set(found.parameters[weight]) == set(linear.shape)
        assert linear.has_bias == (f"{name}.bias" in found.parameters)
    assert len(found.blocks) == 2


# architecture → the fused sets of the last block, by the ends of their names, as vLLM's model files stack them
FUSED = {
    "llama": {"self_attn.qkv_proj": 3, "mlp.gate_up_proj": 2},
    "phi3": {},
    "glm4": {"self_attn.qkv_proj": 3},
    "opt": {"self_attn.qkv_proj": 3},
    "gpt2": {},
    "gpt_neox": {},
    "bloom": {},
    "mixtral": {"self_attn.qkv_proj": 3, **{f"block_sparse_moe.experts.{e}.gate_up_proj": 2 for e in range(4)}},
    "qwen2_moe": {"self_attn.qkv_proj": 3, "mlp.shared_expert.gate_up_proj": 2,
                  **{f"mlp.experts.{e}.gate_up_proj": 2 for e in range(4)}},
    "deepseek_v3": {"self_attn.fused_qkv_a_proj": 2, "mlp.shared_experts.gate_up_proj": 2,
                    **{f"mlp.experts.{e}.gate_up_proj": 2 for e in range(4)}},
    "deepseek_v2_lite": {"mlp.shared_experts.gate_up_proj": 2,
                         **{f"mlp.experts.{e}.gate_up_proj": 2 for e in range(4)}},
    "gemma3": {"self_attn.qkv_proj": 3, "mlp.gate_up_proj": 2},
}  # fmt: skip


@pytest.mark.parametrize("architecture", FUSED)
def test_fused_sets_of_a_family(architecture):
    found = discover(config(architecture), "x")
    last = found.blocks[-1] + "."
    sets = {name.removeprefix(last): len(of) for name, of in found.fused_sets.items() if name.startswith(last)}
    assert sets == FUSED[architecture]


def test_all_experts_of_a_block_are_one_set():
    found = discover(config("deepseek_v3"), "x")
    (name,) = found.expert_sets
    assert name == "model.layers.1.mlp.experts"
    assert len(found.expert_sets[name]) == 4 * 3
    assert found.expert_sets[name][:3] == tuple(f"{name}.0.{leaf}_proj" for leaf in ("gate", "up", "down"))
    assert not discover(config("llama"), "x").expert_sets


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_routers_stay_in_16_bits(architecture):
    kept = [linear for linear in discover(config(architecture), "x").linears.values() if linear.keep is not None]
    assert {linear.role for linear in kept} == {"router"}
    assert {linear.name.rsplit(".", 1)[-1] for linear in kept} <= {"gate", "router", "shared_expert_gate"}
    assert len(kept) == {"qwen2_moe": 4, "deepseek_v3": 1}.get(architecture, 2)


def test_mixtral_has_the_names_of_its_files():
    found = discover(config("mixtral"), "x")
    expert = found.linears["model.layers.1.block_sparse_moe.experts.3.w2"]
    assert (expert.role, expert.expert, expert.shape) == ("down_proj", 3, (128, 192))
    assert expert.fed_by == "model.layers.1.block_sparse_moe.experts.3.w3"
    assert expert.reads == "model.layers.1.block_sparse_moe.experts.3.hidden"


def test_gpt2_lies_transposed():
    found = discover(config("gpt2"), "x")
    up = found.linears["transformer.h.0.mlp.c_fc"]
    assert (up.shape, up.transposed) == ((512, 128), True)
    assert found.parameters["transformer.h.0.mlp.c_fc.weight"] == (128, 512)
    assert not found.linears["lm_head"].transposed


def test_vision_language_models_have_the_names_of_the_hub():
    gemma = discover(config("gemma3"), "x")
    assert gemma.blocks[0] == "language_model.model.layers.0"
    assert gemma.tied == {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1" in gemma.linears
    qwen = discover(config("qwen2_5_vl"), "x")
    assert "visual.blocks.0.attn.qkv" in qwen.linears
    assert "model.layers.0.mlp.up_proj" in qwen.linears
    assert qwen.linears["visual.blocks.0.attn.qkv"].block is None


def test_norms_behind_a_linear_do_not_feed_it():
    assert discover(config("olmo2"), "x").linears["model.layers.0.self_attn.q_proj"].fed_by is None
    first = "model.decoder.layers.0.self_attn.q_proj"
    assert discover(config("opt"), "x").linears[first].fed_by is not None
    assert discover(config("opt", do_layer_norm_before=False), "x").linears[first].fed_by is None


def test_parallel_blocks_share_one_input():
    linears = discover(config("cohere2"), "x").linears
    assert linears["model.layers.0.mlp.up_proj"].reads == linears["model.layers.0.self_attn.q_proj"].reads


def test_the_decoder_of_several_models_is_the_one_that_text_goes_through():
    """Qwen3-Omni thinks in one model and talks in another, which here has the list of modules with more weights."""
    parsed = tiny_config("qwen3_omni_moe")
    parsed.talker_config.text_config.shared_expert_intermediate_size = 64
    parsed.talker_config.spatial_merge_size = 2
    given = parsed.to_dict() | {"architectures": ["Qwen3OmniMoeForConditionalGeneration"]}

    found = discover(given, "x")

    assert found.blocks
    assert all(block.startswith("thinker.model.layers.") for block in found.blocks)
    inside = [linear for linear in found.linears.values() if linear.block is not None]
    assert {linear.role for linear in inside} >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert not any(linear.block is not None for name, linear in found.linears.items() if name.startswith("talker."))
    assert found.needs_weights == "Qwen3OmniMoeForConditionalGeneration", "it has no forward, which decodes"


def test_embeddings_that_compute_positions_from_their_padding_are_traced():
    """ProphetNet adds the number of its padding token to every position."""
    found = discover(tiny_config("prophetnet").to_dict(), "x")

    assert found.untraced is None
    block = "prophetnet.decoder.layers.0.self_attn"
    assert len({found.linears[f"{block}.{leaf}_proj"].reads for leaf in ("query", "key", "value")}) == 1
