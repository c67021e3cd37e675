"""What the rules of tiny_types.py cannot know of single model types: their constraints, their inputs, and which of them
transformers cannot make. Rows are by the model_type of a config, or of a part of one ("jamba", "deepseek_ocr2_text").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from tiny_types import Sizes

# A value that is left to the config class.
DEFAULT = object()

_LINEAR_THEN_FULL = ["linear_attention", "full_attention"]
_HYBRID = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}  # the hybrids share weights


def rope(section: list[int]) -> dict[str, Any]:
    """Positions with several axes, where the class does not say so."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}}


def exceptions(s: Sizes) -> dict[str, dict[str, Any]]:
    """Model type → keys whose values follow from others or have no useful default."""
    t, h, _ = s.mrope_section(1.0)
    ranks = {"n_routed_experts": s.experts, "n_shared_experts": 1, "num_experts_per_tok": 2}
    return {
        "bamba": {"attn_layer_indices": [1]},
        "blip-2": {"num_query_tokens": 4, "image_token_index": s.vocabulary - 1},
        "chameleon": {"vocabulary_map": {"<image>": s.vocabulary - 1}},
        "cohere_compass_text": {
            "rope_parameters": {"full_attention": rope([t, h, h])["rope_parameters"], "sliding_attention": None},
        },
        "dbrx": {"attn_config": {"kv_n_heads": s.kv_heads, "rope_theta": 10000.0, "clip_qkv": 8.0}},
        "deepseek_ocr2_text": {**ranks, "mlp_layer_types": ["dense", "sparse"], "moe_intermediate_size": s.expert},
        "deepseek_v2": {**ranks, "first_k_dense_replace": 1},
        "diffusion_gemma_text": {"num_experts": s.experts, "top_k_experts": 2, "moe_intermediate_size": s.expert},
        "dots1": {**ranks, "first_k_dense_replace": 1},
        "dots3_note_text": {"head_dim": 2 * s.head_dim},  # the part with positions and the part without
        "emu3": {"vocabulary_map": {"<image>": s.vocabulary - 1, "<|extra_200|>": s.vocabulary - 2}},
        "ernie4_5_vl_moe_text": rope([h, h, t]),
        "gemma3n_text": {"num_kv_shared_layers": 2},
        "glm4_moe": {"head_dim": s.head_dim},
        "glm4_moe_lite": {"first_k_dense_replace": 1},
        "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[0, 0], [1, 1]],
                            "spatial_target_layers": [0, 1]},
        "granitemoehybrid": {"layer_types": _LINEAR_THEN_FULL},
        "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
        "hunyuan_v1_dense": {"head_dim": s.head_dim},
        "hunyuan_v1_moe": {"head_dim": s.head_dim},
        "hunyuan_vl_text": {"head_dim": s.head_dim},
        "instructblip": {"num_query_tokens": 4, "image_token_index": s.vocabulary - 1},
        "instructblipvideo": {"num_query_tokens": 4, "video_token_index": s.vocabulary - 1},
        "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
        "kosmos-2": {"latent_query_num": 4},
        "lfm2": {"block_dim": s.hidden},
        "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
        "llama4_text": {"attention_chunk_size": 128},  # vLLM wants whole blocks of its cache
        "mamba2": {"num_heads": s.inner // s.head_dim},
        "minimax_m2": {"rotary_dim": s.head_dim},
        "ministral": {"head_dim": s.head_dim},
        "mistral4": {"head_dim": 2 * s.head_dim},  # its rotary half is qk_rope_head_dim
        "molmo2_adapter": {"vision_feature_layer": [1, 0]},
        "nemotron": {"num_key_value_heads": s.kv_heads},
        "paddleocr_vl_text": rope([t, h, h]),
        "pix2struct_vision_model": {"hidden_size": s.hidden, "num_attention_heads": s.heads, "d_kv": s.head_dim},
        "qwen4_exp_text": {
            "eos_token_id": 1, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": s.head_dim,
            "indexer_budget": 16, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 50, "heads_per_ngram": 2,
            "split_ngram_parts": 4, "make_ngram_vocab_size_divisible_by": 8, "ple_layer_ids": [1],
            "ple_embed_dim": s.rank,
        },
        "qwen3_vl_moe_text": {"norm_topk_prob": True, "moe_intermediate_size": 96},
        "recurrent_gemma": {"num_hidden_layers": 3},
        "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, s.hidden - 32]},
        "shieldgemma2": {"yes_token_index": 7, "no_token_index": 8},
        "step3p5": {"sliding_window": 16},
        "xmod": {"default_language": "en_XX"},
        "zamba": {**_HYBRID, "attention_hidden_size": DEFAULT, "attention_head_dim": DEFAULT},
        "zamba2": {**_HYBRID, "attention_hidden_size": DEFAULT, "attention_head_dim": DEFAULT,
                   "mamba_headdim": DEFAULT, "hybrid_layer_ids": DEFAULT, "num_query_groups": DEFAULT,
                   "num_key_value_heads": s.heads},
    }  # fmt: skip


# Types that the auto classes of transformers cannot make from a config of the type, and why.
NOT_MADE: dict[str, str] = {
    "evolla": "transformers' auto classes do not find its class",
    "gemma4_assistant": "drafts tokens from the KV cache of another model; transformers does not make it alone",
    "gemma4_unified_assistant": "drafts tokens from the KV cache of another model; transformers does not make it alone",
    "musicgen": "predicts codes of sound; its class takes only a part of the type's config",
    "musicgen_melody": "predicts codes of sound; its class takes only a part of the type's config",
}

# Types that are made but do not continue a text by themselves, and why.
NOT_RUN: dict[str, str] = {
    "pi0": "predicts the actions of a robot from its state",
}


# The class of models on the hub, where the auto classes name a part of it, which saves names that it does not load.
OWN_CLASS = {"shieldgemma2": "ShieldGemma2ForImageClassification"}


def inputs(model_type: str, config: PretrainedConfig, ids: Tensor) -> dict[str, Tensor]:
    """What a model is given so that it continues `ids` [1, T]: some types want an image, or the text twice."""
    given: dict[str, Tensor] = {"input_ids": ids}
    if model_type in ("florence2", "t5gemma2", "udop"):
        given["decoder_input_ids"] = ids
    if model_type in ("pix2struct", "pp_formulanet", "vision-encoder-decoder"):
        given = {"decoder_input_ids": ids}
    if model_type in WITH_IMAGE:
        given |= WITH_IMAGE[model_type](config, ids)
    return given


def _image(config: PretrainedConfig, *before: int) -> Tensor:
    """A gray image [*before, 3, height, width] of the size that a vision tower takes."""
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.full((*before, 3, height, width), 0.5)


def _queries(config: PretrainedConfig, ids: Tensor) -> dict[str, Tensor]:
    """A Q-Former's tokens stand before the text."""
    frames = 4 if config.model_type == "instructblipvideo" else 1
    token = config.video_token_index if frames > 1 else config.image_token_index
    tokens = torch.full((1, config.num_query_tokens * frames), token)
    given = {"input_ids": torch.cat([tokens, ids], 1), "pixel_values": _image(config.vision_config, 1)}
    if config.model_type != "blip-2":
        given["qformer_input_ids"] = ids
    if frames > 1:
        given["pixel_values"] = _image(config.vision_config, 1, frames)
    return given


WITH_IMAGE: dict[str, Callable[[Any, Tensor], dict[str, Tensor]]] = {
    "blip": lambda config, ids: {"pixel_values": _image(config.vision_config, 1)},
    "blip-2": _queries,
    "idefics": lambda config, ids: {
        "pixel_values": _image(config.vision_config, 1, 1),
        "image_attention_mask": torch.ones(1, ids.shape[1], 1, dtype=torch.long),
    },
    "instructblip": _queries,
    "instructblipvideo": _queries,
    "kosmos-2": lambda config, ids: {
        "pixel_values": _image(config.vision_config, 1),
        "image_embeds_position_mask": (torch.arange(ids.shape[1]) < config.latent_query_num)[None],
    },
    "pix2struct": lambda config, ids: {
        "flattened_patches": torch.full((1, 4, 2 + config.vision_config.patch_embed_hidden_size), 1.0),
    },
    "pp_formulanet": lambda config, ids: {"pixel_values": _image(config.vision_config, 1)},
    "udop": lambda config, ids: {"bbox": torch.zeros(1, ids.shape[1], 4)},
    "vision-encoder-decoder": lambda config, ids: {"pixel_values": _image(config.encoder, 1)},
}
