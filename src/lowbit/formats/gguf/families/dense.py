"""Dense decoders that are built like Llama: norms by root mean square, a gated MLP.

Those with norms of mean and variance are in `layernorm`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families import layernorm
from lowbit.formats.gguf.families.common import (
    ATTENTION_KINDS,
    BOOL,
    FLOAT,
    GRANITE_SCALES,
    KEYS,
    LLAMA_BIASES,
    LLAMA_BLOCK,
    LLAMA_ROPE,
    MLP,
    MLP_NORM,
    NO_ATTENTION_BIAS,
    O_PROJ,
    OUTSIDE,
    PAIRED_QKV,
    PRE_NORM,
    QK_NORM,
    QKV_KINDS,
    QKV_PLACES,
    SILU,
    head_dim_is_width_over_heads,
    number,
    width_over_heads,
)
from lowbit.formats.gguf.keys import shortest
from lowbit.formats.gguf.layout import Lookup
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope

REFUSED = {
    "bitnet": "llama.cpp computes SiLU where BitNet has squared ReLU",
    "cwm": "llama.cpp has no architecture like Llama with sliding windows in three of four blocks",
    "gptj": "llama.cpp names the architecture and does not compute it",
    "hyperclovax": "llama.cpp has no architecture with its norms behind attention and MLP and its multipliers",
    "vaultgemma": "llama.cpp has no Gemma without norms behind attention and MLP",
} | layernorm.REFUSED


# --- as Llama ---------------------------------------------------------------------------------------------------------

# transformers' classes differ from Llama's in defaults; llama.cpp has one architecture for all.
_MINISTRAL = GGUFArchitecture(
    "ministral", "MinistralForCausalLM", "llama", "model.layers", OUTSIDE, LLAMA_BLOCK, KEYS,
    fixed=SILU, rope=LLAMA_ROPE, read_back=False,
)  # fmt: skip
_HELIUM = replace(  # neighbours are paired in transformers too
    _MINISTRAL, model_type="helium", model_class="HeliumForCausalLM",
    inside={**PRE_NORM, **QKV_PLACES, **O_PROJ, **MLP_NORM, **MLP},
    biases={frozenset(): {"attention_bias": False, "mlp_bias": False}}, rope=Rope(),
)  # fmt: skip
_INTERNLM3 = replace(_MINISTRAL, model_type="internlm3", model_class="InternLM3ForCausalLM", biases=LLAMA_BIASES)
_IQUESTCODER = replace(_INTERNLM3, model_type="iquestcoder", model_class="IQuestCoderForCausalLM")
_ARCEE = GGUFArchitecture(
    "arcee", "ArceeForCausalLM", "arcee", "model.layers", OUTSIDE,
    {
        **PRE_NORM, **PAIRED_QKV, **O_PROJ, **MLP_NORM,
        "mlp.up_proj": Place(T.FFN_UP),
        "mlp.down_proj": Place(T.FFN_DOWN),
    },
    KEYS, biases={frozenset(): {"attention_bias": False, "mlp_bias": False}},
    fixed={"hidden_act": ("relu2",)}, rope=LLAMA_ROPE,
)  # fmt: skip


# --- Ministral 3 and Mistral Small 3 ----------------------------------------------------------------------------------

_TEMPERATURE = "mistral3.attention.temperature_scale"


def _is_ministral3(get: Lookup) -> bool:
    return get("model_type") == "ministral3"


def _of_ministral3(metadata: dict[str, Any]) -> bool:
    return _TEMPERATURE in metadata


# Queries are scaled by 1 + β ln(1 + ⌊position / original context⌋), which llama.cpp takes from YaRN's key.
_MINISTRAL3 = GGUFArchitecture(
    "ministral3", "Ministral3ForCausalLM", "mistral3", "model.layers", OUTSIDE, LLAMA_BLOCK,
    (*KEYS, Key("attention.temperature_scale", "rope_parameters.llama_4_scaling_beta", FLOAT)),
    fixed=SILU, rope=Rope(("yarn",), log=True, betas=True), of_file=_of_ministral3,
)  # fmt: skip
_MISTRAL_OF_FILE = replace(
    _MINISTRAL, model_type="mistral", model_class="MistralForCausalLM", arch="mistral3", read_back=True,
)  # fmt: skip
_MISTRAL3 = replace(
    _MISTRAL_OF_FILE, model_type="mistral3", model_class="Mistral3ForConditionalGeneration",
    blocks="language_model.model.layers",
    outside={f"language_model.{name}": place for name, place in OUTSIDE.items()},
    read_back=False, left_out=("vision_tower.", "multi_modal_projector."),
)  # fmt: skip
_MISTRAL3_OF_MINISTRAL3 = replace(_MISTRAL3, keys=_MINISTRAL3.keys, rope=_MINISTRAL3.rope, when=_is_ministral3)


# --- Granite with windows ---------------------------------------------------------------------------------------------


def _one_base(get: Lookup) -> dict[str, Any]:
    """Blocks without rotary embeddings have the base 0; the others share one."""
    parameters, bases = get("rope_parameters"), get("layer_rope_theta")
    return {"layer_rope_theta": [parameters["rope_theta"] if each else 0 for each in bases]} if parameters else {}


def _granite_swa_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    base, rotated = metadata.get("granite_swa.rope.freq_base"), metadata.get("granite_swa.attention.rope_pattern")
    if type(base) is not float or not isinstance(rotated, np.ndarray) or rotated.dtype != bool:
        return {}
    return {"layer_rope_theta": [shortest(base) if each else 0.0 for each in rotated]}


_GRANITE_SWA = GGUFArchitecture(
    "granite_swa", "GraniteSWAForCausalLM", "granite_swa", "model.layers", OUTSIDE,
    {**PRE_NORM, **PAIRED_QKV, **O_PROJ, "self_attn.sinks": Place(T.ATTN_SINKS, bare=True), **MLP_NORM, **MLP},
    (
        *KEYS, *GRANITE_SCALES,
        # the loader has no pattern of its own
        Key("attention.sliding_window_pattern", kind=BOOL,
            value=lambda get: [kind == "sliding_attention" for kind in get("layer_types")]),
        Key("attention.rope_pattern", kind=BOOL, value=lambda get: [base != 0 for base in get("layer_rope_theta")]),
    ),
    biases=LLAMA_BIASES, fixed=SILU, implied=_one_base, window_period=1, from_file=_granite_swa_of_file,
)  # fmt: skip


# --- GLM --------------------------------------------------------------------------------------------------------------

# transformers pairs neighbours here, as llama.cpp does, so rows stay.
_GLM_MLP = {
    "mlp.gate_up_proj": Place(T.FFN_UP),  # gate first, then up
    "mlp.down_proj": Place(T.FFN_DOWN),
}
_QKV_BIASES: dict[frozenset[T], dict[str, Any]] = {
    frozenset(): {"attention_bias": False}, QKV_KINDS: {"attention_bias": True},
}  # fmt: skip
_GLM = GGUFArchitecture(
    "glm", "GlmForCausalLM", "chatglm", "model.layers", OUTSIDE,
    {**PRE_NORM, **QKV_PLACES, **O_PROJ, **MLP_NORM, **_GLM_MLP},
    KEYS, biases=_QKV_BIASES, fixed=SILU, implied=head_dim_is_width_over_heads, rope=Rope(partial=True),
)  # fmt: skip
_GLM4 = replace(
    _GLM, model_type="glm4", model_class="Glm4ForCausalLM", arch="glm4",
    inside={
        **PRE_NORM, **QKV_PLACES, **O_PROJ,
        "post_self_attn_layernorm": Place(T.ATTN_POST_NORM),
        **MLP_NORM, **_GLM_MLP,
        "post_mlp_layernorm": Place(T.FFN_POST_NORM),
    },
    implied=lambda get: {},
)  # fmt: skip


# --- others -----------------------------------------------------------------------------------------------------------

_SEED_OSS = GGUFArchitecture(
    "seed_oss", "SeedOssForCausalLM", "seed_oss", "model.layers", OUTSIDE,
    {**PRE_NORM, **QKV_PLACES, **O_PROJ, "post_attention_layernorm": Place(T.ATTN_POST_NORM), **MLP},
    KEYS,
    biases={
        frozenset(): {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False},
        QKV_KINDS: {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    },
    fixed=SILU,
)  # fmt: skip
_ERNIE4_5 = GGUFArchitecture(  # pairs neighbours, as llama.cpp
    "ernie4_5", "Ernie4_5ForCausalLM", "ernie4_5", "model.layers", OUTSIDE,
    {**PRE_NORM, **QKV_PLACES, **O_PROJ, **MLP_NORM, **MLP},
    KEYS, biases={frozenset(): {"use_bias": False}}, fixed=SILU,
)  # fmt: skip
_HUNYUAN = GGUFArchitecture(
    "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", "hunyuan-dense", "model.layers", OUTSIDE,
    {
        **PRE_NORM, **QKV_PLACES,
        "self_attn.query_layernorm": Place(T.ATTN_Q_NORM),
        "self_attn.key_layernorm": Place(T.ATTN_K_NORM),
        **O_PROJ, **MLP_NORM, **MLP,
    },
    KEYS, biases=NO_ATTENTION_BIAS, fixed=SILU, rope=Rope(alpha=True),
)  # fmt: skip


_APERTUS = GGUFArchitecture(
    "apertus", "ApertusForCausalLM", "apertus", "model.layers", OUTSIDE,
    {
        "attention_layernorm": Place(T.ATTN_NORM),
        **QKV_PLACES, **QK_NORM, **O_PROJ,
        "feedforward_layernorm": Place(T.FFN_NORM),
        "mlp.up_proj": Place(T.FFN_UP), "mlp.down_proj": Place(T.FFN_DOWN),
    },
    KEYS, biases={frozenset(): {"attention_bias": False}, ATTENTION_KINDS: {"attention_bias": True}},
    fixed={"hidden_act": ("xielu",)}, rope=LLAMA_ROPE, needs_output=True,
    scalars={  # of its activation, xIELU
        "mlp.act_fn.alpha_n": ("xielu.alpha_n", (1,)), "mlp.act_fn.alpha_p": ("xielu.alpha_p", (1,)),
        "mlp.act_fn.beta": ("xielu.beta", ()), "mlp.act_fn.eps": ("xielu.eps", ()),
    },
)  # fmt: skip


# --- latent attention -------------------------------------------------------------------------------------------------


def _minicpm3_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    rope = number(metadata, "minicpm3.rope.dimension_count")
    return {"qk_rope_head_dim": rope, "qk_nope_head_dim": number(metadata, "minicpm3.attention.key_length") - rope}


_EPSILON_OF_LATENTS = (
    "llama.cpp takes rms_norm_eps also for the norms of latents, where transformers takes 1e-06: "
    "logits differ by some 1e-5"
)
_MINICPM3 = GGUFArchitecture(
    "minicpm3", "MiniCPM3ForCausalLM", "minicpm3", "model.layers", OUTSIDE,
    {
        **PRE_NORM,
        "self_attn.q_a_proj": Place(T.ATTN_Q_A),
        "self_attn.q_a_layernorm": Place(T.ATTN_Q_A_NORM),
        "self_attn.q_b_proj": Place(T.ATTN_Q_B),
        "self_attn.kv_a_proj_with_mqa": Place(T.ATTN_KV_A_MQA),
        "self_attn.kv_a_layernorm": Place(T.ATTN_KV_A_NORM),
        "self_attn.kv_b_proj": Place(T.ATTN_KV_B),
        **O_PROJ, **MLP_NORM, **MLP,
    },
    (
        *KEYS[:-2],
        Key("attention.q_lora_rank", "q_lora_rank"),
        Key("attention.kv_lora_rank", "kv_lora_rank"),
        Key("attention.key_length", value=lambda get: get("qk_nope_head_dim") + get("qk_rope_head_dim")),
        Key("attention.value_length", "v_head_dim", otherwise=width_over_heads),
    ),
    biases={frozenset(): {"attention_bias": False, "mlp_bias": False}},
    # the graph has these numbers
    fixed=SILU | {"scale_emb": (12,), "scale_depth": (1.4,), "dim_model_base": (256,)},
    implied=lambda get: {"num_key_value_heads": get("num_attention_heads")},
    rope=Rope(("default", "linear", "longrope"), dim=lambda get: get("qk_rope_head_dim")),
    from_file=_minicpm3_of_file,
    near={("rms_norm_eps", lambda epsilon: epsilon != 1e-6): _EPSILON_OF_LATENTS},
)  # fmt: skip


# --- norms behind attention and MLP -----------------------------------------------------------------------------------

_POST_NORM_BLOCK = {
    **QKV_PLACES, **QK_NORM, **O_PROJ,
    "post_attention_layernorm": Place(T.ATTN_POST_NORM),
    **MLP,
    "post_feedforward_layernorm": Place(T.FFN_POST_NORM),
}  # fmt: skip
_OLMO3 = GGUFArchitecture(
    "olmo3", "Olmo3ForCausalLM", "olmo2", "model.layers", OUTSIDE, _POST_NORM_BLOCK, KEYS[:-2],
    biases=NO_ATTENTION_BIAS, fixed=SILU, implied=head_dim_is_width_over_heads, needs_output=True,
    rope=Rope(local=True, local_base=None), window_period=4, windowless=True,
    of_file=lambda metadata: number(metadata, "olmo2.attention.sliding_window") > 0,
)  # fmt: skip


def _exaone4_has_windows(get: Lookup) -> bool:
    return get("num_hidden_layers") == 64


def _no_windows(get: Lookup) -> dict[str, Any]:
    return {"sliding_window": None, "layer_types": ["full_attention"] * get("num_hidden_layers")}


# llama.cpp knows the 32B model by its 64 blocks: three of four slide, and the fourth has no rotary embedding.
_EXAONE4 = GGUFArchitecture(
    "exaone4", "Exaone4ForCausalLM", "exaone4", "model.layers", OUTSIDE, _POST_NORM_BLOCK, KEYS,
    fixed=SILU, implied=head_dim_is_width_over_heads, rope=LLAMA_ROPE, window_period=4, window_default=4096,
    when=_exaone4_has_windows, of_file=lambda metadata: number(metadata, "exaone4.block_count") == 64,
)  # fmt: skip
_EXAONE4_SMALL = replace(
    _EXAONE4, implied=lambda get: head_dim_is_width_over_heads(get) | _no_windows(get), window_period=None,
    when=lambda get: True, of_file=lambda metadata: True,
)  # fmt: skip

ROWS = (
    _MINISTRAL3, _MISTRAL3_OF_MINISTRAL3, _MISTRAL3, _MISTRAL_OF_FILE, _MINISTRAL, _INTERNLM3, _IQUESTCODER, _HELIUM,
    _ARCEE,
    _GRANITE_SWA, _GLM, _GLM4, _SEED_OSS, _ERNIE4_5, _HUNYUAN, _APERTUS, _MINICPM3, _OLMO3, _EXAONE4, _EXAONE4_SMALL,
    *layernorm.ROWS,
)  # fmt: skip
