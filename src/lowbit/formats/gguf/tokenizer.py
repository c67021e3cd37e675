"""tokenizer.json and what goes with it, from the key-values of a GGUF file.

    tokenizer.ggml.model "gpt2"   byte-level BPE: merges as they are, words cut as tokenizer.ggml.pre says
    tokenizer.ggml.model "llama"  SentencePiece: "▁" for spaces, byte fallback; every way to split a token into two
                                  tokens is a merge, and the token with the highest score merges first
    tokenizer.ggml.model "gemma4" "▁" for spaces and byte fallback, with merges; text is cut at newlines, BOS before it
    tokenizer.ggml.model "none"   no tokenizer: nothing is written
    token_type                    control and unknown → special added tokens, user-defined → added tokens;
                                  unused "[PADn]" are left out
    add_bos_token, add_eos_token  the post-processor

The result tokenizes as llama.cpp does, but for NFC, which the models with a Qwen2 pre-tokenizer have and llama.cpp
leaves out. Refused, before anything is built: other models and pre-tokenizers, lists of different lengths, tokens that
occur twice, merges of tokens that do not exist, scores that are no numbers, ids beyond the list.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import Keys, TokenType

from lowbit.errors import CheckpointError
from lowbit.formats.gguf.pre_tokenizers import BY_NAME, LINES, PreTokenizer

K = Keys.Tokenizer
NO_TOKENIZER = ("none", "no_vocab")  # llama.cpp takes both; its converter writes the first
MAX_TOKENS = 1 << 22
MAX_TOKEN_CHARACTERS = 1 << 14
# A token of SentencePiece is split everywhere; its models' longest have 16 to 64 characters.
MAX_SPLIT_CHARACTERS = 1 << 10

_ROLES = {"bos": K.BOS_ID, "eos": K.EOS_ID, "unk": K.UNK_ID, "sep": K.SEP_ID, "pad": K.PAD_ID, "mask": K.MASK_ID}
_NO_ID = 2**32 - 1  # −1 in a field without sign
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}  # llama.cpp's, where the file says nothing
_PADDING = re.compile(r"\[PAD\d+\]_*")
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_SPACE = "▁"
_HINT = "use another GGUF of the model, or its safetensors checkpoint"


@dataclass(frozen=True)
class _Vocabulary:
    """Checked key-values. texts, types, scores by id; roles: "bos" … → id."""

    texts: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    roles: dict[str, int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool


def write_tokenizer(folder: Path, metadata: dict[str, Any], where: str) -> None:
    """tokenizer.json, tokenizer_config.json and chat templates of the key-values; CheckpointError names what is bad."""
    model = metadata.get(K.MODEL)
    if model in NO_TOKENIZER:
        return
    if K.LIST not in metadata:
        raise CheckpointError(f"{where}: there is no tokenizer in the file", "use another GGUF of the model")
    if model == "gpt2":
        row = _pre_tokenizer(metadata, where)
        vocabulary = _read(metadata, where, row.add_bos)
        parsed = _byte_level(vocabulary, row, where)
    elif model == "llama":
        vocabulary = _read(metadata, where, True)
        parsed = _spaced(vocabulary, _merges_by_score(vocabulary, where))
    elif model == "gemma4":
        vocabulary = _read(metadata | {K.ADD_BOS: True}, where, True)
        parsed = _spaced(vocabulary, _merges(vocabulary, where), LINES)
    else:
        raise _error(where, f"{K.MODEL} is {str(model)[:80]!r}, not 'gpt2', 'llama' or 'gemma4'")
    parsed |= {"version": "1.0", "truncation": None, "padding": None}
    parsed["added_tokens"] = _added_tokens(vocabulary)
    parsed["post_processor"] = _post_processor(vocabulary, byte_level=model == "gpt2")
    text = json.dumps(parsed, ensure_ascii=False)
    _check_loads(text, parsed["added_tokens"], where)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    _write_settings(folder, metadata, vocabulary)
    _write_templates(folder, metadata, where)


def generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Where generation begins and ends; chat models end at the end of a turn too."""
    found = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "eot")}
    ids = {name: value for name, value in found.items() if type(value) is int}
    ends = sorted({ids[name] for name in ("eos", "eot") if name in ids})
    generation = {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids.get("padding"),
    }
    return {key: value for key, value in generation.items() if value is not None}


def _pre_tokenizer(metadata: dict[str, Any], where: str) -> PreTokenizer:
    """The row of tokenizer.ggml.pre; a file without it is cut as llama.cpp cuts it, by "default"."""
    name = metadata.get(K.PRE) or "default"
    row = BY_NAME.get(name) if isinstance(name, str) else None
    if row is None:
        near = ", ".join(difflib.get_close_matches(str(name), BY_NAME, n=3)) or "far"
        raise _error(where, f"{K.PRE} is {str(name)[:80]!r}, which is not known; the nearest are {near}")
    return row


def _read(metadata: dict[str, Any], where: str, begins: bool) -> _Vocabulary:
    """Every list and id, checked. begins  BOS goes before a text if the file does not say."""
    texts = _texts(metadata[K.LIST], where)
    count = len(texts)
    types = _numbers(metadata, K.TOKEN_TYPE, count, where, "iu")
    scores = _numbers(metadata, K.SCORES, count, where, "fiu")
    types = np.full(count, int(TokenType.NORMAL)) if types is None else types
    known = np.isin(types, [int(kind) for kind in TokenType])
    if not known.all():
        odd = int(np.argmin(known))
        raise _error(
            where, f"{K.TOKEN_TYPE} of token {odd} is {types[odd]}; {', '.join(map(str, TokenType))} are known"
        )
    if scores is not None and not np.isfinite(scores).all():
        raise _error(where, f"{K.SCORES} of token {int(np.argmin(np.isfinite(scores)))} is no finite number")
    sentencepiece = metadata.get(K.MODEL) == "llama"
    if sentencepiece and scores is None:
        raise _error(where, f"there is no {K.SCORES}")
    roles = _roles(metadata, count, where, _SENTENCEPIECE_IDS if sentencepiece else {})
    return _Vocabulary(
        texts=texts,
        types=types.tolist(),
        scores=[] if scores is None else scores.tolist(),
        merges=_merge_list(metadata, where) if not sentencepiece else [],
        roles=roles,
        add_bos=_flag(metadata, K.ADD_BOS, begins, where) and "bos" in roles,
        add_eos=_flag(metadata, K.ADD_EOS, False, where) and "eos" in roles,
        space_prefix=_flag(metadata, K.ADD_PREFIX, sentencepiece, where),
    )


def _texts(tokens: Any, where: str) -> list[str]:
    if not isinstance(tokens, list) or not tokens or len(tokens) > MAX_TOKENS:
        count = len(tokens) if isinstance(tokens, list | np.ndarray) else "no"
        raise _error(where, f"{K.LIST} has {count} strings; 1 to {MAX_TOKENS} are needed")
    texts = [text or f"[EMPTY_{index}]" for index, text in enumerate(tokens)]  # as llama.cpp names them
    longest = max(range(len(texts)), key=lambda index: len(texts[index]))
    if len(texts[longest]) > MAX_TOKEN_CHARACTERS:
        raise _error(
            where, f"token {longest} has {len(texts[longest])} characters; at most {MAX_TOKEN_CHARACTERS} are read"
        )
    if len(set(texts)) < len(texts):
        first: dict[str, int] = {}
        for index, text in enumerate(texts):
            if first.setdefault(text, index) != index:
                raise _error(where, f"tokens {first[text]} and {index} are both {text[:40]!r}")
    return texts


def _numbers(metadata: dict[str, Any], key: str, count: int, where: str, kinds: str) -> np.ndarray | None:
    """An array with one number per token; None where there is none."""
    values = metadata.get(key)
    if values is None:
        return None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds:
        raise _error(where, f"{key} is no array of numbers")
    if len(values) != count:
        raise _error(where, f"{key} has {len(values)} items, and there are {count} tokens")
    return values


def _merge_list(metadata: dict[str, Any], where: str) -> list[str]:
    merges = metadata.get(K.MERGES)
    if isinstance(merges, np.ndarray) and not len(merges):
        return []
    if not isinstance(merges, list):
        raise _error(where, f"there is no list {K.MERGES}, which a byte-level BPE needs")
    if len(merges) > MAX_TOKENS:
        raise _error(where, f"{K.MERGES} has {len(merges)} items; at most {MAX_TOKENS} are read")
    return merges


def _roles(metadata: dict[str, Any], count: int, where: str, defaults: dict[str, int]) -> dict[str, int]:
    roles = {role: token for role, token in defaults.items() if token < count}
    for role, key in _ROLES.items():
        token = metadata.get(key)
        if token in (None, _NO_ID, -1):
            continue
        if type(token) is not int or not 0 <= token < count:
            raise _error(where, f"{key} is {str(token)[:40]}, and there are {count} tokens")
        roles[role] = token
    return roles


def _flag(metadata: dict[str, Any], key: str, default: bool, where: str) -> bool:
    value = metadata.get(key, default)
    if type(value) is not bool:
        raise _error(where, f"{key} is {str(value)[:40]}, not true or false")
    return value


def _ids(vocabulary: _Vocabulary) -> dict[str, int]:
    """Text → id, without what only fills rows of the embedding."""
    rows = enumerate(zip(vocabulary.texts, vocabulary.types, strict=True))
    return {text: index for index, (text, kind) in rows if kind != TokenType.UNUSED or not _PADDING.fullmatch(text)}


def _byte_level(vocabulary: _Vocabulary, row: PreTokenizer, where: str) -> dict[str, Any]:
    """What a byte-level BPE has of its own in tokenizer.json."""
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    model = _bpe(
        _ids(vocabulary), _merges(vocabulary, where), None, byte_fallback=False, ignore_merges=row.ignore_merges
    )
    return {
        "normalizer": {"type": "NFC"} if row.nfc else None,
        "pre_tokenizer": row.to_json(),
        "decoder": decoder,
        "model": model,
    }


def _merges(vocabulary: _Vocabulary, where: str) -> list[tuple[str, str]]:
    """The merges of a file, checked."""
    ids = _ids(vocabulary)
    pairs: dict[tuple[str, str], None] = {}  # of equal merges the first counts
    for index, merge in enumerate(vocabulary.merges):
        left, _, right = merge[1:].partition(" ")  # the first letter may be a space
        left = merge[:1] + left
        if not right or left not in ids or right not in ids or left + right not in ids:
            raise _error(where, f"merge {index} is {merge[:60]!r}, of which the vocabulary lacks a part or the result")
        pairs[left, right] = None
    return list(pairs)


def _spaced(
    vocabulary: _Vocabulary, merges: list[tuple[str, str]], pre_tokenizer: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a vocabulary with "▁" for spaces has of its own in tokenizer.json."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = [{"type": "Prepend", "prepend": _SPACE}, space] if vocabulary.space_prefix else [space]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.space_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocabulary.roles.get("unk")
    model = _bpe(
        _ids(vocabulary),
        merges,
        None if unknown is None else vocabulary.texts[unknown],
        byte_fallback=True,
        ignore_merges=False,
    )
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _bpe(
    ids: dict[str, int], pairs: list[tuple[str, str]], unknown: str | None, byte_fallback: bool, ignore_merges: bool
) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": byte_fallback, "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges, "vocab": ids, "merges": pairs,
    }  # fmt: skip


def _merges_by_score(vocabulary: _Vocabulary, where: str) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token; highest score first, then by id."""
    rows = zip(vocabulary.texts, vocabulary.types, strict=True)
    ids = {text: index for index, (text, kind) in enumerate(rows) if kind == TokenType.NORMAL}
    longest = max(ids, key=len, default="")
    if len(longest) > MAX_SPLIT_CHARACTERS:
        raise _error(where, f"token {ids[longest]} has {len(longest)} characters; {MAX_SPLIT_CHARACTERS} is the most")
    pairs = []
    for text in sorted(ids, key=lambda text: (-vocabulary.scores[ids[text]], ids[text])):
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        found = [(left, right) for left, right in splits if left in ids and right in ids]
        pairs += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return pairs


def _added_tokens(vocabulary: _Vocabulary) -> list[dict[str, Any]]:
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    return [
        {"id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind in special}
        for index, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True))
        if kind in special or kind == TokenType.USER_DEFINED
    ]  # fmt: skip


def _post_processor(vocabulary: _Vocabulary, byte_level: bool) -> dict[str, Any]:
    """BOS before and EOS behind every text, where they are wanted."""
    plain = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    around = [role for role, wanted in (("bos", vocabulary.add_bos), ("eos", vocabulary.add_eos)) if wanted]
    if not around and byte_level:
        return plain
    tokens = {role: vocabulary.texts[vocabulary.roles[role]] for role in around}

    def side(sequence: str, type_id: int) -> list[dict[str, Any]]:
        parts = [{"SpecialToken": {"id": tokens["bos"], "type_id": type_id}}] if "bos" in tokens else []
        parts.append({"Sequence": {"id": sequence, "type_id": type_id}})
        return parts + ([{"SpecialToken": {"id": tokens["eos"], "type_id": type_id}}] if "eos" in tokens else [])

    template = {
        "type": "TemplateProcessing",
        "single": side("A", 0),
        "pair": side("A", 0) + side("B", 1),
        "special_tokens": {
            text: {"id": text, "ids": [vocabulary.roles[role]], "tokens": [text]} for role, text in tokens.items()
        },
    }
    return {"type": "Sequence", "processors": [plain, template]} if byte_level else template


def _check_loads(text: str, added: list[dict[str, Any]], where: str) -> None:
    """tokenizers loads it, and gives added tokens the ids that they have."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise _error(where, f"tokenizers does not load it ({error})") from error
    for token in added:
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise _error(where, f"tokenizers gives {token['content'][:40]!r} another id than {token['id']}")


def _write_settings(folder: Path, metadata: dict[str, Any], vocabulary: _Vocabulary) -> None:
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if type(context) is int and context > 0:
        settings["model_max_length"] = context
    settings |= {f"{role}_token": vocabulary.texts[token] for role, token in vocabulary.roles.items()}
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _write_templates(folder: Path, metadata: dict[str, Any], where: str) -> None:
    """chat_template.jinja, and additional_chat_templates/NAME.jinja of those with a name."""
    for key, template in metadata.items():
        if key != K.CHAT_TEMPLATE and not key.startswith(K.CHAT_TEMPLATE + "."):
            continue
        name = key.removeprefix(K.CHAT_TEMPLATE).removeprefix(".")
        if not isinstance(template, str) or (name and not _TEMPLATE_NAME.fullmatch(name)):
            raise _error(where, f"{key[:120]} is no text, or its name no name")
        target = folder / "additional_chat_templates" / f"{name}.jinja" if name else folder / "chat_template.jinja"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(template.encode("utf-8"))  # line ends as they are


def _error(where: str, message: str) -> CheckpointError:
    return CheckpointError(f"{where}: cannot rebuild the tokenizer: {message}", _HINT)
