"""Tiny random models that see, as Hugging Face folders with the files of their image processors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from models import make_tokenizer
from tiny_types import factory

_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 384, "max_position_embeddings": 4096}  # fmt: skip
_EYE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_QWEN_EYE = {"depth": 3, "num_heads": 2, "patch_size": 14}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}}
# llama.cpp does not turn pairs that no axis has where axes are interleaved: of 16, 6, 5 and 5 leave none.
_INTERLEAVED = {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [6, 5, 5]}}
_QWEN_TOKENS = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_QWEN3_EYE = {"depth": 3, "num_heads": 2, "patch_size": 16, "hidden_size": 32, "intermediate_size": 64,
              "out_hidden_size": 64, "num_position_embeddings": 16}  # fmt: skip
_HYBRID = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 32,
           "linear_value_head_dim": 32, "layer_types": ["linear_attention", "full_attention"],
           "rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
           }  # fmt: skip
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP_NORM = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}

# name → (model_type, config, preprocessor_config.json)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ("qwen2_vl", {
        **_QWEN_TOKENS,
        "text_config": _TEXT | _MROPE,
        "vision_config": {**_QWEN_EYE, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    }, _CLIP_NORM | {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14}),
    "qwen2_5_vl": ("qwen2_5_vl", {
        **_QWEN_TOKENS,
        "text_config": _TEXT | _MROPE,
        "vision_config": {**_QWEN_EYE, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "depth": 4,
                          "fullatt_block_indexes": [1, 3], "window_size": 112},
    }, _CLIP_NORM | {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14}),
    "qwen3_vl": ("qwen3_vl", {
        **_QWEN_TOKENS,
        "text_config": {**_TEXT, **_INTERLEAVED, "head_dim": 32, "num_hidden_layers": 3},
        "vision_config": {**_QWEN3_EYE, "deepstack_visual_indexes": [0, 1]},
    }, _HALF | {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16}),
    "qwen3_vl_moe": ("qwen3_vl_moe", {
        **_QWEN_TOKENS,
        "text_config": {**_TEXT, **_MROPE, **_MOE, "head_dim": 32, "num_hidden_layers": 3},
        "vision_config": {**_QWEN3_EYE, "deepstack_visual_indexes": [1]},
    }, _HALF),
    "qwen3_5": ("qwen3_5", {
        **_QWEN_TOKENS, "text_config": {**_TEXT, **_HYBRID, "head_dim": 32}, "vision_config": _QWEN3_EYE,
    }, _HALF),
    "gemma3": ("gemma3", {
        "text_config": {**_TEXT, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
        "vision_config": {**_EYE, "image_size": 56, "patch_size": 14}, "mm_tokens_per_image": 4,
        "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302,
    }, _HALF | {"image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 4,
                "size": {"height": 56, "width": 56}}),
    "idefics3": ("idefics3", {
        "text_config": {**_TEXT, "model_type": "llama"}, "scale_factor": 2,
        "vision_config": {**_EYE, "image_size": 64, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"},
        "image_token_id": 300,
    }, _HALF | {"size": {"longest_edge": 128}}),
    "smolvlm": ("smolvlm", {
        "text_config": {**_TEXT, "model_type": "llama"}, "scale_factor": 2,
        "vision_config": {**_EYE, "image_size": 64, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"},
        "image_token_id": 300,
    }, _HALF | {"size": {"longest_edge": 128}}),
    "pixtral": ("llava", {
        "text_config": {**_TEXT, "model_type": "mistral", "head_dim": 32},
        "vision_config": {**_EYE, "model_type": "pixtral", "image_size": 56, "patch_size": 14, "head_dim": 16,
                          "num_hidden_layers": 3, "hidden_act": "gelu"},
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_index": 300,
    }, _CLIP_NORM),
    "mistral3": ("mistral3", {
        "text_config": {**_TEXT, "model_type": "mistral", "head_dim": 32},
        "vision_config": {**_EYE, "model_type": "pixtral", "image_size": 56, "patch_size": 14, "head_dim": 16,
                          "num_hidden_layers": 3, "hidden_act": "silu"},
        "vision_feature_layer": -1, "spatial_merge_size": 2, "image_token_index": 300,
    }, _CLIP_NORM),
}  # fmt: skip

# Tokens that llama.cpp looks up, or that frame an image.
_AROUND = {"<fake_token_around_image>": 311, "<global-img>": 312, "\n\n": 313}
_FRAME = {"<|vision_start|>": 302, "<|vision_end|>": 303}
SPECIAL = {"pixtral": {"[IMG_BREAK]": 310}, "mistral3": {"[IMG_BREAK]": 310}, "idefics3": _AROUND, "smolvlm": _AROUND,
           "qwen2_5_vl": _FRAME, "qwen3_vl": _FRAME}  # fmt: skip


def make_vision(folder: Path, case: str, seed: int = 0, **changes: Any) -> Path:
    """The folder of a case, in bfloat16; nothing in it is what its class initializes it to."""
    from transformers import AutoConfig

    torch.manual_seed(seed)
    model_type, parts, processor = CASES[case]
    config = AutoConfig.for_model(model_type, **{**parts, **changes})
    model = factory(config).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    if case == "gemma3":  # as on the hub; transformers 5 writes shorter names
        weights = folder / "model.safetensors"
        tensors = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): value
                   for name, value in load_file(weights).items()}  # fmt: skip
        save_file(tensors, weights, {"format": "pt"})
    make_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    _change_tokenizer(folder / "tokenizer.json", SPECIAL.get(case, {}))
    return folder


def _change_tokenizer(path: Path, special: dict[str, int]) -> None:
    """Add special tokens, and the one merge without which llama.cpp loads no byte-level vocabulary."""
    parsed = json.loads(path.read_text())
    parsed["model"] |= {"vocab": parsed["model"]["vocab"] | {"!!": 259}, "merges": [["!", "!"]]}
    for text, number in special.items():
        parsed["added_tokens"].append({"id": number, "content": text, "special": True, "single_word": False,
                                       "lstrip": False, "rstrip": False, "normalized": False})  # fmt: skip
    path.write_text(json.dumps(parsed))
