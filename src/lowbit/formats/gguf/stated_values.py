"""The rule that a file's key-values state the computation of its source: rotary base, heads, norms, experts per token.

The source is a GGUF file, whose key-values are compared as they are, or a model that is mapped once more, as if it were
written. Only keys of the architecture ("llama.rope.freq_base") are compared: those of `general` and of the tokenizer
do not come from config.json. What llama.cpp takes for granted or reads off the tensors may be absent from one of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.errors import ArchitectureError
from lowbit.formats.gguf.keys import PATTERN, WINDOW
from lowbit.formats.gguf.mmproj.model import describe_mmproj
from lowbit.formats.gguf.model import describe_gguf
from lowbit.formats.gguf.table import ROWS
from lowbit.verification.result import MMPROJ, Finding

if TYPE_CHECKING:
    from lowbit.formats.gguf.subject import GGUFSubject

# key → what llama.cpp computes with where it is absent; None: what the tensors say
_TAKEN_FOR_GRANTED: dict[str, Any] = {
    "attention.key_length": None, "attention.value_length": None, "attention.head_count_kv": None,
    "rope.dimension_count": None, "vocab_size": None, "rope.freq_base": 10000.0, "rope.scaling.factor": 1.0,
    "rope.scaling.attn_factor": 1.0, "attention.causal": True, "expert_weights_scale": 1.0, "logit_scale": 1.0,
}  # fmt: skip
_NOTHING = (0, "none")  # 0.0 and False are equal to 0
_LONGEST = 80


def check_same_computation(subject: GGUFSubject) -> Finding:
    """Every key-value of the architecture has the value that the source gives it."""
    try:
        arch, theirs = _of_source(subject)
    except ArchitectureError as error:  # has no form as GGUF by lowbit's table: there is nothing to compare with
        return Finding([], f"not compared: {error}")
    if arch != subject.arch:
        return Finding([f"general.architecture is {subject.arch!r}, the source's is {arch!r}"], "")
    ours = _below(subject.raw.metadata, arch)
    readable = {key.name for row in ROWS if row.arch == arch for key in row.keys} | {WINDOW, PATTERN}
    extra = (key for key in ours if key in readable or key.startswith("rope.") or not subject.source_is_mapped)
    problems = []
    for key in dict.fromkeys((*theirs, *extra)):
        mine, other = ours.get(key), theirs.get(key)
        if not _are_same(key, mine, other):
            problems.append(f"{arch}.{key} is {_shown(mine)}, by the source {_shown(other)}")
    return Finding(problems, f"{len(theirs)} key-values of {arch} are the source's")


def _of_source(subject: GGUFSubject) -> tuple[str, dict[str, Any]]:
    """(general.architecture, its key-values) of the source."""
    assert subject.source is not None
    if not subject.source_is_mapped:
        metadata = subject.source.metadata  # type: ignore[attr-defined]
    else:
        architecture, source = subject.described
        described = (describe_mmproj if subject.known_format == MMPROJ else describe_gguf)(source, architecture)
        metadata = {key: value[0] for key, value in described.key_values.items()}
    arch = str(metadata.get("general.architecture", ""))
    return arch, _below(metadata, arch)


def _below(metadata: Mapping[str, Any], arch: str) -> dict[str, Any]:
    return {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}


def _are_same(key: str, mine: Any, other: Any) -> bool:
    if mine is None or other is None:
        stated = other if mine is None else mine
        granted = _TAKEN_FOR_GRANTED.get(key, 0)
        return granted is None or _is_all(stated, granted) or any(_is_all(stated, nothing) for nothing in _NOTHING)
    if isinstance(mine, str) or isinstance(other, str):
        return bool(mine == other)
    if np.ndim(mine) != np.ndim(other):  # one number for every block, or one per block
        return _is_all(mine, other) if np.ndim(mine) else _is_all(other, mine)
    one, two = _as_stored(mine), _as_stored(other)
    return one.shape == two.shape and np.array_equal(one, two, equal_nan=one.dtype.kind == two.dtype.kind == "f")


def _is_all(value: Any, one: Any) -> bool:
    """True if a value, or each of a list, is one number or string."""
    if isinstance(value, str) or isinstance(one, str):
        return bool(value == one)
    return bool(np.all(_as_stored(value) == _as_stored(one)))


def _as_stored(value: Any) -> np.ndarray:
    """Floats as float32, in which files hold them; strings and integers as they are."""
    values = np.asarray(value)
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def _shown(value: Any) -> str:
    text = "absent" if value is None else str(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
