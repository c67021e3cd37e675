"""`GGUFArchitecture`, a row of the table of GGUF architectures (`table.py`), and the row layouts of tensors.

A row serves both directions. Writing a GGUF takes names, layouts and key-values from it and refuses a model that
llama.cpp would compute differently; reading one takes the inverse names and layouts, and config.json from the same
keys.

Row layouts, as llama.cpp's converter arranges them, for a tensor of `rows` rows in `heads` heads; h, p and q count
halves (2), pairs, and the parts q, k, v (3):

    ROTARY      the two halves of a rotary pair become neighbours, within a head of d = rows / heads rows
                Hugging Face  head·d + h·d/2 + p            GGUF  head·d + 2p + h
    QKV         q, k and v, interleaved head by head, become three matrices; d = rows / heads / 3
                Hugging Face  head·3d + q·d + i             GGUF  q·heads·d + head·d + i
    TRANSPOSED  Conv1D of GPT-2: [K, N] in Hugging Face, [N, K] in GGUF
    PLUS_ONE    norms of Gemma: w in Hugging Face, w + 1 in GGUF
    ONE_ROW     one row of weights: [1, K] in Hugging Face, [1, K] or [K] in GGUF
    SAME        nothing changes

Both orders keep rows of one head close together: d consecutive GGUF rows of a head lie within d consecutive Hugging
Face rows, which is what bounds the memory of reading a slab.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, GGUFValueType

# Key of config.json → value; None where it has none.
Lookup = Callable[[str], Any]

_EXPERT = re.compile(r"(^|\.)experts\.(\d+)\.")


class RowLayout(Enum):
    """See the module's docstring."""

    SAME = "same"
    ROTARY = "rotary pairs"
    QKV = "q, k and v by head"
    TRANSPOSED = "transposed"
    PLUS_ONE = "plus one"
    ONE_ROW = "one row"

    @property
    def reorders(self) -> bool:
        return self in _ROWS_PER_HEAD


_ROWS_PER_HEAD = {RowLayout.ROTARY: 1, RowLayout.QKV: 3}


def head_dim(layout: RowLayout, rows: int, heads: int) -> int | None:
    """Rows of one head (of q, k or v) in a tensor of `rows` rows; None where they do not divide evenly."""
    parts = _ROWS_PER_HEAD[layout] * heads
    if heads < 1 or rows % parts or (layout is RowLayout.ROTARY and rows // parts % 2):
        return None
    return rows // parts


def stored_rows(layout: RowLayout, hf_rows: np.ndarray, heads: int, dim: int) -> np.ndarray:
    """Hugging Face rows, int64 [n] → the GGUF rows that hold them, int64 [n]. dim  rows of a head, from `head_dim`."""
    if layout is RowLayout.ROTARY:
        head, row = np.divmod(hf_rows, dim)
        half, pair = np.divmod(row, dim // 2)
        return head * dim + 2 * pair + half
    head, row = np.divmod(hf_rows, 3 * dim)
    part, row = np.divmod(row, dim)
    return (part * heads + head) * dim + row


def hf_rows(layout: RowLayout, stored: np.ndarray, heads: int, dim: int) -> np.ndarray:
    """GGUF rows, int64 [n] → the Hugging Face rows that they hold, int64 [n]; the inverse of `stored_rows`."""
    if layout is RowLayout.ROTARY:
        head, row = np.divmod(stored, dim)
        pair, half = np.divmod(row, 2)
        return head * dim + half * (dim // 2) + pair
    part, row = np.divmod(stored, heads * dim)
    head, row = np.divmod(row, dim)
    return (head * 3 + part) * dim + row


@dataclass(frozen=True)
class Place:
    """The GGUF tensor of one Hugging Face module (or bare parameter).

    heads  the key-value, below the architecture's name, that counts the heads of a layout that goes by head
    bare   the Hugging Face parameter has no ".weight" at the end of its name
    """

    tensor: MODEL_TENSOR
    layout: RowLayout = RowLayout.SAME
    heads: str = "attention.head_count"
    bare: bool = False


@dataclass(frozen=True)
class Key:
    """One key-value of GGUF and one key of config.json with the same meaning.

    name       below the architecture's name: "attention.head_count"
    otherwise  value where config.json or the file has none
    default    what llama.cpp takes where the file has none; config.json always says it
    optional   neither side needs it; a key without any of the three must be there
    """

    name: str
    config: str
    kind: GGUFValueType = GGUFValueType.UINT32
    otherwise: Callable[[Lookup], Any] | None = None
    default: Any = None
    optional: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings in llama.cpp.

    scalings   transformers' rope types that it computes
    partial    it rotates the first rope.dimension_count of a head, which may be fewer than all
    local      sliding-window blocks have a base of their own (Gemma 3)
    truncates  transformers rounds the ends of the YaRN ramp to whole dimensions, as llama.cpp does
    """

    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    partial: bool = False
    local: bool = False
    truncates: bool = True


@dataclass(frozen=True)
class GGUFArchitecture:
    """One row.

    model_type     of config.json
    model_class    what config.json's `architectures` says
    arch           general.architecture of the file
    blocks         path of the decoder blocks
    outside        module → place, of what is not in a block
    inside         path in a block → place, in the order of the file; "*" stands for the number of an expert
    keys           key-values ↔ config.json
    biases         which tensors have a bias, in every block → what config.json must say then
    fixed          config.json key → what llama.cpp computes, in all spellings; the first is written on reading
    near           (config.json key, value) that is accepted though llama.cpp computes something close to it → the note
    implied        what llama.cpp derives from other values and config.json has to agree with
    rope           None without rotary embeddings
    window_period  every so many blocks one attends to everything and the others within attention.sliding_window;
                   0: llama.cpp keeps the key and ignores it; None: it does not know the key
    window_default what it takes for attention.sliding_window where the file has none; 0: no window
    needs_output   llama.cpp loads no model without output.weight, tied or not
    read_back      this row is what a GGUF file of its `arch` becomes (others share the arch: Mistral becomes Llama)
    left_out       beginnings of names that belong to parts llama.cpp keeps in files of their own (vision)
    """

    model_type: str
    model_class: str
    arch: str
    blocks: str
    outside: dict[str, Place]
    inside: dict[str, Place]
    keys: tuple[Key, ...]
    biases: dict[frozenset[MODEL_TENSOR], dict[str, Any]] = field(default_factory=lambda: {frozenset(): {}})
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    near: dict[tuple[str, Any], str] = field(default_factory=dict)
    implied: Callable[[Lookup], dict[str, Any]] = lambda get: {}
    rope: Rope | None = Rope()
    window_period: int | None = None
    window_default: int = 0
    needs_output: bool = False
    read_back: bool = True
    left_out: tuple[str, ...] = ()

    @cached_property
    def places(self) -> dict[MODEL_TENSOR, tuple[str, Place]]:
        """Tensor → (Hugging Face module with {bid} and {expert} to fill in, place)."""
        prefix = f"{self.blocks}.{{bid}}."
        inside = {prefix + path.replace("*", "{expert}"): place for path, place in self.inside.items()}
        return {place.tensor: (module, place) for module, place in (self.outside | inside).items()}

    def find(self, parameter: str) -> RowTarget | None:
        """Where a Hugging Face parameter goes; None if nowhere."""
        stem, _, suffix = parameter.rpartition(".")
        for module, ending, bare in ((parameter, "weight", True), (stem, suffix, False)):
            block, path = self._path(module)
            expert = _EXPERT.search(path)
            path = _EXPERT.sub(r"\1experts.*.", path)
            place = (self.outside if block is None else self.inside).get(path)
            if place is not None and place.bare is bare and ending in ("weight", "bias"):
                return RowTarget(place, block, int(expert[2]) if expert else None, ending)
        return None

    def leaves_out(self, parameter: str) -> bool:
        return parameter.startswith(self.left_out) if self.left_out else False

    def _path(self, module: str) -> tuple[int | None, str]:
        """(block, path in it), or (None, the module's own name)."""
        prefix = self.blocks + "."
        if module.startswith(prefix):
            number, _, path = module[len(prefix) :].partition(".")
            if number.isdigit() and path:
                return int(number), path
        return None, module


@dataclass(frozen=True)
class RowTarget:
    """Where one Hugging Face parameter goes. suffix  "weight" or "bias"; expert  its number, None for no expert."""

    place: Place
    block: int | None
    expert: int | None
    suffix: str

    @property
    def name(self) -> str:
        """The GGUF name."""
        return f"{TENSOR_NAMES[self.place.tensor].format(bid=self.block)}.{self.suffix}"
