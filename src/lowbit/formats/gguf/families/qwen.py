"""Qwen 2 and 3, dense and with experts."""

from __future__ import annotations

from dataclasses import replace

from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    KEYS,
    NO_ATTENTION_BIAS,
    OUTSIDE,
    QK_NORM,
    QKV_KINDS,
    QWEN_BLOCK,
    QWEN_MOE_BLOCK,
    SILU,
    expert_keys,
    head_dim_is_width_over_heads,
)
from lowbit.formats.gguf.layout import ONE_ROW
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place

_QWEN2 = GGUFArchitecture(
    "qwen2", "Qwen2ForCausalLM", "qwen2", "model.layers", OUTSIDE, QWEN_BLOCK, KEYS[:-2],
    biases={QKV_KINDS: {}}, fixed=SILU, implied=head_dim_is_width_over_heads,
)  # fmt: skip
_QWEN2_MOE = replace(
    _QWEN2, model_type="qwen2_moe", model_class="Qwen2MoeForCausalLM", arch="qwen2moe",
    inside={
        **QWEN_MOE_BLOCK,
        "mlp.shared_expert_gate": Place(T.FFN_GATE_INP_SHEXP, ONE_ROW),
        "mlp.shared_expert.gate_proj": Place(T.FFN_GATE_SHEXP),
        "mlp.shared_expert.up_proj": Place(T.FFN_UP_SHEXP),
        "mlp.shared_expert.down_proj": Place(T.FFN_DOWN_SHEXP),
    },
    keys=(*KEYS[:-2], *expert_keys("num_experts"),
          Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
    biases={QKV_KINDS: {"qkv_bias": True}, frozenset(): {"qkv_bias": False}},
    fixed=SILU | {"norm_topk_prob": (False,)}, needs_output=True,
)  # fmt: skip
_QWEN3 = GGUFArchitecture(
    "qwen3", "Qwen3ForCausalLM", "qwen3", "model.layers", OUTSIDE, QWEN_BLOCK | QK_NORM, KEYS,
    biases=NO_ATTENTION_BIAS, fixed=SILU,
)  # fmt: skip
_QWEN3_MOE = replace(
    _QWEN3, model_type="qwen3_moe", model_class="Qwen3MoeForCausalLM", arch="qwen3moe",
    inside=QWEN_MOE_BLOCK | QK_NORM, keys=(*KEYS, *expert_keys("num_experts")),
    fixed=SILU | {"norm_topk_prob": (True,)},
)  # fmt: skip


ROWS = (_QWEN2, _QWEN2_MOE, _QWEN3, _QWEN3_MOE)
