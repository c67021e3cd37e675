"""What a config.json states, checked where it is first read: counts that the files must bear out, kernels of the Hub,
a quantization.

    "num_hidden_layers": 1000000000        refused: the files hold 21 tensors
    "hidden_size": 1000000000              refused: the largest tensor holds 32768 numbers
    "dtype": ["x"]                         refused: transformers fails on it long after the config is read
    "attn_implementation": "org/kernel"    dropped with a note: transformers would download and run it
    "quantization_config" over floats      dropped with a note (`quantized.open_quantized`)

A quantization stands under `quantization_config`, in old files of compressed-tensors under `compression_config`, and in
models that see also inside `text_config`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from lowbit.checkpoint.base import Checkpoint, OpenOptions, read_config, text_part
from lowbit.errors import CheckpointError

QUANTIZATION_KEYS = ("quantization_config", "compression_config")

# Counts of parts of a model, each of which holds tensors or rows of one.
_COUNTS = re.compile(r"^(?!.*(size|dim|width|rank)$).*(^|_)(layers?|blocks?|experts?|heads?|depth)(_|$)")
_LAYERS = re.compile(r"(num_hidden_layers|num_layers|n_layers?)$")
# No model has so many; attention heads and experts share a tensor, so that the files bound them loosely.
_MOST = 4096
# Sizes of matrices: a dimension cannot be larger than the largest tensor as a whole. Sizes that models have pass:
# a tower may state one that it does not use.
MOST_WIDE = 1 << 20
_SIZES = re.compile(
    r"^(hidden_size|(moe_|shared_expert_)?intermediate_size|vocab_size|head_dim|d_model|d_ff|n_embd|n_inner|ffn_dim"
    r"|ffn_hidden_size)$"
)
_DTYPES = ("dtype", "torch_dtype")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


class StatedConfig(Checkpoint):
    """A checkpoint with the config.json of its folder, and what lowbit changed in it: every change adds a note."""

    _restated: dict[str, Any] | None = None

    def config(self) -> dict[str, Any]:
        """config.json, parsed."""
        return read_config(self.folder) if self._restated is None else self._restated

    def restate(self, config: dict[str, Any], note: str) -> None:
        """Let `config` stand for config.json from now on."""
        self._restated = config
        self.notes.append(note)


def check_stated(checkpoint: Any, options: OpenOptions) -> None:
    """Refuse numbers of config.json that the open files (a `StatedConfig`) deny, and drop kernels of the Hub."""
    if not (checkpoint.folder / "config.json").exists():
        return
    config = checkpoint.config()
    for key, value in _values(config):
        if key in _DTYPES and not (value is None or isinstance(value, str)):
            raise CheckpointError(
                f"{checkpoint.source}: config.json: {key} is {str(value)[:80]}; the name of a dtype is needed",
                'write "dtype": "bfloat16", or take the key out',
            )
    refuse_absurd(config, checkpoint.source, [info.shape for info in checkpoint.tensors.values()])
    kernels = hub_kernels(config)
    if kernels and not options.trust_remote_code:
        note = f"config.json asks for a kernel of the Hub, which was neither loaded nor kept: {', '.join(kernels)}"
        checkpoint.restate(_without(config, lambda key, value: key in _KERNELS and _names_a_kernel(value)), note)


def hub_kernels(config: dict[str, Any]) -> list[str]:
    """Kernels of the Hub (org/name) that transformers would download and run for this config.json."""
    return sorted({value for key, value in _values(config) if key in _KERNELS and _names_a_kernel(value)})


def refuse_absurd(config: dict[str, Any], source: str, shapes: Collection[Sequence[int]] | None = None) -> None:
    """CheckpointError for a number of layers, experts or heads that the files cannot hold (transformers would build
    them one by one), and for a size beyond all numbers of the largest tensor (the model is traced with such inputs).

    shapes  of the tensors in the files; None where there are no files
    """
    tensors = None if shapes is None else len(shapes)
    largest = None if shapes is None else max(map(math.prod, shapes), default=0)
    for key, value in _values(config):
        if type(value) is not int:
            continue
        if _COUNTS.search(key):
            most = max(_MOST, tensors or 0) if tensors is None or not _LAYERS.search(key) else max(tensors, 1)
            held = "no model has so many" if tensors is None else f"the files hold {tensors} tensors"
        elif _SIZES.search(key):
            most = max(MOST_WIDE, largest or 0)
            held = "no model is so wide" if largest is None else f"the largest tensor holds {largest} numbers"
        else:
            continue
        if value > most:
            raise CheckpointError(
                f"{source}: config.json: {key} is {value}, and {held}", "config.json is damaged, or of another model"
            )


def stated_quantization(config: dict[str, Any]) -> Any:
    """The quantization that config.json states: a mapping if it is sound; None where it states none."""
    for place in (config, text_part(config)):
        for key in QUANTIZATION_KEYS:
            if place.get(key) not in (None, {}):
                return place[key]
    return None


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """config.json without any statement of a quantization, at any depth."""
    return _without(config, lambda key, value: key in QUANTIZATION_KEYS)


def _without(config: dict[str, Any], drops: Any) -> dict[str, Any]:
    return {
        key: _without(value, drops) if isinstance(value, dict) else value
        for key, value in config.items()
        if not drops(key, value)
    }


def _values(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in config.json that is no mapping."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _values(value)
        else:
            yield key, value


def _names_a_kernel(value: Any) -> bool:
    """True for org/name, with or without a revision; transformers' own implementations have no slash."""
    return isinstance(value, str) and "/" in value
