"""SentencePiece-like vocabularies for llama.cpp: text, type and score of each token.

llama.cpp writes "▁" for every space, begins with one "▁" where add_space_prefix says so (and after each special token),
and then joins the two neighbours whose joint text is the token with the highest score, leftmost first, until nothing
can be joined. Characters that are no token become byte tokens <0x00>…<0xFF>.

Scores come from tokenizer.model where it lists the same tokens, else from the merges of tokenizer.json:

    score of a token = −(rank of the first merge that makes it)

which joins in the same order as long as every way to split a token is a merge, as it is in files converted from
SentencePiece. A test text is tokenized by both rules; where they differ, a note says so. Refused: unigram models, and
pre-tokenizers or normalizers that do more than write "▁".

"gemma4" is the same kind of vocabulary with merges by rank, within lines: llama.cpp joins no newline with other text.
"""

from __future__ import annotations

import heapq
import json
import re
from typing import Any

from gguf.constants import TokenType

from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.formats.gguf.pre_tokenizers import LINES
from lowbit.formats.gguf.sentencepiece import BPE, SentencePieceModel
from lowbit.formats.gguf.tokenizer_files import TokenizerFiles, calling_tokenizers, flat_steps, merge_pairs, texts_by_id
from lowbit.formats.gguf.write_pre_tokenizers import HARD_TEXT

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
_MINUS = -1000.0  # of tokens that nothing is joined to; llama.cpp's converter has the same


def sentencepiece_vocabulary(
    files: TokenizerFiles, vocab_size: int
) -> tuple[list[str | None], list[int], list[float], bool, list[str]]:
    """(texts, types, scores, add_space_prefix, notes). texts[i] is None where an id has no token."""
    model, parsed = files.sentencepiece, files.tokenizer
    if model is not None and model.model_type != BPE:
        raise ArchitectureError(f"{files.folder / 'tokenizer.model'}: not a BPE model; unigram models are not written")
    if parsed is None:
        assert model is not None
        texts, types, scores = _of_model(model, vocab_size, str(files.folder / "tokenizer.model"))
        prefix, notes = model.add_dummy_prefix, []
    else:
        where = str(files.folder / "tokenizer.json")
        texts = texts_by_id(parsed["model"].get("vocab"), vocab_size, where)
        types = _types(texts, parsed["model"].get("unk_token"))
        pairs = merge_pairs(parsed["model"], where)
        prefix, notes = _space_prefix(parsed, where)
        scores = _scores(texts, pairs, model, notes)
        notes += _compare(files, texts, scores, prefix)
    _refuse_missing_bytes(files, texts)
    return texts, types, scores, prefix, notes


def spaced_vocabulary(
    files: TokenizerFiles, vocab_size: int
) -> tuple[list[str | None], list[int], list[str], list[str]]:
    """(texts, types, merges "a b", notes) of a vocabulary with "▁" for spaces, its merges by rank."""
    where, parsed = str(files.folder / "tokenizer.json"), files.tokenizer
    if parsed is None:
        raise CheckpointError(f"{where} is missing, which has the merges",
                              "load the tokenizer with transformers and save it again")  # fmt: skip
    texts = texts_by_id(parsed["model"].get("vocab"), vocab_size, where)
    pairs = merge_pairs(parsed["model"], where)
    prefix, notes = _space_prefix(parsed, where)
    if prefix:
        notes.append("the tokenizer puts a space before the text; llama.cpp does not")
    _refuse_missing_bytes(files, texts)
    if not _same_by_lines(files, parsed):
        notes.append("llama.cpp will tokenize some text otherwise than tokenizer.json: it joins no newline with other "
                     "text")  # fmt: skip
    return texts, _types(texts, parsed["model"].get("unk_token")), [f"{left} {right}" for left, right in pairs], notes


def _same_by_lines(files: TokenizerFiles, parsed: dict[str, Any]) -> bool:
    """True if the test text has the same tokens where it is cut at newlines first, as llama.cpp does."""
    from tokenizers import Tokenizer

    with calling_tokenizers(str(files.folder / "tokenizer.json")):
        cut = Tokenizer.from_str(json.dumps(parsed | {"pre_tokenizer": LINES, "post_processor": None}))
        found, expected = (one.encode(HARD_TEXT, add_special_tokens=False).ids for one in (cut, files.loaded))
    return found == expected


def _refuse_missing_bytes(files: TokenizerFiles, texts: list[str | None]) -> None:
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - {text for text in texts if text is not None}
    if missing:
        raise ArchitectureError(
            f"{files.folder}: the vocabulary has no byte token {min(missing)}, and llama.cpp stops at a character "
            f"that is no token"
        )


def _of_model(
    model: SentencePieceModel, vocab_size: int, where: str
) -> tuple[list[str | None], list[int], list[float]]:
    if len(model.pieces) > vocab_size:
        raise CheckpointError(
            f"{where}: {len(model.pieces)} pieces, and the embedding has {vocab_size} rows",
            "the tokenizer is of another model",
        )
    if len(set(model.pieces)) < len(model.pieces):
        raise CheckpointError(f"{where}: a piece occurs twice")
    rest = vocab_size - len(model.pieces)
    spaced = [
        piece.replace(_SPACE, " ") if kind == TokenType.USER_DEFINED else piece
        for piece, kind in zip(model.pieces, model.types, strict=True)
    ]
    return [*spaced, *[None] * rest], model.types + [int(TokenType.UNUSED)] * rest, model.scores + [_MINUS] * rest


def _types(texts: list[str | None], unknown: str | None) -> list[int]:
    def kind(text: str | None) -> TokenType:
        if text is None:
            return TokenType.UNUSED
        if text == unknown:
            return TokenType.UNKNOWN
        return TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL

    return [int(kind(text)) for text in texts]


def _scores(
    texts: list[str | None], pairs: list[tuple[str, str]], model: SentencePieceModel | None, notes: list[str]
) -> list[float]:
    if model is not None and model.pieces == texts[: len(model.pieces)]:
        return model.scores + [_MINUS] * (len(texts) - len(model.pieces))
    if model is not None:
        notes.append("tokenizer.model has other tokens than tokenizer.json, and is left out; scores follow the merges")
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, index)
    last = len(pairs)
    return [-float(rank.get(text, last)) if text is not None and len(text) > 1 else 0.0 for text in texts]


def _space_prefix(parsed: dict[str, Any], where: str) -> tuple[bool, list[str]]:
    """(add_space_prefix, notes), by normalizer and pre-tokenizer."""
    prefix, notes = False, []
    for step in flat_steps(parsed.get("normalizer"), "normalizers", where):
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == _SPACE:
            prefix = True
        elif kind in ("NFC", "NFKC", "Precompiled"):
            notes.append(f"the tokenizer normalizes text ({kind}); llama.cpp does not")
        elif not (kind == "Replace" and step.get("content") == _SPACE and step.get("pattern") == {"String": " "}):
            raise _unknown("normalizer", step, where)
    for step in flat_steps(parsed.get("pre_tokenizer"), "pretokenizers", where):
        kind = step.get("type")
        if kind == "Metaspace" and step.get("replacement", _SPACE) == _SPACE:
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            prefix = prefix or scheme != "never"
            if scheme == "first":
                notes.append("the tokenizer puts a space before the text only; llama.cpp also after special tokens")
            if scheme != "never":
                notes.append("where the text begins with a space already, llama.cpp puts another one before it")
        elif step != LINES and not (kind == "Split" and step.get("pattern") == {"String": " "}):
            # there are no spaces left for the latter (Gemma)
            raise _unknown("pre-tokenizer", step, where)
    return prefix, notes


def _unknown(what: str, step: dict[str, Any], where: str) -> ArchitectureError:
    return ArchitectureError(
        f"{where}: llama.cpp's SentencePiece has no {what} {json.dumps(step, ensure_ascii=False)[:200]}"
    )


def _compare(files: TokenizerFiles, texts: list[str | None], scores: list[float], prefix: bool) -> list[str]:
    """A note where a line of the test text is tokenized otherwise than by tokenizers."""
    ids = {text: index for index, text in enumerate(texts) if text is not None}
    added = [token.text.replace(_SPACE, " ") for token in files.added]
    lines = [line for line in HARD_TEXT.split("\n") if line and line[0] != " " and not any(a in line for a in added)]
    for line in lines:
        with calling_tokenizers(str(files.folder / "tokenizer.json")):
            expected = files.loaded.encode(line, add_special_tokens=False).ids
        if join_greedily((" " if prefix else "") + line, ids, scores) != expected:
            return [
                f"llama.cpp will tokenize some text otherwise than tokenizer.json: its SentencePiece joins by score, "
                f"and the merges are not in that order (as in {line[:40]!r})"
            ]
    return []


def join_greedily(text: str, ids: dict[str, int], scores: list[float]) -> list[int]:
    """Token ids of a text by llama.cpp's rule."""
    symbols: list[str] = list(text.replace(" ", _SPACE))
    after = [*range(1, len(symbols)), -1]
    before = [*range(-1, len(symbols) - 1)]
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (joint := symbols[left] + symbols[right]) in ids:
            heapq.heappush(queue, (-scores[ids[joint]], left, right, joint))

    for index in range(len(symbols) - 1):
        offer(index, index + 1)
    while queue:
        _, left, right, joint = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != joint:
            continue
        symbols[left], symbols[right] = joint, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    found = []
    for symbol in filter(None, symbols):
        found += [ids[symbol]] if symbol in ids else [ids.get(f"<0x{byte:02X}>", -1) for byte in symbol.encode()]
    return found
