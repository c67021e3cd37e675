"""The tokenizer of a Hugging Face folder as GGUF key-values.

    tokenizer.ggml.model       "gpt2": byte-level BPE, tokens in byte letters, merges by rank
                               "gemma4": BPE with "▁" for spaces, byte tokens, merges by rank (the row says so)
                               "llama": SentencePiece-like BPE, "▁" for spaces, byte tokens, a score per token
    tokenizer.ggml.pre         how text is cut into words: `gguf_pre_tokenizers`; "default" for "llama"
    tokenizer.ggml.tokens, .token_type, .merges ("a b") or .scores
    tokenizer.ggml.*_token_id  of each role; of end of turn, end of message and fill-in-the-middle by the texts that
                               llama.cpp knows them by
    tokenizer.ggml.add_bos_token, .add_eos_token, .add_space_prefix
    tokenizer.chat_template, tokenizer.chat_template.NAME

Where no tokenizer is asked for, all of it is `tokenizer.ggml.model` "none", as convert_hf_to_gguf.py has it; the number
of tokens is then ARCH.vocab_size.

The vocabulary has a token for every row of the embedding; rows without one get "[PADn]", unused. Notes list what
llama.cpp lacks: NFC, spaces that go with a token, prefixes other than BOS. Refused: unigram and WordPiece models,
pre-tokenizers that llama.cpp does not have, tokens without a row.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType, Keys, TokenType

from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.formats.gguf.names import PHI3, PHI3_KEEPS, missing_tokens
from lowbit.formats.gguf.pre_tokenizers import PreTokenizer
from lowbit.formats.gguf.tokenizer_files import AddedToken, TokenizerFiles, calling_tokenizers, merge_pairs, texts_by_id
from lowbit.formats.gguf.write_pre_tokenizers import identify, what_llama_cpp_leaves_out
from lowbit.formats.gguf.write_sentencepiece import sentencepiece_vocabulary, spaced_vocabulary

K = Keys.Tokenizer

_ROLE_KEYS = {
    "bos": K.BOS_ID, "eos": K.EOS_ID, "unk": K.UNK_ID, "sep": K.SEP_ID, "pad": K.PAD_ID, "mask": K.MASK_ID,
}  # fmt: skip
# Texts by which llama.cpp finds these tokens; writing the id says which one where a vocabulary has several.
_KNOWN_TEXTS = {
    K.EOM_ID: ("<|eom_id|>",),
    K.FIM_PRE_ID: ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                   "<|code_prefix|>", "<|prefix|>"),
    K.FIM_SUF_ID: ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                   "<|code_suffix|>", "<|suffix|>"),
    K.FIM_MID_ID: ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                   "<|code_middle|>", "<|middle|>"),
    K.FIM_PAD_ID: ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>"),
    K.FIM_REP_ID: ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    K.FIM_SEP_ID: ("<|file_sep|>",),
}  # fmt: skip
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>",
                 "[EOT]")  # fmt: skip
_WITHOUT = "--no-tokenizer writes a file without one, which takes token ids alone"
_WRAPPINGS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
# Llama.cpp's chat parser of Gemma 4 has to see these, so they are no control tokens.
_GEMMA4_VISIBLE = {
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
}  # fmt: skip
# gpt-oss ends every message with <|end|>, and its turns with these
_HARMONY = {"<|return|>", "<|call|>"}


# Key-values, and the note, of a file without a tokenizer
WITHOUT_TOKENIZER = {K.MODEL: ("none", GGUFValueType.STRING)}
LEFT_OUT = "no tokenizer is written, as asked: llama.cpp loads the file and takes token ids, no text"


@dataclass(frozen=True)
class TokenizerKeyValues:
    """Key-values for the header of a GGUF file.

    key_values  key → (value, type, type of the items): str, int and bool with types STRING, UINT32 and BOOL and None;
                lists with type ARRAY and items of STRING (tokens, merges), INT32 (token_type), FLOAT32 (scores)
    notes       differences between llama.cpp and transformers, and what was left out
    strips_as_phi3  whitespace is dropped behind special tokens, those that Phi-3 does it for (`names.py`)
    """

    key_values: dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]
    notes: tuple[str, ...]
    strips_as_phi3: bool = False


@dataclass
class Vocabulary:
    """Tokens by id; None in `texts` where an id has no token."""

    model: str
    pre: str
    texts: list[str | None]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool | None = None
    notes: list[str] = field(default_factory=list)
    strips_as_phi3: bool = False


def tokenizer_key_values(
    folder: Path, vocab_size: int, pre: str | None = None, spaced: str = "llama"
) -> TokenizerKeyValues:
    """The tokenizer of a folder, for an embedding of `vocab_size` rows.

    pre     overrides tokenizer.ggml.pre
    spaced  tokenizer.ggml.model of a vocabulary with "▁" for spaces: "llama" or "gemma4"

    Raises CheckpointError (no tokenizer, damaged files), ArchitectureError (one that llama.cpp does not have),
    UsageError (a `pre` that is not known).
    """
    files = TokenizerFiles(folder)
    vocabulary = _vocabulary(files, vocab_size, pre, spaced)
    notes = vocabulary.notes
    _fill_up(vocabulary)
    ids = {text: index for index, text in enumerate(vocabulary.texts) if text is not None}
    roles = _roles(files, ids, vocab_size, notes)
    values = {
        K.MODEL: _string(vocabulary.model),
        K.PRE: _string(vocabulary.pre),
        K.LIST: (vocabulary.texts, GGUFValueType.ARRAY, GGUFValueType.STRING),
        K.TOKEN_TYPE: (vocabulary.types, GGUFValueType.ARRAY, GGUFValueType.INT32),
    }
    if vocabulary.scores is not None:
        values[K.SCORES] = (vocabulary.scores, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    if vocabulary.merges is not None:
        values[K.MERGES] = (vocabulary.merges, GGUFValueType.ARRAY, GGUFValueType.STRING)
    add_bos, add_eos = _added_around(files, roles, vocab_size, notes)
    if vocabulary.model == "gemma4" and not add_bos:
        notes.append("llama.cpp begins every text of this vocabulary with BOS; the tokenizer does not")
    values |= {_ROLE_KEYS[role]: _id(token) for role, token in roles.items()}
    values |= {key: _id(token) for key, token in _known_by_text(files, ids, vocabulary.types).items()}
    values |= {K.ADD_BOS: _flag(add_bos), K.ADD_EOS: _flag(add_eos)}
    if vocabulary.space_prefix is not None:
        values[K.ADD_PREFIX] = _flag(vocabulary.space_prefix)
    return TokenizerKeyValues(values | _templates(files), tuple(notes), vocabulary.strips_as_phi3)


def _vocabulary(files: TokenizerFiles, vocab_size: int, pre: str | None, spaced: str) -> Vocabulary:
    parsed = files.tokenizer
    if parsed is None and files.sentencepiece is None:
        raise CheckpointError(
            f"{files.folder}: there is no tokenizer (tokenizer.json, tokenizer.model, or vocab.json and merges.txt)",
            "copy the tokenizer files of the model beside its config.json, or write a file that takes token ids alone: "
            "--no-tokenizer",
        )
    if parsed is not None and parsed["model"].get("type", "BPE") != "BPE":
        raise ArchitectureError(
            f"{files.folder}: the tokenizer is of type {parsed['model'].get('type')}; byte-level BPE and SentencePiece "
            f"BPE are written",
            _WITHOUT,
        )
    added = _within(files.added, vocab_size, notes := [])
    steps = json.dumps([(parsed or {}).get(key) for key in ("pre_tokenizer", "decoder")])
    if parsed is not None and '"ByteLevel"' in steps and not parsed["model"].get("byte_fallback"):
        vocabulary = _byte_level(files.folder, parsed, vocab_size, pre)
    else:
        if spaced == "gemma4":
            texts, types, merges, found = spaced_vocabulary(files, vocab_size)
            vocabulary = Vocabulary(spaced, spaced, texts, types, merges=merges, space_prefix=False, notes=found)
        else:
            texts, types, scores, prefix, found = sentencepiece_vocabulary(files, vocab_size)
            vocabulary = Vocabulary("llama", "default", texts, types, scores, space_prefix=prefix, notes=found)
        if pre not in (None, "default"):
            notes.append(f"--pre-tokenizer {pre} has no effect: SentencePiece models have no pre-tokenizer")
    vocabulary.notes += notes
    _place_added(vocabulary, added)
    return vocabulary


def _within(added: list[AddedToken], vocab_size: int, notes: list[str]) -> list[AddedToken]:
    """Added tokens that the embedding has rows for."""
    beyond = [token for token in added if token.id >= vocab_size]
    if beyond:
        notes.append(
            f"{len(beyond)} added tokens are left out, because the embedding has only {vocab_size} rows: "
            f"{beyond[0].text!r} is {beyond[0].id}"
        )
    return [token for token in added if token.id < vocab_size]


def _byte_level(folder: Path, parsed: dict[str, Any], vocab_size: int, pre: str | None) -> Vocabulary:
    where = str(folder / "tokenizer.json")
    row, notes = identify(parsed, where, pre)
    model = parsed["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ArchitectureError(f"{where}: {key} is {str(model[key])[:40]!r}, which llama.cpp does not have")
    texts = texts_by_id(model.get("vocab"), vocab_size, where)
    pairs = merge_pairs(model, where)
    notes += what_llama_cpp_leaves_out(parsed, where)
    if row.ignore_merges != bool(model.get("ignore_merges")):
        notes += _unmerged(parsed, pairs, row, where)
    merges = [f"{left} {right}" for left, right in pairs]
    return Vocabulary("gpt2", row.name, texts, [int(TokenType.NORMAL)] * vocab_size, merges=merges, notes=notes)


def _unmerged(parsed: dict[str, Any], pairs: list[tuple[str, str]], row: PreTokenizer, where: str) -> list[str]:
    """A note about tokens that no merges lead to, if there are any: they are found by one of the two rules only."""
    from tokenizers.models import BPE

    with calling_tokenizers(where):
        model = BPE(parsed["model"]["vocab"], pairs)  # does not ignore merges
        count = sum(len(model.tokenize(text)) != 1 for text in parsed["model"]["vocab"])
    if not count:
        return []
    rule = "also where no merges lead to it" if row.ignore_merges else "only where merges lead to it"
    return [f"llama.cpp's {row.name} takes a word of the vocabulary as one token {rule}: {count} tokens differ in that"]


def _place_added(vocabulary: Vocabulary, added: list[AddedToken]) -> None:
    """Types and, where they differ, texts of added tokens."""
    taken = {text for text in vocabulary.texts if text is not None}
    for token in added:
        text = token.text
        # Models forgot to mark some tokens as special (DeepSeek Coder, Command R, Gemma).
        wrapped = any(text.startswith(a) and text.endswith(b) for a, b in _WRAPPINGS)
        control = token.special or wrapped or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        control &= vocabulary.model != "gemma4" or text not in _GEMMA4_VISIBLE
        if not control and vocabulary.model != "gpt2" and text.replace("▁", " ") not in taken:
            text = text.replace("▁", " ")  # llama.cpp looks for these in the text as it is
        if vocabulary.texts[token.id] != text and text in taken:
            raise CheckpointError(f"added token {token.id} is {text[:40]!r}, as another token is already")
        taken.add(text)
        vocabulary.texts[token.id] = text
        if vocabulary.types[token.id] != TokenType.UNKNOWN:
            vocabulary.types[token.id] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    stripping = [token.text for token in added if token.strips]
    vocabulary.strips_as_phi3 = _strips_as_phi3(vocabulary, added)
    if stripping and not vocabulary.strips_as_phi3:
        vocabulary.notes.append(
            f"{len(stripping)} added tokens take spaces around them along or want whole words, for which GGUF has no "
            f"place: {', '.join(stripping[:3])}"
        )


def _strips_as_phi3(vocabulary: Vocabulary, added: list[AddedToken]) -> bool:
    """True where whitespace goes with exactly those tokens behind which llama.cpp drops it for names with Phi-3."""
    texts = {text for text in vocabulary.texts if text is not None}
    special = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    dropping = {text for text, kind in zip(vocabulary.texts, vocabulary.types, strict=True) if kind in special}
    dropping = {text for text in (dropping | {"</s>"}) - set(PHI3_KEEPS) if text is not None}
    stripping = {token.text for token in added if token.behind}
    others = any(token.strips and not token.behind for token in added)
    return missing_tokens(PHI3, texts) is None and stripping == dropping and not others


def _fill_up(vocabulary: Vocabulary) -> None:
    """A token for every row."""
    taken = {text for text in vocabulary.texts if text is not None}
    for index, text in enumerate(vocabulary.texts):
        if text is not None:
            continue
        name = f"[PAD{index}]"
        while name in taken:
            name += "_"
        taken.add(name)
        vocabulary.texts[index] = name
        vocabulary.types[index] = int(TokenType.UNUSED)
        if vocabulary.scores is not None:
            vocabulary.scores[index] = -10000.0


def _roles(files: TokenizerFiles, ids: dict[str, int], vocab_size: int, notes: list[str]) -> dict[str, int]:
    """Role → id: by tokenizer_config.json's text, else by config.json's id."""
    roles = {}
    for role in _ROLE_KEYS:
        text, token_id = files.role_texts.get(role), files.role_id(role)
        if text is not None and text in ids:
            roles[role] = ids[text]
        elif text is not None:
            notes.append(f"the {role} token {text[:40]!r} is not in the vocabulary, and left out")
        elif token_id is not None and 0 <= token_id < vocab_size:
            roles[role] = token_id
    return roles


def _added_around(files: TokenizerFiles, roles: dict[str, int], vocab_size: int, notes: list[str]) -> tuple[bool, bool]:
    """(add_bos, add_eos): by tokenizer_config.json, else by the post-processor."""
    before, after = _by_post_processor(files, roles)
    added = {}
    for role, around in (("bos", before), ("eos", after)):
        said = files.settings.get(f"add_{role}_token")
        if role not in roles and len(around) == 1 and around[0] < vocab_size:
            roles[role] = around[0]
        if around and around != [roles.get(role)]:
            notes.append(
                f"tokens {around} go {'before' if role == 'bos' else 'behind'} every text; llama.cpp adds one {role} "
                f"token or nothing"
            )
            around = []
        adds = said if isinstance(said, bool) else bool(around)
        if said is False and around and files.tokenizer is not None:
            notes.append(f"tokenizer.json adds the {role} token, tokenizer_config.json says not to; the latter counts")
        added[role] = adds and role in roles
    return added["bos"], added["eos"]


def _by_post_processor(files: TokenizerFiles, roles: dict[str, int]) -> tuple[list[int], list[int]]:
    """(ids before a text, ids behind it)."""
    if files.tokenizer is None:  # LlamaTokenizer's default
        return [roles["bos"]] if "bos" in roles else [], []
    with calling_tokenizers(str(files.folder / "tokenizer.json")):
        plain, full = (files.loaded.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _known_by_text(files: TokenizerFiles, ids: dict[str, int], types: list[int]) -> dict[str, int]:
    """End of turn, end of message, fill-in-the-middle: key → id."""
    found = {}
    for key, texts in _KNOWN_TEXTS.items():
        token = next((ids[text] for text in texts if text in ids and types[ids[text]] != TokenType.NORMAL), None)
        if token is not None:
            found[key] = token
    turns = [text for text in _ENDS_OF_TURN if text in ids and types[ids[text]] != TokenType.NORMAL]
    if ids.keys() >= _HARMONY:
        turns = [text for text in turns if text != "<|end|>"]
    ends = files.end_ids()
    turns.sort(key=lambda text: ids[text] not in ends)  # stable: those that end generation first
    if turns and (ids[turns[0]] in ends or files.chat_templates()):
        found[K.EOT_ID] = ids[turns[0]]
    return found


def _templates(files: TokenizerFiles) -> dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]:
    values, names = {}, []
    for name, template in files.chat_templates().items():
        if name == "default":
            values[K.CHAT_TEMPLATE] = _string(template)
            continue
        safe = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
        names.append(safe)
        values[K.CHAT_TEMPLATE_N.format(name=safe)] = _string(template)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise CheckpointError(f"{files.folder}: two chat templates would be named {repeated[0]!r}")
    if names:
        values[K.CHAT_TEMPLATES] = (names, GGUFValueType.ARRAY, GGUFValueType.STRING)
    return values


def _string(value: str) -> tuple[Any, GGUFValueType, None]:
    return value, GGUFValueType.STRING, None


def _id(value: int) -> tuple[Any, GGUFValueType, None]:
    return value, GGUFValueType.UINT32, None


def _flag(value: bool) -> tuple[Any, GGUFValueType, None]:
    return value, GGUFValueType.BOOL, None
