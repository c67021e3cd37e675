"""Gemma 4: sliding blocks and blocks that attend to everything, whose heads differ in size, embeddings for every block,
keys and values that later blocks share, and experts beside the MLP.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    BOOL,
    FLOAT,
    KV_HEADS,
    LENGTHS,
    MLP,
    NO_ATTENTION_BIAS,
    O_PROJ,
    OUTSIDE,
)
from lowbit.formats.gguf.keys import FULL, PATTERN, SLIDING, per_block, shortest
from lowbit.formats.gguf.layout import Lookup
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope, grouped


def _block(get: Lookup, kind: str) -> Any:
    """The config of the first block of a kind; of any, where there is none of that kind (the last is always full)."""
    kinds = get("layer_types")
    return get("per_layer_config")[kinds.index(kind) if kind in kinds else 0]


def _slides(get: Lookup) -> list[bool]:
    return [kind == SLIDING for kind in get("layer_types")]


def _kv_heads(get: Lookup) -> int | list[int]:
    sliding, full = (_block(get, kind).num_key_value_heads for kind in (SLIDING, FULL))
    return sliding if sliding == full else [sliding if slides else full for slides in _slides(get)]


def _mlp_width(get: Lookup) -> int | list[int]:
    """Blocks that share keys and values may have an MLP twice as wide."""
    width, blocks, shared = get("intermediate_size"), get("num_hidden_layers"), get("num_kv_shared_layers")
    wide = shared if get("use_double_wide_mlp") else 0
    return [width] * (blocks - wide) + [2 * width] * wide if wide else width


def _sharing(get: Lookup) -> dict[str, Any]:
    """llama.cpp takes keys and values of the block before the first that shares them, or of the one before that where
    the block slides."""
    kinds, shared = get("layer_types"), get("num_kv_shared_layers")
    before = kinds[: len(kinds) - shared][-2:]
    return {} if not shared or before == [SLIDING, FULL] else {"num_kv_shared_layers": 0}


def _of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    heads, slides = per_block(metadata, KV_HEADS), per_block(metadata, PATTERN)
    widths = per_block(metadata, "feed_forward_length")
    full, shared = per_block(metadata, "attention.key_length")[0], metadata.get("gemma4.attention.shared_kv_layers", 0)
    cap = metadata.get("gemma4.final_logit_softcapping", 30.0)
    if type(cap) is not float or not 0 <= cap < 1e6:
        raise ValueError(f"gemma4.final_logit_softcapping is {str(cap)[:80]}")
    if all(slides) or type(shared) is not int or not 0 <= shared < len(heads):
        raise ValueError(f"gemma4.{PATTERN} is {slides}, with {str(shared)[:80]} blocks that share keys and values")
    return {
        "layer_types": [SLIDING if each else FULL for each in slides],
        "num_key_value_heads": next((count for count, each in zip(heads, slides, strict=True) if each), heads[0]),
        "head_dim": per_block(metadata, "attention.key_length_swa")[0],
        "per_layer_config": {
            block: {"head_dim": full, "num_key_value_heads": count}
            for block, (count, each) in enumerate(zip(heads, slides, strict=True)) if not each
        },
        "intermediate_size": widths[0], "use_double_wide_mlp": widths[-1] != widths[0],
        "num_kv_shared_layers": shared, "final_logit_softcapping": shortest(cap) if cap else None,
        "vocab_size_per_layer_input": len(metadata.get("tokenizer.ggml.tokens", ())),
        "hidden_size_per_layer_input": metadata.get("gemma4.embedding_length_per_layer_input", 0),
    }  # fmt: skip


def _of_names(names: Collection[str]) -> dict[str, Any]:
    """Blocks that attend to everything may use their keys as values."""
    with_keys = [name for name in names if name.endswith(".attn_k.weight")]
    alike = any(name.replace("attn_k", "attn_v") not in names for name in with_keys)
    return {"attention_k_eq_v": alike}


_PER_BLOCK = {
    "per_layer_input_gate": Place(T.PER_LAYER_INP_GATE),
    "per_layer_projection": Place(T.PER_LAYER_PROJ),
    "post_per_layer_input_norm": Place(T.PER_LAYER_POST_NORM),
}
_BLOCK = {
    "input_layernorm": Place(T.ATTN_NORM),
    "self_attn.q_proj": Place(T.ATTN_Q),
    **grouped("keys", {"self_attn.k_proj": Place(T.ATTN_K), "self_attn.k_norm": Place(T.ATTN_K_NORM)}),
    "self_attn.v_proj": Place(T.ATTN_V, optional=True),
    **O_PROJ,
    "self_attn.q_norm": Place(T.ATTN_Q_NORM),
    "post_attention_layernorm": Place(T.ATTN_POST_NORM),
    "layer_scalar": Place(T.LAYER_OUT_SCALE, bare=True, optional=True),
    "pre_feedforward_layernorm": Place(T.FFN_PRE_NORM),
    **MLP,
    "post_feedforward_layernorm": Place(T.FFN_POST_NORM),
    **grouped("embedding per block", _PER_BLOCK),
}
_KEYS = (
    *LENGTHS[:3],
    *LENGTHS[4:],
    Key("feed_forward_length", value=_mlp_width),
    Key(KV_HEADS, value=_kv_heads),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", FLOAT),
    Key("attention.key_length", value=lambda get: _block(get, FULL).head_dim),
    Key("attention.value_length", value=lambda get: _block(get, FULL).head_dim),
    Key("attention.key_length_swa", value=lambda get: _block(get, SLIDING).head_dim),
    Key("attention.value_length_swa", value=lambda get: _block(get, SLIDING).head_dim),
    Key("rope.dimension_count_swa", value=lambda get: _block(get, SLIDING).head_dim),
    Key("attention.shared_kv_layers", value=lambda get: get("num_kv_shared_layers")),
    Key("embedding_length_per_layer_input", value=lambda get: get("hidden_size_per_layer_input") or 0),
    Key(PATTERN, value=_slides, kind=BOOL),
    # llama.cpp takes 30 where the file has none
    Key("final_logit_softcapping", value=lambda get: get("final_logit_softcapping") or 0.0, kind=FLOAT),
)
_GEMMA4_TEXT = GGUFArchitecture(
    "gemma4_text", "Gemma4ForCausalLM", "gemma4", "model.layers",
    {
        **OUTSIDE,
        "model.embed_tokens_per_layer": Place(T.PER_LAYER_TOKEN_EMBD, optional=True),
        "model.per_layer_model_projection": Place(T.PER_LAYER_MODEL_PROJ, optional=True),
        "model.per_layer_projection_norm": Place(T.PER_LAYER_PROJ_NORM, optional=True),
    },
    _BLOCK, _KEYS, biases=NO_ATTENTION_BIAS,
    fixed={"hidden_activation": ("gelu_pytorch_tanh", "gelu_new"), "use_bidirectional_attention": (None, "vision"),
           "enable_moe_block": (False,)},
    implied=_sharing, rope=Rope(("proportional",), local=True, dim=lambda get: _block(get, FULL).head_dim),
    window_period=6, window_default=512, when=lambda get: not get("enable_moe_block"), from_file=_of_file,
    from_names=_of_names, vocabulary="gemma4",
)  # fmt: skip
_GEMMA4_TEXT_EXPERTS = replace(
    _GEMMA4_TEXT,
    inside=_BLOCK | {
        "router.proj": Place(T.FFN_GATE_INP),
        "router.scale": Place(T.FFN_GATE_INP, bare=True, ending="scale"),
        "router.per_expert_scale": Place(T.FFN_DOWN_EXP, bare=True, ending="scale"),
        "experts.*.gate_proj": Place(T.FFN_GATE_EXP),
        "experts.*.up_proj": Place(T.FFN_UP_EXP),
        "experts.*.down_proj": Place(T.FFN_DOWN_EXP),
        "pre_feedforward_layernorm_2": Place(T.FFN_PRE_NORM_2),
        "post_feedforward_layernorm_1": Place(T.FFN_POST_NORM_1),
        "post_feedforward_layernorm_2": Place(T.FFN_POST_NORM_2),
    },
    keys=(*_KEYS, Key("expert_count", "num_experts"), Key("expert_used_count", "top_k_experts"),
          Key("expert_feed_forward_length", "moe_intermediate_size")),
    fixed=_GEMMA4_TEXT.fixed | {"enable_moe_block": (True,)}, when=lambda get: bool(get("enable_moe_block")),
)  # fmt: skip
_BESIDE = ("model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio.")


def _seeing(row: GGUFArchitecture) -> GGUFArchitecture:
    return row.around("gemma4", "Gemma4ForConditionalGeneration", "model.language_model.", "lm_head", _BESIDE)


ROWS = (_GEMMA4_TEXT, _GEMMA4_TEXT_EXPERTS, _seeing(_GEMMA4_TEXT), _seeing(_GEMMA4_TEXT_EXPERTS))
