"""Names that engines look up instead of those in the files: linears that they load as one have one name there."""

from __future__ import annotations

from collections.abc import Iterator

# fused name → its members. vLLM: `packed_modules_mapping` of the model classes; SGLang calls DeepSeek's otherwise.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def fused_names(members: list[str]) -> Iterator[str]:
    """The fused names of sets of which every member is in `members`."""
    present = set(members)
    for name in members:
        parent, _, leaf = name.rpartition(".")
        for fused, parts in FUSED.items():
            if leaf == parts[0] and all(f"{parent}.{part}" in present for part in parts):
                yield f"{parent}.{fused}"
