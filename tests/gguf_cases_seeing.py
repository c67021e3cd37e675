"""Text decoders of models that see, and embedding models: tiny models for `gguf_models`."""

from __future__ import annotations

from models import SIZES

_TEXT = {key: value for key, value in SIZES.items() if key != "head_dim"}
_EYE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14}  # fmt: skip
_QWEN_EYE = {"hidden_size": 64, "intermediate_size": 128, "depth": 2, "num_heads": 2, "out_hidden_size": 128,
             "patch_size": 14, "spatial_merge_size": 2}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 50000.0, "mrope_section": [4, 6, 6]}
# llama.cpp reads no epsilon for qwen2vl.
_QWEN2 = {"rope_parameters": _MROPE, "rms_norm_eps": 1e-12}
_QWEN3 = {"rope_parameters": _MROPE | {"mrope_section": [6, 5, 5]}, "num_hidden_layers": 3}
_DEEPSTACK = _QWEN_EYE | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
_GLM_EYE = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128, "depth": 1, "num_heads": 2,
            "patch_size": 14, "image_size": 56, "attention_bias": False}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}


def _seeing(model_type: str, text_type: str, text: dict, **more: object) -> tuple[str, dict]:
    """A model with a small vision tower around a decoder."""
    return model_type, {"text_config": {"model_type": text_type, **text}, "vision_config": _EYE, **more}


def _hearing(model_type: str, text_type: str, text: dict) -> tuple[str, dict]:
    """The same with a small audio tower."""
    ear = {"hidden_size": 64, "d_model": 64, "intermediate_size": 128, "num_hidden_layers": 1, "encoder_layers": 1,
           "num_attention_heads": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128, "num_mel_bins": 32,
           "max_source_positions": 32}  # fmt: skip
    return model_type, {"text_config": {"model_type": text_type, **text}, "audio_config": ear}


# name → (model_type and sizes, changes to the config, general.architecture, model_type read back or None)
CASES: dict[str, tuple] = {
    "qwen2_vl": (("qwen2_vl", {
        "text_config": _TEXT | _QWEN2,
        "vision_config": {"embed_dim": 64, "hidden_size": 128, "depth": 1, "num_heads": 2, "patch_size": 14},
    }), {}, "qwen2vl", None),
    "qwen2_5_vl": (("qwen2_5_vl", {
        "text_config": _TEXT | _QWEN2, "vision_config": _QWEN_EYE, "tie_word_embeddings": True,
    }), {}, "qwen2vl", None),
    "qwen3_vl": (("qwen3_vl", {
        "text_config": SIZES | _QWEN3, "vision_config": _DEEPSTACK, "tie_word_embeddings": True,
    }), {}, "qwen3vl", None),
    "qwen3_vl_moe": (("qwen3_vl_moe", {
        "text_config": SIZES | _EXPERTS | _QWEN3, "vision_config": _DEEPSTACK,
    }), {}, "qwen3vlmoe", None),
    "glm4v": (("glm4v", {
        "text_config": SIZES | {"rope_parameters": _MROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
                                "pad_token_id": 0}, "vision_config": _GLM_EYE,
    }), {}, "glm4", None),
    "glm_ocr": (("glm_ocr", {
        "text_config": SIZES | {"rope_parameters": _MROPE, "pad_token_id": 0}, "vision_config": _GLM_EYE,
    }), {}, "glm4", None),
    "glm4v_moe": (("glm4v_moe", {
        "text_config": SIZES | {
            "rope_parameters": _MROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}, "pad_token_id": 0,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        }, "vision_config": _GLM_EYE,
    }), {}, "glm4moe", None),
    "paddleocr_vl": (("paddleocr_vl", {
        "text_config": SIZES | _QWEN2 | {"pad_token_id": 0}, "vision_config": _EYE,
    }), {}, "paddleocr", None),
    "phi4_multimodal": (("phi4_multimodal", _TEXT | {
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vision_config": _EYE | {"image_size": 448},
        "audio_config": {"hidden_size": 64, "intermediate_size": 128, "num_blocks": 1, "num_attention_heads": 2,
                         "ext_pw_out_channel": 64, "nemo_conv_channels": 64, "input_size": 32,
                         "depthwise_separable_out_channel": 64},
    }), {}, "phi3", None),
    "lfm2_vl": (_seeing("lfm2_vl", "lfm2", _TEXT | {
        "layer_types": ["conv", "full_attention"], "block_ff_dim": 192, "block_auto_adjust_ff_dim": False,
    }), {}, "lfm2", None),
    "llava": (_seeing("llava", "llama", SIZES), {}, "llama", None),
    "llava_next": (_seeing("llava_next", "mistral", SIZES), {}, "llama", None),
    "llava_next_video": (_seeing("llava_next_video", "llama", SIZES), {}, "llama", None),
    "llava_onevision": (_seeing("llava_onevision", "qwen2", _TEXT), {}, "qwen2", None),
    "video_llava": (_seeing("video_llava", "llama", SIZES), {}, "llama", None),
    "vipllava": (_seeing("vipllava", "llama", SIZES), {}, "llama", None),
    "internvl": (_seeing("internvl", "qwen2", _TEXT), {}, "qwen2", None),
    "internvl_moe": (_seeing("internvl", "qwen3_moe", SIZES | _EXPERTS), {}, "qwen3moe", None),
    "pixtral": (_seeing("llava", "mistral", SIZES), {}, "llama", None),
    "idefics3": (_seeing("idefics3", "llama", SIZES), {}, "llama", None),
    "smolvlm": (_seeing("smolvlm", "llama", SIZES), {"tie_word_embeddings": True}, "llama", None),
    "got_ocr2": (("got_ocr2", {"text_config": {"model_type": "qwen2", **_TEXT}, "vision_config": {
        "hidden_size": 64, "output_channels": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 16, "mlp_dim": 128, "window_size": 2, "global_attn_indexes": [0],
    }}), {}, "qwen2", None),
    "lighton_ocr": (_seeing("lighton_ocr", "qwen3", SIZES), {}, "qwen3", None),
    "voxtral": (_hearing("voxtral", "llama", SIZES), {}, "llama", None),
    "qwen2_audio": (_hearing("qwen2_audio", "qwen2", _TEXT), {}, "qwen2", None),
    "granite_speech": (("granite_speech", {
        "text_config": {"model_type": "granite", **_TEXT}, "encoder_config": {
            "hidden_dim": 64, "num_layers": 1, "num_heads": 2, "dim_head": 32, "input_dim": 32, "output_dim": 32,
        }, "projector_config": {
            "model_type": "blip_2_qformer", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "encoder_hidden_size": 64,
        },
    }), {}, "granite", None),
    "deepseek_vl": (_seeing("deepseek_vl", "llama", SIZES), {}, "llama", None),
}  # fmt: skip
# case → nats, with the reason
LOOSER: dict[str, float] = {}
