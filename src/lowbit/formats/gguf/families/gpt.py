"""GPT-2, GPT-NeoX and gpt-oss."""

from __future__ import annotations

from gguf.constants import MODEL_TENSOR as T
from gguf.constants import GGUFValueType

from lowbit.formats.gguf.families.common import (
    ATTENTION_KINDS,
    EXACT_GELU,
    FLOAT,
    GATE_UP_DOWN,
    GPT_BIASES,
    KEYS,
    LENGTHS,
    O_PROJ,
    OUTSIDE,
    PRE_NORM,
    QKV_PLACES,
    SILU,
    expert_keys,
    expert_places,
)
from lowbit.formats.gguf.layout import QKV, TRANSPOSED
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope

_GPT2 = GGUFArchitecture(
    "gpt2", "GPT2LMHeadModel", "gpt2", "transformer.h",
    {
        "transformer.wte": Place(T.TOKEN_EMBD),
        "transformer.wpe": Place(T.POS_EMBD),
        "transformer.ln_f": Place(T.OUTPUT_NORM),
        "lm_head": Place(T.OUTPUT),
    },
    {
        "ln_1": Place(T.ATTN_NORM),
        "attn.c_attn": Place(T.ATTN_QKV, TRANSPOSED),
        "attn.c_proj": Place(T.ATTN_OUT, TRANSPOSED),
        "ln_2": Place(T.FFN_NORM),
        "mlp.c_fc": Place(T.FFN_UP, TRANSPOSED),
        "mlp.c_proj": Place(T.FFN_DOWN, TRANSPOSED),
    },
    (
        Key("context_length", "n_positions"),
        Key("embedding_length", "n_embd"),
        Key("block_count", "n_layer"),
        Key("feed_forward_length", "n_inner", otherwise=lambda get: 4 * get("n_embd")),
        Key("attention.head_count", "n_head"),
        Key("attention.layer_norm_epsilon", "layer_norm_epsilon", FLOAT),
    ),
    biases=GPT_BIASES,
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    rope=None,
)  # fmt: skip
_GPT_NEOX = GGUFArchitecture(
    "gpt_neox", "GPTNeoXForCausalLM", "gptneox", "gpt_neox.layers",
    {
        "gpt_neox.embed_in": Place(T.TOKEN_EMBD),
        "gpt_neox.final_layer_norm": Place(T.OUTPUT_NORM),
        "embed_out": Place(T.OUTPUT),
    },
    {
        "input_layernorm": Place(T.ATTN_NORM),
        "attention.query_key_value": Place(T.ATTN_QKV, QKV),
        "attention.dense": Place(T.ATTN_OUT),
        "post_attention_layernorm": Place(T.FFN_NORM),
        "mlp.dense_h_to_4h": Place(T.FFN_UP),
        "mlp.dense_4h_to_h": Place(T.FFN_DOWN),
    },
    (
        *LENGTHS,
        Key("attention.layer_norm_epsilon", "layer_norm_eps", FLOAT),
        Key("use_parallel_residual", "use_parallel_residual", GGUFValueType.BOOL),
    ),
    biases=GPT_BIASES,
    fixed={"hidden_act": ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh"), "attention_bias": (True,)},
    near=EXACT_GELU,
    rope=Rope(partial=True), needs_output=True,
)  # fmt: skip
_GPT_OSS = GGUFArchitecture(
    "gpt_oss", "GptOssForCausalLM", "gpt-oss", "model.layers", OUTSIDE,
    {
        **PRE_NORM, **QKV_PLACES, **O_PROJ,
        "self_attn.sinks": Place(T.ATTN_SINKS, bare=True),
        "post_attention_layernorm": Place(T.ATTN_POST_NORM),
        **expert_places("mlp", "router", GATE_UP_DOWN),
    },
    (*KEYS, *expert_keys("num_local_experts", "intermediate_size")),
    biases={ATTENTION_KINDS | {T.FFN_GATE_INP, T.FFN_GATE_EXP, T.FFN_UP_EXP, T.FFN_DOWN_EXP}: {}},
    fixed=SILU | {"attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    rope=Rope(truncates=False), window_period=2, needs_output=True,
)  # fmt: skip

ROWS = (_GPT2, _GPT_NEOX, _GPT_OSS)
