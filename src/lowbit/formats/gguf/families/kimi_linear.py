"""Kimi Linear: three of four blocks are Kimi Delta Attention (KDA), the others latent attention without positions.

A delta net whose state decays channel by channel: f_b(f_a(x)) + dt_bias gives a decay for each channel of keys, where
Qwen's gives one for each head; g_b(g_a(x)) gates its output. q, k and v have a short convolution each.

llama.cpp finds by `attention.head_count_kv` which blocks are of which kind: 0 for KDA, 1 for latent attention.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    KV_HEADS,
    LENGTHS,
    MLP_NORM,
    NO_ATTENTION_BIAS,
    O_PROJ,
    OUTSIDE,
    PRE_NORM,
    SILU,
    expert_keys,
    expert_places,
)
from lowbit.formats.gguf.families.latent import LATENT_SIZES, LATENTS, heads_of_latent
from lowbit.formats.gguf.families.routing import (
    CORRECTION,
    DENSE_BLOCKS,
    GROUPS,
    LEADING_DENSE_TYPES,
    SHARED_COUNT,
    SIGMOID,
    WEIGHTS,
    dense_blocks_first,
    gating,
    mlp_types_of_file,
    shared_places,
)
from lowbit.formats.gguf.keys import per_block
from lowbit.formats.gguf.layout import NEG_EXP, Lookup, RowLayout, Shape
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, grouped

# --- tensors --------------------------------------------------------------------------------------------------------


def _kernels_in_file(get: Lookup, shape: Shape) -> Shape:
    return (1, shape[0], 1, shape[-1])


def _kernels(get: Lookup, shape: Shape) -> Shape:
    """[C, 1, K], with or without a 1 in front: llama-quantize drops it."""
    return (shape[-3], 1, shape[-1]) if len(shape) > 2 else shape


def _decays(get: Lookup, shape: Shape) -> Shape:
    """[1, 1, H, 1], which llama-quantize makes [H, 1]."""
    return (1, 1, shape[-2], 1) if len(shape) > 1 else shape


_CONV = RowLayout("convolution of a part", shape=_kernels_in_file, unshape=_kernels)
_DECAY = replace(NEG_EXP, name="minus exp per head", shape=lambda get, shape: shape, unshape=_decays)
_KDA = grouped("delta", {
    "self_attn.k_proj": Place(T.ATTN_K),
    "self_attn.v_proj": Place(T.ATTN_V),
    "self_attn.q_conv1d": Place(T.SSM_CONV1D_Q, _CONV),
    "self_attn.k_conv1d": Place(T.SSM_CONV1D_K, _CONV),
    "self_attn.v_conv1d": Place(T.SSM_CONV1D_V, _CONV),
    "self_attn.f_a_proj": Place(T.SSM_F_A),
    "self_attn.f_b_proj": Place(T.SSM_F_B),
    "self_attn.dt_bias": Place(T.SSM_DT, bare=True, ending="bias"),
    "self_attn.A_log": Place(T.SSM_A, _DECAY, bare=True, ending=""),
    "self_attn.b_proj": Place(T.SSM_BETA),
    "self_attn.g_a_proj": Place(T.SSM_G_A),
    "self_attn.g_b_proj": Place(T.SSM_G_B),
    "self_attn.o_norm": Place(T.SSM_NORM),
})  # fmt: skip
_EXPERTS = grouped("experts", {
    **expert_places("block_sparse_moe", "gate", ("w1", "w3", "w2")),
    "block_sparse_moe.gate.e_score_correction_bias": CORRECTION,
    **shared_places("block_sparse_moe.shared_experts"),
})  # fmt: skip

# --- key-values -----------------------------------------------------------------------------------------------------


def _kv_heads(get: Lookup) -> list[int]:
    return [int(kind == "full_attention") for kind in get("layer_types")]


_KEYS = (
    *LENGTHS, Key(KV_HEADS, value=_kv_heads), *LATENT_SIZES,
    Key("rope.dimension_count", "qk_rope_head_dim"),
    Key("ssm.conv_kernel", "linear_conv_kernel_dim"),
    Key("kda.head_dim", "linear_head_dim"),
    *expert_keys("num_experts"),
    SHARED_COUNT, WEIGHTS[0], *GROUPS, LEADING_DENSE_TYPES, gating(SIGMOID),
)  # fmt: skip


def _as_llama_cpp_has_it(get: Lookup) -> dict[str, Any]:
    """One number of heads, for KDA and for keys of latent attention too; no latent of queries, whose rank its loader
    does not read; both kinds of blocks, without which it ends the process; dense blocks before those with experts."""
    heads = get("num_attention_heads")
    both = {} if len(set(get("layer_types"))) == 2 else {"layer_types": "blocks of both kinds"}
    sizes = {"linear_num_heads": heads, "num_key_value_heads": heads, "q_lora_rank": None}
    return sizes | both | dense_blocks_first(get)


_EPSILONS = (
    "llama.cpp takes rms_norm_eps also for the norms of latents and of q and k, where transformers takes 1e-06: "
    "probabilities differ a little"
)


def _of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json as published and, beside it, what transformers makes of `linear_attn_config`."""
    full = [bool(heads) for heads in per_block(metadata, KV_HEADS)]
    if len(set(full)) < 2:
        raise ValueError(f"kimi-linear.{KV_HEADS} is of one kind of blocks; llama.cpp loads files with both")
    heads = per_block(metadata, "attention.head_count")[0]
    types = mlp_types_of_file("kimi-linear", metadata)
    parts = {
        "full_attn_layers": [block for block, each in enumerate(full, 1) if each],
        "kda_layers": [block for block, each in enumerate(full, 1) if not each],
        "head_dim": per_block(metadata, "kda.head_dim")[0], "num_heads": heads,
        "short_conv_kernel_size": per_block(metadata, "ssm.conv_kernel")[0],
    }  # fmt: skip
    return heads_of_latent("kimi-linear", metadata) | types | {
        "linear_attn_config": parts, "linear_num_heads": heads, "num_key_value_heads": heads,
        "layer_types": ["full_attention" if each else "linear_attention" for each in full],
        "first_k_dense_replace": types["mlp_layer_types"].count("dense"),
    }  # fmt: skip


_KIMI_LINEAR = GGUFArchitecture(
    "kimi_linear", "KimiLinearForCausalLM", "kimi-linear", "model.layers", OUTSIDE,
    {
        **PRE_NORM, "self_attn.q_proj": Place(T.ATTN_Q), **grouped("attention", LATENTS), **_KDA, **O_PROJ,
        **MLP_NORM, **DENSE_BLOCKS, **_EXPERTS,
    },
    _KEYS, biases=NO_ATTENTION_BIAS, rope=None, from_file=_of_file, implied=_as_llama_cpp_has_it,
    fixed=SILU | {"norm_topk_prob": (True,), "mla_use_nope": (True,), "moe_router_activation_func": ("sigmoid",),
                  "moe_layer_freq": (1,)},
    near={("rms_norm_eps", lambda epsilon: epsilon != 1e-6): _EPSILONS},
)  # fmt: skip

ROWS = (_KIMI_LINEAR,)
