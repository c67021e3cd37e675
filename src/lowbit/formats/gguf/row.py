"""`GGUFArchitecture`, a row of the table of GGUF architectures (`families/`).

A row serves both directions. Writing a GGUF takes names, layouts and key-values from it and refuses a model that
llama.cpp would compute differently; reading one takes the inverse names and layouts, and config.json from the same
keys. `layout.py` has the layouts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, GGUFValueType

from lowbit.formats.gguf.layout import SAME, Lookup, RowLayout

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Place:
    """A GGUF tensor that one Hugging Face module (or bare parameter) becomes.

    bare      the Hugging Face parameter has no ".weight" at the end of its name
    ending    of a bare parameter's GGUF name: "weight", "bias", or "" for none ("blk.0.ssm_a")
    group     a block has all tensors of a group or none of them; tensors without a group are in every block
    optional  a block may lack it
    flag      key of config.json that is true where the model has the tensor
    count     key of config.json that counts what "*" in the path stands for, or what counts it; "": it stands for the
              experts of a block
    """

    tensor: MODEL_TENSOR
    layout: RowLayout = SAME
    bare: bool = False
    ending: str = "weight"
    group: str = ""
    optional: bool = False
    flag: str = ""
    count: str | Callable[[Lookup], int] = ""

    def name(self, suffix: str, block: int | None) -> str:
        stem = TENSOR_NAMES[self.tensor].format(bid=block)
        return f"{stem}.{suffix}" if suffix else stem

    def layout_of(self, suffix: str) -> RowLayout:
        """Of the weight or of the bias: a norm of w + 1 has the bias as it is."""
        if suffix == "bias" and not self.bare and self.layout.values is not None:
            return replace(self.layout, values=None, undo=None)
        return self.layout


Places = Mapping[str, Place | tuple[Place, ...]]


def grouped(group: str, places: Places) -> Places:
    """The places, as members of a group."""

    def member(place: Place | tuple[Place, ...]) -> Place | tuple[Place, ...]:
        if isinstance(place, tuple):
            return tuple(replace(one, group=group) for one in place)
        return replace(place, group=group)

    return {path: member(place) for path, place in places.items()}


@dataclass(frozen=True)
class Key:
    """One key-value of GGUF and one key of config.json with the same meaning.

    name       below the architecture's name: "attention.head_count"
    config     the key of config.json, "attn_config.clip_qkv" for one in a part; "" for a value that is computed
    kind       of the value, or of the items of a list
    value      computes it, None for no key-value; reading a file passes it by (`GGUFArchitecture.from_file`)
    otherwise  value where config.json or the file has none
    default    what llama.cpp takes where the file has none; config.json always says it
    optional   neither side needs it; a key without any of the four must be there
    zero       0 is a value; other counts are positive
    one_of_all config.json may have a list, of which all items are equal (`GGUFArchitecture.implied`)
    """

    name: str
    config: str = ""
    kind: GGUFValueType = GGUFValueType.UINT32
    otherwise: Callable[[Lookup], Any] | None = None
    default: Any = None
    optional: bool = False
    value: Callable[[Lookup], Any] | None = None
    zero: bool = False
    one_of_all: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings in llama.cpp.

    scalings   transformers' rope types that it computes
    partial    it rotates the first rope.dimension_count of a head, which may be fewer than all
    local      sliding-window blocks have a base of their own (Gemma 3)
    local_base what that is where the file has none; None: the base of the other blocks
    local_partial  and a number of rotated dimensions of their own
    truncates  transformers rounds the ends of the YaRN ramp to whole dimensions, as llama.cpp does
    log        llama.cpp divides YaRN's magnitude by that of rope.scaling.yarn_log_multiplier: mscale_all_dim
    betas      its loader reads the ends of that ramp from the file (`rope.py`)
    alpha      "dynamic" with an alpha is a larger base: θ · alpha^(d / (d - 2)) (Hunyuan)
    dim        rotated dimensions of a head, where they are not a share of head_dim
    sections   positions have several axes, which share the rotary pairs (`mrope_section`): "runs" of them, or
               "interleaved"; "" for the usual positions
    latent     YaRN scales the scores of latent attention by m(mscale_all_dim)², and cos and sin by nothing; llama.cpp
               computes it for these values of mscale_all_dim; () for any
    """

    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    partial: bool = False
    local: bool = False
    local_base: float | None = 10000.0
    local_partial: bool = False
    truncates: bool = True
    log: bool = False
    betas: bool = False
    alpha: bool = False
    dim: Callable[[Lookup], int] | None = None
    sections: str = ""
    latent: tuple[float, ...] | None = None


@dataclass(frozen=True)
class GGUFArchitecture:
    """One row.

    model_type     of config.json
    model_class    what config.json's `architectures` says
    arch           general.architecture of the file
    blocks         path of the decoder blocks
    outside        module → place (or places, for a tensor that is split), of what is not in a block
    inside         path in a block → the same, in the order of the file; "*" stands for a number (`Place.count`)
    scalars        path in a block of a tensor of one number → (full key of the numbers of all blocks, its shape)
    keys           key-values ↔ config.json
    vocabulary     tokenizer.ggml.model of a vocabulary that has "▁" for spaces: "llama", whose tokens join by score, or
                   "gemma4", which has merges
    biases         which tensors have a bias, in every block that has the tensor → what config.json must say then
    fixed          config.json key → what llama.cpp computes, in all spellings; the first is written on reading
    near           (config.json key, value or condition) that is accepted though llama.cpp computes something close to
                   it → the note
    implied        what llama.cpp derives from other values and config.json has to agree with
    rope           None without rotary embeddings
    window_period  every so many blocks one attends to everything and the others within attention.sliding_window;
                   1: the file always says which blocks slide; 0: llama.cpp keeps the key and ignores it; None: it does
                   not know the key
    window_default what it takes for attention.sliding_window where the file has none; 0: no window
    windowless     a file without attention.sliding_window is a model that attends to everything
    window_of      sliding_window of transformers' config object → the number in the file
    needs_output   llama.cpp loads no model without output.weight, tied or not
    read_back      this row is what a GGUF file of its `arch` becomes (others share the arch: Mistral becomes Llama)
    left_out       beginnings of names that belong to parts llama.cpp keeps in files of their own (vision)
    when           of several rows of a model type, the first whose condition on config.json holds is taken
    of_file        of several readable rows of an arch, the first whose condition on the key-values holds
    of_tensors     and whose files have these tensors
    from_file      key-values → what config.json gets besides `keys`: what computed keys say, the other way around;
                   ValueError where they say nothing sensible
    from_names     the same of the names of the file's tensors
    unread         names and shapes of tensors that the loader asks for and llama.cpp does not compute with, where the
                   model has none: they are written as zeros
    """

    model_type: str
    model_class: str
    arch: str
    blocks: str
    outside: Places
    inside: Places
    keys: tuple[Key, ...]
    biases: dict[frozenset[MODEL_TENSOR], dict[str, Any]] = field(default_factory=lambda: {frozenset(): {}})
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    near: dict[tuple[str, Any], str] = field(default_factory=dict)
    implied: Callable[[Lookup], dict[str, Any]] = lambda get: {}
    rope: Rope | None = Rope()
    window_period: int | None = None
    window_default: int = 0
    windowless: bool = False
    window_of: Callable[[int], int] = lambda window: window
    needs_output: bool = False
    read_back: bool = True
    left_out: tuple[str, ...] = ()
    when: Callable[[Lookup], bool] = lambda get: True
    of_file: Callable[[dict[str, Any]], bool] = lambda metadata: True
    of_tensors: tuple[str, ...] = ()
    from_file: Callable[[dict[str, Any]], dict[str, Any]] = lambda metadata: {}
    scalars: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    vocabulary: str = "llama"
    from_names: Callable[[Collection[str]], dict[str, Any]] = lambda names: {}
    unread: Callable[[Lookup], Mapping[str, tuple[int, ...]]] = lambda get: {}

    @cached_property
    def places(self) -> dict[tuple[MODEL_TENSOR, str], tuple[str, Place]]:
        """(tensor, ending) → (Hugging Face module with {bid} and {expert} to fill in, place)."""
        prefix = f"{self.blocks}.{{bid}}."
        inside = {prefix + path: place for path, place in self.inside.items()}
        return {
            (place.tensor, place.ending): (module.replace("*", "{expert}"), place)
            for module, places in {**self.outside, **inside}.items()
            for place in each_place(places)
        }

    @property
    def stacks_experts(self) -> bool:
        return any("*" in path and not place.count for path, place in self._inside_places)

    def find(self, parameter: str) -> tuple[RowTarget, ...]:
        """Where a Hugging Face parameter goes: one tensor, several that share its rows, or none that is known."""
        stem, _, suffix = parameter.rpartition(".")
        for module, bare in ((parameter, True), (stem, False)):
            block, path = self._path(module)
            known = self.outside if block is None else self.inside
            expert = None if path in known else _NUMBER.search(path)
            places = known.get(path if expert is None else _NUMBER.sub("*", path, count=1))
            if places is None or any(place.bare is not bare for place in each_place(places)):
                continue
            if bare or suffix in ("weight", "bias"):
                number = int(expert[0]) if expert else None
                return tuple(
                    RowTarget(place, block, number, place.ending if bare else suffix) for place in each_place(places)
                )
        return ()

    def missing(self, blocks: int, biased: Container[MODEL_TENSOR], found: Container[str]) -> list[str]:
        """GGUF names that llama.cpp's loader needs and that are not among those found.

        biased  tensors that have a bias, in every block that has the tensor
        """
        names = []
        for block in range(blocks):
            inside = [(place, place.name(place.ending, block)) for _, place in self._inside_places]
            begun = {place.group for place, name in inside if name in found}
            for place, name in inside:
                if place.group and place.group not in begun:
                    continue
                names += [name] if name not in found and not place.optional else []
                if place.tensor in biased and not place.bare and name in found:
                    bias = place.name("bias", block)
                    names += [bias] if bias not in found else []
        for places in self.outside.values():
            for place in each_place(places):
                name = place.name(place.ending, None)
                if place.tensor is not MODEL_TENSOR.OUTPUT and not place.optional and name not in found:
                    names.append(name)
        return names

    @cached_property
    def _inside_places(self) -> list[tuple[str, Place]]:
        return [(path, place) for path, places in self.inside.items() for place in each_place(places)]

    def is_scalar(self, parameter: str) -> bool:
        """True for a tensor that becomes one number of a key-value."""
        block, path = self._path(parameter)
        return block is not None and path in self.scalars

    def leaves_out(self, parameter: str) -> bool:
        return parameter.startswith(self.left_out) if self.left_out else False

    def around(
        self, model_type: str, model_class: str, stem: str, head: str, left_out: tuple[str, ...]
    ) -> GGUFArchitecture:
        """This decoder as a part of another model: `stem` stands for its "model.", `head` for its "lm_head"."""

        def renamed(path: str) -> str:
            return re.sub(r"^lm_head$", head, re.sub(r"^model\.", stem, path))

        return replace(
            self, model_type=model_type, model_class=model_class, blocks=renamed(self.blocks),
            outside={renamed(path): place for path, place in self.outside.items()},
            left_out=(*self.left_out, *left_out), read_back=False,
        )  # fmt: skip

    def _path(self, module: str) -> tuple[int | None, str]:
        """(block, path in it), or (None, the module's own name)."""
        prefix = self.blocks + "."
        if module.startswith(prefix):
            number, _, path = module[len(prefix) :].partition(".")
            if number.isdigit() and path:
                return int(number), path
        return None, module


def each_place(places: Place | tuple[Place, ...]) -> Iterator[Place]:
    yield from places if isinstance(places, tuple) else (places,)


@dataclass(frozen=True)
class RowTarget:
    """Where one Hugging Face parameter goes.

    suffix  "weight", "bias" or ""; expert  its number, or that of what else is stacked; None for a tensor of its own
    """

    place: Place
    block: int | None
    expert: int | None
    suffix: str

    @property
    def name(self) -> str:
        """The GGUF name."""
        return self.place.name(self.suffix, self.block)
