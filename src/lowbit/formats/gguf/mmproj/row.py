"""`Tower`, a row of the table of vision towers (`mmproj/table.py`): which tensors of a Hugging Face model form the
mmproj file that llama.cpp loads beside the language model, how they are stored, and what the file's key-values say.

Layouts, as llama.cpp's converter arranges them:

    SAME       nothing changes
    FRAMES     patch embedding of two frames, [N, C, 2, h, w] in Hugging Face, becomes one convolution [N, C, h, w] for
               each frame: "v.patch_embd.weight" and "v.patch_embd.weight.1"
    THIRDS     q, k and v in one matrix [3N, K], one after the other, become three
    ROTARY     the two halves of a rotary pair become neighbours, head by head; see `formats.gguf.row`
    PLUS_ONE   a norm of Gemma: w in Hugging Face, w + 1 in the file
    TOKEN      one row of the token embedding, [V, N] in Hugging Face, [N] in the file
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, GGUFValueType, Keys

from lowbit.formats.gguf.layout import Lookup

CLIP = "clip"  # general.architecture of every mmproj file
UINT, FLOAT, STRING, BOOL, ARRAY = (
    GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.BOOL, GGUFValueType.ARRAY
)  # fmt: skip


class TowerLayout(Enum):
    """See the module's docstring."""

    SAME = "same"
    FRAMES = "one convolution for each frame"
    THIRDS = "q, k and v apart"
    ROTARY = "rotary pairs"
    PLUS_ONE = "plus one"
    TOKEN = "one token"


@dataclass(frozen=True)
class TowerPlace:
    """The tensors of the file that one Hugging Face module (or bare parameter) becomes.

    tensors  one; three for THIRDS
    number   fills {bid} of a name outside the blocks
    bare     the Hugging Face parameter has no ".weight" at the end of its name
    plain    the tensor of the file has none either
    bias     True: it has one, and llama.cpp needs it; False: it has none; None: either
    kept     the type it always has: "F32" or "F16"; None: see `stored_type`
    """

    tensors: tuple[MODEL_TENSOR, ...]
    layout: TowerLayout = TowerLayout.SAME
    number: int | None = None
    bare: bool = False
    plain: bool = False
    bias: bool | None = False
    kept: str | None = None

    def names(self, suffix: str, block: int | None) -> list[str]:
        """Names in the file of its weight, or of its bias."""
        number = block if self.number is None else self.number
        stems = [TENSOR_NAMES[tensor].format(bid=number) for tensor in self.tensors]
        if self.plain:
            return stems
        if self.layout is TowerLayout.FRAMES and suffix == "weight":
            return [f"{stems[0]}.weight", f"{stems[0]}.weight.1"]
        return [f"{stem}.{suffix}" for stem in stems]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Those that must be there."""
        return ("weight", "bias") if self.bias else ("weight",)


@dataclass(frozen=True)
class TowerConfig:
    """What a row may ask of a model.

    vision, model, text  look-ups in the parts of config.json, completed with the defaults of transformers' classes
    processor            preprocessor_config.json and processor_config.json
    token_id             text of a special token → its number; CheckpointError where the tokenizer has none
    """

    vision: Lookup
    model: Lookup
    text: Lookup
    processor: dict[str, Any]
    token_id: Callable[[str], int]


@dataclass(frozen=True)
class TowerKey:
    """One key-value of the file.

    name   in full: "clip.vision.patch_size"
    value  a key of the vision config, or a function; None as the value leaves the key out
    """

    name: str
    value: str | Callable[[TowerConfig], Any]
    kind: GGUFValueType = UINT
    items: GGUFValueType | None = None

    def of(self, config: TowerConfig) -> Any:
        return config.vision(self.value) if isinstance(self.value, str) else self.value(config)


@dataclass(frozen=True)
class Tower:
    """One row.

    model_types  of config.json
    vision_type  model_type of its vision_config; None: any
    projector    clip.projector_type: what llama.cpp computes
    prefixes     beginnings of the names that belong to the tower and its projector; the others are the language model's
    blocks       path of the tower's blocks
    outside      module → place, of what is not in a block
    inside       path in a block → place, in the order of the file
    keys         key-values beyond those that all towers have
    block_count  key of the vision config that counts the blocks
    fixed        key of the vision config → what llama.cpp computes, in all spellings
    implied      (key, its value, what llama.cpp computes) of what follows from several keys
    extra        places that depend on the config: deepstack mergers, the embedding of one token
    left_out     beginning of names → why they are in no file
    note         what llama.cpp computes close to, but not exactly as transformers does
    """

    model_types: tuple[str, ...]
    projector: str
    prefixes: tuple[str, ...]
    blocks: str
    outside: dict[str, TowerPlace]
    inside: dict[str, TowerPlace]
    keys: tuple[TowerKey, ...]
    vision_type: str | None = None
    block_count: str = "num_hidden_layers"
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    implied: Callable[[TowerConfig], Iterable[tuple[str, Any, Any]]] = lambda config: ()
    extra: Callable[[TowerConfig], dict[str, TowerPlace]] = lambda config: {}
    left_out: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def why_left_out(self, parameter: str) -> str | None:
        return next((why for start, why in self.left_out.items() if parameter.startswith(start)), None)

    def find(self, parameter: str, extra: dict[str, TowerPlace]) -> TowerTarget | None:
        """Where a Hugging Face parameter goes; None if nowhere."""
        stem, _, suffix = parameter.rpartition(".")
        for module, ending, bare in ((parameter, "weight", True), (stem, suffix, False)):
            block, path = None, module
            if module.startswith(self.blocks + "."):
                number, _, inside = module[len(self.blocks) + 1 :].partition(".")
                if number.isdigit():
                    block, path = int(number), inside
            place = (self.outside | extra if block is None else self.inside).get(path)
            if place is not None and place.bare is bare and (ending == "weight" or place.bias is not False):
                return TowerTarget(place, block, ending) if ending in ("weight", "bias") else None
        return None

    def needed(self, blocks: int, extra: dict[str, TowerPlace]) -> set[str]:
        """Names of all tensors without which llama.cpp does not load the file, or computes something else."""
        places = [(place, None) for place in (self.outside | extra).values()]
        places += [(place, block) for place in self.inside.values() for block in range(blocks)]
        return {name for place, block in places for suffix in place.suffixes for name in place.names(suffix, block)}


@dataclass(frozen=True)
class TowerTarget:
    """Where one Hugging Face parameter goes. suffix  "weight" or "bias" """

    place: TowerPlace
    block: int | None
    suffix: str

    @property
    def names(self) -> list[str]:
        return self.place.names(self.suffix, self.block)


PATCHES = (MODEL_TENSOR.V_ENC_EMBD_PATCH, MODEL_TENSOR.V_MM_PATCH_MERGER)


def stored_type(target: TowerTarget, name: str, shape: tuple[int, ...], asked: str) -> tuple[str, str | None]:
    """(ggml type before the length of rows is looked at, why it is not the one that was asked for).

    Follows tensor_force_quant and prepare_tensors of llama.cpp's conversion/base.py and of its classes of towers.
    """
    place = target.place
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return "F32", "vectors and norms are always F32"
    if place.kept is not None:
        return place.kept, f"llama.cpp has it in {place.kept}, whatever the rest of the file is in"
    if place.tensors[0] in PATCHES:
        return ("F16" if asked == "F16" else "F32"), "patches are convolved in F16 or F32"
    if place.tensors[0] is MODEL_TENSOR.V_ENC_EMBD_POS:
        return "F32", "position embeddings are always F32"
    return asked, None


def _mean_or_std(key: str) -> Callable[[TowerConfig], Any]:
    return lambda config: config.processor.get(key)


# The keys that llama.cpp needs of every tower, but for its sizes: their names in config.json differ.
COMMON_KEYS = (
    TowerKey(Keys.Clip.HAS_VISION_ENCODER, lambda config: True, BOOL),
    TowerKey(Keys.ClipVision.PROJECTION_DIM, lambda config: config.text("hidden_size")),
    TowerKey(Keys.ClipVision.IMAGE_MEAN, _mean_or_std("image_mean"), ARRAY, FLOAT),
    TowerKey(Keys.ClipVision.IMAGE_STD, _mean_or_std("image_std"), ARRAY, FLOAT),
)
