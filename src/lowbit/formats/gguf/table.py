"""The GGUF architectures that lowbit writes and reads, as data: one row per model type of config.json.

Names of tensors and keys are those of the gguf package; what a row says beyond them follows llama.cpp: its converter
(conversion/*.py: layouts, keys) and its loader (src/models/*.cpp: which tensors and keys are required, what is computed
whatever the file says). docs/gguf-architectures.md explains the rows.

Refused: a model type without a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from gguf.constants import MODEL_TENSOR as T
from gguf.constants import GGUFValueType

from lowbit.errors import ArchitectureError
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Lookup, Place, Rope, RowLayout, RowTarget

FLOAT = GGUFValueType.FLOAT32
KV_HEADS = "attention.head_count_kv"

# Computed from the config, so the Hugging Face model has no such tensor.
DERIVED = frozenset({T.ROPE_FREQS, T.ATTN_ROT_EMBD, T.ROPE_FACTORS_LONG, T.ROPE_FACTORS_SHORT})

# --- key-values -----------------------------------------------------------------------------------------------------


def _width_over_heads(get: Lookup) -> int:
    return get("hidden_size") // get("num_attention_heads")


_HEAD_DIM = (
    Key("attention.key_length", "head_dim", otherwise=_width_over_heads),
    Key("attention.value_length", "head_dim", otherwise=_width_over_heads),
)
_LENGTHS = (
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("block_count", "num_hidden_layers"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
)
_KEYS = (
    *_LENGTHS,
    Key(KV_HEADS, "num_key_value_heads", otherwise=lambda get: get("num_attention_heads")),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", FLOAT),
    *_HEAD_DIM,
)


def _experts(count: str, width: str | None = "moe_intermediate_size") -> tuple[Key, ...]:
    keys = (Key("expert_count", count), Key("expert_used_count", "num_experts_per_tok"))
    return keys if width is None else (*keys, Key("expert_feed_forward_length", width))


# --- tensors --------------------------------------------------------------------------------------------------------

_OUTSIDE = {
    "model.embed_tokens": Place(T.TOKEN_EMBD),
    "model.norm": Place(T.OUTPUT_NORM),
    "lm_head": Place(T.OUTPUT),
}
_QKV = {
    "self_attn.q_proj": Place(T.ATTN_Q),
    "self_attn.k_proj": Place(T.ATTN_K, heads=KV_HEADS),
    "self_attn.v_proj": Place(T.ATTN_V),
}
# The rotary embedding of these architectures pairs neighbours (LLAMA_ROPE_TYPE_NORM), Hugging Face's pairs halves.
_PAIRED_QKV = {
    "self_attn.q_proj": Place(T.ATTN_Q, RowLayout.ROTARY),
    "self_attn.k_proj": Place(T.ATTN_K, RowLayout.ROTARY, KV_HEADS),
    "self_attn.v_proj": Place(T.ATTN_V),
}
_QK_NORM = {"self_attn.q_norm": Place(T.ATTN_Q_NORM), "self_attn.k_norm": Place(T.ATTN_K_NORM)}
_O_PROJ = {"self_attn.o_proj": Place(T.ATTN_OUT)}
_PRE_NORM = {"input_layernorm": Place(T.ATTN_NORM)}
_MLP_NORM = {"post_attention_layernorm": Place(T.FFN_NORM)}
_MLP = {
    "mlp.gate_proj": Place(T.FFN_GATE),
    "mlp.up_proj": Place(T.FFN_UP),
    "mlp.down_proj": Place(T.FFN_DOWN),
}


def _expert_places(path: str, router: str, leaves: tuple[str, str, str]) -> dict[str, Place]:
    gate, up, down = leaves
    return {
        f"{path}.{router}": Place(T.FFN_GATE_INP),
        f"{path}.experts.*.{gate}": Place(T.FFN_GATE_EXP),
        f"{path}.experts.*.{up}": Place(T.FFN_UP_EXP),
        f"{path}.experts.*.{down}": Place(T.FFN_DOWN_EXP),
    }


_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
_LLAMA_BLOCK = {**_PRE_NORM, **_PAIRED_QKV, **_O_PROJ, **_MLP_NORM, **_MLP}
_QWEN_BLOCK = {**_PRE_NORM, **_QKV, **_O_PROJ, **_MLP_NORM, **_MLP}
_QWEN_MOE_BLOCK = {**_PRE_NORM, **_QKV, **_O_PROJ, **_MLP_NORM, **_expert_places("mlp", "gate", _GATE_UP_DOWN)}

_QKV_KINDS = frozenset({T.ATTN_Q, T.ATTN_K, T.ATTN_V})
_ATTENTION_KINDS = _QKV_KINDS | {T.ATTN_OUT}
_MLP_KINDS = frozenset({T.FFN_GATE, T.FFN_UP, T.FFN_DOWN})
_NO_BIASES: dict[frozenset[T], dict[str, Any]] = {frozenset(): {}}
_LLAMA_BIASES = {
    frozenset(): {"attention_bias": False, "mlp_bias": False},
    _ATTENTION_KINDS: {"attention_bias": True, "mlp_bias": False},
    _MLP_KINDS: {"attention_bias": False, "mlp_bias": True},
    _ATTENTION_KINDS | _MLP_KINDS: {"attention_bias": True, "mlp_bias": True},
}
_NO_ATTENTION_BIAS: dict[frozenset[T], dict[str, Any]] = {frozenset(): {"attention_bias": False}}
_GPT_BIASES: dict[frozenset[T], dict[str, Any]] = {
    frozenset({T.ATTN_NORM, T.ATTN_QKV, T.ATTN_OUT, T.FFN_NORM, T.FFN_UP, T.FFN_DOWN, T.OUTPUT_NORM}): {}
}
_EXACT_GELU = {
    ("hidden_act", "gelu"): "llama.cpp computes GELU by its tanh form, which differs from the exact one by up to 5e-4",
}
_SILU = {"hidden_act": ("silu", "swish")}
_LLAMA_ROPE = Rope(("default", "linear", "yarn", "llama3"))


# --- what llama.cpp derives -----------------------------------------------------------------------------------------


def _head_dim_is_width_over_heads(get: Lookup) -> dict[str, Any]:
    """The loader expects q of [hidden, hidden]."""
    return {"head_dim": _width_over_heads(get)}


def _gemma_scale(blocks_of_27b: int):
    """llama.cpp scales attention by 1/√head_dim, but in the 27B model, known by its blocks, by 1/√(width / heads)."""

    def implied(get: Lookup) -> dict[str, Any]:
        big = get("num_hidden_layers") == blocks_of_27b
        return {"query_pre_attn_scalar": _width_over_heads(get) if big else get("head_dim")}

    return implied


def _every_fourth_without_rope(get: Lookup) -> dict[str, Any]:
    blocks = range(get("num_hidden_layers"))
    return {"no_rope_layers": [int((block + 1) % 4 != 0) for block in blocks]}


# --- rows -----------------------------------------------------------------------------------------------------------

_LLAMA = GGUFArchitecture(
    "llama", "LlamaForCausalLM", "llama", "model.layers", _OUTSIDE, _LLAMA_BLOCK, _KEYS,
    biases=_LLAMA_BIASES, fixed=_SILU, rope=_LLAMA_ROPE,
)  # fmt: skip
_MISTRAL = replace(
    _LLAMA, model_type="mistral", model_class="MistralForCausalLM", biases=_NO_BIASES, read_back=False,
)  # fmt: skip
_MIXTRAL = GGUFArchitecture(
    "mixtral", "MixtralForCausalLM", "llama", "model.layers", _OUTSIDE,
    {**_PRE_NORM, **_PAIRED_QKV, **_O_PROJ, **_MLP_NORM,
     **_expert_places("block_sparse_moe", "gate", ("w1", "w3", "w2"))},
    (*_KEYS, *_experts("num_local_experts", None)),
    fixed=_SILU, rope=_LLAMA_ROPE,
)  # fmt: skip
_SMOLLM3 = GGUFArchitecture(
    "smollm3", "SmolLM3ForCausalLM", "smollm3", "model.layers", _OUTSIDE, _LLAMA_BLOCK, _KEYS,
    biases={frozenset(): {"attention_bias": False, "mlp_bias": False}}, fixed=_SILU,
    implied=_every_fourth_without_rope,
)  # fmt: skip
_GRANITE = replace(
    _LLAMA, model_type="granite", model_class="GraniteForCausalLM", arch="granite",
    keys=(
        *_KEYS,
        Key("attention.scale", "attention_multiplier", FLOAT),
        Key("embedding_scale", "embedding_multiplier", FLOAT, default=1.0),
        Key("residual_scale", "residual_multiplier", FLOAT, default=1.0),
        Key("logit_scale", "logits_scaling", FLOAT),
    ),
)  # fmt: skip
_QWEN2 = GGUFArchitecture(
    "qwen2", "Qwen2ForCausalLM", "qwen2", "model.layers", _OUTSIDE, _QWEN_BLOCK, _KEYS[:-2],
    biases={_QKV_KINDS: {}}, fixed=_SILU, implied=_head_dim_is_width_over_heads,
)  # fmt: skip
_QWEN2_MOE = replace(
    _QWEN2, model_type="qwen2_moe", model_class="Qwen2MoeForCausalLM", arch="qwen2moe",
    inside={
        **_QWEN_MOE_BLOCK,
        "mlp.shared_expert_gate": Place(T.FFN_GATE_INP_SHEXP, RowLayout.ONE_ROW),
        "mlp.shared_expert.gate_proj": Place(T.FFN_GATE_SHEXP),
        "mlp.shared_expert.up_proj": Place(T.FFN_UP_SHEXP),
        "mlp.shared_expert.down_proj": Place(T.FFN_DOWN_SHEXP),
    },
    keys=(*_KEYS[:-2], *_experts("num_experts"),
          Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
    biases={_QKV_KINDS: {"qkv_bias": True}, frozenset(): {"qkv_bias": False}},
    fixed=_SILU | {"norm_topk_prob": (False,)}, needs_output=True,
)  # fmt: skip
_QWEN3 = GGUFArchitecture(
    "qwen3", "Qwen3ForCausalLM", "qwen3", "model.layers", _OUTSIDE, _QWEN_BLOCK | _QK_NORM, _KEYS,
    biases=_NO_ATTENTION_BIAS, fixed=_SILU,
)  # fmt: skip
_QWEN3_MOE = replace(
    _QWEN3, model_type="qwen3_moe", model_class="Qwen3MoeForCausalLM", arch="qwen3moe",
    inside=_QWEN_MOE_BLOCK | _QK_NORM, keys=(*_KEYS, *_experts("num_experts")),
    fixed=_SILU | {"norm_topk_prob": (True,)},
)  # fmt: skip

_GEMMA_NORM = RowLayout.PLUS_ONE
_GEMMA_OUTSIDE = {"model.embed_tokens": Place(T.TOKEN_EMBD), "model.norm": Place(T.OUTPUT_NORM, _GEMMA_NORM)}
_GEMMA_BLOCK = {
    "input_layernorm": Place(T.ATTN_NORM, _GEMMA_NORM),
    **_QKV, **_O_PROJ,
    "post_attention_layernorm": Place(T.ATTN_POST_NORM, _GEMMA_NORM),
    "pre_feedforward_layernorm": Place(T.FFN_PRE_NORM, _GEMMA_NORM),
    **_MLP,
    "post_feedforward_layernorm": Place(T.FFN_POST_NORM, _GEMMA_NORM),
}  # fmt: skip
_GEMMA_FIXED = {
    "hidden_activation": ("gelu_pytorch_tanh", "gelu_new"),
    "use_bidirectional_attention": (None, False),
}
_GEMMA = GGUFArchitecture(
    "gemma", "GemmaForCausalLM", "gemma", "model.layers", _GEMMA_OUTSIDE,
    {
        "input_layernorm": Place(T.ATTN_NORM, _GEMMA_NORM),
        **_QKV, **_O_PROJ,
        "post_attention_layernorm": Place(T.FFN_NORM, _GEMMA_NORM),
        **_MLP,
    },
    _KEYS, biases=_NO_ATTENTION_BIAS,
    fixed={"hidden_act": ("gelu_pytorch_tanh", "gelu_new", "gelu"), "use_bidirectional_attention": (None, False)},
    near=_EXACT_GELU,
)  # fmt: skip
_GEMMA2 = GGUFArchitecture(
    "gemma2", "Gemma2ForCausalLM", "gemma2", "model.layers", _GEMMA_OUTSIDE, _GEMMA_BLOCK,
    (*_KEYS,
     Key("attn_logit_softcapping", "attn_logit_softcapping", FLOAT, default=50.0),
     Key("final_logit_softcapping", "final_logit_softcapping", FLOAT, default=30.0)),
    biases=_NO_ATTENTION_BIAS, fixed=_GEMMA_FIXED, implied=_gemma_scale(46), window_period=2,
    window_default=4096,
)  # fmt: skip
_GEMMA3_TEXT = replace(
    _GEMMA2, model_type="gemma3_text", model_class="Gemma3ForCausalLM", arch="gemma3",
    outside=_GEMMA_OUTSIDE | {"lm_head": Place(T.OUTPUT)},
    inside=_GEMMA_BLOCK | {
        "self_attn.q_norm": Place(T.ATTN_Q_NORM, _GEMMA_NORM),
        "self_attn.k_norm": Place(T.ATTN_K_NORM, _GEMMA_NORM),
    },
    keys=(*_KEYS, Key("final_logit_softcapping", "final_logit_softcapping", FLOAT, optional=True)),
    fixed=_GEMMA_FIXED | {"attn_logit_softcapping": (None,)}, implied=_gemma_scale(62),
    rope=Rope(("default", "linear"), local=True), window_period=6, window_default=0,
)  # fmt: skip
_GEMMA3 = replace(
    _GEMMA3_TEXT, model_type="gemma3", model_class="Gemma3ForConditionalGeneration",
    blocks="language_model.model.layers",
    outside={f"language_model.{name}": place for name, place in _GEMMA3_TEXT.outside.items()},
    read_back=False, left_out=("vision_tower.", "multi_modal_projector."),
)  # fmt: skip
_PHI3 = GGUFArchitecture(
    "phi3", "Phi3ForCausalLM", "phi3", "model.layers", _OUTSIDE,
    {
        **_PRE_NORM,
        "self_attn.qkv_proj": Place(T.ATTN_QKV),
        **_O_PROJ, **_MLP_NORM,
        "mlp.gate_up_proj": Place(T.FFN_UP),  # gate first, then up: what LLM_FFN_SWIGLU takes too
        "mlp.down_proj": Place(T.FFN_DOWN),
    },
    (*_KEYS[:-2],
     Key("rope.scaling.original_context_length", "original_max_position_embeddings",
         otherwise=lambda get: get("max_position_embeddings"))),
    fixed=_SILU, implied=_head_dim_is_width_over_heads,
    rope=Rope(("default", "linear", "longrope"), partial=True), window_period=0,
)  # fmt: skip
_OLMO2 = GGUFArchitecture(
    "olmo2", "Olmo2ForCausalLM", "olmo2", "model.layers", _OUTSIDE,
    {
        **_QKV, **_QK_NORM, **_O_PROJ,
        "post_attention_layernorm": Place(T.ATTN_POST_NORM),
        **_MLP,
        "post_feedforward_layernorm": Place(T.FFN_POST_NORM),
    },
    _KEYS[:-2], biases=_NO_ATTENTION_BIAS, fixed=_SILU, implied=_head_dim_is_width_over_heads, needs_output=True,
)  # fmt: skip
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
        "attn.c_attn": Place(T.ATTN_QKV, RowLayout.TRANSPOSED),
        "attn.c_proj": Place(T.ATTN_OUT, RowLayout.TRANSPOSED),
        "ln_2": Place(T.FFN_NORM),
        "mlp.c_fc": Place(T.FFN_UP, RowLayout.TRANSPOSED),
        "mlp.c_proj": Place(T.FFN_DOWN, RowLayout.TRANSPOSED),
    },
    (
        Key("context_length", "n_positions"),
        Key("embedding_length", "n_embd"),
        Key("block_count", "n_layer"),
        Key("feed_forward_length", "n_inner", otherwise=lambda get: 4 * get("n_embd")),
        Key("attention.head_count", "n_head"),
        Key("attention.layer_norm_epsilon", "layer_norm_epsilon", FLOAT),
    ),
    biases=_GPT_BIASES,
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
        "attention.query_key_value": Place(T.ATTN_QKV, RowLayout.QKV),
        "attention.dense": Place(T.ATTN_OUT),
        "post_attention_layernorm": Place(T.FFN_NORM),
        "mlp.dense_h_to_4h": Place(T.FFN_UP),
        "mlp.dense_4h_to_h": Place(T.FFN_DOWN),
    },
    (
        *_LENGTHS,
        Key("attention.layer_norm_epsilon", "layer_norm_eps", FLOAT),
        Key("use_parallel_residual", "use_parallel_residual", GGUFValueType.BOOL),
    ),
    biases=_GPT_BIASES,
    fixed={"hidden_act": ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh"), "attention_bias": (True,)},
    near=_EXACT_GELU,
    rope=Rope(partial=True), needs_output=True,
)  # fmt: skip
_GPT_OSS = GGUFArchitecture(
    "gpt_oss", "GptOssForCausalLM", "gpt-oss", "model.layers", _OUTSIDE,
    {
        **_PRE_NORM, **_QKV, **_O_PROJ,
        "self_attn.sinks": Place(T.ATTN_SINKS, bare=True),
        "post_attention_layernorm": Place(T.ATTN_POST_NORM),
        **_expert_places("mlp", "router", _GATE_UP_DOWN),
    },
    (*_KEYS, *_experts("num_local_experts", "intermediate_size")),
    biases={_ATTENTION_KINDS | {T.FFN_GATE_INP, T.FFN_GATE_EXP, T.FFN_UP_EXP, T.FFN_DOWN_EXP}: {}},
    fixed=_SILU | {"attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    rope=Rope(truncates=False), window_period=2, needs_output=True,
)  # fmt: skip

ROWS: dict[str, GGUFArchitecture] = {
    row.model_type: row
    for row in (
        _LLAMA, _MISTRAL, _MIXTRAL, _SMOLLM3, _GRANITE, _QWEN2, _QWEN2_MOE, _QWEN3, _QWEN3_MOE, _GEMMA, _GEMMA2,
        _GEMMA3_TEXT, _GEMMA3, _PHI3, _OLMO2, _GPT2, _GPT_NEOX, _GPT_OSS,
    )
}  # fmt: skip


def row_of_model(model_type: Any, where: str) -> GGUFArchitecture:
    """The row of a model_type; ArchitectureError names those that there are."""
    row = ROWS.get(model_type) if isinstance(model_type, str) else None
    if row is None:
        raise ArchitectureError(
            f"{where}: model type {str(model_type)[:80]!r} has no place in GGUF that lowbit knows",
            f"it writes {', '.join(ROWS)}",
        )
    return row


def row_of_file(metadata: dict[str, Any], where: str) -> GGUFArchitecture:
    """The row for reading a GGUF file with these key-values; ArchitectureError lists the readable architectures."""
    arch = metadata.get("general.architecture")
    experts = metadata.get(f"{arch}.expert_count", 0) if isinstance(arch, str) else 0
    readable = {row.arch: row for row in ROWS.values() if row.read_back}
    if arch not in readable:
        raise ArchitectureError(
            f"{where}: GGUF architecture {str(arch)[:80]!r} cannot be read",
            f"readable are {', '.join(readable)}; for others use the safetensors checkpoint of the model",
        )
    for row in ROWS.values():
        stacks_experts = any("*" in path for path in row.inside)
        if row.read_back and row.arch == arch and stacks_experts is (type(experts) is int and experts > 0):
            return row
    raise ArchitectureError(
        f"{where}: {arch} with {str(experts)[:80]} experts cannot be read from GGUF",
        "use the safetensors checkpoint of the model",
    )


def gguf_names(config: dict[str, Any], parameters: Iterable[str]) -> dict[str, str]:
    """Hugging Face tensor name → GGUF tensor name; the experts of a block share one.

    Names are those of lowbit's `Architecture`: experts one by one. Parts that GGUF keeps in other files (vision) are
    left out. ArchitectureError for a model type without a row, and for a name that has no place in it.
    """
    row = row_of_model(config.get("model_type"), "config.json")
    return {name: target_of(row, name, "config.json").name for name in parameters if not row.leaves_out(name)}


def target_of(row: GGUFArchitecture, parameter: str, where: str) -> RowTarget:
    """Where a parameter goes; ArchitectureError if nowhere."""
    target = row.find(parameter)
    if target is None:
        raise ArchitectureError(
            f"{where}: {parameter!r} has no place in a GGUF file of architecture {row.arch}",
            "llama.cpp cannot run this variant of the model",
        )
    return target
