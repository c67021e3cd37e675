"""Key-values of a GGUF file ↔ config.json, by the keys of an architecture's row.

    writing   key-values from the config; refused where the model is not the one that llama.cpp computes
    reading   config.json from key-values, including values that llama.cpp has built in

Numbers of a file are checked before use: counts are positive, floats finite. A float32 becomes the shortest decimal
number that rounds to it: 1e-05, not 9.999999747378752e-06.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType

from lowbit.errors import ArchitectureError
from lowbit.formats.gguf.layout import Lookup
from lowbit.formats.gguf.row import GGUFArchitecture, Key

# key → (value, type), or (list, ARRAY, type of the items)
KeyValues = dict[str, tuple[Any, GGUFValueType] | tuple[Any, GGUFValueType, GGUFValueType]]

WINDOW = "attention.sliding_window"
PATTERN = "attention.sliding_window_pattern"
_PYTHON_TYPES: dict[GGUFValueType, Callable[[Any], Any]] = {
    GGUFValueType.BOOL: bool, GGUFValueType.FLOAT32: float, GGUFValueType.STRING: str,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"


def key_values(row: GGUFArchitecture, get: Lookup, where: str) -> tuple[KeyValues, list[str]]:
    """({full key: (value, type)}, notes) of a model; `get` looks up its config. Rotary embeddings: `gguf_rope`."""
    _refuse_what_is_fixed_otherwise(row, get, where)
    values: KeyValues = {}
    for key in row.keys:
        if key.value is not None:
            value = key.value(get)
        else:
            value = get(key.config)
            if value is None and key.otherwise is not None:
                value = key.otherwise(get)
            if key.one_of_all and isinstance(value, list):
                value = value[0]
        if value is None and not key.optional and key.value is None:
            raise ArchitectureError(
                f"{where}: config.json has no {key.config}, which {row.arch}.{key.name} needs",
                "complete config.json; the one that the model was published with has it",
            )
        if value is not None:
            convert = _PYTHON_TYPES.get(key.kind, int)
            if isinstance(value, list):
                entry = ([convert(item) for item in value], GGUFValueType.ARRAY, key.kind)
            else:
                entry = (convert(value), key.kind)
            values[f"{row.arch}.{key.name}"] = entry
    windows, notes = _windows(row, get, where)
    near = [
        note for (key, value), note in row.near.items()
        if (value(get(key)) if callable(value) else get(key) == value)
    ]  # fmt: skip
    return values | windows, notes + near


def config_of(row: GGUFArchitecture, metadata: dict[str, Any], names: Collection[str], where: str) -> dict[str, Any]:
    """config.json without rotary embeddings, tokens and facts about tensors, of whose names a row may read some.

    The number of blocks must be checked against the tensors before: lists of that length are made.
    """
    config: dict[str, Any] = {"model_type": row.model_type, "architectures": [row.model_class]}
    for key in row.keys:
        if key.value is not None:
            continue
        value = _checked(row, key, metadata, where)
        if value is None and key.otherwise is not None:
            value = config.get(key.config) or key.otherwise(config.get)
        if value is None:
            value = key.default
        if value is not None and config.setdefault(key.config, value) != value:
            raise ArchitectureError(
                f"{where}: {row.arch}.{key.name} is {value}, where config.json has room for {config[key.config]} only",
                "use the safetensors checkpoint of the model",
            )
    config |= {key: spellings[0] for key, spellings in row.fixed.items() if spellings[0] is not None}
    try:
        config |= row.from_file(metadata) | row.from_names(names)
    except ValueError as error:
        raise ArchitectureError(f"{where}: {error}", "use the safetensors checkpoint of the model") from error
    return _in_parts(config | row.implied(config.get) | _windows_of_file(row, metadata, config, where))


def positive(metadata: dict[str, Any], key: str, where: str) -> int:
    """A key-value that must be one positive integer (some files hold one per layer, which has no counterpart)."""
    value = metadata.get(key)
    if type(value) is not int or value < 1:
        raise ArchitectureError(f"{where}: {key} is {str(value)[:80]}; one positive number is needed")
    return value


def per_block(metadata: dict[str, Any], name: str) -> list[int]:
    """One count per block, where the file has a list or one for all of them; ValueError where it has neither.

    name  of the key-value, below the architecture's name
    """
    arch = metadata["general.architecture"]
    blocks, value = metadata[f"{arch}.block_count"], metadata.get(f"{arch}.{name}")
    values = value.tolist() if isinstance(value, np.ndarray) else [value] * blocks
    if len(values) < blocks or any(type(count) not in (int, bool) or count < 0 for count in values):
        raise ValueError(f"{arch}.{name} is {str(value)[:80]}; one number per block is needed")
    return values[:blocks]


def shortest(value: float) -> float:
    """The shortest decimal that is this float32."""
    return float(str(np.float32(value)))


def _in_parts(config: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    parts: dict[str, Any] = {}
    for key, value in config.items():
        part, _, rest = key.partition(".")
        if rest:
            parts.setdefault(part, {})[rest] = value
        else:
            parts[key] = value
    return parts


def _checked(row: GGUFArchitecture, key: Key, metadata: dict[str, Any], where: str) -> Any:
    """The value in the file; None where it has none and needs none."""
    name = f"{row.arch}.{key.name}"
    needed = key.otherwise is None and key.default is None and not key.optional
    value = metadata.get(name)
    if value is None and not needed:
        return None
    if key.kind is GGUFValueType.UINT32:
        return 0 if key.zero and type(value) is int and value == 0 else positive(metadata, name, where)
    if key.kind is GGUFValueType.BOOL and type(value) is bool:
        return value
    if key.kind is GGUFValueType.FLOAT32 and type(value) is float and math.isfinite(value):
        return shortest(value)
    raise ArchitectureError(f"{where}: {name} is {str(value)[:80]}; one {key.kind.name.lower()} is needed")


def _refuse_what_is_fixed_otherwise(row: GGUFArchitecture, get: Lookup, where: str) -> None:
    for key, spellings in row.fixed.items():
        value = get(key)
        if value is not None and value not in spellings:
            _refuse(row, key, value, spellings[0], where)
    for key, needed in row.implied(get).items():
        value = get(key)
        if value is not None and value != needed:
            _refuse(row, key, value, needed, where)


def _refuse(row: GGUFArchitecture, key: str, value: Any, needed: Any, where: str) -> None:
    raise ArchitectureError(
        f"{where}: {key} is {str(value)[:80]} in config.json, and llama.cpp computes {row.arch} models with "
        f"{str(needed)[:80]}",
        "llama.cpp cannot run this variant of the model",
    )


def _windows(row: GGUFArchitecture, get: Lookup, where: str) -> tuple[KeyValues, list[str]]:
    """Sliding windows: written where llama.cpp has them, noted where it attends to everything instead.

    Refused where no block has one and llama.cpp takes one for granted: it ends the process when it loads such a file.
    """
    blocks, window = get("num_hidden_layers"), get("sliding_window") or 0
    types = get("layer_types") or [SLIDING if window else FULL] * (blocks or 0)
    slides = window and SLIDING in types
    if not row.window_period:
        values: KeyValues = {}
        if row.window_period == 0:
            values[f"{row.arch}.{WINDOW}"] = (int(window), GGUFValueType.UINT32)
        ignored = slides and window < (get("max_position_embeddings") or 0)
        note = (
            f"the model attends within a sliding window of {window} tokens; llama.cpp has none for {row.arch} and "
            f"attends to everything, which differs beyond that many tokens"
        )
        return values, [note] if ignored else []
    if not slides and row.windowless:
        return {}, []
    if not slides:
        found = f"{len(types)} of full attention" if window else f"with a sliding_window of {window}"
        raise ArchitectureError(
            f"{where}: layer_types has {found} in config.json; llama.cpp loads {row.arch} models only where a block "
            f"attends within a sliding window",
            "llama.cpp cannot run this variant of the model",
        )
    values = {f"{row.arch}.{WINDOW}": (row.window_of(int(window)), GGUFValueType.UINT32)}
    if types != _default_types(row, blocks) or row.window_period == 1:
        values[f"{row.arch}.{PATTERN}"] = ([kind == SLIDING for kind in types], GGUFValueType.ARRAY, GGUFValueType.BOOL)
    return values, []


def _windows_of_file(
    row: GGUFArchitecture, metadata: dict[str, Any], config: dict[str, Any], where: str
) -> dict[str, Any]:
    """sliding_window and, where the file says so itself, layer_types."""
    if row.window_period is None:
        return {}
    key, pattern = f"{row.arch}.{WINDOW}", metadata.get(f"{row.arch}.{PATTERN}")
    none = metadata.get(key) is None or (type(metadata[key]) is int and metadata[key] == 0)
    window = row.window_default if none else positive(metadata, key, where)
    blocks = config["num_hidden_layers"]
    if not window:
        return {"layer_types": [FULL] * blocks} if row.window_period else {"sliding_window": None}
    if not row.window_period:
        return {"sliding_window": window}
    if pattern is None or (type(pattern) is int and pattern > 0):
        types = _default_types(row, blocks, pattern or 0)
    elif isinstance(pattern, np.ndarray) and len(pattern) >= blocks:
        types = [SLIDING if slides else FULL for slides in pattern[:blocks]]
    else:
        raise ArchitectureError(f"{where}: {row.arch}.{PATTERN} is {str(pattern)[:80]}; one per block is needed")
    return {"sliding_window": window, "layer_types": types}


def _default_types(row: GGUFArchitecture, blocks: int, period: int = 0) -> list[str]:
    period = period or row.window_period or 1
    return [SLIDING if block % period < period - 1 else FULL for block in range(blocks)]
