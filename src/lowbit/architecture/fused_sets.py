"""The matrices that engines fuse into one: all members must have one scheme.

One row per set, with the file of vLLM 0.32 that stacks it (`packed_modules_mapping`, `stacked_params_mapping`; SGLang's
files do the same). A set holds where all members lie in one module and read one input. Where some engine loads the
members apart, a common scheme costs nothing; where one fuses them and schemes differ, it loads nonsense.
"""

from __future__ import annotations

from collections.abc import Iterable

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
