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
_V2 = ("deepseek_v2", _LATENT | {"topk_method": "greedy"})
_V3 = ("deepseek_v3", _LATENT | {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1})
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
    "llama4_text": (("llama4_text", _LLAMA4), {"interleave_moe_layer_step": 2}, "llama4", "llama4_text"),
}  # fmt: skip
# case → nats, with the reason
LOOSER: dict[str, float] = {
    "glm4_moe_lite": 1e-4,  # rms_norm_eps is 1e-5, which the norms of latents do not have in transformers
}
