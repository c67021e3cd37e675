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
}  # fmt: skip
# case → nats, with the reason
LOOSER: dict[str, float] = {}
