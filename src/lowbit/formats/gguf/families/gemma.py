"""Gemma 1 to 3.

Models that make one embedding of a text: Gemma with attention in both directions.

Embedding models that are plain decoders (Qwen 3, Llama, Mistral …) need no row: their class is the bare decoder, whose
names lack "model.", and `pooling.py` reads how their folder pools the tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    EXACT_GELU,
    FLOAT,
    KEYS,
    MLP,
    NO_ATTENTION_BIAS,
    O_PROJ,
    QKV_PLACES,
    width_over_heads,
)
from lowbit.formats.gguf.layout import PLUS_ONE, Lookup
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope


def _gemma_scale(blocks_of_27b: int):
    """llama.cpp scales attention by 1/√head_dim, but in the 27B model, known by its blocks, by 1/√(width / heads)."""

    def implied(get: Lookup) -> dict[str, Any]:
        big = get("num_hidden_layers") == blocks_of_27b
        return {"query_pre_attn_scalar": width_over_heads(get) if big else get("head_dim")}

    return implied


def is_causal(get: Lookup) -> bool:
    return not get("use_bidirectional_attention")


_GEMMA_OUTSIDE = {"model.embed_tokens": Place(T.TOKEN_EMBD), "model.norm": Place(T.OUTPUT_NORM, PLUS_ONE)}
_GEMMA_BLOCK = {
    "input_layernorm": Place(T.ATTN_NORM, PLUS_ONE),
    **QKV_PLACES, **O_PROJ,
    "post_attention_layernorm": Place(T.ATTN_POST_NORM, PLUS_ONE),
    "pre_feedforward_layernorm": Place(T.FFN_PRE_NORM, PLUS_ONE),
    **MLP,
    "post_feedforward_layernorm": Place(T.FFN_POST_NORM, PLUS_ONE),
}  # fmt: skip
_GEMMA_FIXED = {
    "hidden_activation": ("gelu_pytorch_tanh", "gelu_new"),
    "use_bidirectional_attention": (None, False),
}
_GEMMA = GGUFArchitecture(
    "gemma", "GemmaForCausalLM", "gemma", "model.layers", _GEMMA_OUTSIDE,
    {
        "input_layernorm": Place(T.ATTN_NORM, PLUS_ONE),
        **QKV_PLACES, **O_PROJ,
        "post_attention_layernorm": Place(T.FFN_NORM, PLUS_ONE),
        **MLP,
    },
    KEYS, biases=NO_ATTENTION_BIAS,
    fixed={"hidden_act": ("gelu_pytorch_tanh", "gelu_new", "gelu"), "use_bidirectional_attention": (None, False)},
    near=EXACT_GELU,
)  # fmt: skip
_GEMMA2 = GGUFArchitecture(
    "gemma2", "Gemma2ForCausalLM", "gemma2", "model.layers", _GEMMA_OUTSIDE, _GEMMA_BLOCK,
    (*KEYS,
     Key("attn_logit_softcapping", "attn_logit_softcapping", FLOAT, default=50.0),
     Key("final_logit_softcapping", "final_logit_softcapping", FLOAT, default=30.0)),
    biases=NO_ATTENTION_BIAS, fixed=_GEMMA_FIXED, implied=_gemma_scale(46), window_period=2,
    window_default=4096,
)  # fmt: skip
_GEMMA3_TEXT = replace(
    _GEMMA2, model_type="gemma3_text", model_class="Gemma3ForCausalLM", arch="gemma3",
    outside=_GEMMA_OUTSIDE | {"lm_head": Place(T.OUTPUT)},
    inside=_GEMMA_BLOCK | {
        "self_attn.q_norm": Place(T.ATTN_Q_NORM, PLUS_ONE),
        "self_attn.k_norm": Place(T.ATTN_K_NORM, PLUS_ONE),
    },
    keys=(*KEYS, Key("final_logit_softcapping", "final_logit_softcapping", FLOAT, optional=True)),
    fixed=_GEMMA_FIXED | {"attn_logit_softcapping": (None,)}, implied=_gemma_scale(62),
    rope=Rope(("default", "linear"), local=True), window_period=6, window_default=0, windowless=True, when=is_causal,
)  # fmt: skip
_GEMMA3 = replace(
    _GEMMA3_TEXT, model_type="gemma3", model_class="Gemma3ForConditionalGeneration",
    blocks="language_model.model.layers",
    outside={f"language_model.{name}": place for name, place in _GEMMA3_TEXT.outside.items()},
    read_back=False, left_out=("vision_tower.", "multi_modal_projector."),
)  # fmt: skip

ROWS = (_GEMMA, _GEMMA2, _GEMMA3_TEXT, _GEMMA3)


def _scale_is_of_the_head(get: Lookup) -> dict[str, Any]:
    return {"query_pre_attn_scalar": get("head_dim")}


EMBEDDING_ROWS = (
    replace(
        _GEMMA3_TEXT, arch="gemma-embedding", when=lambda get: not is_causal(get),
        fixed=_GEMMA3_TEXT.fixed | {"use_bidirectional_attention": (True,), "final_logit_softcapping": (None,)},
        keys=tuple(key for key in _GEMMA3_TEXT.keys if key.name != "final_logit_softcapping"),
        implied=_scale_is_of_the_head, window_of=lambda window: 2 * (window - 1),
    ),
)  # fmt: skip
