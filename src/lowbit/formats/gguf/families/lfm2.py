"""LFM2: blocks of a short convolution or of attention; the later ones with experts in its second variant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gguf.constants import MODEL_TENSOR as T
from gguf.constants import GGUFValueType

from lowbit.formats.gguf.families.common import (
    FLOAT,
    KV_HEADS,
    LENGTHS,
    expert_keys,
    expert_places,
    head_dim_is_width_over_heads,
)
from lowbit.formats.gguf.families.mamba import CONV
from lowbit.formats.gguf.keys import per_block
from lowbit.formats.gguf.layout import Lookup
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope, grouped

_SIGMOID = 2  # of llama.cpp's gating functions
_MIXERS = {
    "operator_norm": Place(T.ATTN_NORM),
    **grouped("convolution", {
        "conv.in_proj": Place(T.SHORTCONV_INPROJ),
        "conv.conv": Place(T.SHORTCONV_CONV, CONV),
        "conv.out_proj": Place(T.SHORTCONV_OUTPROJ),
    }),
    **grouped("attention", {
        "self_attn.q_proj": Place(T.ATTN_Q), "self_attn.k_proj": Place(T.ATTN_K), "self_attn.v_proj": Place(T.ATTN_V),
        "self_attn.q_layernorm": Place(T.ATTN_Q_NORM), "self_attn.k_layernorm": Place(T.ATTN_K_NORM),
        "self_attn.out_proj": Place(T.ATTN_OUT),
    }),
    "ffn_norm": Place(T.FFN_NORM),
}  # fmt: skip
_MLP = {
    "feed_forward.w1": Place(T.FFN_GATE),
    "feed_forward.w3": Place(T.FFN_UP),
    "feed_forward.w2": Place(T.FFN_DOWN),
}


def _kv_heads(get: Lookup) -> list[int]:
    return [get("num_key_value_heads") * (kind == "full_attention") for kind in get("layer_types")]


def _width(get: Lookup) -> int:
    """Of an MLP: two thirds of intermediate_size, times a factor, rounded up, or intermediate_size itself."""
    width, multiple = get("intermediate_size"), get("block_multiple_of")
    if not get("block_auto_adjust_ff_dim"):
        return width
    width = int(2 * width / 3)
    if get("block_ffn_dim_multiplier") is not None:
        width = int(get("block_ffn_dim_multiplier") * width)
    return multiple * ((width + multiple - 1) // multiple)


def _blocks_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    heads = per_block(metadata, KV_HEADS)
    kinds = ["full_attention" if count else "conv" for count in heads]
    return {"layer_types": kinds, "num_key_value_heads": max(heads)}


def _of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    width = per_block(metadata, "feed_forward_length")[0]
    return _blocks_of_file(metadata) | {"intermediate_size": width, "block_auto_adjust_ff_dim": False}


_KEYS = (
    *LENGTHS[:3],
    *LENGTHS[4:],
    Key(KV_HEADS, value=_kv_heads),
    Key("attention.layer_norm_rms_epsilon", "norm_eps", FLOAT),
    Key("shortconv.l_cache", "conv_L_cache"),
)
_LFM2 = GGUFArchitecture(
    "lfm2", "Lfm2ForCausalLM", "lfm2", "model.layers",
    {"model.embed_tokens": Place(T.TOKEN_EMBD), "model.embedding_norm": Place(T.TOKEN_EMBD_NORM),
     "lm_head": Place(T.OUTPUT)},
    {**_MIXERS, **_MLP}, (*_KEYS, Key("feed_forward_length", value=_width)),
    biases={frozenset(): {"conv_bias": False}}, implied=head_dim_is_width_over_heads, rope=Rope(), from_file=_of_file,
)  # fmt: skip
_LFM2_MOE = replace(
    _LFM2, model_type="lfm2_moe", model_class="Lfm2MoeForCausalLM", arch="lfm2moe",
    inside={
        **_MIXERS, **grouped("mlp", _MLP),
        **grouped("experts", {
            **expert_places("feed_forward", "gate", ("w1", "w3", "w2")),
            "feed_forward.expert_bias": Place(T.FFN_EXP_PROBS_B, bare=True, ending="bias"),
        }),
    },
    keys=(*_KEYS, LENGTHS[3], *expert_keys("num_experts"),
          Key("leading_dense_block_count", "num_dense_layers", default=0, zero=True),
          Key("expert_gating_func", value=lambda get: _SIGMOID, kind=GGUFValueType.UINT32)),
    fixed={"routed_scaling_factor": (1.0,), "norm_topk_prob": (True,), "use_expert_bias": (True,)},
    from_file=_blocks_of_file,
)  # fmt: skip

ROWS = (_LFM2, _LFM2_MOE)
