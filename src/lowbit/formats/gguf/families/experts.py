"""Decoders with experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families import latent, windowed
from lowbit.formats.gguf.families.common import (
    BOOL,
    FLOAT,
    GATE_UP_DOWN,
    KEYS,
    LLAMA_ROPE,
    MLP_NORM,
    NO_ATTENTION_BIAS,
    O_PROJ,
    OUTSIDE,
    PAIRED_QKV,
    PRE_NORM,
    QK_NORM,
    SILU,
    expert_keys,
    expert_places,
)
from lowbit.formats.gguf.families.routing import (
    ATTENTION,
    CORRECTED_BLOCKS,
    CORRECTION,
    DENSE_BLOCKS,
    GROUPS,
    LEADING_DENSE,
    LEADING_DENSE_TYPES,
    QKV_BIASES,
    SHARED_COUNT,
    SIGMOID,
    WEIGHTS,
    dense_blocks_first,
    gating,
    mlp_types_of_file,
    shared_places,
)
from lowbit.formats.gguf.layout import Lookup, RowLayout
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope, grouped

PREDICTS_NOTHING = {"num_nextn_predict_layers": 0}

# --- GLM ------------------------------------------------------------------------------------------------------------

_GLM4_MOE = GGUFArchitecture(
    "glm4_moe", "Glm4MoeForCausalLM", "glm4moe", "model.layers", OUTSIDE,
    {
        **ATTENTION,
        "self_attn.q_norm": Place(T.ATTN_Q_NORM, optional=True, flag="use_qk_norm"),
        "self_attn.k_norm": Place(T.ATTN_K_NORM, optional=True, flag="use_qk_norm"),
        "post_attention_layernorm": Place(T.ATTN_POST_NORM),
        **DENSE_BLOCKS, **grouped("experts", CORRECTED_BLOCKS),
    },
    (*KEYS, *expert_keys("n_routed_experts"), SHARED_COUNT, *WEIGHTS, *GROUPS, LEADING_DENSE, gating(SIGMOID)),
    biases=QKV_BIASES, fixed=SILU, rope=Rope(partial=True), from_file=lambda metadata: PREDICTS_NOTHING,
)  # fmt: skip
_SOLAR_OPEN = replace(
    _GLM4_MOE, model_type="solar_open", model_class="SolarOpenForCausalLM",
    keys=(*(key for key in KEYS if key.name != "feed_forward_length"),
          Key("feed_forward_length", "intermediate_size", otherwise=lambda get: get("moe_intermediate_size")),
          *expert_keys("n_routed_experts"), SHARED_COUNT, *WEIGHTS, *GROUPS,
          Key("leading_dense_block_count", value=lambda get: 0), gating(SIGMOID)),
    read_back=False,
)  # fmt: skip

# --- dots, MiniMax, OLMoE, ERNIE -----------------------------------------------------------------------------------


def _a_key_for_each_query(get: Lookup) -> dict[str, Any]:
    """The loader expects k of the size of q."""
    return {"num_key_value_heads": get("num_attention_heads")}


_DOTS1 = GGUFArchitecture(
    "dots1", "Dots1ForCausalLM", "dots1", "model.layers", OUTSIDE,
    {**ATTENTION, **QK_NORM, **MLP_NORM, **DENSE_BLOCKS, **grouped("experts", CORRECTED_BLOCKS)},
    (*KEYS, *expert_keys("n_routed_experts"), SHARED_COUNT, *WEIGHTS, *GROUPS, LEADING_DENSE, gating(SIGMOID)),
    biases=NO_ATTENTION_BIAS, fixed=SILU, implied=_a_key_for_each_query, needs_output=True,
)  # fmt: skip
_MINIMAX_M2 = GGUFArchitecture(
    "minimax_m2", "MiniMaxM2ForCausalLM", "minimax-m2", "model.layers", OUTSIDE,
    {
        **ATTENTION, **QK_NORM, **MLP_NORM,
        **expert_places("block_sparse_moe", "gate", ("w1", "w3", "w2")),
        "block_sparse_moe.e_score_correction_bias": CORRECTION,
    },
    (*KEYS, *expert_keys("num_local_experts", "intermediate_size"), gating(SIGMOID)),
    fixed=SILU, rope=Rope(partial=True), needs_output=True,
)  # fmt: skip
_OLMOE = GGUFArchitecture(
    "olmoe", "OlmoeForCausalLM", "olmoe", "model.layers", OUTSIDE,
    {**ATTENTION, **QK_NORM, **MLP_NORM, **expert_places("mlp", "gate", GATE_UP_DOWN)},
    (*KEYS[:-2], *expert_keys("num_experts", None)),
    biases=NO_ATTENTION_BIAS, fixed=SILU | {"norm_topk_prob": (False,), "clip_qkv": (None,)},
    implied=_a_key_for_each_query, needs_output=True,
)  # fmt: skip
_ONE_GROUP = RowLayout(
    "one group of experts", shape=lambda get, shape: shape[1:], unshape=lambda get, shape: (1, *shape)
)


def _every_block_from_the_first(get: Lookup) -> dict[str, Any]:
    return {"moe_layer_end_index": get("num_hidden_layers") - 1}


_ERNIE4_5_MOE = GGUFArchitecture(
    "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "ernie4_5-moe", "model.layers", OUTSIDE,
    {
        # rotary pairs are neighbours in Hugging Face too
        **ATTENTION, **MLP_NORM, **DENSE_BLOCKS,
        **grouped("experts", {
            **expert_places("mlp", "gate", GATE_UP_DOWN),
            "mlp.moe_statics.e_score_correction_bias": Place(
                T.FFN_EXP_PROBS_B, _ONE_GROUP, bare=True, ending="bias"),
            **{path: replace(place, optional=True) for path, place in shared_places("mlp.shared_experts").items()},
        }),
    },
    (*KEYS, Key("expert_count", "moe_num_experts"), Key("expert_used_count", "moe_k"),
     Key("expert_feed_forward_length", "moe_intermediate_size"),
     Key("expert_shared_count", "moe_num_shared_experts", zero=True),
     Key("expert_shared_feed_forward_length",
         value=lambda get: get("moe_num_shared_experts") * get("moe_intermediate_size")),
     Key("interleave_moe_layer_step", "moe_layer_interval"),
     Key("leading_dense_block_count", "moe_layer_start_index", default=0, zero=True)),
    fixed=SILU | {"use_bias": (False,), "moe_layer_interval": (1,), "moe_norm_min": (1e-12,)},
    implied=_every_block_from_the_first,
)  # fmt: skip

# --- Granite --------------------------------------------------------------------------------------------------------


def _half(name: str, which: int) -> RowLayout:
    """The first or second half of the rows: gate or up of a fused pair."""

    def rows(get: Lookup, count: int) -> np.ndarray:
        if count % 2:
            raise ValueError(f"{count} rows are no pair of matrices")
        return np.arange(count // 2) + which * (count // 2)

    return RowLayout(name, rows=rows)


_GRANITE_BLOCK = {
    **PRE_NORM, **PAIRED_QKV, **O_PROJ, **MLP_NORM,
    "block_sparse_moe.router.layer": Place(T.FFN_GATE_INP),
    "block_sparse_moe.*.gate_proj": Place(T.FFN_GATE_EXP),
    "block_sparse_moe.*.up_proj": Place(T.FFN_UP_EXP),
    "block_sparse_moe.*.down_proj": Place(T.FFN_DOWN_EXP),
}  # fmt: skip
_GRANITEMOE = GGUFArchitecture(
    "granitemoe", "GraniteMoeForCausalLM", "granitemoe", "model.layers", OUTSIDE, _GRANITE_BLOCK,
    (*KEYS, *expert_keys("num_local_experts", None),
     Key("attention.scale", "attention_multiplier", FLOAT),
     Key("embedding_scale", "embedding_multiplier", FLOAT, default=1.0),
     Key("residual_scale", "residual_multiplier", FLOAT, default=1.0),
     Key("logit_scale", "logits_scaling", FLOAT)),
    biases=NO_ATTENTION_BIAS, fixed=SILU, rope=LLAMA_ROPE,
)  # fmt: skip
_GRANITEMOESHARED = replace(
    _GRANITEMOE, model_type="granitemoeshared", model_class="GraniteMoeSharedForCausalLM",
    inside={
        **_GRANITE_BLOCK,
        **grouped("shared", {
            "shared_mlp.input_linear": (
                Place(T.FFN_GATE_SHEXP, _half("gate", 0)), Place(T.FFN_UP_SHEXP, _half("up", 1))),
            "shared_mlp.output_linear": Place(T.FFN_DOWN_SHEXP),
        }),
    },
    keys=(*_GRANITEMOE.keys, Key("expert_shared_feed_forward_length", "shared_intermediate_size", zero=True)),
    of_file=lambda metadata: metadata.get("granitemoe.expert_shared_feed_forward_length", 0) > 0,
)  # fmt: skip

# What llama.cpp computes otherwise than transformers, or what lowbit cannot take apart.
REFUSED = {
    "phimoe": "llama.cpp weighs the two experts of a token by softmax, transformers' SparseMixer weighs each alone: "
    "for random scores their weights sum to 1.95 of 2, not to 1",
    "dbrx": "lowbit does not take its fused experts apart",
    "flex_olmo": "llama.cpp has no architecture with experts and norms behind attention and MLP",
    "jetmoe": "llama.cpp has no architecture with experts of attention",
    "aria_text": "llama.cpp has no architecture for it",
    "longcat_flash": "llama.cpp has no architecture for it",
    "doge": "llama.cpp has no architecture for it",
    "bailing_moe": "it is computed by Python code beside its files, and lowbit has no row for llama.cpp's bailingmoe",
    "bailing_hybrid": "lowbit has no row for its linear attention beside latent attention",
}

# --- Hunyuan --------------------------------------------------------------------------------------------------------


def _hunyuan_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    return mlp_types_of_file("hy_v3", metadata) | PREDICTS_NOTHING


def _one_choice(get: Lookup) -> int:
    """Of config.json's moe_topk: a number, or one for each block."""
    choices = get("moe_topk")
    return choices if type(choices) is int else choices[0]


def _the_same_choice_everywhere(get: Lookup) -> dict[str, Any]:
    choices = get("moe_topk")
    return {} if type(choices) is int else {"moe_topk": [choices[0]] * get("num_hidden_layers")}


_HUNYUAN_V1_MOE = GGUFArchitecture(
    "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", "hunyuan-moe", "model.layers", OUTSIDE,
    {
        **ATTENTION,
        "self_attn.query_layernorm": Place(T.ATTN_Q_NORM),
        "self_attn.key_layernorm": Place(T.ATTN_K_NORM),
        **MLP_NORM, **expert_places("mlp", "gate.wg", GATE_UP_DOWN), **shared_places("mlp.shared_mlp"),
    },
    (*KEYS, Key("expert_count", "num_experts"), Key("expert_used_count", value=_one_choice),
     Key("expert_shared_count", value=lambda get: 1), Key("expert_feed_forward_length", "intermediate_size"),
     Key("expert_shared_feed_forward_length", "intermediate_size")),
    biases=NO_ATTENTION_BIAS, fixed=SILU, implied=_the_same_choice_everywhere, rope=Rope(alpha=True),
    from_file=lambda metadata: {"moe_topk": metadata.get("hunyuan-moe.expert_used_count")},
)  # fmt: skip
_HY_V3 = GGUFArchitecture(
    "hy_v3", "HYV3ForCausalLM", "hy_v3", "model.layers", OUTSIDE,
    {
        **ATTENTION, **QK_NORM, **MLP_NORM, **DENSE_BLOCKS,
        **grouped("experts", {
            **expert_places("mlp", "router.gate", GATE_UP_DOWN), **shared_places("mlp.shared_mlp"),
            "mlp.expert_bias": replace(CORRECTION, ending=""),
        }),
    },
    (*KEYS, *expert_keys("num_experts"), Key("expert_shared_count", "num_shared_experts", default=1),
     Key("expert_shared_feed_forward_length",
         value=lambda get: get("num_shared_experts") * get("moe_intermediate_size")),
     Key("expert_weights_scale", "router_scaling_factor", FLOAT, default=1.0),
     Key("expert_weights_norm", kind=BOOL, value=lambda get: True), LEADING_DENSE_TYPES, gating(SIGMOID)),
    biases=NO_ATTENTION_BIAS, fixed=SILU | {"mlp_bias": (False,)}, implied=dense_blocks_first,
    from_file=_hunyuan_of_file,
)  # fmt: skip

# --- Llama 4 --------------------------------------------------------------------------------------------------------


def _llama4(get: Lookup) -> dict[str, Any]:
    blocks, step = get("num_hidden_layers"), get("interleave_moe_layer_step")
    rotates = [int((block + 1) % 4 != 0) for block in range(blocks)]
    return {
        "no_rope_layers": rotates,
        "layer_types": ["chunked_attention" if each else "full_attention" for each in rotates],
        "moe_layers": list(range(step - 1, blocks, step)),
        "use_qk_norm": get("num_local_experts") != 128,
    }


_LLAMA4_TEXT = GGUFArchitecture(
    "llama4_text", "Llama4ForCausalLM", "llama4", "model.layers", OUTSIDE,
    {
        # rotary pairs are neighbours in Hugging Face too
        **ATTENTION, **MLP_NORM,
        **grouped("dense", {
            "feed_forward.gate_proj": Place(T.FFN_GATE),
            "feed_forward.up_proj": Place(T.FFN_UP),
            "feed_forward.down_proj": Place(T.FFN_DOWN),
        }),
        **grouped("experts", {
            **expert_places("feed_forward", "router", GATE_UP_DOWN), **shared_places("feed_forward.shared_expert"),
        }),
    },
    (*(key for key in KEYS if key.name != "feed_forward_length"),
     Key("feed_forward_length", "intermediate_size_mlp"), *expert_keys("num_local_experts", "intermediate_size"),
     Key("interleave_moe_layer_step", "interleave_moe_layer_step")),
    biases=NO_ATTENTION_BIAS,
    fixed=SILU | {
        "attention_chunk_size": (8192,), "floor_scale": (8192,), "attn_scale": (0.1,),
        "attn_temperature_tuning": (True,),
    },
    implied=_llama4, rope=Rope(("default", "llama3")),
)  # fmt: skip
_LLAMA4 = replace(
    _LLAMA4_TEXT, model_type="llama4", model_class="Llama4ForConditionalGeneration",
    blocks="language_model.model.layers",
    outside={f"language_model.{name}": place for name, place in OUTSIDE.items()},
    read_back=False, left_out=("vision_model.", "multi_modal_projector."),
)  # fmt: skip

ROWS: tuple[GGUFArchitecture, ...] = (
    *latent.ROWS, _GLM4_MOE, _SOLAR_OPEN, _DOTS1, _MINIMAX_M2, _OLMOE, _ERNIE4_5_MOE, _GRANITEMOESHARED, _GRANITEMOE,
    _HUNYUAN_V1_MOE, _HY_V3, _LLAMA4_TEXT, _LLAMA4, *windowed.ROWS,
)  # fmt: skip
