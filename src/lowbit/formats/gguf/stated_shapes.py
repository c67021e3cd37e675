"""Shapes that the key-values of a GGUF file state: what llama.cpp asks of every tensor when it creates it.

    blk.N.attn_q        heads · d_k rows                feed_forward_length and the counts of heads are one number for
    blk.N.attn_k, _v    kv heads · d_k, · d_v rows      all blocks, or one for each
    blk.N.attn_output   heads · d_v columns             d_k = key_length, or embedding_length / heads
    blk.N.ffn_gate, up  feed_forward_length rows        d_v = value_length, or d_k
    blk.N.ffn_down      feed_forward_length columns
    …_exps              expert_count matrices of expert_feed_forward_length

Some architectures have two matrices in one tensor, with twice the rows: gate and up in ffn_up, a gate beside attn_q.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_TWO_IN_ONE = {"ffn_up": ("chatglm", "glm4", "phi3"), "attn_q": ("qwen35", "qwen35moe", "qwen3next")}
_LATENT = "attention.kv_lora_rank"  # heads are then of two parts, or absorbed, and sizes those of the latent


@dataclass(frozen=True)
class _Sizes:
    """The numbers of one block; None where the file states none."""

    metadata: dict[str, Any]
    arch: str
    block: int

    def number(self, name: str) -> int | None:
        """Of all blocks or of this one; None also for what is no number."""
        value = self.metadata.get(f"{self.arch}.{name}")
        if isinstance(value, np.ndarray | list):
            value = value[self.block] if self.block < len(value) else None
        value = value.item() if isinstance(value, np.generic) else value
        return value if type(value) is int and value > 0 else None

    def heads(self) -> int | None:
        return self.number("attention.head_count")

    def kv_heads(self) -> int | None:
        stated = f"{self.arch}.attention.head_count_kv" in self.metadata
        return self.number("attention.head_count_kv") if stated else self.heads()

    def key(self) -> tuple[int, ...]:
        """Widths that a head of keys may have: blocks with a sliding window may have another."""
        width, heads = self.number("embedding_length"), self.heads()
        usual = self.number("attention.key_length") or (width // heads if width and heads else None)
        return tuple(filter(None, (usual, self.number("attention.key_length_swa"))))

    def value(self) -> tuple[int, ...]:
        usual = self.number("attention.value_length")
        found = tuple(filter(None, (usual, self.number("attention.value_length_swa"))))
        return found if usual else self.key()

    def hidden(self) -> tuple[int, ...]:
        return tuple(filter(None, (self.number("feed_forward_length"),)))

    def expert_hidden(self) -> tuple[int, ...]:
        own = self.number("expert_feed_forward_length")
        return self.hidden() if own is None else (own,)


def _times(count: Callable[[_Sizes], int | None], width: Callable[[_Sizes], tuple[int, ...]]) -> Callable:
    return lambda sizes: tuple(each * (count(sizes) or 0) for each in width(sizes) if count(sizes))


# tensor of a block → (axis, sizes that fit, the key that states them)
_QUERIES, _KEYS = _times(_Sizes.heads, _Sizes.key), _times(_Sizes.kv_heads, _Sizes.key)
_VALUES, _OUTPUTS = _times(_Sizes.kv_heads, _Sizes.value), _times(_Sizes.heads, _Sizes.value)
_HEADS, _KV_HEADS = "attention.head_count", "attention.head_count_kv"
_STATED: dict[str, tuple[int, Callable[[_Sizes], tuple[int, ...]], str]] = {
    "attn_q": (-2, _QUERIES, _HEADS),
    "attn_k": (-2, _KEYS, _KV_HEADS),
    "attn_v": (-2, _VALUES, _KV_HEADS),
    "attn_output": (-1, _OUTPUTS, _HEADS),
    "ffn_gate": (-2, _Sizes.hidden, "feed_forward_length"),
    "ffn_up": (-2, _Sizes.hidden, "feed_forward_length"),
    "ffn_down": (-1, _Sizes.hidden, "feed_forward_length"),
    "ffn_gate_exps": (-2, _Sizes.expert_hidden, "expert_feed_forward_length"),
    "ffn_up_exps": (-2, _Sizes.expert_hidden, "expert_feed_forward_length"),
    "ffn_down_exps": (-1, _Sizes.expert_hidden, "expert_feed_forward_length"),
}


def denied_shape(arch: str, metadata: dict[str, Any], pattern: str, block: int | None, shape: Sequence[int]) -> str:
    """Why the key-values deny a tensor's shape ([…, N, K]), in words; "" where they do not, or say nothing of it.

    pattern  "blk.{bid}.attn_q", of a weight, or of the bias of stacked experts [experts, N]
    """
    kind = pattern.removeprefix("blk.{bid}.")
    if block is None or kind not in _STATED or len(shape) < 2:
        return ""
    sizes = _Sizes(metadata, arch, block)
    axis, find, key = _STATED[kind]
    if kind.startswith("attn") and sizes.number(_LATENT) is not None:
        return ""
    experts = sizes.number("expert_count")
    if kind.endswith("_exps") and experts is not None and shape[0] != experts:
        return f"{shape[0]} experts, expert_count is {experts}"
    if kind.endswith("_exps") and len(shape) == 2:  # biases
        return "" if axis == -1 else denied_shape(arch, metadata, pattern, block, (*shape, 0))
    matrices = 2 if arch in _TWO_IN_ONE.get(kind, ()) else 1
    fitting = [size * matrices for size in find(sizes)]
    if not fitting or shape[axis] in fitting:
        return ""
    return f"{shape[axis]} {'rows' if axis == -2 else 'columns'}, {key} asks for {fitting[0]}"


def named_pattern(name: str) -> tuple[str, int | None]:
    """("blk.{bid}.attn_q", 3) of blk.3.attn_q.weight."""
    stem = name.rpartition(".")[0] if name.endswith((".weight", ".bias", ".scale", ".input_scale")) else name
    found = re.match(r"blk\.(\d{1,6})\.", stem)
    return (stem, None) if found is None else (f"blk.{{bid}}.{stem[found.end() :]}", int(found[1]))
