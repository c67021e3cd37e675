"""What is known of each model family, as data: a new family is a new row.

A row says, for every linear of a decoder block, the role it plays, which input it reads (linears with the same input
share calibration statistics), which set engines fuse into one matrix (a set must have one scheme), and which norm or
linear feeds it (where AWQ and SmoothQuant fold their scales). Everything else (names, shapes, number of blocks, tied
embeddings, experts) is discovered from the model itself.

Paths are relative to the decoder block.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearRole:
    """One linear of a decoder block.

    role     the field's short name: q_proj, down_proj …
    reads    name of the input it shares with the linears of the same `reads`
    fused    name of the matrix that engines build of it and its siblings; None where it stays alone
    fed_by   the norm or linear whose output (times something elementwise) is its input
    """

    role: str
    reads: str
    fused: str | None
    fed_by: str


@dataclass(frozen=True)
class Family:
    """blocks: path of the list of decoder blocks; linears: path in the block → role."""

    blocks: str
    linears: dict[str, LinearRole]


def _attention(norm: str) -> dict[str, LinearRole]:
    qkv = {f"self_attn.{leaf}": LinearRole(leaf, "attention_input", "self_attn.qkv_proj", norm)
           for leaf in ("q_proj", "k_proj", "v_proj")}  # fmt: skip
    return {**qkv, "self_attn.o_proj": LinearRole("o_proj", "attention_output", None, "self_attn.v_proj")}


def _gated_mlp(norm: str) -> dict[str, LinearRole]:
    gate_up = {f"mlp.{leaf}": LinearRole(leaf, "mlp_input", "mlp.gate_up_proj", norm)
               for leaf in ("gate_proj", "up_proj")}  # fmt: skip
    return {**gate_up, "mlp.down_proj": LinearRole("down_proj", "mlp_hidden", None, "mlp.up_proj")}


_LLAMA = Family("model.layers", {**_attention("input_layernorm"), **_gated_mlp("post_attention_layernorm")})
_GEMMA3 = Family("model.layers", {**_attention("input_layernorm"), **_gated_mlp("pre_feedforward_layernorm")})

# config.model_type → family
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _GEMMA3,
}
