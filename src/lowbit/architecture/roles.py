"""Names of roles, the sets of matrices that engines fuse, and what always stays in 16 bits.

A role is the field's short name of what a linear does (q_proj, down_proj). It is for reports and for rules about
attention; nothing that changes a number depends on it: what a linear reads and what feeds it is found by running it.

All members of a fused set must have one scheme, because the engine joins them into one matrix. There is one row per
set, with the file of vLLM 0.32 that stacks it (`packed_modules_mapping`, `stacked_params_mapping`; SGLang's
files do the same). A set holds where all members lie in one module and read one input. Where some engine loads the
members apart, a common scheme costs nothing; where one fuses them and schemes differ, it loads nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# last part of a linear's name → role; other names are their own role
_ROLES = {
    **dict.fromkeys(("q_proj", "wq", "query", "to_q"), "q_proj"),
    **dict.fromkeys(("k_proj", "wk", "key", "to_k"), "k_proj"),
    **dict.fromkeys(("v_proj", "wv", "value", "to_v"), "v_proj"),
    **dict.fromkeys(("qkv_proj", "c_attn", "query_key_value", "wqkv", "Wqkv", "W_pack", "qkv"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "w1", "w_gate"), "gate_proj"),
    **dict.fromkeys(("up_proj", "w3", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "w_in"), "up_proj"),
    **dict.fromkeys(("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h", "w_out"), "down_proj"),
    **dict.fromkeys(("gate_up_proj", "w13"), "gate_up_proj"),
    "kv_a_proj_with_mqa": "kv_a_proj",
}
# names that mean the one in attention and the other in an MLP
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "attn_out", "output_proj", "proj")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_forward|ffn|\.ff", re.IGNORECASE)

ROUTER = "routers choose experts by small differences; engines read them in 16 bits only"
_SMALL = "a gate of few outputs; engines read it in 16 bits only"
_FEWEST = 32
# end of a name in a block → why it stays in 16 bits
_KEPT = (
    (re.compile(r"(^|\.)(dt_proj|x_proj|in_proj_ba|in_proj_b|in_proj_a|b_proj|a_proj|f_a_proj|f_b_proj|g_a_proj|beta_proj"
                r"|dt_in_proj)$"),
     "it sets decay and step of a recurrence, which exponentiates its error"),
    (re.compile(r"(^|\.)per_layer_(input_gate|projection)$"),
     "it belongs to per-layer embeddings, which engines keep in 16 bits"),
)  # fmt: skip


def role_of(path: str) -> str:
    """The role of a linear, by the end of its name."""
    owner, _, leaf = path.rpartition(".")
    if leaf in _OUTPUTS:
        if _ATTENTION.search(owner.rpartition(".")[2]):
            return "o_proj"
        return "down_proj" if _MLP.search(f".{owner}") else leaf
    return _ROLES.get(leaf, leaf)


def why_kept(path: str, rows: int, columns: int, experts: int) -> str | None:
    """Why a linear of a block stays in 16 bits; None where it may be quantized.

    path     relative to the block
    experts  routed experts of the block, 0 in dense blocks
    """
    if experts and rows in (experts, experts + 1) and re.search(r"gate|router|switch", path):
        return ROUTER
    if columns < _FEWEST:
        return f"its {columns} columns are less than any group of an engine's kernels"
    if rows == 1:
        return _SMALL if not experts else ROUTER
    return next((why for pattern, why in _KEPT if pattern.search(path)), None)


_INPUTS = {
    "q_proj": "attention_input", "k_proj": "attention_input", "v_proj": "attention_input",
    "qkv_proj": "attention_input", "q_a_proj": "attention_input", "kv_a_proj": "attention_input",
    "o_proj": "attention_output", "q_b_proj": "query_latent", "kv_b_proj": "kv_latent",
    "gate_proj": "mlp_input", "up_proj": "mlp_input", "gate_up_proj": "mlp_input", "router": "mlp_input",
    "down_proj": "mlp_hidden",
}  # fmt: skip


def input_name(path: str, role: str, taken: set[str]) -> str:
    """A name for the input whose first reader is `path`: "attention_input" of the first attention of a block, else
    "shared_mlp.down_proj.input"."""
    name = _INPUTS.get(role)
    if role == "down_proj" and path.count(".") > 1:
        name = f"{path.rpartition('.')[0]}.hidden"
    return name if name is not None and name not in taken else f"{path}.input"


# (members, name of the fused matrix, where)
FUSED_SETS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("q_proj", "k_proj", "v_proj"), "qkv_proj", "models/llama.py, LlamaForCausalLM.packed_modules_mapping"),
    (("gate_proj", "up_proj"), "gate_up_proj", "models/llama.py, LlamaForCausalLM.packed_modules_mapping"),
    (("w1", "w3"), "gate_up_proj", "models/mixtral.py, get_expert_mapping; models/internlm2.py"),
    (("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj", "models/deepseek_v2.py, load_weights"),
    (("in_proj_qkv", "in_proj_z"), "in_proj_qkvz", "models/qwen3_5.py, packed_modules_mapping"),
    (("in_proj_b", "in_proj_a"), "in_proj_ba", "models/qwen3_5.py, packed_modules_mapping"),
    (("wq", "wk", "wv"), "qkv_proj", "models/chatglm.py and relatives"),
    (("query", "key", "value"), "qkv_proj", "models/bert.py, stacked_params_mapping"),
)


def fused_names(leaves: Iterable[str]) -> dict[str, str]:
    """Member → name of its fused matrix, for linears of one module that read one input."""
    present = set(leaves)
    found: dict[str, str] = {}
    for members, name, _ in FUSED_SETS:
        there = [leaf for leaf in members if leaf in present]
        if len(there) > 1:
            found.update(dict.fromkeys(there, name))
    return found
