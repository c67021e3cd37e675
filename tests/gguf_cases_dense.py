"""Dense decoders: tiny models for `gguf_models`."""

from __future__ import annotations

from models import SIZES

_NO_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"pad_token_id": 0}
_SIZES = SIZES | {"pad_token_id": 0}
_SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 384,
    "max_position_embeddings": 256, "num_hidden_layers": 64, "pad_token_id": 0,
}  # fmt: skip
_MLA = _NO_HEAD_DIM | {
    "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
}  # fmt: skip
_FALCON = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 384,
           "max_position_embeddings": 256}  # fmt: skip
_EYE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "head_dim": 32}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
_MINISTRAL3 = {"rope_parameters": {
    "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16,
    "max_position_embeddings": 256, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}}  # fmt: skip
_OLMO3 = {"rope_parameters": {
    "full_attention": _YARN | {"attention_factor": 1.2079441541679836},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}}  # fmt: skip

# name → (model_type and sizes, changes to the config, general.architecture, model_type read back or None)
CASES: dict[str, tuple] = {
    "ministral3": (("ministral3", _SIZES), _MINISTRAL3, "mistral3", "ministral3"),
    "ministral3_betas": (("ministral3", _SIZES), {"rope_parameters": _MINISTRAL3["rope_parameters"] | {
        "original_max_position_embeddings": 4096, "beta_fast": 4.0, "beta_slow": 2.0,
    }}, "mistral3", "ministral3"),
    "mistral3": (("mistral3", {
        "text_config": _SIZES | {"model_type": "mistral"}, "vision_config": _EYE,
    }), {}, "mistral3", None),
    "mistral3_of_ministral3": (("mistral3", {
        "text_config": _SIZES | _MINISTRAL3 | {"model_type": "ministral3"}, "vision_config": _EYE,
    }), {}, "mistral3", None),
    "ministral": (("ministral", _SIZES), {"sliding_window": 100}, "llama", None),
    "internlm3": (("internlm3", _SIZES), {"attention_bias": True, "mlp_bias": True}, "llama", None),
    "iquestcoder": (("iquestcoder", _SIZES), {}, "llama", None),
    "helium": (("helium", _SIZES), {}, "llama", None),
    "arcee": (("arcee", _SIZES), {"rope_parameters": _YARN}, "arcee", "arcee"),
    "granite_swa": (("granite_swa", _SIZES), {
        "num_hidden_layers": 4, "sliding_window": 8, "layer_rope_theta": [0.0, 10000.0, 10000.0, 10000.0],
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
    }, "granite_swa", "granite_swa"),
    "granite_swa_biased": (("granite_swa", _NO_HEAD_DIM), {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "attention_multiplier": 0.2,
        "attention_bias": True, "mlp_bias": True,
    }, "granite_swa", "granite_swa"),
    "glm": (("glm", _SIZES), {}, "chatglm", "glm"),
    "glm_plain": (("glm", _SIZES), {"attention_bias": False, "tie_word_embeddings": True}, "chatglm", "glm"),
    "glm4": (("glm4", _SIZES | {"head_dim": 48}), {}, "glm4", "glm4"),
    "glm4_plain": (("glm4", _SIZES), {"attention_bias": False}, "glm4", "glm4"),
    "seed_oss": (("seed_oss", _SIZES | {"head_dim": 48}), {}, "seed_oss", "seed_oss"),
    "seed_oss_plain": (("seed_oss", _SIZES), {"attention_bias": False}, "seed_oss", "seed_oss"),
    "ernie4_5": (("ernie4_5", _SIZES), {}, "ernie4_5", "ernie4_5"),
    "hunyuan_v1_dense": (("hunyuan_v1_dense", _SIZES), {}, "hunyuan-dense", "hunyuan_v1_dense"),
    "hunyuan_v1_dense_alpha": (("hunyuan_v1_dense", _SIZES), {
        "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "rope_theta": 10000.0, "factor": 1.0},
    }, "hunyuan-dense", None),
    "apertus": (("apertus", _SIZES), {"rope_parameters": _LLAMA3}, "apertus", "apertus"),
    "apertus_biased": (("apertus", _SIZES), {"attention_bias": True, "tie_word_embeddings": True}, "apertus",
                       "apertus"),
    "minicpm3": (("minicpm3", _MLA), {}, "minicpm3", "minicpm3"),
    "minicpm3_longrope": (("minicpm3", _MLA), {
        "tie_word_embeddings": False, "max_position_embeddings": 1024, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
            "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + 0.5 * i for i in range(8)],
        },
    }, "minicpm3", "minicpm3"),
    "olmo3": (("olmo3", _NO_HEAD_DIM), _OLMO3 | {"num_hidden_layers": 4, "sliding_window": 8}, "olmo2", "olmo3"),
    "olmo3_types": (("olmo3", _NO_HEAD_DIM), {
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8, "tie_word_embeddings": True,
    }, "olmo2", "olmo3"),
    "olmo3_full": (("olmo3", _NO_HEAD_DIM), {"layer_types": ["full_attention"] * 2}, "olmo2", "olmo2"),
    "exaone4": (("exaone4", _NO_HEAD_DIM), {
        "sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": _LLAMA3,
    }, "exaone4", "exaone4"),
    "exaone4_windows": (("exaone4", _SMALL), {"sliding_window": 8}, "exaone4", "exaone4"),
    "cohere": (("cohere", _NO_HEAD_DIM), {"logit_scale": 0.25}, "command-r", "cohere"),
    "cohere_plus": (("cohere", _SMALL), {"use_qk_norm": True, "model_max_length": 512}, "command-r", "cohere"),
    "cohere2": (("cohere2", _NO_HEAD_DIM), {"num_hidden_layers": 4, "sliding_window": 8, "logit_scale": 0.25},
                "cohere2", "cohere2"),
    "cohere2_types": (("cohere2", _NO_HEAD_DIM), {
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8,
    }, "cohere2", "cohere2"),
    "phi": (("phi", _NO_HEAD_DIM), {"num_key_value_heads": 4}, "phi2", "phi"),
    "starcoder2": (("starcoder2", _NO_HEAD_DIM), {}, "starcoder2", "starcoder2"),
    "stablelm": (("stablelm", _NO_HEAD_DIM), {"use_qkv_bias": True}, "stablelm", "stablelm"),
    "stablelm_parallel": (("stablelm", _NO_HEAD_DIM), {"use_parallel_residual": True, "qk_layernorm": True},
                          "stablelm", "stablelm"),
    "stablelm_norms": (("stablelm", _NO_HEAD_DIM), {"qk_layernorm": True}, "stablelm", "stablelm"),
    "falcon": (("falcon", _FALCON), {}, "falcon", "falcon"),
    "falcon_heads": (("falcon", _FALCON), {"multi_query": False}, "falcon", "falcon"),
    "falcon_new": (("falcon", _FALCON), {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 192},
                   "falcon", "falcon"),
    "falcon_new_one_norm": (("falcon", _FALCON), {
        "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
    }, "falcon", "falcon"),
    "bloom": ("bloom", {}, "bloom", "bloom"),
    "mpt": (("mpt", {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "vocab_size": 384}), {},
            "mpt", "mpt"),
    "mpt_clipped": (("mpt", {"d_model": 192, "n_heads": 6, "n_layers": 2, "max_seq_len": 256, "vocab_size": 384}),
                    {"attn_config": {"clip_qkv": 0.5}}, "mpt", "mpt"),
    "gpt_bigcode": (("gpt_bigcode", {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 384,
                                     "n_positions": 256}), {}, "starcoder", "gpt_bigcode"),
    "olmo": (("olmo", _NO_HEAD_DIM), {"clip_qkv": 0.5}, "olmo", "olmo"),
    "nemotron": (("nemotron", _NO_HEAD_DIM), {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 0.5,
    }}, "nemotron", "nemotron"),
    "nemotron_biased": (("nemotron", _NO_HEAD_DIM), {"attention_bias": True, "mlp_bias": True}, "nemotron",
                        "nemotron"),
    "jais2": (("jais2", _SIZES), {}, "jais2", "jais2"),
}  # fmt: skip
# case → nats, with the reason
LOOSER: dict[str, float] = {  # llama.cpp looks GELU up in a float16 table
    case: 2e-3 for case in CASES if case.startswith(("bloom", "falcon", "gpt_bigcode", "mpt", "phi", "starcoder2"))
}
