"""The tokenizer of a Hugging Face folder, as its files have it.

    tokenizer.json            vocabulary, merges, normalizer, pre-tokenizer, post-processor, added tokens
    vocab.json, merges.txt    the same of a byte-level BPE without tokenizer.json (GPT-2, Qwen2)
    tiktoken.model            its vocabulary (Kimi-K2)
    tokenizer.model           SentencePiece
    tokenizer_config.json     roles of tokens, BOS and EOS, added tokens, chat template
    special_tokens_map.json, added_tokens.json, generation_config.json, config.json, chat_template.jinja,
    additional_chat_templates/NAME.jinja, chat_template.json

Every file may be absent but one that has the vocabulary. Refused: other types than these files have, ids that are no
numbers.

tiktoken.model, the vocabulary of a byte-level BPE without merges, as tokenizer.json would have it.

    one token a line: its bytes in base64, a space, its rank, which is its id

A merge of two tokens has the rank of what they make. So the last merge of a token joins the two that its bytes become
by the merges of lower rank; a token whose bytes become more than two is never made of its parts and has no merge, as in
llama.cpp's converter. Refused: other lines, two tokens of one rank, a byte without a token.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.checkpoint.base import MAX_JSON_BYTES, read_json_object, refuse_half_pairs, text_part
from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.files.regular import read_regular
from lowbit.formats.gguf.pre_tokenizers import BY_NAME
from lowbit.formats.gguf.sentencepiece import SentencePieceModel, read_sentencepiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
# Classes whose tokenizers are often without tokenizer.json; their pre-tokenizer is in transformers' code.
_CLASSES = {"GPT2Tokenizer": "gpt-2", "GPT2TokenizerFast": "gpt-2", "Qwen2Tokenizer": "qwen2",
            "Qwen2TokenizerFast": "qwen2"}  # fmt: skip
_MODEL_TYPES = {"gpt2": "gpt-2", "qwen2": "qwen2", "qwen2_moe": "qwen2", "qwen3": "qwen2", "qwen3_moe": "qwen2"}


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out before anything else.

    strips  whitespace around it goes with it, or it is cut out of whole words only
    behind  whitespace behind it does, and no more than that
    """

    id: int
    text: str
    special: bool
    strips: bool
    behind: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a folder, parsed; {} and None for those that are absent."""

    folder: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        return self._json("tokenizer_config.json")

    @cached_property
    def generation(self) -> dict[str, Any]:
        return self._json("generation_config.json")

    @cached_property
    def tokenizer(self) -> dict[str, Any] | None:
        """tokenizer.json, or the same made of other files; "model" and "pre_tokenizer" are there."""
        if (self.folder / "tokenizer.json").exists():
            parsed = read_json_object(self.folder / "tokenizer.json")
            if not isinstance(parsed.get("model"), dict):
                raise CheckpointError(f"{self.folder / 'tokenizer.json'}: there is no model in it")
            return {"pre_tokenizer": None} | parsed
        if (self.folder / "vocab.json").exists() and (self.folder / "merges.txt").exists():
            return self._of_vocab_and_merges()
        return self._of_tiktoken() if (self.folder / "tiktoken.model").exists() else None

    @cached_property
    def loaded(self) -> Tokenizer:
        """`tokenizer`, which is not None here, as the tokenizers library has it."""
        from tokenizers import Tokenizer

        with calling_tokenizers(str(self.folder / "tokenizer.json")):
            return Tokenizer.from_str(json.dumps(self.tokenizer))

    @cached_property
    def sentencepiece(self) -> SentencePieceModel | None:
        """tokenizer.model."""
        path = self.folder / "tokenizer.model"
        return read_sentencepiece(path) if path.exists() else None

    @cached_property
    def added(self) -> list[AddedToken]:
        """By id; tokenizer.json's word counts before tokenizer_config.json's and that before added_tokens.json's."""
        found: dict[int, AddedToken] = {}
        path = self.folder / "added_tokens.json"
        special = set(self.role_texts.values())
        for text, token_id in self._json(path.name).items():
            found[_id(token_id, path)] = AddedToken(_id(token_id, path), text, text in special, False)
        path = self.folder / "tokenizer_config.json"
        for key, entry in _object(self.settings.get("added_tokens_decoder"), path).items():
            token_id = _id(int(key) if key.isdecimal() and len(key) < 10 else key, path)
            found[token_id] = _added(token_id, entry, path)
        path = self.folder / "tokenizer.json"
        entries = (self.tokenizer or {}).get("added_tokens") or []
        for entry in entries if isinstance(entries, list) else [entries]:
            token_id = _id(_object(entry, path).get("id"), path)
            found[token_id] = _added(token_id, entry, path)
        return [found[token_id] for token_id in sorted(found)]

    @cached_property
    def role_texts(self) -> dict[str, str]:
        """Role ("bos", …) → text of its token."""
        texts = {}
        for source in (self._json("special_tokens_map.json"), self.settings):
            for role in ROLES:
                value = source.get(f"{role}_token")
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str):
                    texts[role] = value
        return texts

    def role_id(self, role: str) -> int | None:
        """The id that config.json gives a role; the first where it gives several."""
        config = self._json("config.json")
        for source in (config, text_part(config), self.generation):
            ids = source.get(f"{role}_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            if ids and type(ids[0]) is int:
                return ids[0]
        return self.sentencepiece.specials.get(role) if self.sentencepiece is not None else None

    def end_ids(self) -> list[int]:
        """All ids at which generation ends, by generation_config.json."""
        ids = self.generation.get("eos_token_id")
        return [item for item in (ids if isinstance(ids, list) else [ids]) if type(item) is int]

    def chat_templates(self) -> dict[str, str]:
        """Name → template; "default" is the one without a name. A file counts before tokenizer_config.json."""
        path = self.folder / "chat_template.jinja"
        if path.exists():
            more = sorted((self.folder / "additional_chat_templates").glob("*.jinja"))
            return {"default": _text(path)} | {extra.stem: _text(extra) for extra in more}
        value = self.settings.get("chat_template", self._json("chat_template.json").get("chat_template"))
        named = [{"name": "default", "template": value}] if isinstance(value, str) else value or []
        if not isinstance(named, list):
            raise CheckpointError(f"{self.folder / 'tokenizer_config.json'}: chat_template is no text and no list")
        templates = {}
        for entry in named:
            entry = _object(entry, self.folder / "tokenizer_config.json")
            if not isinstance(entry.get("name"), str) or not isinstance(entry.get("template"), str):
                raise CheckpointError(f"{self.folder / 'tokenizer_config.json'}: a chat template needs name and text")
            refuse_half_pairs(self.folder / "tokenizer_config.json", entry, f"the chat template {entry['name']!r}")
            templates[entry["name"]] = entry["template"]
        return templates

    def _of_vocab_and_merges(self) -> dict[str, Any]:
        """tokenizer.json of a GPT-2-like folder."""
        name = _CLASSES.get(str(self.settings.get("tokenizer_class")))
        name = name or _MODEL_TYPES.get(str(self._json("config.json").get("model_type")))
        if name is None:
            raise ArchitectureError(
                f"{self.folder}: vocab.json and merges.txt do not say how text is cut into words",
                "load the tokenizer with transformers and save it again: that writes tokenizer.json",
            )
        lines = _text(self.folder / "merges.txt").split("\n")
        merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
        vocabulary = self._json("vocab.json")
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        special = [{"id": vocabulary[text], "content": text, "special": True} | plain
                   for text in dict.fromkeys(self.role_texts.values()) if text in vocabulary]  # fmt: skip
        return self._byte_level({"type": "BPE", "vocab": vocabulary, "merges": merges}, name, special)

    @staticmethod
    def _byte_level(model: dict[str, Any], name: str, special: list[dict[str, Any]]) -> dict[str, Any]:
        """tokenizer.json of a model, a pre-tokenizer and special tokens."""
        return {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
            "normalizer": {"type": "NFC"} if BY_NAME[name].nfc else None,
            "pre_tokenizer": BY_NAME[name].to_json(),
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": model,
        }  # fmt: skip

    def _of_tiktoken(self) -> dict[str, Any]:
        """The same of Kimi-K2's folder, whose code says how text is cut; the file does not."""
        path, code = self.folder / "tiktoken.model", self.settings.get("auto_map") or {}
        named = code.get("AutoTokenizer") if isinstance(code, dict) else None
        if "tokenization_kimi." not in str(named):
            raise ArchitectureError(
                f"{path} does not say how text is cut into words; lowbit knows that of Kimi-K2's tokenizer only",
                "load the tokenizer with transformers and save it again, if that writes tokenizer.json",
            )
        return self._byte_level(read_tiktoken(path), "kimi-k2", [])

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json_object(path) if path.exists() else {}


@contextmanager
def calling_tokenizers(where: str) -> Iterator[None]:
    """Calls of the tokenizers library. It raises Exception itself, and its Rust code panics at some damaged files."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(f"{where}: the tokenizers library cannot use it ({error})") from error
        raise


def flat_steps(step: Any, inside: str, where: str) -> list[dict[str, Any]]:
    """The steps of a "pre_tokenizer" or "normalizer", sequences unrolled. inside  where a sequence has its steps."""
    if step is None:
        return []
    if not isinstance(step, dict) or not isinstance(step.get(inside, []), list):
        raise CheckpointError(f"{where}: {str(step)[:80]!r} is no step of a tokenizer")
    if step.get("type") == "Sequence":
        return [flat for inner in step.get(inside, []) for flat in flat_steps(inner, inside, where)]
    return [step]


def texts_by_id(vocabulary: Any, vocab_size: int, where: str) -> list[str | None]:
    """Tokens of a vocabulary (text → id) in the order of ids."""
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise CheckpointError(f"{where}: the vocabulary is no object with tokens")
    texts: list[str | None] = [None] * vocab_size
    for text, token_id in vocabulary.items():
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise CheckpointError(
                f"{where}: token {text[:40]!r} has id {str(token_id)[:20]}, and the embedding {vocab_size} rows",
                "the tokenizer is of another model",
            )
        if texts[token_id] is not None:
            raise CheckpointError(f"{where}: {text[:40]!r} and {str(texts[token_id])[:40]!r} both have id {token_id}")
        texts[token_id] = text
    return texts


def merge_pairs(model: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """The merges of a BPE by rank; both spellings, "a b" and ["a", "b"]."""
    merges, vocabulary = model.get("merges"), model["vocab"]
    if not isinstance(merges, list):
        raise CheckpointError(f"{where}: the BPE model has no merges")
    pairs = []
    for merge in merges:
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else ()
        if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise CheckpointError(f"{where}: merge {str(merge)[:60]!r} is not two tokens")
        if pair[0] not in vocabulary or pair[1] not in vocabulary or pair[0] + pair[1] not in vocabulary:
            raise CheckpointError(f"{where}: merge {str(merge)[:60]!r} is of tokens that the vocabulary does not have")
        pairs.append(pair)
    return pairs


def _added(token_id: int, entry: Any, path: Path) -> AddedToken:
    entry = _object(entry, path)
    text = entry.get("content")
    if not isinstance(text, str) or not text:
        raise CheckpointError(f"{path}: added token {token_id} has no text")
    strips = bool(entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"))
    behind = bool(entry.get("rstrip")) and not entry.get("lstrip") and not entry.get("single_word")
    return AddedToken(token_id, text, bool(entry.get("special")), strips, behind)


def _object(value: Any, path: Path) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {str(value)[:80]!r} where an object is needed")
    return value


def _id(value: Any, path: Path) -> int:
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{path}: {str(value)[:80]!r} is no token id")
    return value


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read")
        return read_regular(path).decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not valid UTF-8 ({error.reason})") from error


MAX_TOKEN_BYTES = 1 << 10  # joining is quadratic


def read_tiktoken(path: Path) -> dict[str, Any]:
    """The "model" of tokenizer.json."""
    ranks = _read_ranks(path)
    letters = _letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = _parts(token, ranks, rank)
        if len(parts) == 2:
            merges.append([spelled(part) for part in parts])
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {spelled(token): rank for token, rank in ranks.items()}, "merges": merges,
    }  # fmt: skip


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read")
        lines = read_regular(path).splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(filter(None, lines), 1):
        encoded, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            token = b""
        if not 0 < len(token) <= MAX_TOKEN_BYTES or not rank.isdigit() or len(rank) > 9 or token in ranks:
            raise CheckpointError(f"{path}, line {number}: {line[:60]!r} is no token and its rank")
        ranks[token] = int(rank)
    if len(set(ranks.values())) < len(ranks):
        raise CheckpointError(f"{path}: two tokens have the same rank")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise CheckpointError(f"{path}: there is no token for byte {lacking[0]}")
    return ranks


def _parts(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """What the bytes of a token become by the merges of lower rank, the lowest first."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        made = [ranks.get(left + right, below) for left, right in pairwise(parts)]
        lowest = min(range(len(made)), key=made.__getitem__)
        if made[lowest] >= below:
            break
        parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
    return parts


def _letters() -> list[str]:
    """GPT-2's letter of each byte: the character of that number where it can be seen, others from 256 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256)]
