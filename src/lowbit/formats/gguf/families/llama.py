"""Llama and what is built like it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    FLOAT,
    KEYS,
    LLAMA_BIASES,
    LLAMA_BLOCK,
    LLAMA_ROPE,
    MLP,
    MLP_NORM,
    NO_ATTENTION_BIAS,
    NO_BIASES,
    O_PROJ,
    OUTSIDE,
    PAIRED_QKV,
    PRE_NORM,
    QK_NORM,
    QKV_PLACES,
    SILU,
    expert_keys,
    expert_places,
    head_dim_is_width_over_heads,
    number,
)
from lowbit.formats.gguf.layout import Lookup
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope


def _every_fourth_without_rope(get: Lookup) -> dict[str, Any]:
    blocks = range(get("num_hidden_layers"))
    return {"no_rope_layers": [int((block + 1) % 4 != 0) for block in blocks]}


_LLAMA = GGUFArchitecture(
    "llama", "LlamaForCausalLM", "llama", "model.layers", OUTSIDE, LLAMA_BLOCK, KEYS,
    biases=LLAMA_BIASES, fixed=SILU, rope=LLAMA_ROPE,
)  # fmt: skip
_MISTRAL = replace(
    _LLAMA, model_type="mistral", model_class="MistralForCausalLM", biases=NO_BIASES, read_back=False,
)  # fmt: skip
_MIXTRAL = GGUFArchitecture(
    "mixtral", "MixtralForCausalLM", "llama", "model.layers", OUTSIDE,
    {**PRE_NORM, **PAIRED_QKV, **O_PROJ, **MLP_NORM,
     **expert_places("block_sparse_moe", "gate", ("w1", "w3", "w2"))},
    (*KEYS, *expert_keys("num_local_experts", None)),
    fixed=SILU, rope=LLAMA_ROPE,
)  # fmt: skip
_SMOLLM3 = GGUFArchitecture(
    "smollm3", "SmolLM3ForCausalLM", "smollm3", "model.layers", OUTSIDE, LLAMA_BLOCK, KEYS,
    biases={frozenset(): {"attention_bias": False, "mlp_bias": False}}, fixed=SILU,
    implied=_every_fourth_without_rope,
)  # fmt: skip
_GRANITE = replace(
    _LLAMA, model_type="granite", model_class="GraniteForCausalLM", arch="granite",
    keys=(
        *KEYS,
        Key("attention.scale", "attention_multiplier", FLOAT),
        Key("embedding_scale", "embedding_multiplier", FLOAT, default=1.0),
        Key("residual_scale", "residual_multiplier", FLOAT, default=1.0),
        Key("logit_scale", "logits_scaling", FLOAT),
    ),
)  # fmt: skip
_OLMO2 = GGUFArchitecture(
    "olmo2", "Olmo2ForCausalLM", "olmo2", "model.layers", OUTSIDE,
    {
        **QKV_PLACES, **QK_NORM, **O_PROJ,
        "post_attention_layernorm": Place(T.ATTN_POST_NORM),
        **MLP,
        "post_feedforward_layernorm": Place(T.FFN_POST_NORM),
    },
    KEYS[:-2], biases=NO_ATTENTION_BIAS, fixed=SILU, implied=head_dim_is_width_over_heads, needs_output=True,
    of_file=lambda metadata: number(metadata, "olmo2.attention.sliding_window") == 0,
)  # fmt: skip
_PHI3 = GGUFArchitecture(
    "phi3", "Phi3ForCausalLM", "phi3", "model.layers", OUTSIDE,
    {
        **PRE_NORM,
        "self_attn.qkv_proj": Place(T.ATTN_QKV),
        **O_PROJ, **MLP_NORM,
        "mlp.gate_up_proj": Place(T.FFN_UP),  # gate first, then up: what LLM_FFN_SWIGLU takes too
        "mlp.down_proj": Place(T.FFN_DOWN),
    },
    (*KEYS[:-2],
     Key("rope.scaling.original_context_length", "original_max_position_embeddings",
         otherwise=lambda get: get("max_position_embeddings"))),
    fixed=SILU, implied=head_dim_is_width_over_heads,
    rope=Rope(("default", "linear", "longrope"), partial=True), window_period=0,
)  # fmt: skip

ROWS = (_LLAMA, _MISTRAL, _MIXTRAL, _SMOLLM3, _GRANITE, _OLMO2, _PHI3)
