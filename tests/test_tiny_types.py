"""The generator of tiny models: every type has a config or a reason, and a type of each kind continues a text."""

from __future__ import annotations

import pytest
import torch

from tiny_type_rows import NOT_MADE, NOT_RUN, exceptions, inputs
from tiny_types import RULES, TEXT, Sizes, build_tiny, make_tiny, model_types, tiny_config

# Dense; experts; a state space beside attention; a recurrence; an encoder and a decoder; an image in front of the text;
# rotary positions with three axes; positions that are learned.
KINDS = ("qwen3", "glm4_moe", "bamba", "rwkv", "udop", "blip-2", "qwen2_5_vl", "gpt2")


@pytest.mark.parametrize("model_type", KINDS)
def test_a_tiny_model_continues_a_text(model_type):
    model = build_tiny(model_type)

    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        logits = model(**inputs(model_type, model.config, ids), use_cache=False).logits

    assert logits.isfinite().all()
    assert logits.std() > 0.01
    assert sum(parameter.numel() for parameter in model.parameters()) < 3e6
    assert any(parameter.dim() == 2 and parameter.shape[1] % 32 == 0 for parameter in model.parameters())


def test_the_same_seed_gives_the_same_weights():
    first, again, other = (build_tiny("llama", seed=seed).state_dict() for seed in (1, 1, 2))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_every_kind_of_layer_is_kept_once():
    config = tiny_config("qwen3_next")
    assert config.layer_types == ["linear_attention", "full_attention"]

    config = tiny_config("hy_v4")
    assert set(config.mlp_layer_types) == {"dense", "sparse"}
    assert set(config.indexer_types) == {"full", "shared"}


def test_tokens_lie_inside_the_vocabulary_and_stay_apart():
    config = tiny_config("qwen2_5_vl")

    tokens = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    assert all(256 < token < TEXT.vocabulary for token in tokens)
    assert len(set(tokens)) == len(tokens)


def test_other_sizes_reach_every_part():
    wide = Sizes(hidden=256, head_dim=64)

    config = tiny_config("gemma3", wide)

    assert (config.text_config.hidden_size, config.text_config.head_dim) == (256, 64)
    assert config.vision_config.hidden_size == 128


def test_rows_are_of_types_that_exist():
    from transformers import CONFIG_MAPPING

    types = model_types()
    assert len(types) > 250
    assert set(NOT_MADE) | set(NOT_RUN) <= set(types)
    parts = {name for name in exceptions(TEXT) if name not in CONFIG_MAPPING}
    assert not parts, "a part of a config is a type of its own too"
    assert all(isinstance(size, int | str) for _, size in RULES)


def test_a_folder_has_the_names_of_the_hub(tmp_path):
    from safetensors import safe_open

    folder = make_tiny(tmp_path / "tiny", "mixtral")

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in set(file.keys())
    assert (folder / "tokenizer.json").exists()
