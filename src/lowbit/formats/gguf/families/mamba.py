"""State spaces: Mamba 1 and 2, and Jamba, a hybrid of the first with attention and experts.

A block of a hybrid is of one kind, which llama.cpp finds by the key-values: `attention.head_count_kv` is a list with 0
where a block has no attention.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    BOOL,
    FLOAT,
    GATE_UP_DOWN,
    KV_HEADS,
    LENGTHS,
    O_PROJ,
    PRE_NORM,
    QKV_PLACES,
    SILU,
    expert_keys,
    expert_places,
    head_dim_is_width_over_heads,
)
from lowbit.formats.gguf.keys import per_block
from lowbit.formats.gguf.layout import NEG_EXP, Lookup, RowLayout, Shape
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, grouped

# --- layouts --------------------------------------------------------------------------------------------------------


def _flat(get: Lookup, shape: Shape) -> Shape:
    return (shape[0], shape[2]) if len(shape) == 3 else shape


def _deep(get: Lookup, shape: Shape) -> Shape:
    return (shape[0], 1, shape[1]) if len(shape) == 2 else shape


def _column(get: Lookup, shape: Shape) -> Shape:
    return (*shape, 1)


def _flattened(get: Lookup, shape: Shape) -> Shape:
    return (int(np.prod(shape)),)


CONV = RowLayout("convolution", shape=_flat, unshape=_deep)  # [C, 1, K] → [C, K]; its bias stays [C]
_HEADS = RowLayout("one number per head", shape=_column, unshape=_flattened)  # [H] → [H, 1]
_DECAYS = replace(NEG_EXP, name="minus exp per head", shape=_column, unshape=_flattened)


def in_groups(key: str) -> RowLayout:
    """[d] → [groups, d / groups]; `key` of config.json counts the groups."""

    def shape(get: Lookup, shape: Shape) -> Shape:
        groups = get(key)
        if type(groups) is not int or groups < 1 or shape[0] % groups:
            raise ValueError(f"{shape[0]} numbers in {str(groups)[:40]} groups")
        return (groups, shape[0] // groups)

    return RowLayout("groups", shape=shape, unshape=_flattened)


# --- mixers ---------------------------------------------------------------------------------------------------------


def _mamba1_places(path: str) -> dict[str, Place]:
    return {
        f"{path}.in_proj": Place(T.SSM_IN),
        f"{path}.conv1d": Place(T.SSM_CONV1D, CONV),
        f"{path}.x_proj": Place(T.SSM_X),
        f"{path}.dt_proj": Place(T.SSM_DT),
        f"{path}.A_log": Place(T.SSM_A, NEG_EXP, bare=True, ending=""),
        f"{path}.D": Place(T.SSM_D, bare=True, ending=""),
        f"{path}.out_proj": Place(T.SSM_OUT),
    }


def mamba2_places(path: str, groups: str) -> dict[str, Place]:
    return {
        f"{path}.in_proj": Place(T.SSM_IN),
        f"{path}.conv1d": Place(T.SSM_CONV1D, CONV),
        f"{path}.dt_bias": Place(T.SSM_DT, bare=True, ending="bias"),
        f"{path}.A_log": Place(T.SSM_A, _DECAYS, bare=True, ending=""),
        f"{path}.D": Place(T.SSM_D, _HEADS, bare=True, ending=""),
        f"{path}.norm": Place(T.SSM_NORM, in_groups(groups)),
        f"{path}.out_proj": Place(T.SSM_OUT),
    }


CONV_BIAS = frozenset({T.SSM_CONV1D})
NO_LIMIT = {"time_step_limit": (None, (0.0, float("inf")), [0.0, float("inf")])}
# Without positions there is no longest context.
ANY_CONTEXT = Key("context_length", value=lambda get: 2**20)
_NO_ATTENTION = (
    Key("embedding_length", "hidden_size"),
    Key("block_count", "num_hidden_layers"),
    Key("feed_forward_length", value=lambda get: 0),
    Key("attention.head_count", value=lambda get: 0),
    Key("attention.layer_norm_rms_epsilon", "layer_norm_epsilon", FLOAT),
)

SSM_KEYS = (
    Key("ssm.conv_kernel", "mamba_d_conv"),
    Key("ssm.inner_size", value=lambda get: get("mamba_n_heads") * get("mamba_d_head")),
    Key("ssm.state_size", "mamba_d_state"),
    Key("ssm.time_step_rank", "mamba_n_heads"),
    Key("ssm.group_count", "mamba_n_groups"),
)


def head_width(metadata: dict[str, Any]) -> int:
    """Numbers of a state-space head, of a file."""
    inner, heads = (per_block(metadata, f"ssm.{key}")[0] for key in ("inner_size", "time_step_rank"))
    if not heads or inner % heads:
        raise ValueError(f"ssm.inner_size is {inner}, for {heads} heads")
    return inner // heads


# --- Mamba ----------------------------------------------------------------------------------------------------------

BACKBONE = {
    "backbone.embeddings": Place(T.TOKEN_EMBD),
    "backbone.norm_f": Place(T.OUTPUT_NORM),
    "lm_head": Place(T.OUTPUT),
}
FINAL_LAYERNORM = {
    "model.embed_tokens": Place(T.TOKEN_EMBD),
    "model.final_layernorm": Place(T.OUTPUT_NORM),
    "lm_head": Place(T.OUTPUT),
}
_MAMBA = GGUFArchitecture(
    "mamba", "MambaForCausalLM", "mamba", "backbone.layers", BACKBONE,
    {"norm": Place(T.ATTN_NORM), **_mamba1_places("mixer")},
    (ANY_CONTEXT, *_NO_ATTENTION,
     Key("ssm.conv_kernel", "conv_kernel"),
     Key("ssm.inner_size", value=lambda get: 2 * get("hidden_size")),
     Key("ssm.state_size", "state_size"),
     Key("ssm.time_step_rank", "time_step_rank"),
     Key("ssm.dt_b_c_rms", value=lambda get: False, kind=BOOL)),
    biases={frozenset({T.SSM_CONV1D, T.SSM_DT}): {"use_conv_bias": True}},
    fixed=SILU | {"use_bias": (False,)},
    implied=lambda get: {"expand": 2, "intermediate_size": 2 * get("hidden_size")},
    rope=None, of_file=lambda metadata: not metadata.get("mamba.ssm.dt_b_c_rms"),
)  # fmt: skip


def _one_epsilon(get: Lookup) -> dict[str, Any]:
    """llama.cpp has one epsilon for all norms. That of the released models is near enough (`near`)."""
    own = get("mixer_rms_eps")
    epsilon = own if own == 1e-6 else get("layer_norm_epsilon")
    return {"expand": 2, "intermediate_size": 2 * get("hidden_size"), "mixer_rms_eps": epsilon}


_FALCON_MAMBA = replace(
    _MAMBA, model_type="falcon_mamba", model_class="FalconMambaForCausalLM",
    keys=(*_MAMBA.keys[:-1], Key("ssm.dt_b_c_rms", value=lambda get: True, kind=BOOL)),
    near={("mixer_rms_eps", 1e-6): "llama.cpp norms B, C and the time step with layer_norm_epsilon, transformers with "
                                   "mixer_rms_eps 1e-06"},
    implied=_one_epsilon, of_file=lambda metadata: bool(metadata.get("mamba.ssm.dt_b_c_rms")),
)  # fmt: skip


def _mamba2_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    inner, width = per_block(metadata, "ssm.inner_size")[0], per_block(metadata, "embedding_length")[0]
    if not width or inner % width:
        raise ValueError(f"mamba2.ssm.inner_size is {inner}, for a width of {width}")
    return {"head_dim": head_width(metadata), "expand": inner // width}


_MAMBA2 = GGUFArchitecture(
    "mamba2", "Mamba2ForCausalLM", "mamba2", "backbone.layers", BACKBONE,
    {"norm": Place(T.ATTN_NORM), **mamba2_places("mixer", "n_groups")},
    (ANY_CONTEXT, *_NO_ATTENTION,
     Key("ssm.conv_kernel", "conv_kernel"),
     Key("ssm.inner_size", value=lambda get: get("expand") * get("hidden_size")),
     Key("ssm.state_size", "state_size"),
     Key("ssm.time_step_rank", "num_heads"),
     Key("ssm.group_count", "n_groups")),
    biases={CONV_BIAS: {"use_conv_bias": True}}, fixed=SILU | NO_LIMIT | {"use_bias": (False,)},
    rope=None, from_file=_mamba2_of_file,
)  # fmt: skip

# --- Jamba ----------------------------------------------------------------------------------------------------------


def _jamba_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    """Blocks with attention and with experts follow each other at regular distances."""
    heads = per_block(metadata, KV_HEADS)
    at = [block for block, count in enumerate(heads) if count]
    if not at or len({after - before for before, after in pairwise(at)}) > 1:
        raise ValueError(f"jamba.{KV_HEADS} is {heads}; blocks with attention at equal distances are needed")
    return {
        "num_key_value_heads": max(heads), "attn_layer_offset": at[0],
        "attn_layer_period": at[1] - at[0] if len(at) > 1 else max(len(heads), at[0] + 1),
    }  # fmt: skip


def _jamba_experts(names: Collection[str]) -> dict[str, Any]:
    at = [int(name.split(".")[1]) for name in names if name.endswith(".ffn_gate_inp.weight")]
    at.sort()
    if len({after - before for before, after in pairwise(at)}) > 1:
        raise ValueError(f"blocks {at} have experts; blocks at equal distances are needed")
    if not at:
        return {}
    return {"expert_layer_offset": at[0], "expert_layer_period": at[1] - at[0] if len(at) > 1 else 10**6}


def _jamba_kv_heads(get: Lookup) -> list[int]:
    period, offset = get("attn_layer_period"), get("attn_layer_offset")
    return [get("num_key_value_heads") * (block % period == offset) for block in range(get("num_hidden_layers"))]


_JAMBA_MLP = {
    "feed_forward.gate_proj": Place(T.FFN_GATE),
    "feed_forward.up_proj": Place(T.FFN_UP),
    "feed_forward.down_proj": Place(T.FFN_DOWN),
}
_JAMBA = GGUFArchitecture(
    "jamba", "JambaForCausalLM", "jamba", "model.layers", FINAL_LAYERNORM,
    {
        **PRE_NORM,
        **grouped("mamba", {
            **_mamba1_places("mamba"),
            "mamba.dt_layernorm": Place(T.SSM_DT_NORM),
            "mamba.b_layernorm": Place(T.SSM_B_NORM),
            "mamba.c_layernorm": Place(T.SSM_C_NORM),
        }),
        **grouped("attention", {**QKV_PLACES, **O_PROJ}),
        "pre_ff_layernorm": Place(T.FFN_NORM),
        **grouped("mlp", _JAMBA_MLP),
        **grouped("experts", expert_places("feed_forward", "router", GATE_UP_DOWN)),
    },
    (*LENGTHS, Key(KV_HEADS, value=_jamba_kv_heads),
     Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", FLOAT),
     Key("ssm.conv_kernel", "mamba_d_conv"),
     Key("ssm.inner_size", value=lambda get: 2 * get("hidden_size")),
     Key("ssm.state_size", "mamba_d_state"),
     Key("ssm.time_step_rank", "mamba_dt_rank"),
     *expert_keys("num_experts", None)),
    biases={frozenset({T.SSM_CONV1D, T.SSM_DT}): {"mamba_conv_bias": True}},
    fixed=SILU | {"mamba_proj_bias": (False,), "mamba_expand": (2,), "sliding_window": (None,)},
    implied=head_dim_is_width_over_heads, rope=None, from_file=_jamba_of_file,
    from_names=_jamba_experts,
)  # fmt: skip

ROWS = (_MAMBA, _FALCON_MAMBA, _MAMBA2, _JAMBA)
