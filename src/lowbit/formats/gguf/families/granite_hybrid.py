"""Granite 4 and Bamba: blocks of Mamba 2 or of attention, each with an MLP or experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    ATTENTION_KINDS,
    BOOL,
    FLOAT,
    GATE_UP_DOWN,
    KEYS,
    KV_HEADS,
    LENGTHS,
    LLAMA_ROPE,
    O_PROJ,
    OUTSIDE,
    PAIRED_QKV,
    PRE_NORM,
    SILU,
    expert_keys,
    expert_places,
    head_dim_is_width_over_heads,
)
from lowbit.formats.gguf.families.mamba import (
    CONV_BIAS,
    FINAL_LAYERNORM,
    NO_LIMIT,
    SSM_KEYS,
    head_width,
    mamba2_places,
)
from lowbit.formats.gguf.keys import per_block
from lowbit.formats.gguf.layout import Lookup, RowLayout, heads_of
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope, grouped


def _half(second: bool) -> RowLayout:
    """One half of the rows: the gate comes first, then up."""

    def rows(get: Lookup, count: int) -> np.ndarray:
        if count % 2:
            raise ValueError(f"{count} rows are no two halves")
        return np.arange(count // 2) + second * count // 2

    return RowLayout("second half" if second else "first half", rows=rows)


def _partly_rotary(key: str) -> RowLayout:
    """Rotary pairs in the part of a head that rotates; `key` of config.json counts the heads."""

    def rows(get: Lookup, count: int) -> np.ndarray:
        heads = heads_of(get, key)
        share = (get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
        if count % heads or int(count // heads * share) % 2:
            raise ValueError(f"{count} rows are not {heads} heads of rotary pairs")
        within = np.arange(count).reshape(heads, -1)
        rotated = int(within.shape[1] * share)
        pairs = within[:, :rotated].reshape(heads, 2, -1).transpose(0, 2, 1).reshape(heads, -1)
        return np.concatenate([pairs, within[:, rotated:]], axis=1).reshape(-1)

    return RowLayout("rotary pairs of a part", rows=rows)


# --- Granite 4, Bamba -----------------------------------------------------------------------------------------------


def _is_attention(get: Lookup) -> list[bool]:
    return [kind in ("attention", "full_attention") for kind in get("layer_types")]


def _kv_heads_of_attention(get: Lookup) -> list[int]:
    return [get("num_key_value_heads") * attends for attends in _is_attention(get)]


def _shared_halves(gate: T, up: T, down: T) -> dict[str, Place | tuple[Place, ...]]:
    return {
        "shared_mlp.input_linear": (Place(gate, _half(second=False)), Place(up, _half(second=True))),
        "shared_mlp.output_linear": Place(down),
    }


def _has_rope(get: Lookup) -> bool:
    return get("position_embedding_type") == "rope"


_CONTEXT = Key("context_length", value=lambda get: get("max_position_embeddings") if _has_rope(get) else 2**20)


def _granite_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    heads = per_block(metadata, KV_HEADS)
    rope = metadata.get("granitehybrid.rope.scaling.finetuned", True)
    return {
        "layer_types": ["full_attention" if count else "linear_attention" for count in heads],
        "num_key_value_heads": max(heads),
        "mamba_d_head": head_width(metadata), "position_embedding_type": "rope" if rope else None,
        "max_position_embeddings": per_block(metadata, "context_length")[0],
    }  # fmt: skip


_GRANITE_SCALES = (
    Key("attention.scale", "attention_multiplier", FLOAT),
    Key("embedding_scale", "embedding_multiplier", FLOAT, default=1.0),
    Key("residual_scale", "residual_multiplier", FLOAT, default=1.0),
    Key("logit_scale", "logits_scaling", FLOAT),
)
_GRANITE_BASE = (
    *LENGTHS[1:3],
    *LENGTHS[4:],
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", FLOAT),
    Key("rope.scaling.finetuned", value=_has_rope, kind=BOOL),
)
_KV_PER_BLOCK = Key(KV_HEADS, value=_kv_heads_of_attention)
_MLP_HALVES = _shared_halves(T.FFN_GATE, T.FFN_UP, T.FFN_DOWN)
_SHARED_HALVES = _shared_halves(T.FFN_GATE_SHEXP, T.FFN_UP_SHEXP, T.FFN_DOWN_SHEXP)
_HYBRID_BLOCK = {
    **PRE_NORM,
    **grouped("mamba", mamba2_places("mamba", "mamba_n_groups")),
    **grouped("attention", {**PAIRED_QKV, **O_PROJ}),
}
_GRANITE_NORM = {"post_attention_layernorm": Place(T.FFN_NORM)}
_GRANITE_EXPERTS = expert_places("block_sparse_moe", "router.layer", GATE_UP_DOWN)
_GRANITE_BIASES = {
    CONV_BIAS: {"mamba_conv_bias": True, "attention_bias": False},
    frozenset(): {"mamba_conv_bias": False, "attention_bias": False},
    CONV_BIAS | ATTENTION_KINDS: {"mamba_conv_bias": True, "attention_bias": True},
}
_GRANITE_FIXED = SILU | NO_LIMIT | {"mamba_proj_bias": (False,), "mamba_expand": (2,)}
_GRANITE_HYBRID = GGUFArchitecture(
    "granitemoehybrid", "GraniteMoeHybridForCausalLM", "granitehybrid", "model.layers", OUTSIDE,
    {**_HYBRID_BLOCK, **_GRANITE_NORM, **_MLP_HALVES},
    (_CONTEXT, Key("feed_forward_length", "shared_intermediate_size"), *_GRANITE_BASE, _KV_PER_BLOCK,
     *_GRANITE_SCALES, *SSM_KEYS),
    biases=_GRANITE_BIASES, fixed=_GRANITE_FIXED | {"num_local_experts": (0,)},
    implied=head_dim_is_width_over_heads, rope=Rope(),
    when=lambda get: not all(_is_attention(get)) and not get("num_local_experts"),
    from_file=_granite_of_file, of_file=lambda metadata: "granitehybrid.logit_scale" in metadata,
)  # fmt: skip
_GRANITE_HYBRID_EXPERTS = replace(
    _GRANITE_HYBRID,
    inside={**_HYBRID_BLOCK, **_GRANITE_NORM, **_GRANITE_EXPERTS, **grouped("shared", _SHARED_HALVES)},
    keys=(_CONTEXT, LENGTHS[3], *_GRANITE_BASE, _KV_PER_BLOCK,
          *_GRANITE_SCALES, *SSM_KEYS, *expert_keys("num_local_experts", None),
          Key("expert_shared_feed_forward_length", "shared_intermediate_size")),
    fixed=_GRANITE_FIXED, when=lambda get: not all(_is_attention(get)),
)  # fmt: skip
# Granite 4 without a state space is what llama.cpp calls granite, or granitemoe.
_GRANITE_ATTENTION = replace(
    _GRANITE_HYBRID, arch="granite", inside={**PRE_NORM, **PAIRED_QKV, **O_PROJ, **_GRANITE_NORM, **_MLP_HALVES},
    keys=(_CONTEXT, Key("feed_forward_length", "shared_intermediate_size"),
          *_GRANITE_BASE, KEYS[len(LENGTHS)], *_GRANITE_SCALES),
    biases={frozenset(): {}, ATTENTION_KINDS: {}}, fixed=SILU, rope=LLAMA_ROPE,
    when=lambda get: all(_is_attention(get)) and not get("num_local_experts"), read_back=False,
)  # fmt: skip
_GRANITE_ATTENTION_EXPERTS = replace(
    _GRANITE_ATTENTION, arch="granitemoe",
    inside={**PRE_NORM, **PAIRED_QKV, **O_PROJ, **_GRANITE_NORM, **_GRANITE_EXPERTS,
            **grouped("shared", _SHARED_HALVES)},
    keys=(_CONTEXT, LENGTHS[3], *_GRANITE_BASE, KEYS[len(LENGTHS)],
          *_GRANITE_SCALES, *expert_keys("num_local_experts", None),
          Key("expert_shared_feed_forward_length", "shared_intermediate_size")),
    when=lambda get: all(_is_attention(get)),
)  # fmt: skip


def _bamba_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    heads = per_block(metadata, KV_HEADS)
    return {
        "attn_layer_indices": [block for block, count in enumerate(heads) if count],
        "num_key_value_heads": max(heads), "mamba_d_head": head_width(metadata),
    }  # fmt: skip


_BAMBA = GGUFArchitecture(
    "bamba", "BambaForCausalLM", "granitehybrid", "model.layers",
    FINAL_LAYERNORM,
    {
        **PRE_NORM,
        **grouped("mamba", mamba2_places("mamba", "mamba_n_groups")),
        **grouped("attention", {
            "self_attn.q_proj": Place(T.ATTN_Q, _partly_rotary("num_attention_heads")),
            "self_attn.k_proj": Place(T.ATTN_K, _partly_rotary("num_key_value_heads")),
            "self_attn.v_proj": Place(T.ATTN_V), **O_PROJ,
        }),
        "pre_ff_layernorm": Place(T.FFN_NORM),
        "feed_forward.gate_proj": Place(T.FFN_GATE),
        "feed_forward.up_proj": Place(T.FFN_UP),
        "feed_forward.down_proj": Place(T.FFN_DOWN),
    },
    (*LENGTHS, Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", FLOAT),
     Key("rope.scaling.finetuned", value=lambda get: True, kind=BOOL), _KV_PER_BLOCK, *SSM_KEYS),
    biases=_GRANITE_BIASES, fixed=_GRANITE_FIXED | {"mlp_bias": (False,)}, implied=head_dim_is_width_over_heads,
    rope=Rope(partial=True), from_file=_bamba_of_file,
)  # fmt: skip

ROWS = (_GRANITE_HYBRID, _GRANITE_HYBRID_EXPERTS, _GRANITE_ATTENTION, _GRANITE_ATTENTION_EXPERTS, _BAMBA)
