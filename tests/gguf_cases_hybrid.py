"""Decoders with state spaces, convolutions or linear attention: tiny models for `gguf_models`."""

from __future__ import annotations

from models import SIZES

_NO_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_BARE = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 384, "state_size": 16}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2}
_GRANITE = ("granitemoehybrid", {
    **_NO_HEAD_DIM, **_MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
    "pad_token_id": 0, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0, "tie_word_embeddings": True,
})  # fmt: skip
_DENSE = {"num_local_experts": 0, "shared_intermediate_size": 192}
_ATTENTION = {"layer_types": ["full_attention"] * 3, "position_embedding_type": "rope"}
_NEMOTRON = ("nemotron_h", {
    **{key: value for key, value in SIZES.items() if key != "num_hidden_layers"}, "mamba_num_heads": 8,
    "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "pad_token_id": 0,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
})  # fmt: skip
_NEMOTRON_EXPERTS = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 96,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
_FALCON = ("falcon_h1", {**SIZES, **_MAMBA, "mamba_d_ssm": 256, "pad_token_id": 0})
_MULTIPLIED = {
    "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "key_multiplier": 0.7, "attention_in_multiplier": 1.1,
    "attention_out_multiplier": 0.9, "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.8,
    "mlp_multipliers": [0.9, 0.6], "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7],
}  # fmt: skip
_DELTA = {
    **SIZES, "num_hidden_layers": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 64,
}  # fmt: skip
_DELTA_EXPERTS = {**_DELTA, **_EXPERTS, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}
_SECTIONS = {"rope_parameters": {
    "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2],
    "mrope_interleaved": True,
}}  # fmt: skip
_EYE = {"vision_config": {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
                          "out_hidden_size": 128, "num_position_embeddings": 16}}  # fmt: skip
_KIMI_LINEAR = ("kimi_linear", {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 384, "max_position_embeddings": 256, "num_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 64, "kv_lora_rank": 96,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 64, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 1, "linear_head_dim": 32, "linear_num_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
})  # fmt: skip
_CONV = {**_NO_HEAD_DIM, "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
_GEMMA = ("gemma4_text", {
    **SIZES, "num_hidden_layers": 4, "global_head_dim": 64, "vocab_size_per_layer_input": 384, "sliding_window": 8,
    "hidden_size_per_layer_input": 32, "layer_types": ["sliding_attention", "full_attention"] * 2,
})  # fmt: skip
_GEMMA3N = ("gemma3n_text", {
    **SIZES, "intermediate_size": 1024, "num_hidden_layers": 6, "hidden_size_per_layer_input": 256, "laurel_rank": 64,
    "vocab_size_per_layer_input": 320, "sliding_window": 8, "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.95] * 6,
})  # fmt: skip
_GEMMA_EXPERTS = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64,
    "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
}  # fmt: skip

# name → (model_type and sizes, changes to the config, general.architecture, model_type read back or None)
CASES: dict[str, tuple] = {
    "qwen3_next": (("qwen3_next", _DELTA_EXPERTS), {}, "qwen3next", "qwen3_next"),
    "qwen3_next_odd": (("qwen3_next", _DELTA_EXPERTS), {
        "num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "linear_attention"],
    }, "qwen3next", "qwen3_next"),
    "qwen3_5_text": (("qwen3_5_text", _DELTA), _SECTIONS | {"tie_word_embeddings": True}, "qwen35", "qwen3_5_text"),
    "qwen3_5_moe_text": (("qwen3_5_moe_text", _DELTA_EXPERTS), _SECTIONS, "qwen35moe", "qwen3_5_moe_text"),
    "qwen3_5": (("qwen3_5", {"text_config": _DELTA | _SECTIONS, **_EYE}), {}, "qwen35", None),
    "qwen3_5_moe": (("qwen3_5_moe", {"text_config": _DELTA_EXPERTS | _SECTIONS, **_EYE}), {}, "qwen35moe", None),
    "kimi_linear": (_KIMI_LINEAR, {}, "kimi-linear", "kimi_linear"),
    "kimi_linear_all_experts": (_KIMI_LINEAR, {"num_experts_per_tok": 8}, "kimi-linear", "kimi_linear"),
    "kimi_linear_groups": (_KIMI_LINEAR, {
        "n_group": 4, "topk_group": 2, "rms_norm_eps": 1e-6, "linear_head_dim": 64, "linear_conv_kernel_dim": 3,
        "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    }, "kimi-linear", "kimi_linear"),
    "lfm2": (("lfm2", _CONV), {}, "lfm2", "lfm2"),
    "lfm2_moe": (("lfm2_moe", {**_CONV, **_EXPERTS, "moe_intermediate_size": 64, "num_dense_layers": 1}), {}, "lfm2moe",
                 "lfm2_moe"),
    "mamba": (("mamba", _BARE), {}, "mamba", "mamba"),
    "mamba_untied": (("mamba", _BARE), {"tie_word_embeddings": False}, "mamba", "mamba"),
    "falcon_mamba": (("falcon_mamba", _BARE), {"mixer_rms_eps": 1e-5}, "mamba", "falcon_mamba"),
    "mamba2": (("mamba2", {**_BARE, "num_heads": 8, "head_dim": 32, "n_groups": 2}), {}, "mamba2", "mamba2"),
    "granitehybrid": (_GRANITE, _DENSE, "granitehybrid", "granitemoehybrid"),
    "granitehybrid_experts": (_GRANITE, {"position_embedding_type": "rope"}, "granitehybrid", "granitemoehybrid"),
    "granitehybrid_attention": (_GRANITE, _DENSE | _ATTENTION, "granite", None),
    "granitehybrid_attention_experts": (_GRANITE, _ATTENTION, "granitemoe", None),
    "bamba": (("bamba", {**_NO_HEAD_DIM, **_MAMBA, "attn_layer_indices": [1], "pad_token_id": 0}), {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    }, "granitehybrid", "bamba"),
    "jamba": (("jamba", {**_NO_HEAD_DIM, **_EXPERTS, "mamba_d_state": 16}), {
        "num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_offset": 0,
    }, "jamba", "jamba"),
    "jamba_dense": (("jamba", {**_NO_HEAD_DIM, "num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": 16}), {
        "attn_layer_period": 2, "attn_layer_offset": 1,
    }, "jamba", "jamba"),
    "nemotron_h": (_NEMOTRON, {}, "nemotron_h", "nemotron_h"),
    "nemotron_h_biased": (_NEMOTRON, {"mlp_bias": True}, "nemotron_h", "nemotron_h"),
    "nemotron_h_experts": (_NEMOTRON, _NEMOTRON_EXPERTS, "nemotron_h_moe", "nemotron_h"),
    "nemotron_h_latent": (_NEMOTRON, _NEMOTRON_EXPERTS | {"moe_latent_size": 64}, "nemotron_h_moe", "nemotron_h"),
    "falcon_h1": (_FALCON, {"mamba_rms_norm": True, "mamba_norm_before_gate": False}, "falcon-h1", "falcon_h1"),
    "falcon_h1_multiplied": (_FALCON, _MULTIPLIED, "falcon-h1", None),
    "falcon_h1_tied": (_FALCON, _MULTIPLIED | {"tie_word_embeddings": True}, "falcon-h1", None),
    "gemma3n_text": (_GEMMA3N, {}, "gemma3n", "gemma3n_text"),
    "gemma3n_shared": (_GEMMA3N, {
        "num_hidden_layers": 22, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
    }, "gemma3n", "gemma3n_text"),
    "gemma4_text": (_GEMMA, {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 30.0},
                    "gemma4", "gemma4_text"),
    "gemma4_plain": (_GEMMA, {"hidden_size_per_layer_input": 0}, "gemma4", "gemma4_text"),
    "gemma4_experts": (_GEMMA, _GEMMA_EXPERTS, "gemma4", "gemma4_text"),
}  # fmt: skip
# case → nats, with the reason, which tests/interop/test_llama_cpp_differences.py imitates
LOOSER: dict[str, float] = {
    # rms_norm_eps is 1e-5, where transformers has 1e-6 for latents, q and k
    "kimi_linear": 5e-4, "kimi_linear_all_experts": 5e-4,
    # GELU, and the deviation of a sample where transformers takes that of all
    "gemma3n_text": 5e-3, "gemma3n_shared": 0.1,
}  # fmt: skip
