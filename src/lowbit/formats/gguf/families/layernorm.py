"""Dense decoders with norms of mean and variance (LayerNorm)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    ATTENTION_KINDS,
    BOOL,
    EXACT_GELU,
    FLOAT,
    GPT_BIASES,
    HEAD_DIM,
    KV_HEADS,
    LENGTHS,
    MLP,
    MLP_NORM,
    NO_ATTENTION_BIAS,
    O_PROJ,
    OUTSIDE,
    PAIRED_QKV,
    PRE_NORM,
    QKV_KINDS,
    QKV_PLACES,
    SILU,
    head_dim_is_width_over_heads,
    number,
)
from lowbit.formats.gguf.layout import PER_HEAD, PLUS_ONE, QKV, Lookup, RowLayout
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope

_KV_HEADS = Key(KV_HEADS, "num_key_value_heads", otherwise=lambda get: get("num_attention_heads"))
_EPSILON = "attention.layer_norm_epsilon"
_KEYS = (*LENGTHS, _KV_HEADS, Key(_EPSILON, "layer_norm_eps", FLOAT))
_NORMS = frozenset({T.ATTN_NORM, T.FFN_NORM, T.OUTPUT_NORM})
_UP_DOWN = frozenset({T.FFN_UP, T.FFN_DOWN})
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")
_GELU_NOTE = EXACT_GELU["hidden_act", "gelu"]


# --- Cohere: attention and MLP side by side ---------------------------------------------------------------------------

# The output is the embedding. Neighbours are paired in transformers too.
_COHERE_OUTSIDE = {"model.embed_tokens": Place(T.TOKEN_EMBD), "model.norm": Place(T.OUTPUT_NORM)}
_COHERE_BLOCK = {**PRE_NORM, **QKV_PLACES, **O_PROJ, **MLP}
_COHERE_KEYS = (*_KEYS, Key("logit_scale", "logit_scale", FLOAT))
_COHERE = GGUFArchitecture(
    "cohere", "CohereForCausalLM", "command-r", "model.layers", _COHERE_OUTSIDE, _COHERE_BLOCK,
    (
        # what Command R was trained for stands under the first name
        Key("context_length", value=lambda get: get("model_max_length") or get("max_position_embeddings")),
        *_COHERE_KEYS[1:],
    ),
    biases=NO_ATTENTION_BIAS, fixed=SILU | {"use_qk_norm": (False,)}, implied=head_dim_is_width_over_heads,
    when=lambda get: get("num_hidden_layers") < 64,
    of_file=lambda metadata: number(metadata, "command-r.block_count") < 64,
    from_file=lambda metadata: {"max_position_embeddings": number(metadata, "command-r.context_length")},
)  # fmt: skip
# Command R+, which llama.cpp knows by its 64 blocks, has a norm for each head of q and k.
_COHERE_PLUS = replace(
    _COHERE,
    inside=_COHERE_BLOCK | {
        "self_attn.q_norm": Place(T.ATTN_Q_NORM, PER_HEAD), "self_attn.k_norm": Place(T.ATTN_K_NORM, PER_HEAD),
    },
    fixed=SILU | {"use_qk_norm": (True,)}, when=lambda get: True, of_file=lambda metadata: True,
)  # fmt: skip
_COHERE2 = GGUFArchitecture(
    "cohere2", "Cohere2ForCausalLM", "cohere2", "model.layers", _COHERE_OUTSIDE, _COHERE_BLOCK, _COHERE_KEYS,
    biases=NO_ATTENTION_BIAS, fixed=SILU, implied=head_dim_is_width_over_heads, window_period=4,
)  # fmt: skip


# --- an MLP with a gate -----------------------------------------------------------------------------------------------

_OLMO = GGUFArchitecture(  # its norms have no weights
    "olmo", "OlmoForCausalLM", "olmo", "model.layers",
    {"model.embed_tokens": Place(T.TOKEN_EMBD), "lm_head": Place(T.OUTPUT)},
    {**PAIRED_QKV, **O_PROJ, **MLP},
    (
        *LENGTHS, _KV_HEADS, Key(_EPSILON, kind=FLOAT, value=lambda get: 1e-5),
        Key("attention.clamp_kqv", "clip_qkv", FLOAT, optional=True),
    ),
    biases=NO_ATTENTION_BIAS, fixed=SILU, implied=head_dim_is_width_over_heads,
)  # fmt: skip
_STABLELM_QK_NORMS = {
    "self_attn.q_layernorm.norms.*": Place(
        T.ATTN_Q_NORM,
        count="num_attention_heads",
    ),
    "self_attn.k_layernorm.norms.*": Place(T.ATTN_K_NORM, count="num_key_value_heads"),
}


def _stablelm(parallel: bool, qk_norms: bool) -> GGUFArchitecture:
    """parallel: attention and MLP side by side, behind one norm."""
    norms = _NORMS - {T.FFN_NORM} if parallel else _NORMS
    block = PRE_NORM | QKV_PLACES | O_PROJ | ({} if parallel else MLP_NORM) | MLP
    return GGUFArchitecture(
        "stablelm", "StableLmForCausalLM", "stablelm", "model.layers", OUTSIDE,
        block | (_STABLELM_QK_NORMS if qk_norms else {}),
        (*_KEYS, Key("use_parallel_residual", "use_parallel_residual", BOOL)),
        biases={norms: {"use_qkv_bias": False}, norms | QKV_KINDS: {"use_qkv_bias": True}},
        fixed=SILU | {"use_parallel_residual": (parallel,), "qk_layernorm": (qk_norms,)},
        implied=head_dim_is_width_over_heads, rope=Rope(partial=True), needs_output=True,
        when=lambda get: (get("use_parallel_residual"), get("qk_layernorm")) == (parallel, qk_norms),
        of_file=lambda metadata: metadata.get("stablelm.use_parallel_residual", True) is parallel,
        of_tensor="blk.0.attn_q_norm.weight" if qk_norms else "",
    )  # fmt: skip


_STABLELM = tuple(_stablelm(parallel, qk_norms) for qk_norms in (True, False) for parallel in (False, True))


# --- an MLP without a gate --------------------------------------------------------------------------------------------

_NEMOTRON = GGUFArchitecture(
    "nemotron", "NemotronForCausalLM", "nemotron", "model.layers",
    OUTSIDE | {"model.norm": Place(T.OUTPUT_NORM, PLUS_ONE)},
    {
        "input_layernorm": Place(T.ATTN_NORM, PLUS_ONE),
        **QKV_PLACES, **O_PROJ,
        "post_attention_layernorm": Place(T.FFN_NORM, PLUS_ONE),
        "mlp.up_proj": Place(T.FFN_UP), "mlp.down_proj": Place(T.FFN_DOWN),
    },
    (*LENGTHS, _KV_HEADS, Key(_EPSILON, "norm_eps", FLOAT)),
    biases={
        _NORMS: {"attention_bias": False, "mlp_bias": False},
        _NORMS | ATTENTION_KINDS: {"attention_bias": True, "mlp_bias": False},
        _NORMS | _UP_DOWN: {"attention_bias": False, "mlp_bias": True},
        _NORMS | ATTENTION_KINDS | _UP_DOWN: {"attention_bias": True, "mlp_bias": True},
    },
    fixed={"hidden_act": ("relu2",)}, implied=head_dim_is_width_over_heads,
    rope=Rope(("default", "linear"), partial=True), needs_output=True,
)  # fmt: skip
_JAIS2 = GGUFArchitecture(
    "jais2", "Jais2ForCausalLM", "jais2", "model.layers", OUTSIDE,
    {
        **PRE_NORM, **QKV_PLACES, **O_PROJ, **MLP_NORM,
        "mlp.up_proj": Place(T.FFN_UP), "mlp.down_proj": Place(T.FFN_DOWN),
    },
    (*_KEYS, *HEAD_DIM),
    biases={_NORMS | ATTENTION_KINDS | _UP_DOWN: {"attention_bias": True, "mlp_bias": True}},
    fixed={"hidden_act": ("relu2",)},
)  # fmt: skip
_STARCODER2 = GGUFArchitecture(
    "starcoder2", "Starcoder2ForCausalLM", "starcoder2", "model.layers", OUTSIDE,
    {
        **PRE_NORM, **QKV_PLACES, **O_PROJ, **MLP_NORM,
        "mlp.c_fc": Place(T.FFN_UP), "mlp.c_proj": Place(T.FFN_DOWN),
    },
    (*LENGTHS, _KV_HEADS, Key(_EPSILON, "norm_epsilon", FLOAT)),
    biases={_NORMS | ATTENTION_KINDS | _UP_DOWN: {"use_bias": True}},
    fixed={"hidden_act": _TANH_GELU}, near=EXACT_GELU, implied=head_dim_is_width_over_heads,
)  # fmt: skip
_PHI = GGUFArchitecture(  # attention and MLP side by side
    "phi", "PhiForCausalLM", "phi2", "model.layers",
    {
        "model.embed_tokens": Place(T.TOKEN_EMBD),
        "model.final_layernorm": Place(T.OUTPUT_NORM),
        "lm_head": Place(T.OUTPUT),
    },
    {
        **PRE_NORM, **QKV_PLACES,
        "self_attn.dense": Place(T.ATTN_OUT),
        "mlp.fc1": Place(T.FFN_UP), "mlp.fc2": Place(T.FFN_DOWN),
    },
    _KEYS, biases={frozenset({T.ATTN_NORM, T.OUTPUT_NORM, T.OUTPUT}) | ATTENTION_KINDS | _UP_DOWN: {}},
    fixed={"hidden_act": ("gelu_new", *_TANH_GELU), "qk_layernorm": (False,)}, near=EXACT_GELU,
    implied=head_dim_is_width_over_heads,
    rope=Rope(partial=True), needs_output=True,
)  # fmt: skip


# --- q, k and v in one ------------------------------------------------------------------------------------------------

_BLOOM = GGUFArchitecture(  # ALiBi
    "bloom", "BloomForCausalLM", "bloom", "transformer.h",
    {
        "transformer.word_embeddings": Place(T.TOKEN_EMBD),
        "transformer.word_embeddings_layernorm": Place(T.TOKEN_EMBD_NORM),
        "transformer.ln_f": Place(T.OUTPUT_NORM),
        "lm_head": Place(T.OUTPUT),
    },
    {
        "input_layernorm": Place(T.ATTN_NORM),
        "self_attention.query_key_value": Place(T.ATTN_QKV, QKV),
        "self_attention.dense": Place(T.ATTN_OUT),
        "post_attention_layernorm": Place(T.FFN_NORM),
        "mlp.dense_h_to_4h": Place(T.FFN_UP),
        "mlp.dense_4h_to_h": Place(T.FFN_DOWN),
    },
    (
        Key("context_length", "seq_length", otherwise=lambda get: get("hidden_size")),
        *LENGTHS[1:3],
        Key("feed_forward_length", value=lambda get: 4 * get("hidden_size")),
        *LENGTHS[4:],
        Key(KV_HEADS, value=lambda get: get("num_attention_heads")),
        Key(_EPSILON, "layer_norm_epsilon", FLOAT),
    ),
    biases={kinds | {T.TOKEN_EMBD_NORM}: needed for kinds, needed in GPT_BIASES.items()},
    fixed={"apply_residual_connection_post_layernorm": (False,)}, rope=None,
)  # fmt: skip
_GPT_BIGCODE = GGUFArchitecture(
    "gpt_bigcode", "GPTBigCodeForCausalLM", "starcoder", "transformer.h",
    {
        "transformer.wte": Place(T.TOKEN_EMBD),
        "transformer.wpe": Place(T.POS_EMBD),
        "transformer.ln_f": Place(T.OUTPUT_NORM),
        "lm_head": Place(T.OUTPUT),
    },
    {
        "ln_1": Place(T.ATTN_NORM),
        "attn.c_attn": Place(T.ATTN_QKV),  # all of q, then one head of k and one of v
        "attn.c_proj": Place(T.ATTN_OUT),
        "ln_2": Place(T.FFN_NORM),
        "mlp.c_fc": Place(T.FFN_UP),
        "mlp.c_proj": Place(T.FFN_DOWN),
    },
    (
        Key("context_length", "n_positions"),
        Key("embedding_length", "n_embd"),
        Key("block_count", "n_layer"),
        Key("feed_forward_length", "n_inner", otherwise=lambda get: 4 * get("n_embd")),
        Key("attention.head_count", "n_head"),
        Key(KV_HEADS, value=lambda get: 1),
        Key(_EPSILON, "layer_norm_epsilon", FLOAT),
    ),
    biases=GPT_BIASES,
    fixed={
        "multi_query": (True,), "scale_attn_weights": (True,), "add_cross_attention": (False,),
        "activation_function": _TANH_GELU,
    },
    near={("activation_function", "gelu"): _GELU_NOTE}, rope=None,
)  # fmt: skip
_MPT = GGUFArchitecture(  # ALiBi
    "mpt", "MptForCausalLM", "mpt", "transformer.blocks",
    {
        "transformer.wte": Place(T.TOKEN_EMBD),
        "transformer.norm_f": Place(T.OUTPUT_NORM),
        "lm_head": Place(T.OUTPUT),
    },
    {
        "norm_1": Place(T.ATTN_NORM),
        "attn.Wqkv": Place(T.ATTN_QKV),
        "attn.out_proj": Place(T.ATTN_OUT),
        "norm_2": Place(T.FFN_NORM),
        "ffn.up_proj": Place(T.FFN_UP),
        "ffn.down_proj": Place(T.FFN_DOWN),
    },
    (
        Key("context_length", "max_seq_len"),
        Key("embedding_length", "d_model"),
        Key("block_count", "n_layers"),
        Key("feed_forward_length", value=lambda get: 4 * get("d_model")),
        Key("attention.head_count", "n_heads"),
        Key(_EPSILON, "layer_norm_epsilon", FLOAT),
        Key("attention.clamp_kqv", "attn_config.clip_qkv", FLOAT, optional=True),
        Key("attention.max_alibi_bias", kind=FLOAT, value=lambda get: 8.0),
    ),
    fixed={
        "expansion_ratio": (4,), "logit_scale": (None,), "attn_config.alibi": (True,),
        "attn_config.alibi_bias_max": (8,), "attn_config.qk_ln": (False,), "attn_config.prefix_lm": (False,),
        "attn_config.softmax_scale": (None,), "attn_config.attn_type": ("multihead_attention",),
    },
    near={("model_type", "mpt"): _GELU_NOTE}, rope=None,
)  # fmt: skip


# --- Falcon: attention and MLP side by side ---------------------------------------------------------------------------


def _falcon_kv_heads(get: Lookup) -> int:
    """num_kv_heads is not read in models with one head for k and v."""
    one = get("multi_query") and not get("new_decoder_architecture")
    return 1 if one else get("num_kv_heads") or get("num_attention_heads")


def _falcon_rows(get: Lookup, count: int) -> np.ndarray:
    """Groups of query heads, each followed by its heads of k and v → all of q, all of k, all of v."""
    heads, groups = get("num_attention_heads"), _falcon_kv_heads(get)
    if heads % groups or count % (heads + 2 * groups):
        raise ValueError(f"{count} rows are not {heads} heads of q with {groups} of k and v")
    rows = np.arange(count).reshape(groups, heads // groups + 2, -1)
    return np.concatenate([rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)])


def _falcon_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    heads = number(metadata, "falcon.attention.head_count")
    groups = number(metadata, f"falcon.{KV_HEADS}", otherwise=heads)
    if groups == 1:
        return {"multi_query": True, "new_decoder_architecture": False}
    return {"multi_query": False, "new_decoder_architecture": groups != heads, "num_kv_heads": groups}


_FALCON_BLOCK = {
    "input_layernorm": Place(T.ATTN_NORM),
    "self_attention.query_key_value": Place(T.ATTN_QKV, RowLayout("q, k and v by group", rows=_falcon_rows)),
    "self_attention.dense": Place(T.ATTN_OUT),
    "mlp.dense_h_to_4h": Place(T.FFN_UP),
    "mlp.dense_4h_to_h": Place(T.FFN_DOWN),
}
_FALCON = GGUFArchitecture(
    "falcon", "FalconForCausalLM", "falcon", "transformer.h",
    {
        "transformer.word_embeddings": Place(T.TOKEN_EMBD),
        "transformer.ln_f": Place(T.OUTPUT_NORM),
        "lm_head": Place(T.OUTPUT),
    },
    _FALCON_BLOCK,
    (
        *LENGTHS[:3], Key("feed_forward_length", "ffn_hidden_size"), *LENGTHS[4:],
        Key(KV_HEADS, value=_falcon_kv_heads),
        Key(_EPSILON, "layer_norm_epsilon", FLOAT),
    ),
    biases={frozenset({T.ATTN_NORM, T.OUTPUT_NORM}): {"bias": False}},
    fixed={
        "alibi": (False,), "parallel_attn": (True,), "num_ln_in_parallel_attn": (1,),
        "activation": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
    },
    near={("activation", "gelu"): _GELU_NOTE}, from_file=_falcon_of_file,
)  # fmt: skip
_FALCON_TWO_NORMS = replace(  # Falcon 40B and 180B
    _FALCON,
    inside={
        "ln_mlp": Place(T.ATTN_NORM), "ln_attn": Place(T.ATTN_NORM_2),
        **{path: place for path, place in _FALCON_BLOCK.items() if path != "input_layernorm"},
    },
    biases={frozenset({T.ATTN_NORM, T.ATTN_NORM_2, T.OUTPUT_NORM}): {"bias": False}},
    fixed=_FALCON.fixed | {"num_ln_in_parallel_attn": (2,), "new_decoder_architecture": (True,)},
    when=lambda get: get("new_decoder_architecture") and get("num_ln_in_parallel_attn") in (None, 2),
    of_tensor="blk.0.attn_norm_2.weight",
    from_file=lambda metadata: {"num_kv_heads": number(metadata, f"falcon.{KV_HEADS}", otherwise=1)},
)  # fmt: skip

REFUSED: dict[str, str] = {}
ROWS = (
    _PHI, _STARCODER2, _COHERE, _COHERE_PLUS, _COHERE2, *_STABLELM, _FALCON_TWO_NORMS, _FALCON, _BLOOM, _MPT,
    _GPT_BIGCODE, _OLMO, _NEMOTRON, _JAIS2,
)  # fmt: skip
