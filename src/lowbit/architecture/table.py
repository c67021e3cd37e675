"""What is known of each model family, as data: a new family is a new row.

A row says, for every linear of a decoder block, the role it plays, which input it reads (linears with the same input
share calibration statistics), which set engines fuse into one matrix (a set must have one scheme), which norm or linear
feeds it (where AWQ and SmoothQuant fold their scales), and why it stays in 16 bits if it always does. Everything else
(names of parameters, shapes, number of blocks, tied embeddings, experts) is discovered from the model itself.

Paths are those of the files on the hub, which vLLM expects too, relative to the decoder block; "*" stands for the
number of an expert. Fused sets follow packed_modules_mapping and stacked_params_mapping of vLLM's model files. A row
may name linears that only some models of the family have.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class LinearRole:
    """One linear of a decoder block.

    role     the field's short name: q_proj, down_proj …
    reads    name of the input it shares with the linears of the same `reads`
    fused    name of the matrix that engines build of it and its siblings; None where it stays alone
    fed_by   the norm or linear whose output (times something elementwise) is its input; None if there is none
    keep     why it stays in 16 bits; None where it may be quantized
    or_fed_by   what feeds it in models that have no `fed_by`
    """

    role: str
    reads: str
    fused: str | None = None
    fed_by: str | None = None
    keep: str | None = None
    or_fed_by: str | None = None


@dataclass(frozen=True)
class ExpertSlice:
    """One tensor of every expert in a fused parameter.

    name        of what expert E has, "*" for E
    start, step rows start::step of parameter[E], which is turned round first if `transposed`
    """

    name: str
    start: int = 0
    step: int = 1
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """
    blocks         path of the list of decoder blocks
    linears        path in the block → role
    spellings      (found, canonical): beginnings of names that some files of this family spell differently
    fused_experts  path of a parameter that files on the hub hold as one tensor [experts, …] → what lies in it
    norms_feed_if  (key of config.json, value): only then norms feed the linears behind them and nothing else
    norm           what its norms compute: "rms" x/rms(x) · w, "rms_plus_one" x/rms(x) · (1 + w), "layer" LayerNorm
    stacked_qkv    rows of a stored q, k, v matrix: "blocks" all of q, then k, then v; "heads" q, k, v of each head
    """

    blocks: str
    linears: dict[str, LinearRole]
    spellings: tuple[tuple[str, str], ...] = ()
    fused_experts: dict[str, tuple[ExpertSlice, ...]] = field(default_factory=dict)
    norms_feed_if: tuple[str, bool] | None = None
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    stacked_qkv: Literal["blocks", "heads"] = "blocks"


ROUTER = "routers choose experts by small differences; engines read them in 16 bits only"


def _attention(norm: str | None, output: str = "o_proj") -> dict[str, LinearRole]:
    qkv = {f"self_attn.{leaf}": LinearRole(leaf, "attention_input", "self_attn.qkv_proj", norm)
           for leaf in ("q_proj", "k_proj", "v_proj")}  # fmt: skip
    return {**qkv, f"self_attn.{output}": LinearRole("o_proj", "attention_output", None, "self_attn.v_proj")}


def _gated_mlp(
    norm: str | None, path: str = "mlp", reads: str = "mlp_input", or_norm: str | None = None
) -> dict[str, LinearRole]:
    gate_up = {f"{path}.{leaf}": LinearRole(leaf, reads, f"{path}.gate_up_proj", norm, or_fed_by=or_norm)
               for leaf in ("gate_proj", "up_proj")}  # fmt: skip
    hidden = "mlp_hidden" if path == "mlp" else f"{path}.hidden"
    return {**gate_up, f"{path}.down_proj": LinearRole("down_proj", hidden, None, f"{path}.up_proj")}


def _stacked_mlp(norm: str | None) -> dict[str, LinearRole]:
    """gate and up are one matrix in the file already."""
    return {
        "mlp.gate_up_proj": LinearRole("gate_up_proj", "mlp_input", None, norm),
        "mlp.down_proj": LinearRole("down_proj", "mlp_hidden", None, "mlp.gate_up_proj"),
    }


def _experts(norm: str, path: str, router: str, leaves: tuple[str, str, str]) -> dict[str, LinearRole]:
    """Experts and their router; `leaves` are the family's names of gate, up and down. Every expert reads the tokens
    that are routed to it, so inputs are per expert."""
    gate, up, down = leaves
    expert = f"{path}.experts.*"
    return {
        f"{path}.{router}": LinearRole("router", "mlp_input", None, norm, ROUTER),
        f"{expert}.{gate}": LinearRole("gate_proj", f"{expert}.input", f"{expert}.gate_up_proj", norm),
        f"{expert}.{up}": LinearRole("up_proj", f"{expert}.input", f"{expert}.gate_up_proj", norm),
        f"{expert}.{down}": LinearRole("down_proj", f"{expert}.hidden", None, f"{expert}.{up}"),
    }


def _wide_mlp(norm: str, up: str, down: str) -> dict[str, LinearRole]:
    """Two linears with an activation between them, which no scale can be moved through."""
    return {
        up: LinearRole("up_proj", "mlp_input", None, norm),
        down: LinearRole("down_proj", "mlp_hidden"),
    }


def _stacked_attention(norm: str, qkv: str, output: str) -> dict[str, LinearRole]:
    return {
        qkv: LinearRole("qkv_proj", "attention_input", None, norm),
        output: LinearRole("o_proj", "attention_output", None, qkv),
    }


_PRE, _POST = "input_layernorm", "post_attention_layernorm"
_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")

_LLAMA_LINEARS = {**_attention(_PRE), **_gated_mlp(_POST)}
_GEMMA2_LINEARS = {**_attention(_PRE), **_gated_mlp("pre_feedforward_layernorm")}
# One norm feeds attention and MLP alike.
_PARALLEL_LINEARS = {**_attention(_PRE), **_gated_mlp(_PRE, reads="attention_input")}

_LLAMA = Family("model.layers", _LLAMA_LINEARS)
_GEMMA = Family("model.layers", _LLAMA_LINEARS, norm="rms_plus_one")
_GEMMA2 = Family("model.layers", _GEMMA2_LINEARS, norm="rms_plus_one")
# Norms stand behind attention and MLP; their inputs are the residual stream itself.
_OLMO2 = Family("model.layers", {**_attention(None), **_gated_mlp(None)})
_PHI3 = Family(
    "model.layers", {**_stacked_attention(_PRE, "self_attn.qkv_proj", "self_attn.o_proj"), **_stacked_mlp(_POST)}
)
_GLM = Family("model.layers", {**_attention(_PRE), **_stacked_mlp(_POST)})
_MIXTRAL = Family(
    "model.layers", {**_attention(_PRE), **_experts(_POST, "block_sparse_moe", "gate", ("w1", "w3", "w2"))}
)
_QWEN3_MOE = Family("model.layers", {**_LLAMA_LINEARS, **_experts(_POST, "mlp", "gate", _GATE_UP_DOWN)})
_QWEN2_MOE = Family(
    "model.layers",
    {
        **_QWEN3_MOE.linears,
        **_gated_mlp(_POST, "mlp.shared_expert"),
        "mlp.shared_expert_gate": LinearRole("router", "mlp_input", None, _POST, ROUTER),
    },
)
# MLA: queries and keys/values go through low-rank projections with a norm between; without q_lora_rank there is q_proj.
_DEEPSEEK = Family(
    "model.layers",
    {
        "self_attn.q_proj": LinearRole("q_proj", "attention_input", None, _PRE),
        "self_attn.q_a_proj": LinearRole("q_a_proj", "attention_input", "self_attn.fused_qkv_a_proj", _PRE),
        "self_attn.kv_a_proj_with_mqa": LinearRole("kv_a_proj", "attention_input", "self_attn.fused_qkv_a_proj", _PRE),
        "self_attn.q_b_proj": LinearRole("q_b_proj", "query_latent", None, "self_attn.q_a_layernorm"),
        "self_attn.kv_b_proj": LinearRole("kv_b_proj", "kv_latent", None, "self_attn.kv_a_layernorm"),
        "self_attn.o_proj": LinearRole("o_proj", "attention_output", None, "self_attn.kv_b_proj"),
        **_gated_mlp(_POST),
        **_gated_mlp(_POST, "mlp.shared_experts"),
        **_experts(_POST, "mlp", "gate", _GATE_UP_DOWN),
    },
)
_GPT_OSS_EXPERTS = _experts(_POST, "mlp", "router", _GATE_UP_DOWN)
# gate and up alternate in the columns of one matrix, which is stored [in, out]. The input of down_proj is
# (clamp(up) + 1) · glu(clamp(gate)), which no scale can be moved through.
_GPT_OSS = Family(
    "model.layers",
    {
        **_attention(_PRE),
        **_GPT_OSS_EXPERTS,
        "mlp.experts.*.down_proj": replace(_GPT_OSS_EXPERTS["mlp.experts.*.down_proj"], fed_by=None),
    },
    fused_experts={
        "mlp.experts.gate_up_proj": (
            ExpertSlice("mlp.experts.*.gate_proj.weight", 0, 2, transposed=True),
            ExpertSlice("mlp.experts.*.up_proj.weight", 1, 2, transposed=True),
        ),
        "mlp.experts.gate_up_proj_bias": (
            ExpertSlice("mlp.experts.*.gate_proj.bias", 0, 2),
            ExpertSlice("mlp.experts.*.up_proj.bias", 1, 2),
        ),
        "mlp.experts.down_proj": (ExpertSlice("mlp.experts.*.down_proj.weight", transposed=True),),
        "mlp.experts.down_proj_bias": (ExpertSlice("mlp.experts.*.down_proj.bias"),),
    },
)
_GPT2 = Family(
    "transformer.h",
    {**_stacked_attention("ln_1", "attn.c_attn", "attn.c_proj"), **_wide_mlp("ln_2", "mlp.c_fc", "mlp.c_proj")},
    spellings=(("", "transformer."),),
    norm="layer",
)
_OPT = Family(
    "model.decoder.layers",
    {**_attention("self_attn_layer_norm", "out_proj"), **_wide_mlp("final_layer_norm", "fc1", "fc2")},
    spellings=(("decoder.", "model.decoder."),),
    norms_feed_if=("do_layer_norm_before", True),
    norm="layer",
)
_NEOX_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_GPT_NEOX = Family(
    "gpt_neox.layers",
    {**_stacked_attention(_PRE, "attention.query_key_value", "attention.dense"), **_wide_mlp(_POST, *_NEOX_MLP)},
    norm="layer",
    stacked_qkv="heads",
)
_BLOOM = Family(
    "transformer.h",
    {
        **_stacked_attention(_PRE, "self_attention.query_key_value", "self_attention.dense"),
        **_wide_mlp(_POST, *_NEOX_MLP),
    },
    spellings=(("", "transformer."),),
    norms_feed_if=("apply_residual_connection_post_layernorm", False),
    norm="layer",
    stacked_qkv="heads",
)
_GEMMA3 = Family(
    "language_model.model.layers",
    _GEMMA2_LINEARS,
    spellings=(("vision_tower.", "vision_tower.vision_model."),),
    norm="rms_plus_one",
)
# use_parallel_residual: one norm feeds attention and MLP, and post_attention_layernorm is not there.
_STABLELM = Family("model.layers", {**_attention(_PRE), **_gated_mlp(_POST, or_norm=_PRE)}, norm="layer")

# config.model_type → family
FAMILIES: dict[str, Family] = {
    "bloom": _BLOOM,
    "cohere2": Family("model.layers", _PARALLEL_LINEARS, norm="layer"),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA2,
    "glm": _GLM,
    "glm4": _GLM,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "gpt_oss": _GPT_OSS,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "olmo2": _OLMO2,
    "opt": _OPT,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen2_5_vl": _LLAMA,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3": _LLAMA,
    "qwen3_moe": _QWEN3_MOE,
    "smollm3": _LLAMA,
    "stablelm": _STABLELM,
}
