"""Latent attention: DeepSeek 2 and 3, and what is built like them.

llama.cpp absorbs the keys' half of kv_b_proj into the queries, so the file has it transposed head by head, beside the
values' half: attention is then one over the latent, [kv_lora_rank + qk_rope_head_dim], with a single head of keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    BOOL,
    FLOAT,
    KV_HEADS,
    LENGTHS,
    MLP,
    MLP_NORM,
    NO_ATTENTION_BIAS,
    O_PROJ,
    OUTSIDE,
    PRE_NORM,
    SILU,
    expert_keys,
)
from lowbit.formats.gguf.families.routing import (
    CORRECTED_BLOCKS,
    DENSE_BLOCKS,
    EXPERT_BLOCKS,
    GROUPS,
    LEADING_DENSE,
    LEADING_DENSE_TYPES,
    SHARED_COUNT,
    SIGMOID,
    SOFTMAX,
    WEIGHTS,
    dense_blocks_first,
    gating,
    is_gated,
    mlp_types_of_file,
)
from lowbit.formats.gguf.layout import Lookup, RowLayout, Shape
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Places, Rope, grouped

# --- tensors --------------------------------------------------------------------------------------------------------


def _kv_heads(get: Lookup) -> tuple[int, int, int]:
    """(heads, rows of a head that become keys, rows that become values)."""
    return get("num_attention_heads"), get("qk_nope_head_dim"), get("v_head_dim")


def _rows_of_values(get: Lookup, count: int) -> np.ndarray:
    heads, keys, values = _kv_heads(get)
    if count != heads * (keys + values):
        raise ValueError(f"{count} rows are not {heads} heads of {keys} + {values}")
    return np.arange(count).reshape(heads, -1)[:, keys:].reshape(-1)


def _values_by_head(get: Lookup, shape: Shape) -> Shape:
    heads, _, values = _kv_heads(get)
    return heads, values, shape[-1]


def _keys_by_head(get: Lookup) -> tuple[int, int, int, int]:
    heads, keys, values = _kv_heads(get)
    return heads, keys + values, 0, keys


ABSORBED_KEYS = RowLayout("keys of each head, transposed", heads=_keys_by_head)
ABSORBED_VALUES = RowLayout(
    "values of each head", rows=_rows_of_values, shape=_values_by_head,
    unshape=lambda get, shape: (shape[0] * shape[1], shape[2]),
)  # fmt: skip
_QUERIES = {
    **grouped("queries", {"self_attn.q_proj": Place(T.ATTN_Q)}),
    **grouped("queries by way of a latent", {
        "self_attn.q_a_proj": Place(T.ATTN_Q_A),
        "self_attn.q_a_layernorm": Place(T.ATTN_Q_A_NORM),
        "self_attn.q_b_proj": Place(T.ATTN_Q_B),
    }),
}  # fmt: skip
LATENTS: Places = {
    "self_attn.kv_a_proj_with_mqa": Place(T.ATTN_KV_A_MQA),
    "self_attn.kv_a_layernorm": Place(T.ATTN_KV_A_NORM),
    "self_attn.kv_b_proj": (Place(T.ATTN_K_B, ABSORBED_KEYS), Place(T.ATTN_V_B, ABSORBED_VALUES)),
}
LATENT: Places = {**PRE_NORM, **_QUERIES, **LATENTS, **O_PROJ, **MLP_NORM}
# --- key-values -----------------------------------------------------------------------------------------------------

LATENT_SIZES = (
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", FLOAT),
    Key("attention.kv_lora_rank", "kv_lora_rank"),
    Key("attention.key_length", value=lambda get: get("kv_lora_rank") + get("qk_rope_head_dim")),
    Key("attention.value_length", value=lambda get: get("kv_lora_rank")),
    Key("attention.key_length_mla", value=lambda get: get("qk_nope_head_dim") + get("qk_rope_head_dim")),
    Key("attention.value_length_mla", "v_head_dim"),
)
LATENT_KEYS = (*LENGTHS, Key(KV_HEADS, value=lambda get: 1), *LATENT_SIZES)
# The loader knows by the blocks which models have q_proj: it asks for no rank there, and for one everywhere else.
_PLAIN_QUERIES = (26, 27)


def _rank_of_queries(get: Lookup) -> int | None:
    return None if get("num_hidden_layers") in _PLAIN_QUERIES else get("q_lora_rank") or 0


DEEPSEEK2_KEYS = (*LATENT_KEYS, Key("attention.q_lora_rank", value=_rank_of_queries))


def heads_of_latent(arch: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The sizes of config.json that key-values have in sums, and the rank of queries, which some files lack."""
    rotated, whole = (metadata.get(f"{arch}.{key}") for key in ("rope.dimension_count", "attention.key_length_mla"))
    sizes = {}
    if type(rotated) is int and type(whole) is int:
        sizes = {"qk_rope_head_dim": rotated, "qk_nope_head_dim": whole - rotated}
    return sizes | {"q_lora_rank": metadata.get(f"{arch}.attention.q_lora_rank") or None}


def _deepseek2_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    groups = metadata.get("deepseek2.expert_group_count", 1)
    limited = {} if groups == 1 else {
        "topk_method": "group_limited_greedy", "n_group": groups,
        "topk_group": metadata.get("deepseek2.expert_group_used_count"),
    }  # fmt: skip
    return heads_of_latent("deepseek2", metadata) | limited


def _deepseek3_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    return heads_of_latent("deepseek2", metadata) | {"num_nextn_predict_layers": 0}


def a_key_for_each_query(get: Lookup) -> dict[str, Any]:
    heads = {"num_key_value_heads": get("num_attention_heads")}
    return heads | ({"q_lora_rank": None} if get("num_hidden_layers") in _PLAIN_QUERIES else {})


_LATENT_ROPE = Rope(("default", "linear", "yarn"), dim=lambda get: get("qk_rope_head_dim"), latent=())

# --- the rows -------------------------------------------------------------------------------------------------------

_DEEPSEEK_V2 = GGUFArchitecture(
    "deepseek_v2", "DeepseekV2ForCausalLM", "deepseek2", "model.layers", OUTSIDE,
    {**LATENT, **DENSE_BLOCKS, **grouped("experts", EXPERT_BLOCKS)},
    (*DEEPSEEK2_KEYS, *expert_keys("n_routed_experts"), SHARED_COUNT, WEIGHTS[0], LEADING_DENSE, gating(SOFTMAX)),
    biases=NO_ATTENTION_BIAS, rope=_LATENT_ROPE,
    fixed=SILU | {"topk_method": ("greedy",), "norm_topk_prob": (False,), "mlp_bias": (False,)},
    implied=a_key_for_each_query,
    of_file=is_gated("deepseek2", SOFTMAX, SOFTMAX), from_file=_deepseek2_of_file,
)  # fmt: skip
_DEEPSEEK_V3 = replace(
    _DEEPSEEK_V2, model_type="deepseek_v3", model_class="DeepseekV3ForCausalLM",
    inside={**LATENT, **DENSE_BLOCKS, **grouped("experts", CORRECTED_BLOCKS)},
    keys=(*DEEPSEEK2_KEYS, *expert_keys("n_routed_experts"), SHARED_COUNT, *WEIGHTS, *GROUPS, LEADING_DENSE,
          gating(SIGMOID)),
    fixed=SILU | {"rope_interleave": (True,)},
    of_file=is_gated("deepseek2", SIGMOID, SOFTMAX), from_file=_deepseek3_of_file,
)  # fmt: skip
_EPSILON_OF_LATENTS = (
    "the norms of the latents have an epsilon of their own in transformers, 1e-6, and that of the other norms in "
    "llama.cpp: logits differ by some 1e-5"
)
_GLM4_MOE_LITE = replace(
    _DEEPSEEK_V3, model_type="glm4_moe_lite", model_class="Glm4MoeLiteForCausalLM",
    keys=(*DEEPSEEK2_KEYS, *expert_keys("n_routed_experts"), SHARED_COUNT, *WEIGHTS, *GROUPS, LEADING_DENSE_TYPES,
          gating(SIGMOID)),
    near={("rms_norm_eps", 1e-5): _EPSILON_OF_LATENTS},
    implied=lambda get: a_key_for_each_query(get) | dense_blocks_first(get), read_back=False,
)  # fmt: skip
_KIMI_K2 = replace(_DEEPSEEK_V3, model_type="kimi_k2", read_back=False)
_YOUTU = replace(
    _DEEPSEEK_V3, model_type="youtu", model_class="YoutuForCausalLM",
    inside={**LATENT, **MLP},
    keys=(*DEEPSEEK2_KEYS, Key("expert_feed_forward_length", value=lambda get: get("intermediate_size")),
          Key("expert_shared_count", value=lambda get: 0),
          Key("leading_dense_block_count", value=lambda get: get("num_hidden_layers"))),
    of_file=lambda metadata: True, from_file=lambda metadata: heads_of_latent("deepseek2", metadata),
)  # fmt: skip

# --- sparse attention -----------------------------------------------------------------------------------------------

_INDEXER = grouped("indexer", {
    "self_attn.indexer.k_norm": Place(T.INDEXER_K_NORM),
    "self_attn.indexer.weights_proj": Place(T.INDEXER_PROJ),
    "self_attn.indexer.wk": Place(T.INDEXER_ATTN_K),
    "self_attn.indexer.wq_b": Place(T.INDEXER_ATTN_Q_B),
})  # fmt: skip
_SPARSE_KEYS = (
    *LATENT_KEYS, Key("attention.q_lora_rank", "q_lora_rank"),
    *expert_keys("n_routed_experts"), SHARED_COUNT, *WEIGHTS, *GROUPS, LEADING_DENSE_TYPES, gating(SIGMOID),
    Key("attention.indexer.head_count", "index_n_heads"),
    Key("attention.indexer.key_length", "index_head_dim"),
    Key("attention.indexer.top_k", "index_topk"),
)  # fmt: skip


def _sparse_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    arch = metadata["general.architecture"]
    types = mlp_types_of_file(arch, metadata)
    dense = types["mlp_layer_types"].count("dense")
    found = heads_of_latent(arch, metadata) | types | {"first_k_dense_replace": dense}
    full = metadata.get(f"{arch}.attention.indexer.types")
    if isinstance(full, np.ndarray):
        found["indexer_types"] = ["full" if each else "shared" for each in full]
    return found


def _indexed_everywhere(get: Lookup) -> dict[str, Any]:
    indexed = {"layer_types": ["indexed_attention"] * get("num_hidden_layers")}
    return indexed | dense_blocks_first(get) | {"num_key_value_heads": get("num_attention_heads")}


_DEEPSEEK_V32 = GGUFArchitecture(
    "deepseek_v32", "DeepseekV32ForCausalLM", "deepseek32", "model.layers", OUTSIDE,
    {**LATENT, **_INDEXER, **DENSE_BLOCKS, **grouped("experts", CORRECTED_BLOCKS)}, _SPARSE_KEYS,
    biases={frozenset({T.INDEXER_K_NORM}): {"attention_bias": False}},
    fixed=SILU | {"mlp_bias": (False,)}, implied=_indexed_everywhere,
    rope=Rope(("default", "linear", "yarn"), dim=lambda get: get("qk_rope_head_dim"), latent=(1.0,)),
    from_file=_sparse_of_file,
)  # fmt: skip
_GLM_MOE_DSA = replace(
    _DEEPSEEK_V32, model_type="glm_moe_dsa", model_class="GlmMoeDsaForCausalLM", arch="glm-dsa",
    keys=(*_SPARSE_KEYS, Key("attention.indexer.types", kind=BOOL,
                             value=lambda get: [kind == "full" for kind in get("indexer_types")])),
    near={("rms_norm_eps", 1e-5): _EPSILON_OF_LATENTS},
    rope=Rope(("default", "linear"), dim=lambda get: get("qk_rope_head_dim")),
)  # fmt: skip

ROWS = (_DEEPSEEK_V2, _DEEPSEEK_V3, _GLM4_MOE_LITE, _KIMI_K2, _YOUTU, _DEEPSEEK_V32, _GLM_MOE_DSA)
