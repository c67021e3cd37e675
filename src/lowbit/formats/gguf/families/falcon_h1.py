"""Falcon-H1: Mamba 2 and attention side by side in each block.

llama.cpp knows none of its multipliers: weights are stored multiplied by them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    KEYS,
    PRE_NORM,
    SILU,
)
from lowbit.formats.gguf.families.mamba import (
    CONV_BIAS,
    NO_LIMIT,
    SSM_KEYS,
    head_width,
    in_groups,
    mamba2_places,
)
from lowbit.formats.gguf.layout import Lookup, RowLayout
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place


def _times(*keys: str) -> RowLayout:
    """Rows multiplied by numbers of config.json; "mlp_multipliers.1" is the second of a list."""

    def factor(get: Lookup, rows: int) -> float:
        product = 1.0
        for key in keys:
            name, _, index = key.partition(".")
            value = get(name)
            value = value[int(index)] if index and value is not None else value
            product *= 1.0 if value is None else value
        return product

    return RowLayout("multiplied", factors=factor)


def _ssm_factors(get: Lookup, rows: int) -> np.ndarray:
    """Of in_proj: z, x, B, C and the time steps have one each."""
    inner, states, heads = get("mamba_d_ssm"), get("mamba_n_groups") * get("mamba_d_state"), get("mamba_n_heads")
    sizes = [inner, inner, states, states, heads]
    if sum(sizes) != rows:
        raise ValueError(f"{rows} rows are not z, x, B, C of {inner}, {inner}, {states}, {states} and {heads} heads")
    factor = 1.0 if get("ssm_in_multiplier") is None else get("ssm_in_multiplier")
    return np.repeat(np.asarray(get("ssm_multipliers") or [1.0] * 5, np.float32), sizes) * np.float32(factor)


def _falcon_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    return {"mamba_d_head": head_width(metadata), "mamba_norm_before_gate": False} | {
        f"{name}_multiplier": 1.0
        for name in ("lm_head", "embedding", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")
    } | {"mlp_multipliers": [1.0, 1.0], "ssm_multipliers": [1.0] * 5}  # fmt: skip


_FALCON_H1 = GGUFArchitecture(
    "falcon_h1", "FalconH1ForCausalLM", "falcon-h1", "model.layers",
    {
        "model.embed_tokens": Place(T.TOKEN_EMBD, _times("embedding_multiplier")),
        "model.final_layernorm": Place(T.OUTPUT_NORM),
        "lm_head": Place(T.OUTPUT, _times("lm_head_multiplier")),
    },
    {
        **PRE_NORM,
        **mamba2_places("mamba", "mamba_n_groups"),
        "mamba.in_proj": Place(T.SSM_IN, RowLayout("multiplied", factors=_ssm_factors)),
        "mamba.norm": Place(T.SSM_NORM, in_groups("mamba_n_groups"), optional=True, flag="mamba_rms_norm"),
        "mamba.out_proj": Place(T.SSM_OUT, _times("ssm_out_multiplier")),
        "self_attn.q_proj": Place(T.ATTN_Q, _times("attention_in_multiplier")),
        "self_attn.k_proj": Place(T.ATTN_K, _times("attention_in_multiplier", "key_multiplier")),
        "self_attn.v_proj": Place(T.ATTN_V, _times("attention_in_multiplier")),
        "self_attn.o_proj": Place(T.ATTN_OUT, _times("attention_out_multiplier")),
        "pre_ff_layernorm.weight": Place(T.FFN_PRE_NORM, bare=True, ending=""),  # llama.cpp wants it without ".weight"
        "feed_forward.gate_proj": Place(T.FFN_GATE, _times("mlp_multipliers.0")),
        "feed_forward.up_proj": Place(T.FFN_UP),
        "feed_forward.down_proj": Place(T.FFN_DOWN, _times("mlp_multipliers.1")),
    },
    (*KEYS, *(key for key in SSM_KEYS if key.name != "ssm.inner_size"), Key("ssm.inner_size", "mamba_d_ssm")),
    biases={CONV_BIAS: {"mamba_conv_bias": True}, frozenset(): {"mamba_conv_bias": False}},
    fixed=SILU | NO_LIMIT | {"mamba_proj_bias": (False,)},
    implied=lambda get: {"mamba_norm_before_gate": False} if get("mamba_rms_norm") else {},
    needs_output=True, from_file=_falcon_of_file,
)  # fmt: skip

ROWS = (_FALCON_H1,)
