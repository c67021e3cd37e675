"""What many rows share: key-values, places, biases, and what llama.cpp takes for granted.

Names of tensors and keys are those of the gguf package.
"""

from __future__ import annotations

from typing import Any

from gguf.constants import MODEL_TENSOR as T
from gguf.constants import GGUFValueType

from lowbit.formats.gguf.layout import ROTARY_K, ROTARY_Q, Lookup
from lowbit.formats.gguf.row import Key, Place, Rope

FLOAT = GGUFValueType.FLOAT32
BOOL = GGUFValueType.BOOL
KV_HEADS = "attention.head_count_kv"

# --- key-values -----------------------------------------------------------------------------------------------------


def width_over_heads(get: Lookup) -> int:
    return get("hidden_size") // get("num_attention_heads")


HEAD_DIM = (
    Key("attention.key_length", "head_dim", otherwise=width_over_heads),
    Key("attention.value_length", "head_dim", otherwise=width_over_heads),
)
LENGTHS = (
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("block_count", "num_hidden_layers"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
)
KEYS = (
    *LENGTHS,
    Key(KV_HEADS, "num_key_value_heads", otherwise=lambda get: get("num_attention_heads")),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", FLOAT),
    *HEAD_DIM,
)


def expert_keys(count: str, width: str | None = "moe_intermediate_size") -> tuple[Key, ...]:
    keys = (Key("expert_count", count), Key("expert_used_count", "num_experts_per_tok"))
    return keys if width is None else (*keys, Key("expert_feed_forward_length", width))


# --- tensors --------------------------------------------------------------------------------------------------------

OUTSIDE = {
    "model.embed_tokens": Place(T.TOKEN_EMBD),
    "model.norm": Place(T.OUTPUT_NORM),
    "lm_head": Place(T.OUTPUT),
}
QKV_PLACES = {
    "self_attn.q_proj": Place(T.ATTN_Q),
    "self_attn.k_proj": Place(T.ATTN_K),
    "self_attn.v_proj": Place(T.ATTN_V),
}
# The rotary embedding of these architectures pairs neighbours (LLAMA_ROPE_TYPE_NORM), Hugging Face's pairs halves.
PAIRED_QKV = {
    "self_attn.q_proj": Place(T.ATTN_Q, ROTARY_Q),
    "self_attn.k_proj": Place(T.ATTN_K, ROTARY_K),
    "self_attn.v_proj": Place(T.ATTN_V),
}
QK_NORM = {"self_attn.q_norm": Place(T.ATTN_Q_NORM), "self_attn.k_norm": Place(T.ATTN_K_NORM)}
O_PROJ = {"self_attn.o_proj": Place(T.ATTN_OUT)}
PRE_NORM = {"input_layernorm": Place(T.ATTN_NORM)}
MLP_NORM = {"post_attention_layernorm": Place(T.FFN_NORM)}
MLP = {
    "mlp.gate_proj": Place(T.FFN_GATE),
    "mlp.up_proj": Place(T.FFN_UP),
    "mlp.down_proj": Place(T.FFN_DOWN),
}


def expert_places(path: str, router: str, leaves: tuple[str, str, str]) -> dict[str, Place]:
    gate, up, down = leaves
    return {
        f"{path}.{router}": Place(T.FFN_GATE_INP),
        f"{path}.experts.*.{gate}": Place(T.FFN_GATE_EXP),
        f"{path}.experts.*.{up}": Place(T.FFN_UP_EXP),
        f"{path}.experts.*.{down}": Place(T.FFN_DOWN_EXP),
    }


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
LLAMA_BLOCK = {**PRE_NORM, **PAIRED_QKV, **O_PROJ, **MLP_NORM, **MLP}
QWEN_BLOCK = {**PRE_NORM, **QKV_PLACES, **O_PROJ, **MLP_NORM, **MLP}
QWEN_MOE_BLOCK = {**PRE_NORM, **QKV_PLACES, **O_PROJ, **MLP_NORM, **expert_places("mlp", "gate", GATE_UP_DOWN)}

QKV_KINDS = frozenset({T.ATTN_Q, T.ATTN_K, T.ATTN_V})
ATTENTION_KINDS = QKV_KINDS | {T.ATTN_OUT}
MLP_KINDS = frozenset({T.FFN_GATE, T.FFN_UP, T.FFN_DOWN})
NO_BIASES: dict[frozenset[T], dict[str, Any]] = {frozenset(): {}}
LLAMA_BIASES = {
    frozenset(): {"attention_bias": False, "mlp_bias": False},
    ATTENTION_KINDS: {"attention_bias": True, "mlp_bias": False},
    MLP_KINDS: {"attention_bias": False, "mlp_bias": True},
    ATTENTION_KINDS | MLP_KINDS: {"attention_bias": True, "mlp_bias": True},
}
NO_ATTENTION_BIAS: dict[frozenset[T], dict[str, Any]] = {frozenset(): {"attention_bias": False}}
GPT_BIASES: dict[frozenset[T], dict[str, Any]] = {
    frozenset({T.ATTN_NORM, T.ATTN_QKV, T.ATTN_OUT, T.FFN_NORM, T.FFN_UP, T.FFN_DOWN, T.OUTPUT_NORM}): {}
}
EXACT_GELU = {
    ("hidden_act", "gelu"): "llama.cpp computes GELU by its tanh form, which differs from the exact one by up to 5e-4",
}
SILU = {"hidden_act": ("silu", "swish")}
LLAMA_ROPE = Rope(("default", "linear", "yarn", "llama3"))


# --- what llama.cpp derives -----------------------------------------------------------------------------------------


def number(metadata: dict[str, Any], key: str, otherwise: int = 0) -> int:
    """An integer key-value of a file; `otherwise` where it has none, or something else."""
    value = metadata.get(key)
    return value if type(value) is int else otherwise


def head_dim_is_width_over_heads(get: Lookup) -> dict[str, Any]:
    """The loader expects q of [hidden, hidden]."""
    return {"head_dim": width_over_heads(get)}
