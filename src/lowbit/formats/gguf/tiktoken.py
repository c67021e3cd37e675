"""tiktoken.model, the vocabulary of a byte-level BPE without merges, as tokenizer.json would have it.

    one token a line: its bytes in base64, a space, its rank, which is its id

A merge of two tokens has the rank of what they make. So the last merge of a token joins the two that its bytes become
by the merges of lower rank; a token whose bytes become more than two is never made of its parts and has no merge, as in
llama.cpp's converter. Refused: other lines, two tokens of one rank, a byte without a token.
"""

from __future__ import annotations

import base64
import binascii
from itertools import pairwise
from pathlib import Path
from typing import Any

from lowbit.checkpoint.base import MAX_JSON_BYTES
from lowbit.errors import CheckpointError
from lowbit.files.regular import read_regular

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
