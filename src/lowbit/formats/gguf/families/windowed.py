"""Decoders with experts whose blocks differ in what they attend to: sliding windows in some, everything in others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    BOOL,
    FLOAT,
    GATE_UP_DOWN,
    HEAD_DIM,
    KEYS,
    KV_HEADS,
    LENGTHS,
    MLP_NORM,
    NO_ATTENTION_BIAS,
    OUTSIDE,
    QK_NORM,
    SILU,
    expert_keys,
    expert_places,
)
from lowbit.formats.gguf.families.routing import (
    ATTENTION,
    CORRECTION,
    DENSE_BLOCKS,
    EXPERT_BLOCKS,
    GROUPS,
    LEADING_DENSE_TYPES,
    QKV_BIASES,
    SIGMOID,
    SOFTMAX,
    WEIGHTS,
    dense_blocks_first,
    gating,
    mlp_types_of_file,
    shared_places,
)
from lowbit.formats.gguf.layout import Lookup
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope, grouped

# --- EXAONE, AFMoE, MiMo --------------------------------------------------------------------------------------------


def _exaone_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    types = mlp_types_of_file("exaone-moe", metadata)
    return types | {"first_k_dense_replace": types["mlp_layer_types"].count("dense")}


def _rotates_sliding_blocks_only(get: Lookup) -> dict[str, Any]:
    windows = {} if get("sliding_window") else {"layer_types": ["sliding_attention"] * get("num_hidden_layers")}
    return dense_blocks_first(get) | windows


_EXAONE_MOE = GGUFArchitecture(
    "exaone_moe", "ExaoneMoeForCausalLM", "exaone-moe", "model.layers", OUTSIDE,
    {
        **ATTENTION, **QK_NORM, **MLP_NORM, **DENSE_BLOCKS,
        **grouped("experts", {**EXPERT_BLOCKS, "mlp.e_score_correction_bias": CORRECTION}),
    },
    (*KEYS, *expert_keys("num_experts"), Key("expert_shared_count", "num_shared_experts"),
     Key("expert_shared_feed_forward_length",
         value=lambda get: get("num_shared_experts") * get("moe_intermediate_size")),
     *WEIGHTS, *GROUPS, LEADING_DENSE_TYPES, gating(SIGMOID)),
    fixed=SILU, implied=_rotates_sliding_blocks_only, rope=Rope(("default", "llama3")), window_period=4,
    needs_output=True, from_file=_exaone_of_file,
)  # fmt: skip


def _every_fourth_attends_to_everything(get: Lookup) -> dict[str, Any]:
    blocks = range(get("num_hidden_layers"))
    return {"layer_types": ["sliding_attention" if (block + 1) % 4 else "full_attention" for block in blocks]}


_AFMOE = GGUFArchitecture(
    "afmoe", "AfmoeForCausalLM", "afmoe", "model.layers", OUTSIDE,
    {
        **ATTENTION, **QK_NORM,
        "self_attn.gate_proj": Place(T.ATTN_GATE),
        "post_attention_layernorm": Place(T.ATTN_POST_NORM),
        "pre_mlp_layernorm": Place(T.FFN_PRE_NORM),
        **DENSE_BLOCKS,
        **grouped("experts", {
            **expert_places("mlp", "router.gate", GATE_UP_DOWN), **shared_places("mlp.shared_experts"),
            "mlp.expert_bias": CORRECTION,
        }),
        "post_mlp_layernorm": Place(T.FFN_POST_NORM),
    },
    (*KEYS, *expert_keys("num_experts"), Key("expert_shared_count", "num_shared_experts"),
     Key("expert_weights_scale", "route_scale", FLOAT, default=1.0),
     Key("expert_weights_norm", kind=BOOL, value=lambda get: True),
     Key("leading_dense_block_count", "num_dense_layers", default=0, zero=True), gating(SIGMOID)),
    biases=NO_ATTENTION_BIAS, fixed=SILU | {"mup_enabled": (True,)}, implied=_every_fourth_attends_to_everything,
    window_period=4,
)  # fmt: skip


def _keys_of_mimo(get: Lookup) -> list[int]:
    heads = get("num_key_value_heads")
    return [heads * (1 + (kind == "sliding_attention")) for kind in get("layer_types")]


def _mimo_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    heads, slides = (metadata.get(f"mimo2.{key}") for key in (KV_HEADS, "attention.sliding_window_pattern"))
    found = mlp_types_of_file("mimo2", metadata)
    if isinstance(heads, np.ndarray) and isinstance(slides, np.ndarray) and len(heads) == len(slides):
        found["num_key_value_heads"] = int(heads[0]) // (1 + int(slides[0]))
    return found


_MIMO_V2_FLASH = GGUFArchitecture(
    "mimo_v2_flash", "MiMoV2FlashForCausalLM", "mimo2", "model.layers", OUTSIDE,
    {
        **ATTENTION,
        "self_attn.attention_sink_bias": Place(T.ATTN_SINKS, bare=True, optional=True),
        **MLP_NORM, **DENSE_BLOCKS,
        **grouped("experts", {
            **expert_places("mlp", "gate", GATE_UP_DOWN), "mlp.gate.e_score_correction_bias": CORRECTION}),
    },
    (*LENGTHS, Key(KV_HEADS, value=_keys_of_mimo), Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", FLOAT),
     HEAD_DIM[0], Key("attention.value_length", "v_head_dim"),
     Key("attention.value_scale", "attention_value_scale", FLOAT, default=1.0),
     *expert_keys("n_routed_experts"), *GROUPS, LEADING_DENSE_TYPES, gating(SIGMOID)),
    biases=QKV_BIASES, fixed=SILU | {"routed_scaling_factor": (1.0,), "norm_topk_prob": (True,)},
    implied=dense_blocks_first, rope=Rope(("default",), partial=True, local=True), window_period=1,
    needs_output=True, from_file=_mimo_of_file,
)  # fmt: skip

# --- Laguna, Cohere -------------------------------------------------------------------------------------------------


def _laguna_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    heads = metadata.get("laguna.attention.head_count")
    found = mlp_types_of_file("laguna", metadata)
    if isinstance(heads, np.ndarray) and len(heads):
        found |= {"num_attention_heads": int(heads[0]), "num_attention_heads_per_layer": [int(each) for each in heads]}
    return found


_LAGUNA = GGUFArchitecture(
    "laguna", "LagunaForCausalLM", "laguna", "model.layers", OUTSIDE,
    {
        **ATTENTION, **QK_NORM, "self_attn.g_proj": Place(T.ATTN_GATE), **MLP_NORM, **DENSE_BLOCKS,
        **grouped("experts", {
            **expert_places("mlp", "gate", GATE_UP_DOWN), **shared_places("mlp.shared_expert"),
            "mlp.experts.e_score_correction_bias": CORRECTION,
        }),
    },
    (*LENGTHS[:-1], Key("attention.head_count", value=lambda get: get("num_attention_heads_per_layer")), *KEYS[5:],
     *expert_keys("num_experts"), Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
     Key("expert_weights_scale", "moe_routed_scaling_factor", FLOAT, default=1.0),
     Key("expert_weights_norm", kind=BOOL, value=lambda get: True), LEADING_DENSE_TYPES, gating(SIGMOID)),
    biases=NO_ATTENTION_BIAS,
    fixed=SILU | {"gating": (True, "per-head"), "moe_router_logit_softcapping": (0.0,)},
    implied=dense_blocks_first, rope=Rope(("default", "yarn"), partial=True, local=True, local_partial=True),
    window_period=1, from_file=_laguna_of_file,
)  # fmt: skip


def _rotates_dense_blocks(get: Lookup) -> dict[str, Any]:
    dense = "dense" in (get("mlp_layer_types") or [])
    return dense_blocks_first(get) | ({"prefix_dense_sliding_window_pattern": 1} if dense else {})


def _cohere_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    softmax = metadata.get("cohere2moe.expert_gating_func", SIGMOID) == SOFTMAX
    return mlp_types_of_file("cohere2moe", metadata) | {
        "expert_selection_fn": "softmax" if softmax else "sigmoid",
        "norm_topk_prob": metadata.get("cohere2moe.expert_weights_norm", False),
    }


_COHERE2_MOE = GGUFArchitecture(
    "cohere2_moe", "Cohere2MoeForCausalLM", "cohere2moe", "model.layers", OUTSIDE,
    {
        # rotary pairs are neighbours in Hugging Face too
        **ATTENTION, **DENSE_BLOCKS,
        **grouped("experts", {
            **expert_places("mlp", "gate", GATE_UP_DOWN),
            **{path: replace(place, optional=True) for path, place in shared_places("mlp.shared_experts").items()},
        }),
    },
    (*(key for key in KEYS if key.name not in ("feed_forward_length", "attention.layer_norm_rms_epsilon")),
     Key("feed_forward_length", "prefix_dense_intermediate_size", otherwise=lambda get: get("intermediate_size")),
     Key("attention.layer_norm_epsilon", "layer_norm_eps", FLOAT, optional=True),
     Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", FLOAT, optional=True),
     Key("logit_scale", "logit_scale", FLOAT),
     Key("expert_count", "num_experts"), Key("expert_used_count", "num_experts_per_tok"),
     Key("expert_feed_forward_length", "intermediate_size"),
     Key("expert_shared_count", "num_shared_experts", default=0, zero=True),
     Key("expert_shared_feed_forward_length",
         value=lambda get: get("num_shared_experts") * get("intermediate_size")),
     Key("expert_gating_func", value=lambda get: SOFTMAX if get("expert_selection_fn") == "softmax" else SIGMOID),
     # softmax is over the chosen experts, which normalises
     Key("expert_weights_norm", kind=BOOL,
         value=lambda get: get("expert_selection_fn") == "softmax" or bool(get("norm_topk_prob"))),
     LEADING_DENSE_TYPES),
    biases=NO_ATTENTION_BIAS, fixed=SILU | {"shared_expert_combination_strategy": ("average",)},
    implied=_rotates_dense_blocks, rope=Rope(("default",)), window_period=1, from_file=_cohere_of_file,
)  # fmt: skip


ROWS = (_EXAONE_MOE, _AFMOE, _MIMO_V2_FLASH, _LAGUNA, _COHERE2_MOE)
