"""tokenizer.model: a SentencePiece model, read from the protobuf wire format without trusting it.

    ModelProto      1 pieces (repeated SentencePiece)   2 trainer_spec   3 normalizer_spec
    SentencePiece   1 piece (string)   2 score (float)   3 type (1 normal, 2 unknown, 3 control, 4 user-defined,
                    5 unused, 6 byte; 1 where absent)
    TrainerSpec     3 model_type (1 unigram, 2 BPE, 3 word, 4 char; 1 where absent)
                    40 unk_id   41 bos_id   42 eos_id   43 pad_id  (0, 1, 2, -1 where absent)
    NormalizerSpec  3 add_dummy_prefix (true where absent)

A field is a varint (number << 3 | wire type): 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes. Other fields
are skipped. Refused: groups and unknown wire types, lengths beyond the end, varints of more than 64 bits, pieces that
are not UTF-8, types that are unknown, scores that are not finite.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import CheckpointError
from lowbit.files.regular import read_regular

MAX_BYTES = 100_000_000
BPE = 2
_TYPES = range(1, 7)


@dataclass(frozen=True)
class SentencePieceModel:
    """What llama.cpp needs of a tokenizer.model.

    pieces            text of each id
    scores            of each; higher is merged first
    types             the numbers of GGUF's token_type, which are SentencePiece's
    model_type        1 unigram, 2 BPE
    add_dummy_prefix  text begins with a space
    specials          "unk", "bos", "eos", "pad" → id, where there is one
    """

    pieces: list[str]
    scores: list[float]
    types: list[int]
    model_type: int
    add_dummy_prefix: bool
    specials: dict[str, int]


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Parse tokenizer.model; CheckpointError where it is not one."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path}: {size} bytes; a SentencePiece model has at most {MAX_BYTES}")
        data = memoryview(read_regular(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        return _model(data)
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model ({error})") from error


def _model(data: memoryview) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int] = {}
    normalizer: dict[int, int] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:
            trainer |= {key: item for key, item in _fields(_message(value)) if isinstance(item, int)}
        elif number == 3:
            normalizer |= {key: item for key, item in _fields(_message(value)) if isinstance(item, int)}
    if not pieces:
        raise ValueError("there are no pieces")
    ids = {"unk": trainer.get(40, 0), "bos": trainer.get(41, 1), "eos": trainer.get(42, 2), "pad": trainer.get(43, -1)}
    return SentencePieceModel(
        pieces=[text for text, _, _ in pieces],
        scores=[score for _, score, _ in pieces],
        types=[kind for _, _, kind in pieces],
        model_type=trainer.get(3, 1),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        # negative numbers are varints of 64 bits
        specials={name: value for name, value in ids.items() if 0 <= value < len(pieces)},
    )


def _piece(data: memoryview) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1:
            text = str(_message(value), "utf-8")
        elif number == 2 and isinstance(value, memoryview):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    if kind not in _TYPES or not math.isfinite(score):
        raise ValueError(f"piece {text[:40]!r} has type {kind} and score {score}")
    return text, score, kind


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message is needed")
    return value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, varint or bytes) of one message."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if length > len(data) - position:
            raise ValueError(f"a field of {length} bytes at byte {position}, where {len(data) - position} are left")
        yield tag >> 3, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """(value, position behind it)."""
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(data):
            raise ValueError("ends within a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number of more than 64 bits at byte {position}")
