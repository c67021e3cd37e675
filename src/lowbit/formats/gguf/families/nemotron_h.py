"""Nemotron-H: a block is Mamba 2, attention, an MLP or experts.

llama.cpp finds the kind by two lists: `attention.head_count_kv` is 0 where a block has no attention,
`feed_forward_length` where it has no MLP.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    ATTENTION_KINDS,
    BOOL,
    FLOAT,
    KV_HEADS,
    LENGTHS,
    expert_keys,
    width_over_heads,
)
from lowbit.formats.gguf.families.mamba import (
    ANY_CONTEXT,
    BACKBONE,
    CONV_BIAS,
    head_width,
    mamba2_places,
)
from lowbit.formats.gguf.keys import per_block
from lowbit.formats.gguf.layout import ROTARY_K, ROTARY_Q, Lookup
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, grouped


def _nemotron_widths(get: Lookup, kind: str, width: str) -> list[int]:
    return [get(width) * (each == kind) for each in get("layers_block_type")]


def _nemotron_of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    heads, widths = per_block(metadata, KV_HEADS), per_block(metadata, "feed_forward_length")
    arch = metadata["general.architecture"]
    wide = "moe" if metadata.get(f"{arch}.expert_count") else "mlp"
    found = {
        "layers_block_type": [
            "full_attention" if count else wide if width else "linear_attention"
            for count, width in zip(heads, widths, strict=True)
        ],
        "num_key_value_heads": max(heads), "mamba_head_dim": head_width(metadata),
        "max_position_embeddings": per_block(metadata, "context_length")[0],
    }  # fmt: skip
    return found | ({"intermediate_size": max(widths)} if wide == "mlp" else {})


_NEMOTRON_KEYS = (
    ANY_CONTEXT,
    *LENGTHS[1:3],
    *LENGTHS[4:],
    Key(KV_HEADS, value=lambda get: _nemotron_widths(get, "full_attention", "num_key_value_heads")),
    Key("attention.layer_norm_epsilon", "layer_norm_epsilon", FLOAT),
    Key("attention.layer_norm_rms_epsilon", "layer_norm_epsilon", FLOAT, optional=True),
    Key("attention.key_length", "head_dim", otherwise=width_over_heads),
    Key("attention.value_length", "head_dim", otherwise=width_over_heads),
    Key("ssm.conv_kernel", "conv_kernel"),
    Key("ssm.inner_size", value=lambda get: get("mamba_num_heads") * get("mamba_head_dim")),
    Key("ssm.state_size", "ssm_state_size"),
    Key("ssm.time_step_rank", "mamba_num_heads"),
    Key("ssm.group_count", "n_groups"),
)
_NEMOTRON_BLOCK = {
    "norm": Place(T.ATTN_NORM),
    **grouped("mamba", mamba2_places("mixer", "n_groups")),
    **grouped("attention", {
        "mixer.q_proj": Place(T.ATTN_Q, ROTARY_Q), "mixer.k_proj": Place(T.ATTN_K, ROTARY_K),
        "mixer.v_proj": Place(T.ATTN_V),
        "mixer.o_proj": Place(T.ATTN_OUT),
    }),
}  # fmt: skip
_NEMOTRON_H = GGUFArchitecture(
    "nemotron_h", "NemotronHForCausalLM", "nemotron_h", "backbone.layers", BACKBONE,
    {**_NEMOTRON_BLOCK,
     **grouped("mlp", {"mixer.up_proj": Place(T.FFN_UP), "mixer.down_proj": Place(T.FFN_DOWN)})},
    (*_NEMOTRON_KEYS,
     Key("feed_forward_length", value=lambda get: _nemotron_widths(get, "mlp", "intermediate_size"))),
    biases={
        CONV_BIAS: {"use_conv_bias": True}, frozenset(): {"use_conv_bias": False},
        CONV_BIAS | {T.FFN_UP, T.FFN_DOWN}: {"use_conv_bias": True, "mlp_bias": True},
        CONV_BIAS | ATTENTION_KINDS: {"use_conv_bias": True, "attention_bias": True},
    },
    fixed={"mlp_hidden_act": ("relu2",), "mamba_hidden_act": ("silu", "swish"), "use_bias": (False,),
           "mamba_proj_bias": (False,), "sliding_window": (None,)},
    near={("time_step_min", 0.001): "transformers raises time steps below time_step_min 0.001 to it, llama.cpp does "
                                    "not"},
    rope=None, when=lambda get: "moe" not in get("layers_block_type"), from_file=_nemotron_of_file,
)  # fmt: skip
_NEMOTRON_H_EXPERTS = replace(
    _NEMOTRON_H, arch="nemotron_h_moe",
    inside={
        **_NEMOTRON_BLOCK,
        **grouped("experts", {
            "mixer.gate": Place(T.FFN_GATE_INP),
            "mixer.gate.e_score_correction_bias": Place(T.FFN_EXP_PROBS_B, bare=True, ending="bias"),
            "mixer.fc1_latent_proj": Place(T.MOE_LATENT_DOWN, optional=True),
            "mixer.experts.*.up_proj": Place(T.FFN_UP_EXP),
            "mixer.experts.*.down_proj": Place(T.FFN_DOWN_EXP),
            "mixer.fc2_latent_proj": Place(T.MOE_LATENT_UP, optional=True),
            "mixer.shared_experts.up_proj": Place(T.FFN_UP_SHEXP),
            "mixer.shared_experts.down_proj": Place(T.FFN_DOWN_SHEXP),
        }),
    },
    keys=(*_NEMOTRON_KEYS,
          Key("feed_forward_length", value=lambda get: _nemotron_widths(get, "moe", "moe_intermediate_size")),
          *expert_keys("n_routed_experts"),
          Key("expert_shared_feed_forward_length", "moe_shared_expert_intermediate_size"),
          Key("expert_shared_count", "n_shared_experts"),
          Key("expert_weights_norm", "norm_topk_prob", BOOL, default=False),
          Key("expert_weights_scale", "routed_scaling_factor", FLOAT, default=1.0),
          Key("expert_group_count", "n_group", default=1),
          Key("expert_group_used_count", "topk_group", default=1),
          Key("moe_latent_size", "moe_latent_size", optional=True)),
    biases={CONV_BIAS: {"use_conv_bias": True}, frozenset(): {"use_conv_bias": False}}, when=lambda get: True,
)  # fmt: skip

ROWS = (_NEMOTRON_H, _NEMOTRON_H_EXPERTS)
