"""What rows with experts share: routers, shared experts, dense blocks before those with experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import BOOL, FLOAT, GATE_UP_DOWN, MLP, expert_places
from lowbit.formats.gguf.layout import Lookup
from lowbit.formats.gguf.row import Key, Place, grouped

# --- tensors --------------------------------------------------------------------------------------------------------


def shared_places(path: str) -> dict[str, Place]:
    return {
        f"{path}.gate_proj": Place(T.FFN_GATE_SHEXP),
        f"{path}.up_proj": Place(T.FFN_UP_SHEXP),
        f"{path}.down_proj": Place(T.FFN_DOWN_SHEXP),
    }


# What is added to the scores of experts when they are chosen, and not to their weights.
CORRECTION = Place(T.FFN_EXP_PROBS_B, bare=True, ending="bias")
DENSE_BLOCKS = grouped("dense", MLP)
EXPERT_BLOCKS = {**expert_places("mlp", "gate", GATE_UP_DOWN), **shared_places("mlp.shared_experts")}
CORRECTED_BLOCKS = {**EXPERT_BLOCKS, "mlp.gate.e_score_correction_bias": CORRECTION}

# --- key-values -----------------------------------------------------------------------------------------------------

SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
SHARED_COUNT = Key("expert_shared_count", "n_shared_experts")
WEIGHTS = (
    Key("expert_weights_scale", "routed_scaling_factor", FLOAT, default=1.0),
    Key("expert_weights_norm", "norm_topk_prob", BOOL, default=False),
)
GROUPS = (
    Key("expert_group_count", "n_group", default=1),
    Key("expert_group_used_count", "topk_group", default=1),
)
LEADING_DENSE = Key("leading_dense_block_count", "first_k_dense_replace", default=0, zero=True)
# Where config.json has a kind for every block.
LEADING_DENSE_TYPES = Key("leading_dense_block_count", value=lambda get: get("mlp_layer_types").count("dense"))


def gating(function: int) -> Key:
    return Key("expert_gating_func", value=lambda get: function)


def is_gated(arch: str, function: int, otherwise: int) -> Callable[[dict[str, Any]], bool]:
    """Whether a file's experts are gated by this function; the other is what llama.cpp takes without a key-value."""
    return lambda metadata: metadata.get(f"{arch}.expert_gating_func", otherwise) == function


def dense_blocks_first(get: Lookup) -> dict[str, Any]:
    """The loader wants tensors of an MLP in the first blocks and of experts in all others."""
    types = get("mlp_layer_types") or []
    return {"mlp_layer_types": sorted(types)}  # "dense" is before "sparse" in the alphabet too


def mlp_types_of_file(arch: str, metadata: dict[str, Any]) -> dict[str, Any]:
    dense, blocks = metadata.get(f"{arch}.leading_dense_block_count", 0), main_blocks(arch, metadata)
    return {"mlp_layer_types": ["dense"] * dense + ["sparse"] * (blocks - dense)}


def main_blocks(arch: str, metadata: dict[str, Any]) -> int:
    """Without those for multi-token prediction."""
    return metadata[f"{arch}.block_count"] - metadata.get(f"{arch}.nextn_predict_layers", 0)
