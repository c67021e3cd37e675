"""Qwen 3 Next and Qwen 3.5: three of four blocks are gated delta nets (linear attention), the others gated attention.

Layouts of a delta net, with heads of keys k, of values v (r of them share one of keys) and of d rows:

    in_proj_qkvz of Qwen 3 Next   q, k, r of v and r of z, head of keys by head of keys; becomes attn_qkv and attn_gate
    heads of values of Qwen 3.5   grouped, k·r + i, in Hugging Face; tiled, i·heads of keys + k, in llama.cpp, which
                                  repeats keys that way: rows, channels of the convolution, columns of out_proj
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    BOOL,
    GATE_UP_DOWN,
    KEYS,
    LENGTHS,
    MLP,
    NO_ATTENTION_BIAS,
    O_PROJ,
    QKV_PLACES,
    SILU,
    expert_keys,
    expert_places,
)
from lowbit.formats.gguf.families.mamba import CONV
from lowbit.formats.gguf.keys import per_block
from lowbit.formats.gguf.layout import NEG_EXP, ONE_ROW, PLUS_ONE, Lookup, RowLayout, Rows
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope, grouped


def _heads(get: Lookup) -> tuple[int, int, int, int]:
    """(heads of keys, of values for each, rows of a head of keys, of one of values)."""
    keys, values = get("linear_num_key_heads"), get("linear_num_value_heads")
    if type(keys) is not int or type(values) is not int or keys < 1 or values < keys or values % keys:
        raise ValueError(f"{str(values)[:40]} heads of values for {str(keys)[:40]} of keys")
    return keys, values // keys, get("linear_key_head_dim"), get("linear_value_head_dim")


def _fused(part: str) -> RowLayout:
    """Rows of in_proj_qkvz that are q, k and v, or z."""

    def rows(get: Lookup, count: int) -> np.ndarray:
        keys, shared, key_rows, value_rows = _heads(get)
        value_rows *= shared
        if count != keys * 2 * (key_rows + value_rows):
            raise ValueError(f"{count} rows are not q, k, v and z of {keys} heads of keys")
        by_head = np.arange(count).reshape(keys, -1)
        ends = np.cumsum([key_rows, key_rows, value_rows])
        parts = dict(zip("qkvz", np.split(by_head, ends, axis=1), strict=True))
        return np.concatenate([parts[letter].reshape(-1) for letter in part])

    return RowLayout(f"{part} of q, k, v and z", rows=rows)


def _tiled(after_keys: bool = False, one_row: bool = False) -> Rows:
    """Heads of values from grouped to tiled.

    after_keys  q and k stand before them
    one_row     a head is one row, not linear_value_head_dim
    """

    def rows(get: Lookup, count: int) -> np.ndarray:
        keys, shared, key_rows, value_rows = _heads(get)
        before = 2 * keys * key_rows if after_keys else 0
        size = 1 if one_row else value_rows
        if count != before + keys * shared * size:
            raise ValueError(f"{count} are not {keys * shared} heads of values of {size} behind {before}")
        tiled = np.arange(before, count).reshape(keys, shared, size).transpose(1, 0, 2).reshape(-1)
        return np.concatenate([np.arange(before), tiled])

    return rows


_TILED_NUMBERS = RowLayout("tiled", rows=_tiled(one_row=True))
_PER_HEAD = {
    "linear_attn.dt_bias": Place(T.SSM_DT, bare=True, ending="bias"),
    "linear_attn.A_log": Place(T.SSM_A, NEG_EXP, bare=True, ending=""),
    "linear_attn.norm": Place(T.SSM_NORM),
}
_DELTA_NEXT = {
    "linear_attn.in_proj_qkvz": (Place(T.ATTN_QKV, _fused("qkv")), Place(T.ATTN_GATE, _fused("z"))),
    "linear_attn.conv1d": Place(T.SSM_CONV1D, CONV),
    **_PER_HEAD,
    "linear_attn.in_proj_ba": Place(T.SSM_BETA_ALPHA),
    "linear_attn.out_proj": Place(T.SSM_OUT),
}
_DELTA = {
    "linear_attn.in_proj_qkv": Place(T.ATTN_QKV, RowLayout("tiled", rows=_tiled(after_keys=True))),
    "linear_attn.in_proj_z": Place(T.ATTN_GATE, RowLayout("tiled", rows=_tiled())),
    "linear_attn.conv1d": Place(T.SSM_CONV1D, replace(CONV, name="tiled", rows=_tiled(after_keys=True))),
    **_PER_HEAD,
    "linear_attn.dt_bias": Place(T.SSM_DT, _TILED_NUMBERS, bare=True, ending="bias"),
    "linear_attn.A_log": Place(T.SSM_A, replace(NEG_EXP, rows=_TILED_NUMBERS.rows), bare=True, ending=""),
    "linear_attn.in_proj_b": Place(T.SSM_BETA, _TILED_NUMBERS),
    "linear_attn.in_proj_a": Place(T.SSM_ALPHA, _TILED_NUMBERS),
    "linear_attn.out_proj": Place(T.SSM_OUT, RowLayout("tiled", columns=_tiled())),
}
_ATTENTION = {
    **QKV_PLACES, **O_PROJ,  # of each head of q, the query comes first and then its gate: in both
    "self_attn.q_norm": Place(T.ATTN_Q_NORM, PLUS_ONE),
    "self_attn.k_norm": Place(T.ATTN_K_NORM, PLUS_ONE),
}  # fmt: skip
_NORMS = {
    "input_layernorm": Place(T.ATTN_NORM, PLUS_ONE),
    "post_attention_layernorm": Place(T.ATTN_POST_NORM, PLUS_ONE),
}
_EXPERTS = {
    **expert_places("mlp", "gate", GATE_UP_DOWN),
    "mlp.shared_expert_gate": Place(T.FFN_GATE_INP_SHEXP, ONE_ROW),
    "mlp.shared_expert.gate_proj": Place(T.FFN_GATE_SHEXP),
    "mlp.shared_expert.up_proj": Place(T.FFN_UP_SHEXP),
    "mlp.shared_expert.down_proj": Place(T.FFN_DOWN_SHEXP),
}


def _outside(stem: str) -> dict[str, Place]:
    return {
        f"{stem}.embed_tokens": Place(T.TOKEN_EMBD),
        f"{stem}.norm": Place(T.OUTPUT_NORM, PLUS_ONE),
        "lm_head": Place(T.OUTPUT),
    }


def _recurrent(get: Lookup) -> list[bool]:
    return [kind == "linear_attention" for kind in get("layer_types")]


def _interval(get: Lookup) -> int | None:
    """Every so many blocks one has attention; None where they have no such order."""
    recurrent = _recurrent(get)
    period = recurrent.index(False) + 1 if False in recurrent else len(recurrent) + 1
    return period if recurrent == [bool((block + 1) % period) for block in range(len(recurrent))] else None


def _of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    arch = metadata["general.architecture"]
    blocks, inner = metadata[f"{arch}.block_count"], per_block(metadata, "ssm.inner_size")[0]
    heads = per_block(metadata, "ssm.time_step_rank")[0]
    if not heads or inner % heads:
        raise ValueError(f"{arch}.ssm.inner_size is {inner}, for {heads} heads of values")
    if f"{arch}.attention.recurrent_layers" in metadata:
        recurrent = [bool(each) for each in per_block(metadata, "attention.recurrent_layers")]
    else:
        interval = metadata.get(f"{arch}.full_attention_interval", 4)
        if type(interval) is not int or interval < 1:
            raise ValueError(f"{arch}.full_attention_interval is {str(interval)[:80]}")
        recurrent = [bool((block + 1) % interval) for block in range(blocks)]
    kinds = ["linear_attention" if each else "full_attention" for each in recurrent]
    return {"layer_types": kinds, "linear_value_head_dim": inner // heads}


_KEYS = (
    *KEYS,
    Key("ssm.conv_kernel", "linear_conv_kernel_dim"),
    Key("ssm.state_size", "linear_key_head_dim"),
    Key("ssm.group_count", "linear_num_key_heads"),
    Key("ssm.time_step_rank", "linear_num_value_heads"),
    Key("ssm.inner_size", value=lambda get: get("linear_num_value_heads") * get("linear_value_head_dim")),
    Key("attention.recurrent_layers", value=_recurrent, kind=BOOL),
    Key("full_attention_interval", value=_interval),
)
_EXPERT_KEYS = (
    *expert_keys("num_experts"),
    Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
)


def _one_width(get: Lookup) -> dict[str, Any]:
    """llama.cpp has one size for heads of keys and of values."""
    return {"linear_value_head_dim": get("linear_key_head_dim")}


_QWEN3_NEXT = GGUFArchitecture(
    "qwen3_next", "Qwen3NextForCausalLM", "qwen3next", "model.layers", _outside("model"),
    {**_NORMS, **grouped("attention", _ATTENTION), **grouped("delta", _DELTA_NEXT), **_EXPERTS},
    (*_KEYS, *_EXPERT_KEYS), biases=NO_ATTENTION_BIAS, fixed=SILU | {"norm_topk_prob": (True,)},
    implied=_one_width, rope=Rope(partial=True), from_file=_of_file,
)  # fmt: skip
_STEM = "model.language_model"
_QWEN35 = GGUFArchitecture(
    "qwen3_5_text", "Qwen3_5ForCausalLM", "qwen35", f"{_STEM}.layers", _outside(_STEM),
    {**_NORMS, **grouped("attention", _ATTENTION), **grouped("delta", _DELTA), **MLP}, _KEYS,
    biases=NO_ATTENTION_BIAS, fixed=SILU, implied=_one_width, rope=Rope(partial=True, sections="interleaved"),
    from_file=_of_file,
)  # fmt: skip
_QWEN35_MOE = replace(
    _QWEN35, model_type="qwen3_5_moe_text", model_class="Qwen3_5MoeForCausalLM", arch="qwen35moe",
    inside={**_NORMS, **grouped("attention", _ATTENTION), **grouped("delta", _DELTA), **_EXPERTS},
    keys=(*(key for key in _KEYS if key is not LENGTHS[3]), *_EXPERT_KEYS),
)  # fmt: skip
_SEEING = {"left_out": ("model.visual.",), "read_back": False}
_QWEN35_VISION = replace(
    _QWEN35, model_type="qwen3_5", model_class="Qwen3_5ForConditionalGeneration", **_SEEING,
)  # fmt: skip
_QWEN35_MOE_VISION = replace(
    _QWEN35_MOE, model_type="qwen3_5_moe", model_class="Qwen3_5MoeForConditionalGeneration", **_SEEING,
)  # fmt: skip

ROWS = (_QWEN3_NEXT, _QWEN35, _QWEN35_MOE, _QWEN35_VISION, _QWEN35_MOE_VISION)
