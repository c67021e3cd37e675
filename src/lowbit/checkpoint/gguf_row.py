"""The nouns of the table of GGUF architectures: what one row says. `gguf_table` has the rows.

A row is read in both directions. Writing a GGUF takes names, layouts and key-values from it and refuses a model that
llama.cpp would compute differently; reading one takes the inverse names and layouts, and config.json from the same
keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, GGUFValueType

from lowbit.checkpoint.gguf_layout import Layout

# What an `otherwise` or `implied` is given: the value of a key of config.json, None where it has none.
Lookup = Callable[[str], Any]

_EXPERT = re.compile(r"(^|\.)experts\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Where one Hugging Face module (or bare parameter) stands in GGUF.

    heads  the key-value, below the architecture's name, that counts the heads of a layout that goes by head
    bare   the Hugging Face parameter has no ".weight" at the end of its name
    """

    tensor: MODEL_TENSOR
    layout: Layout = Layout.SAME
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
    """What llama.cpp reads of rotary embeddings.

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
    def has_experts(self) -> bool:
        return any("*" in path for path in self.inside)

    @cached_property
    def places(self) -> dict[MODEL_TENSOR, tuple[str, Place]]:
        """Tensor → (Hugging Face module with {bid} and {expert} to fill in, place)."""
        prefix = f"{self.blocks}.{{bid}}."
        inside = {prefix + path.replace("*", "{expert}"): place for path, place in self.inside.items()}
        return {place.tensor: (module, place) for module, place in (self.outside | inside).items()}

    def find(self, parameter: str) -> Target | None:
        """Where a Hugging Face parameter goes; None if nowhere."""
        stem, _, suffix = parameter.rpartition(".")
        for module, ending, bare in ((parameter, "weight", True), (stem, suffix, False)):
            block, path = self._path(module)
            expert = _EXPERT.search(path)
            path = _EXPERT.sub(r"\1experts.*.", path)
            place = (self.outside if block is None else self.inside).get(path)
            if place is not None and place.bare is bare and ending in ("weight", "bias"):
                return Target(place, block, int(expert[2]) if expert else None, ending)
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
class Target:
    """Where one Hugging Face parameter goes. suffix  "weight" or "bias"; expert  its number, None for no expert."""

    place: Place
    block: int | None
    expert: int | None
    suffix: str

    @property
    def name(self) -> str:
        """The GGUF name."""
        return f"{TENSOR_NAMES[self.place.tensor].format(bid=self.block)}.{self.suffix}"
