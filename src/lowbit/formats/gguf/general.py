"""What a model folder says of itself → the key-values `general.*` of a GGUF file, as llama.cpp's converter writes them.

    README.md (YAML at its beginning)   license, license.name, license.link, languages, tags with the pipeline tag,
                                        author, organization, version, description, source.*, and
                                        base_model.N.*, dataset.N.*: name, organization, version, repo_url
    generation_config.json              sampling.*: temp, top_k, top_p, min_p, penalty_repeat, …
    the model's id, or its folder       name, and where README.md does not say so: basename, finetune, version,
                                        organization, size_label ("7B")
    the tensors                         size_label, where no name has one that fits: "8x1.3B"

What is derived from names is `gguf.Metadata`'s work, the same code that the converter runs. Beyond that, README.md is
foreign input: each of its entries is parsed alone and within bounds (`_BLOCK`, `_TEXT`, `_ENTRIES`), and what is no
text is left out with a note.

Which values of `general.name` llama.cpp acts on, and what becomes of such a name: `names.py`.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from gguf import GGUFWriter
from gguf.constants import GGUFValueType, Keys
from gguf.metadata import Metadata
from gguf.utility import size_label

from lowbit.checkpoint.companions import leads_out
from lowbit.checkpoint.hub import is_hub_id
from lowbit.formats.gguf.keys import KeyValues

_CARD = "README.md"
_CHARACTERS = 1_000_000  # of README.md
_BLOCK = 1 << 16  # characters of one entry of the YAML
_TEXT = 1 << 14  # characters of one text
_ENTRIES = 1024  # of one list
_NAME = 256  # characters of a name in config.json
_SOURCE_KEYS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")
# What `gguf.Metadata` reads of a card: one text, texts, or texts and mappings.
_NAMED = (*_SOURCE_KEYS, "finetune", "basename", "size_label")
_ONE = {*_NAMED, *(f"model_{name}" for name in _NAMED), "model_creator", "model_type", "license_name", "license_link"}
_SEVERAL = {"license", "tags", "pipeline_tag", "languages", "language"}
_SOURCES = {"base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources"}
# Key of generation_config.json → field of `gguf.Metadata`, kind. Of two for one field the latter counts.
_SAMPLING: tuple[tuple[str, str, type], ...] = (
    ("sequence", "sampling_sequence", str), ("top_k", "sampling_top_k", int), ("top_p", "sampling_top_p", float),
    ("min_p", "sampling_min_p", float), ("xtc_probability", "sampling_xtc_probability", float),
    ("xtc_threshold", "sampling_xtc_threshold", float), ("temperature", "sampling_temp", float),
    ("penalty_last_n", "sampling_penalty_last_n", int), ("repetition_penalty", "sampling_penalty_repeat", float),
    ("penalty_repeat", "sampling_penalty_repeat", float), ("mirostat", "sampling_mirostat", int),
    ("mirostat_tau", "sampling_mirostat_tau", float), ("mirostat_eta", "sampling_mirostat_eta", float),
)  # fmt: skip
# Not about the model, but about one file of it.
_OF_THE_FILE = {Keys.General.ARCHITECTURE, Keys.General.TYPE, Keys.General.FILE_TYPE, Keys.General.ALIGNMENT,
                Keys.General.QUANTIZATION_VERSION}  # fmt: skip


def general_key_values(
    folder: Path, source: str, config: dict[str, Any], generation: dict[str, Any],
    shapes: Iterable[tuple[str, tuple[int, ...]]],
) -> tuple[KeyValues, list[str]]:  # fmt: skip
    """(the key-values of the module docstring, notes).

    folder      of README.md
    source      what the user typed: a folder, or a Hugging Face id
    config      config.json, for _name_or_path
    generation  generation_config.json
    shapes      (name, shape) of every tensor of the file, experts stacked
    """
    counts = _parameters(shapes)
    card, left = read_card(folder)
    is_id = is_hub_id(source) and not Path(source).exists()
    stated = config.get("_name_or_path")
    typed = source.partition(":")[0] if is_id else None
    stated = _clean(stated[:_NAME]) if isinstance(stated, str) and stated else typed
    called = Path(typed or _clean(folder.resolve().name))
    found = Metadata.apply_metadata_heuristic(Metadata(), card, {"_name_or_path": stated}, called, counts[0])
    found.name = found.name or "model"
    found.size_label = found.size_label or size_label(*counts)
    for key, field, kind in _SAMPLING:
        value = _sampling(generation.get(key), kind)
        if value is not None:
            setattr(found, field, value)
        elif generation.get(key) is not None:
            left.append(f"{key} of generation_config.json (no {'text' if kind is str else 'number'})")
    writer = GGUFWriter(None, "")
    found.set_gguf_meta_model(writer)
    values: KeyValues = {}
    for key, each in writer.kv_data[0].items():
        if key != Keys.General.ARCHITECTURE:
            is_list = each.type is GGUFValueType.ARRAY
            values[key] = (each.value, each.type, GGUFValueType.STRING) if is_list else (each.value, each.type)
    return values, [f"left out of the file's metadata: {', '.join(left)}"] if left else []


def kept_key_values(metadata: dict[str, Any]) -> KeyValues:
    """`general.*` of a GGUF source: texts, lists of texts and numbers, without what is about the file."""
    values: KeyValues = {}
    for key, value in metadata.items():
        if not key.startswith("general.") or key in _OF_THE_FILE:
            continue
        if isinstance(value, str):
            values[key] = (value, GGUFValueType.STRING)
        elif isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            values[key] = (value, GGUFValueType.ARRAY, GGUFValueType.STRING)
        elif isinstance(value, float):
            values[key] = (value, GGUFValueType.FLOAT32)
        elif type(value) is int and -(2**31) <= value < 2**31:
            kind = GGUFValueType.INT32 if key.startswith("general.sampling.") else GGUFValueType.UINT32
            if value >= 0 or kind is GGUFValueType.INT32:
                values[key] = (value, kind)
    return values


def read_card(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """({key: text, texts or mappings} of README.md's YAML, what was left out and why), of the keys that count."""
    path = folder / _CARD
    if not path.is_file() or leads_out(path, folder) is not None:
        return {}, []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_CHARACTERS)
    except OSError as error:
        return {}, [f"{_CARD} ({error.strerror})"]
    front = re.match(r"\ufeff?---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", text, re.DOTALL)
    card: dict[str, Any] = {}
    left: list[str] = []
    for key, block in _blocks(front[1] if front else "").items():
        try:
            card[key] = _checked(key, _parsed(key, block))
        except ValueError as error:
            left.append(f"{key} of {_CARD} ({error})")
    return {key: value for key, value in card.items() if value}, left


def _blocks(front: str) -> dict[str, str]:
    """Key → its lines, of the keys that count. An entry begins with its key at the beginning of a line."""
    blocks: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in front.split("\n"):
        found = re.match(r"([\"']?)(\w[\w-]*)\1[ \t]*:(?=\s|$)", line)
        if found:
            lines = blocks[found[2]] = []
        lines.append(line)
    return {key: "\n".join(lines) for key, lines in blocks.items() if key in _ONE | _SEVERAL | _SOURCES}


def _parsed(key: str, block: str) -> Any:
    """ValueError says what is wrong with it."""
    if len(block) > _BLOCK:
        raise ValueError(f"over {_BLOCK} characters")
    # As the converter does: a language `no` is Norwegian, and tabs are spaces.
    block = re.sub(r"(?m)^([ \t]*- )no$", r'\1"no"', block).replace("\t", "  ")
    try:
        value = yaml.safe_load(block)[key]
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # PyYAML's constructors raise IndexError, KeyError and more besides YAMLError
        raise ValueError("not YAML") from error
    return "no" if key in ("language", "languages") and value is False else value


def _checked(key: str, value: Any) -> Any:
    """A text, texts, or texts and mappings of texts; None of null. ValueError for anything else."""
    if value is None:
        return None
    if key in _ONE:
        return _text(value)
    entries = value if isinstance(value, list) else [value]
    if len(entries) > _ENTRIES:
        raise ValueError(f"over {_ENTRIES} entries")
    if key in _SOURCES:
        return [_source(entry) if isinstance(entry, dict) else _text(entry) for entry in entries]
    texts = [_text("no" if entry is False and key.startswith("language") else entry) for entry in entries]
    return texts[0] if key == "license" and not isinstance(value, list) else texts


def _source(entry: dict[Any, Any]) -> dict[str, str]:
    return {key: _text(entry[key]) for key in _SOURCE_KEYS if entry.get(key) is not None}


def _text(value: Any) -> str:
    """A text as a GGUF file may hold it; numbers and dates (`version: 1.5`) as they are written."""
    if isinstance(value, (float, datetime.date)) or (type(value) is int and abs(value) < 1 << 63):
        return str(value)
    if not isinstance(value, str):
        raise ValueError("no text")
    if len(value) > _TEXT:
        raise ValueError(f"over {_TEXT} characters")
    if _clean(value) != value:
        raise ValueError("characters that are no text")
    return value


def _clean(text: str) -> str:
    """Without NUL, other control characters and halves of surrogate pairs."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "", text)


def _sampling(value: Any, kind: type) -> Any:
    """The value, where it is of its kind and fits 32 bits."""
    if kind is str:
        return value if isinstance(value, str) and len(value) < _TEXT and _clean(value) == value else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 2**31:  # no NaN, no inf
        return None
    return kind(value) if kind is float or value == int(value) else None


def _parameters(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[int, int, int, int]:
    """(weights, those outside of experts, those of one expert, experts), as `gguf.GGUFWriter` counts them."""
    total = in_experts = of_one = 0
    counts: list[int] = []
    for name, shape in shapes:
        size = math.prod(shape)
        total += size
        if "_exps." in name and len(shape) >= 3:
            counts.append(shape[-2 if ".bias" in name else -3])
            in_experts, of_one = in_experts + size, of_one + size // counts[-1]
    return total, total - in_experts, of_one, sum(counts) // len(counts) if counts else 0
