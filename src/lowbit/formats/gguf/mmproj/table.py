"""The vision towers that lowbit writes as mmproj files, as data: one row per tower.

Names of tensors and keys are those of the gguf package. What a row says beyond them follows llama.cpp: its converter
(conversion/*.py: layouts, types, keys) and its loader and graphs (tools/mtmd/clip.cpp, tools/mtmd/models/*.cpp: which
tensors and keys are required, what is computed whatever the file says). docs/gguf-vision.md explains the rows.

Refused: a model without a vision tower, one with an audio tower, a tower without a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from gguf.constants import MODEL_TENSOR as T
from gguf.constants import Keys, VisionProjectorType

from lowbit.errors import ArchitectureError
from lowbit.formats.gguf.mmproj.row import ARRAY, BOOL, FLOAT, Tower, TowerConfig, TowerKey, TowerLayout, TowerPlace

V = Keys.ClipVision
L = TowerLayout
_FLAT_NORM_EPS = 1e-6  # of the norms of Qwen's towers: a constant of transformers' classes


def _sizes(hidden: str, intermediate: str, heads: str, blocks: str, image: Any) -> tuple[TowerKey, ...]:
    return (
        TowerKey(V.IMAGE_SIZE, image),
        TowerKey(V.PATCH_SIZE, "patch_size"),
        TowerKey(V.EMBEDDING_LENGTH, hidden),
        TowerKey(V.FEED_FORWARD_LENGTH, intermediate),
        TowerKey(V.BLOCK_COUNT, blocks),
        TowerKey(V.Attention.HEAD_COUNT, heads),
    )


_SIZES = _sizes("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "image_size")
_EPS = TowerKey(V.Attention.LAYERNORM_EPS, "layer_norm_eps", FLOAT)
_USE_GELU = TowerKey(V.USE_GELU, lambda config: True, BOOL)
_TANH_GELU = {"hidden_act": ("gelu_pytorch_tanh", "gelu_new")}
_PROJECTOR_GELU = (
    "llama.cpp computes the projector's GELU by its tanh form, which differs from the exact one by up to 5e-4"
)


def _place(tensor: T, bias: bool | None = True, layout: TowerLayout = L.SAME, **others: Any) -> TowerPlace:
    return TowerPlace((tensor,), layout, bias=bias, **others)


# --- Qwen2-VL, Qwen2.5-VL, Qwen3-VL ---------------------------------------------------------------------------------

_QKV = TowerPlace((T.V_ENC_ATTN_Q, T.V_ENC_ATTN_K, T.V_ENC_ATTN_V), L.THIRDS, bias=True)
# The graphs reorder patches in squares of 2 × 2, add two frames, and have a rotary base of 10000 built in.
_QWEN_FIXED: dict[str, tuple[Any, ...]] = {
    "spatial_merge_size": (2,), "temporal_patch_size": (2,), "in_channels": (3,),
}  # fmt: skip


def _rotary_base(config: TowerConfig) -> Iterable[tuple[str, Any, Any]]:
    """llama.cpp has 10000 built in."""
    rope = config.vision("rope_parameters")
    yield "rope_theta of vision_config", (rope or {}).get("rope_theta", 10000.0), 10000.0


_QWEN2_VL = Tower(
    ("qwen2_vl",), VisionProjectorType.QWEN2VL, ("visual.",), "visual.blocks",
    {
        "visual.patch_embed.proj": _place(T.V_ENC_EMBD_PATCH, False, L.FRAMES),
        "visual.merger.ln_q": _place(T.V_POST_NORM),
        "visual.merger.mlp.0": _place(T.V_MMPROJ, number=0),
        "visual.merger.mlp.2": _place(T.V_MMPROJ, number=2),
    },
    {
        "norm1": _place(T.V_ENC_INPUT_NORM),
        "attn.qkv": _QKV,
        "attn.proj": _place(T.V_ENC_ATTN_O),
        "norm2": _place(T.V_ENC_POST_ATTN_NORM),
        "mlp.fc1": _place(T.V_ENC_FFN_UP),
        "mlp.fc2": _place(T.V_ENC_FFN_DOWN),
    },
    (
        # no use: config.json's hidden_size, which is the language model's width here, as llama.cpp's converter has it
        *_sizes("embed_dim", "hidden_size", "num_heads", "depth", lambda config: 560),
        TowerKey(V.Attention.LAYERNORM_EPS, lambda config: _FLAT_NORM_EPS, FLOAT),
    ),
    block_count="depth", fixed={**_QWEN_FIXED, "hidden_act": ("quick_gelu",)}, implied=_rotary_base,
    note=_PROJECTOR_GELU,
)  # fmt: skip


def _window_period(config: TowerConfig) -> int:
    """Every so many blocks one attends to everything."""
    full = config.vision("fullatt_block_indexes") or [-1]
    return full[0] + 1


def _windows(config: TowerConfig) -> Iterable[tuple[str, Any, Any]]:
    period, blocks = _window_period(config), config.vision("depth")
    yield "fullatt_block_indexes", config.vision("fullatt_block_indexes"), [*range(period - 1, blocks, max(period, 1))]
    yield from _rotary_base(config)


_QWEN2_5_VL = replace(
    _QWEN2_VL, model_types=("qwen2_5_vl",), projector=VisionProjectorType.QWEN25VL,
    outside=_QWEN2_VL.outside | {"visual.merger.ln_q": _place(T.V_POST_NORM, False)},
    inside={
        "norm1": _place(T.V_ENC_INPUT_NORM, False),
        "attn.qkv": _QKV,
        "attn.proj": _place(T.V_ENC_ATTN_O),
        "norm2": _place(T.V_ENC_POST_ATTN_NORM, False),
        "mlp.gate_proj": _place(T.V_ENC_FFN_GATE),
        "mlp.up_proj": _place(T.V_ENC_FFN_UP),
        "mlp.down_proj": _place(T.V_ENC_FFN_DOWN),
    },
    keys=(
        *_sizes("hidden_size", "intermediate_size", "num_heads", "depth", lambda config: 560),
        TowerKey(V.Attention.LAYERNORM_EPS, lambda config: _FLAT_NORM_EPS, FLOAT),
        TowerKey(V.USE_SILU, lambda config: True, BOOL),
        TowerKey(V.N_WA_PATTERN, _window_period),
    ),
    fixed={**_QWEN_FIXED, "hidden_act": ("silu",), "window_size": (112,)}, implied=_windows,
)  # fmt: skip


def _deepstack(config: TowerConfig) -> list[int]:
    """Blocks whose output is merged into the first blocks of the language model; Qwen3.5 has none."""
    return list(config.vision("deepstack_visual_indexes") or [])


def _deepstack_mergers(config: TowerConfig) -> dict[str, TowerPlace]:
    places = {}
    for index, block in enumerate(_deepstack(config)):
        path = f"model.visual.deepstack_merger_list.{index}"
        places[f"{path}.norm"] = _place(T.V_DS_NORM, number=block)
        places[f"{path}.linear_fc1"] = _place(T.V_DS_FC1, number=block)
        places[f"{path}.linear_fc2"] = _place(T.V_DS_FC2, number=block)
    return places


def _square_of_positions(config: TowerConfig) -> Iterable[tuple[str, Any, Any]]:
    positions = config.vision("num_position_embeddings")
    yield "num_position_embeddings", positions, math.isqrt(positions) ** 2
    yield from _rotary_base(config)


_QWEN3_VL = Tower(
    ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), VisionProjectorType.QWEN3VL, ("model.visual.",),
    "model.visual.blocks",
    {
        "model.visual.patch_embed.proj": _place(T.V_ENC_EMBD_PATCH, True, L.FRAMES),
        "model.visual.pos_embed": _place(T.V_ENC_EMBD_POS, False),
        "model.visual.merger.norm": _place(T.V_POST_NORM),
        "model.visual.merger.linear_fc1": _place(T.V_MMPROJ, number=0),
        "model.visual.merger.linear_fc2": _place(T.V_MMPROJ, number=2),
    },
    {
        "norm1": _place(T.V_ENC_INPUT_NORM),
        "attn.qkv": _place(T.V_ENC_ATTN_QKV),
        "attn.proj": _place(T.V_ENC_ATTN_O),
        "norm2": _place(T.V_ENC_POST_ATTN_NORM),
        "mlp.linear_fc1": _place(T.V_ENC_FFN_UP),
        "mlp.linear_fc2": _place(T.V_ENC_FFN_DOWN),
    },
    (
        *_sizes("hidden_size", "intermediate_size", "num_heads", "depth",
                lambda config: math.isqrt(config.vision("num_position_embeddings")) * config.vision("patch_size")),
        TowerKey(V.Attention.LAYERNORM_EPS, lambda config: _FLAT_NORM_EPS, FLOAT),
        _USE_GELU,
        TowerKey(V.SPATIAL_MERGE_SIZE, "spatial_merge_size"),
        TowerKey(V.IS_DEEPSTACK_LAYERS,
                 lambda config: [block in _deepstack(config) for block in range(config.vision("depth"))], ARRAY, BOOL),
    ),
    block_count="depth", fixed=_QWEN_FIXED | _TANH_GELU, implied=_square_of_positions, extra=_deepstack_mergers,
    note=_PROJECTOR_GELU,
)  # fmt: skip

# --- SigLIP: Gemma 3, Idefics3, SmolVLM -----------------------------------------------------------------------------

_SIGLIP_BLOCK = {
    "layer_norm1": _place(T.V_ENC_INPUT_NORM),
    "self_attn.q_proj": _place(T.V_ENC_ATTN_Q),
    "self_attn.k_proj": _place(T.V_ENC_ATTN_K),
    "self_attn.v_proj": _place(T.V_ENC_ATTN_V),
    "self_attn.out_proj": _place(T.V_ENC_ATTN_O),
    "layer_norm2": _place(T.V_ENC_POST_ATTN_NORM),
    "mlp.fc1": _place(T.V_ENC_FFN_UP),
    "mlp.fc2": _place(T.V_ENC_FFN_DOWN),
}


def _siglip(path: str) -> dict[str, TowerPlace]:
    return {
        f"{path}.embeddings.patch_embedding": _place(T.V_ENC_EMBD_PATCH, kept="F32"),
        f"{path}.embeddings.position_embedding": _place(T.V_ENC_EMBD_POS, False, kept="F32"),
        f"{path}.post_layernorm": _place(T.V_POST_NORM),
    }


def _pooled(config: TowerConfig) -> int:
    """Patches of a side that are averaged to one token of the image."""
    return config.vision("image_size") // config.vision("patch_size") // math.isqrt(config.model("mm_tokens_per_image"))


def _whole_pools(config: TowerConfig) -> Iterable[tuple[str, Any, Any]]:
    side = config.vision("image_size") // config.vision("patch_size")
    pooled = max(1, _pooled(config))
    yield "mm_tokens_per_image", config.model("mm_tokens_per_image"), (side // pooled) ** 2


_GEMMA3 = Tower(
    ("gemma3",), VisionProjectorType.GEMMA3, ("vision_tower.", "multi_modal_projector."),
    "vision_tower.vision_model.encoder.layers",
    {
        **_siglip("vision_tower.vision_model"),
        "multi_modal_projector.mm_input_projection_weight": _place(T.V_MM_INP_PROJ, False, bare=True, kept="F16"),
        "multi_modal_projector.mm_soft_emb_norm": _place(T.V_MM_SOFT_EMB_NORM, False, L.PLUS_ONE),
    },
    _SIGLIP_BLOCK,
    (*_SIZES, _EPS, _USE_GELU,
     TowerKey(V.Projector.SCALE_FACTOR, lambda config: None if _pooled(config) == 4 else _pooled(config))),
    vision_type="siglip_vision_model", fixed={**_TANH_GELU, "num_channels": (3,)}, implied=_whole_pools,
    left_out={"vision_tower.vision_model.head.": "the tower's own pooling head, which the model does not use"},
)  # fmt: skip


def _longest_edge(config: TowerConfig) -> Any:
    size = config.processor.get("size")
    edge = size.get("longest_edge") if isinstance(size, dict) else None
    return edge or config.vision("image_size")


_IDEFICS3 = Tower(
    ("idefics3", "smolvlm"), VisionProjectorType.IDEFICS3, ("model.vision_model.", "model.connector."),
    "model.vision_model.encoder.layers",
    {
        **_siglip("model.vision_model"),
        "model.connector.modality_projection.proj": _place(T.V_MMPROJ_FC, False),
    },
    _SIGLIP_BLOCK,
    (*_SIZES, _EPS, _USE_GELU,
     TowerKey(V.Projector.SCALE_FACTOR, lambda config: config.model("scale_factor")),
     TowerKey(V.PREPROC_IMAGE_SIZE, _longest_edge)),
    fixed={**_TANH_GELU, "num_channels": (3,)},
)  # fmt: skip

# --- Pixtral, and Mistral Small 3.1 and later -----------------------------------------------------------------------

IMG_BREAK = "[IMG_BREAK]"


def _img_break(config: TowerConfig) -> dict[str, TowerPlace]:
    """The tower puts the embedding of this token behind each row of patches."""
    place = _place(T.V_TOK_EMBD_IMG_BREAK, False, L.TOKEN, number=config.token_id(IMG_BREAK), plain=True)
    return {"language_model.model.embed_tokens": place}


def _pixtral_facts(config: TowerConfig) -> Iterable[tuple[str, Any, Any]]:
    yield "vision_feature_layer", config.model("vision_feature_layer"), -1
    yield "projector_hidden_act", config.model("projector_hidden_act"), "gelu"
    head = config.vision("hidden_size") // config.vision("num_attention_heads")
    yield "head_dim of vision_config", config.vision("head_dim") or head, head
    yield from _rotary_base(config)


_PIXTRAL = Tower(
    ("llava",), VisionProjectorType.PIXTRAL, ("vision_tower.", "multi_modal_projector."),
    "vision_tower.transformer.layers",
    {
        "vision_tower.patch_conv": _place(T.V_ENC_EMBD_PATCH, False),
        "vision_tower.ln_pre": _place(T.V_PRE_NORM, False),
        "multi_modal_projector.linear_1": _place(T.V_MMPROJ, None, number=1),
        "multi_modal_projector.linear_2": _place(T.V_MMPROJ, None, number=2),
    },
    {
        "attention_norm": _place(T.V_ENC_INPUT_NORM, False),
        "attention.q_proj": _place(T.V_ENC_ATTN_Q, False, L.ROTARY),
        "attention.k_proj": _place(T.V_ENC_ATTN_K, False, L.ROTARY),
        "attention.v_proj": _place(T.V_ENC_ATTN_V, False),
        "attention.o_proj": _place(T.V_ENC_ATTN_O, False),
        "ffn_norm": _place(T.V_ENC_POST_ATTN_NORM, False),
        "feed_forward.gate_proj": _place(T.V_ENC_FFN_GATE, False),
        "feed_forward.up_proj": _place(T.V_ENC_FFN_UP, False),
        "feed_forward.down_proj": _place(T.V_ENC_FFN_DOWN, False),
    },
    (
        *_SIZES,
        TowerKey(V.Attention.LAYERNORM_EPS, lambda config: 1e-5, FLOAT),  # a constant of transformers' class
        TowerKey(V.USE_SILU, lambda config: True if config.vision("hidden_act") == "silu" else None, BOOL),
        TowerKey(V.USE_GELU, lambda config: None if config.vision("hidden_act") == "silu" else True, BOOL),
        TowerKey(V.SPATIAL_MERGE_SIZE, lambda config: config.model("spatial_merge_size")),
    ),
    vision_type="pixtral", fixed={"hidden_act": ("silu", "gelu"), "num_channels": (3,)}, implied=_pixtral_facts,
    extra=_img_break, note=_PROJECTOR_GELU,
)  # fmt: skip
_MISTRAL3 = replace(
    _PIXTRAL, model_types=("mistral3",),
    outside=_PIXTRAL.outside | {
        "multi_modal_projector.norm": _place(T.V_MM_INP_NORM, False),
        "multi_modal_projector.patch_merger.merging_layer": _place(T.V_MM_PATCH_MERGER, False),
    },
)  # fmt: skip

# LLaVA's CLIP tower has no row, though llama.cpp has a projector "mlp": clip_graph_llava puts the class embedding
# behind the patches, and takes the patches from the second on, as if it stood before them.

# Where llama.cpp takes down for up if it has as many columns as the tower is wide, since old files have them swapped.
SWAPPED_IF_SQUARE = (
    VisionProjectorType.QWEN2VL, VisionProjectorType.QWEN25VL, VisionProjectorType.GEMMA3, VisionProjectorType.IDEFICS3
)  # fmt: skip

TOWERS = (_QWEN2_VL, _QWEN2_5_VL, _QWEN3_VL, _GEMMA3, _IDEFICS3, _PIXTRAL, _MISTRAL3)


def tower_of(config: dict[str, Any]) -> Tower | None:
    """The row of a config.json; None where there is none."""
    vision = config.get("vision_config")
    vision_type = vision.get("model_type") if isinstance(vision, dict) else None
    for tower in TOWERS:
        known = (
            tower.vision_type is None
            or vision_type == tower.vision_type
            or (vision_type is None and tower.vision_type != "pixtral")
        )  # without one, transformers takes LLaVA's for CLIP
        if config.get("model_type") in tower.model_types and known:
            return tower
    return None


def require_tower(config: dict[str, Any], where: str) -> Tower:
    """The row of a config.json; ArchitectureError says why there is none."""
    found, model_type = tower_of(config), str(config.get("model_type"))[:80]
    thinker = config.get("thinker_config")
    parts = thinker if isinstance(thinker, dict) else config
    if found is not None:
        return found
    if parts.get("audio_config") or parts.get("audio_encoder"):
        raise ArchitectureError(
            f"{where}: {model_type} has an audio tower, and lowbit writes vision towers only",
            "llama.cpp's convert_hf_to_gguf.py --mmproj writes it where llama.cpp knows the model",
        )
    if not parts.get("vision_config"):
        raise ArchitectureError(
            f"{where}: {model_type} has no vision tower, so that there is nothing for an mmproj file",
            "leave --mmproj out to write the language model",
        )
    vision = parts["vision_config"]
    kind = vision.get("model_type") if isinstance(vision, dict) else None
    shown = f"{model_type} ({str(kind)[:80]})" if kind else model_type
    raise ArchitectureError(
        f"{where}: the vision tower of {shown} has no place in GGUF that lowbit knows",
        f"it writes those of {', '.join(sorted({name for tower in TOWERS for name in tower.model_types}))}",
    )
