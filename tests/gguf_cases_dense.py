"""Dense decoders: tiny models for `gguf_models`."""

from __future__ import annotations

from models import SIZES

_NO_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"pad_token_id": 0}
_SIZES = SIZES | {"pad_token_id": 0}
_SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 384,
    "max_position_embeddings": 256, "num_hidden_layers": 64, "pad_token_id": 0,
}  # fmt: skip
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
    "mistral3": (("mistral3", {
        "text_config": _SIZES | {"model_type": "mistral"}, "vision_config": _EYE,
    }), {}, "mistral3", None),
    "mistral3_of_ministral3": (("mistral3", {
        "text_config": _SIZES | _MINISTRAL3 | {"model_type": "ministral3"}, "vision_config": _EYE,
    }), {}, "mistral3", None),
    "ministral": (("ministral", _SIZES), {"sliding_window": 100}, "llama", None),
    "internlm3": (("internlm3", _SIZES), {"attention_bias": True, "mlp_bias": True}, "llama", None),
    "iquestcoder": (("iquestcoder", _SIZES), {}, "llama", None),
    "arcee": (("arcee", _SIZES), {"rope_parameters": _YARN}, "arcee", "arcee"),
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
    "olmo3": (("olmo3", _NO_HEAD_DIM), _OLMO3 | {"num_hidden_layers": 4, "sliding_window": 8}, "olmo2", "olmo3"),
    "olmo3_types": (("olmo3", _NO_HEAD_DIM), {
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8, "tie_word_embeddings": True,
    }, "olmo2", "olmo3"),
    "exaone4": (("exaone4", _NO_HEAD_DIM), {
        "sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": _LLAMA3,
    }, "exaone4", "exaone4"),
    "exaone4_windows": (("exaone4", _SMALL), {"sliding_window": 8}, "exaone4", "exaone4"),
}  # fmt: skip
# case → nats, with the reason
LOOSER: dict[str, float] = {}
