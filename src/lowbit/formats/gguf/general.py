"""What a model folder says of itself → the key-values `general.*` of a GGUF file, as llama.cpp's converter writes them.

    README.md (YAML at its beginning)   license, license_name, license_link, languages, tags with the pipeline tag,
                                        base_model.N.{name, organization, version, repo_url}
    generation_config.json              sampling.{temp, top_k, top_p, min_p, …}
    the tensors                         size_label: "7B", "8x1.3B"
    the folder, or its id               name

llama.cpp looks at general.name: where it has phi3 or phi-3 in it, the tokenizer must have certain tokens, or the file
does not load. Such a name is respelled, with a note, where they are absent.

What is of another kind than expected in a README.md or generation_config.json is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from gguf.constants import GGUFValueType, Keys
from gguf.metadata import Metadata
from gguf.utility import size_label

from lowbit.checkpoint.companions import leads_out
from lowbit.formats.gguf.keys import KeyValues

_CARD = "README.md"
_MOST_CHARACTERS = 1_000_000
_STRING, _UINT, _INT, _FLOAT = (
    GGUFValueType.STRING, GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.FLOAT32,
)  # fmt: skip
# Key of generation_config.json → key of the file, type.
_SAMPLING = {
    "temperature": (Keys.General.SAMPLING_TEMP, _FLOAT), "top_k": (Keys.General.SAMPLING_TOP_K, _INT),
    "top_p": (Keys.General.SAMPLING_TOP_P, _FLOAT), "min_p": (Keys.General.SAMPLING_MIN_P, _FLOAT),
    "repetition_penalty": (Keys.General.SAMPLING_PENALTY_REPEAT, _FLOAT),
}  # fmt: skip
_LISTS = {Keys.General.TAGS: ("tags", "pipeline_tag"), Keys.General.LANGUAGES: ("languages", "language")}
# llm_load_vocab of llama-vocab.cpp: part of a name → tokens that must be there
NAMES_THAT_NEED_TOKENS = {
    "phi-3": ("</s>", "<unk>", "<s>", "<|endoftext|>"), "phi3": ("</s>", "<unk>", "<s>", "<|endoftext|>"),
    "modern-bert": ("[MASK]",),
}  # fmt: skip


def general_key_values(
    folder: Path, generation: dict[str, Any], shapes: Iterable[tuple[str, tuple[int, ...]]]
) -> KeyValues:
    """The key-values of the module docstring, without the name.

    shapes  (name, shape) of every tensor of the file, experts stacked
    """
    shapes = list(shapes)
    card = read_card(folder)
    values: KeyValues = {Keys.General.SIZE_LABEL: (_size_label(shapes), _STRING)}
    for key, name in (
        ("license", Keys.General.LICENSE), ("license_name", Keys.General.LICENSE_NAME),
        ("license_link", Keys.General.LICENSE_LINK),
    ):  # fmt: skip
        texts = _texts(card.get(key))
        if texts:
            values[name] = (",".join(texts), _STRING)
    for name, keys in _LISTS.items():
        found = list(dict.fromkeys(text for key in keys for text in _texts(card.get(key))))
        if found:
            values[name] = (found, GGUFValueType.ARRAY, _STRING)
    values |= _base_models(_texts(card.get("base_model", card.get("base_models"))))
    for key, (name, kind) in _SAMPLING.items():
        number = generation.get(key)
        if isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 2**31:  # no NaN, no inf
            values[name] = (float(number) if kind is _FLOAT else int(number), kind)
    return values


def read_card(folder: Path) -> dict[str, Any]:
    """The YAML at the beginning of README.md; empty where there is none, or none that parses."""
    path = folder / _CARD
    if not path.is_file() or leads_out(path, folder) is not None:
        return {}
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MOST_CHARACTERS)
        parts = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
        found = yaml.safe_load(parts[1]) if parts else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def loadable_name(name: str, tokens: Iterable[str] | None) -> tuple[str, str | None]:
    """(a general.name with which llama.cpp loads a vocabulary, a note where it is another than `name`)."""
    if missing_tokens(name, tokens) is None:
        return name, None
    other = re.sub(r"(?i)phi-?3", "Phi 3", re.sub(r"(?i)modern-bert", "ModernBert", name))
    return other, (
        f"general.name is {other!r}, not {name!r}: for such names llama.cpp looks up tokens that this vocabulary lacks"
    )


def missing_tokens(name: str, tokens: Iterable[str] | None) -> str | None:
    """A token that llama.cpp looks up because of a name, and does not find."""
    known = set(tokens or ())
    needed = [token for part, texts in NAMES_THAT_NEED_TOKENS.items() if part in name.lower() for token in texts]
    return next((token for token in needed if token not in known), None)


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text]


def _size_label(shapes: list[tuple[str, tuple[int, ...]]]) -> str:
    total = sum(math.prod(shape) for _, shape in shapes)
    stacked = [shape for name, shape in shapes if "_exps." in name]
    experts = max((shape[0] for shape in stacked), default=0)
    in_experts = sum(math.prod(shape) for shape in stacked)
    return size_label(total, total - in_experts, in_experts // experts if experts else 0, experts)


def _base_models(names: list[str]) -> KeyValues:
    values: KeyValues = {Keys.General.BASE_MODEL_COUNT: (len(names), _UINT)} if names else {}
    for index, name in enumerate(names):
        found: dict[str, str] = {}
        url = name if re.match(r"(https?|ssh)://", name) else None
        match = re.fullmatch(r"(?:https?://huggingface\.co/)?([^/\s:]+)/([^/\s:]+)", name)
        if match:
            organization, model = match[1], match[2]
            url = f"https://huggingface.co/{organization}/{model}"
            found[Keys.General.BASE_MODEL_NAME] = Metadata.id_to_title(model)
            found[Keys.General.BASE_MODEL_ORGANIZATION] = Metadata.id_to_title(organization)
        elif url is None:
            found[Keys.General.BASE_MODEL_NAME] = name
        if url is not None:
            found[Keys.General.BASE_MODEL_REPO_URL] = url
        values |= {key.format(id=index): (text, _STRING) for key, text in found.items()}
    return values
