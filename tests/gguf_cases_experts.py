"""Decoders with experts: tiny models for `gguf_models`."""

from __future__ import annotations

_SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 384, "max_position_embeddings": 256,
}  # fmt: skip
_ROUTED = {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LATENT = _SIZES | _ROUTED | {
    "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 64, "first_k_dense_replace": 1,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_DEEPSEEK_YARN = _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
# Kimi-K2's, by which the ramp ends in one step.
_KIMI_YARN = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 32.0, "original_max_position_embeddings": 4096,
              "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0, "beta_slow": 1.0}  # fmt: skip
_V2 = ("deepseek_v2", _LATENT | {"topk_method": "greedy"})
_V3 = ("deepseek_v3", _LATENT | {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1})
_KIMI_K2 = ("deepseek_v3", _LATENT | {"n_group": 1, "topk_group": 1, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
                                     "max_position_embeddings": 131072, "rope_parameters": _KIMI_YARN})  # fmt: skip
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_GLM4 = ("glm4_moe", _SIZES | _ROUTED | {"head_dim": 32, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5})
_GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 2.0,
            "residual_multiplier": 0.5}  # fmt: skip
_ERNIE = ("ernie4_5_moe", _SIZES | {
    "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 2, "pad_token_id": 0,
})  # fmt: skip
_LLAMA4 = _SIZES | _LOCAL | {
    "num_hidden_layers": 4, "head_dim": 32, "intermediate_size": 64, "intermediate_size_mlp": 192, "pad_token_id": 0,
}  # fmt: skip

# With few heads many scores are 0, and which of equal ones are chosen differs.
_SPARSE = _LATENT | {"index_topk": 8, "index_n_heads": 32, "index_head_dim": 64, "rms_norm_eps": 1e-6}
_LAGUNA = ("laguna", _SIZES | _EXPERTS | {
    "head_dim": 32, "sliding_window": 8, "num_hidden_layers": 4, "shared_expert_intermediate_size": 96,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "num_attention_heads_per_layer": [4, 6, 6, 4], "moe_routed_scaling_factor": 2.5,
})  # fmt: skip
_COHERE = ("cohere2_moe", _SIZES | {
    "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 8, "num_hidden_layers": 4,
    "prefix_dense_intermediate_size": 96,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
})  # fmt: skip

# name → (model_type and sizes, changes to the config, general.architecture, model_type read back or None)
CASES: dict[str, tuple] = {
    "deepseek_v2": (_V2, {}, "deepseek2", "deepseek_v2"),
    "deepseek_v2_lite": (_V2, {"q_lora_rank": None, "rope_parameters": _DEEPSEEK_YARN}, "deepseek2", "deepseek_v2"),
    "deepseek_v2_27_blocks": (_V2, {"q_lora_rank": None, "num_hidden_layers": 27}, "deepseek2", "deepseek_v2"),
    "deepseek_v2_sparse": (_V2, {"first_k_dense_replace": 0}, "deepseek2", "deepseek_v2"),
    "deepseek_v3": (_V3, {}, "deepseek2", "deepseek_v3"),
    "deepseek_v3_yarn": (
        _V3, {"rope_parameters": _DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "norm_topk_prob": False,
              "tie_word_embeddings": True}, "deepseek2", "deepseek_v3",
    ),
    "glm4_moe_lite": (("glm4_moe_lite", _LATENT), {}, "deepseek2", None),
    "glm4_moe": (_GLM4, {}, "glm4moe", "glm4_moe"),
    "glm4_moe_normed": (_GLM4, {"use_qk_norm": True, "attention_bias": True, "n_group": 4, "topk_group": 2},
                        "glm4moe", "glm4_moe"),
    "solar_open": (("solar_open", _SIZES | _ROUTED | {"head_dim": 32}), {}, "glm4moe", "glm4_moe"),
    "dots1": (("dots1", _SIZES | _ROUTED | {"num_key_value_heads": 4, "first_k_dense_replace": 1}),
              {"norm_topk_prob": True, "routed_scaling_factor": 2.5}, "dots1", "dots1"),
    "minimax_m2": (("minimax_m2", _SIZES | _LOCAL | {"head_dim": 64, "intermediate_size": 64, "rotary_dim": 32}), {},
                   "minimax-m2", "minimax_m2"),
    "olmoe": (("olmoe", _SIZES | _EXPERTS | {"num_key_value_heads": 4, "intermediate_size": 64}), {}, "olmoe",
              "olmoe"),
    "ernie4_5_moe": (_ERNIE, {}, "ernie4_5-moe", "ernie4_5_moe"),
    "ernie4_5_moe_unshared": (_ERNIE, {"moe_num_shared_experts": 0, "tie_word_embeddings": False}, "ernie4_5-moe",
                              "ernie4_5_moe"),
    "granitemoe": (("granitemoe", _SIZES | _LOCAL | _GRANITE), {}, "granitemoe", "granitemoe"),
    "granitemoeshared": (("granitemoeshared", _SIZES | _LOCAL | _GRANITE | {"shared_intermediate_size": 96}),
                         {"tie_word_embeddings": True}, "granitemoe", "granitemoeshared"),
    "exaone_moe": (("exaone_moe", _SIZES | _EXPERTS | {
        "num_shared_experts": 2, "first_k_dense_replace": 1, "sliding_window": 8, "num_hidden_layers": 5,
    }), {}, "exaone-moe", "exaone_moe"),
    "afmoe": (("afmoe", _SIZES | _EXPERTS | {
        "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 8, "num_hidden_layers": 4, "head_dim": 32,
        "mup_enabled": True, "route_scale": 2.5,
    }), {}, "afmoe", "afmoe"),
    "mimo_v2_flash": (("mimo_v2_flash", _SIZES | _ROUTED | {
        "head_dim": 48, "v_head_dim": 32, "sliding_window": 8, "num_hidden_layers": 4, "num_key_value_heads": 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    }), {}, "mimo2", "mimo_v2_flash"),
    "kimi_k2": (_KIMI_K2, {}, "deepseek2", "deepseek_v3"),
    "kimi_k2_without_option": (_KIMI_K2, {}, "deepseek2", "deepseek_v3"),
    "kimi_k25": (("kimi_k25", {
        "text_config": {"model_type": _KIMI_K2[0], **_KIMI_K2[1]},
        "vision_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "patch_size": 14,
                          "num_attention_heads": 2, "pos_emb_height": 4, "pos_emb_width": 4},
        "projection_hidden_size": 64, "tie_word_embeddings": False,
    }), {}, "deepseek2", None),
    "youtu": (("youtu", {key: _LATENT[key] for key in _LATENT if key not in {*_ROUTED, "first_k_dense_replace"}}), {},
              "deepseek2", "youtu"),
    "deepseek_v32": (("deepseek_v32", _SPARSE), {"n_group": 4, "topk_group": 2}, "deepseek32", "deepseek_v32"),
    "deepseek_v32_yarn": (("deepseek_v32", _SPARSE), {
        "rope_parameters": _DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "n_group": 1, "topk_group": 1,
    }, "deepseek32", "deepseek_v32"),
    "glm_moe_dsa": (("glm_moe_dsa", _SPARSE), {"indexer_types": ["full", "shared", "full"]}, "glm-dsa",
                    "glm_moe_dsa"),
    "hunyuan_v1_moe": (("hunyuan_v1_moe", _SIZES | {
        "num_experts": 8, "moe_topk": [2, 2, 2], "head_dim": 32, "intermediate_size": 64, "pad_token_id": 0,
    }), {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}},
        "hunyuan-moe", "hunyuan_v1_moe"),
    "hy_v3": (("hy_v3", _SIZES | _EXPERTS | {"head_dim": 32, "num_shared_experts": 2}), {}, "hy_v3", "hy_v3"),
    "laguna": (_LAGUNA, {}, "laguna", "laguna"),
    "laguna_yarn": (_LAGUNA, {"rope_parameters": {
        "full_attention": _YARN | {"partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 1.0},
    }}, "laguna", "laguna"),
    "cohere2_moe": (_COHERE, {"num_shared_experts": 2}, "cohere2moe", "cohere2_moe"),
    "cohere2_moe_sigmoid": (_COHERE, {
        "expert_selection_fn": "sigmoid", "norm_topk_prob": False, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }, "cohere2moe", "cohere2_moe"),
    "llama4_text": (("llama4_text", _LLAMA4), {"interleave_moe_layer_step": 2}, "llama4", "llama4_text"),
}  # fmt: skip
# case → nats, with the reason
LOOSER: dict[str, float] = {
    "glm4_moe_lite": 1e-4,  # rms_norm_eps is 1e-5, which the norms of latents do not have in transformers
    "kimi_k2_without_option": 0.2,  # llama.cpp computes YaRN with beta_fast 32
}
# case → what config.json says instead of what transformers writes: a model type of code on the hub
_KIMI = {"model_type": "kimi_k2", "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}}
_KIMI_K25 = {"auto_map": {"AutoModelForCausalLM": "modeling_kimi_k25.KimiK25ForConditionalGeneration"}}
PUBLISHED: dict[str, dict] = {"kimi_k2": _KIMI, "kimi_k2_without_option": _KIMI, "kimi_k25": _KIMI_K25}
# case → what llama.cpp is started with
LLAMA_OPTIONS: dict[str, dict[str, float]] = {case: {"yarn_beta_fast": 1.0} for case in ("kimi_k2", "kimi_k25")}
