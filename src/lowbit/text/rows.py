"""Rows of any known layout → documents: plain text, or a conversation.

    columns                        document
    messages                       [{role, content, …}, …]; content is text, a list of parts, or null beside tool calls
    conversations                  [{from, value}, …] (ShareGPT), or as messages
    instruction, output [, input]  user: instruction, blank line, input; assistant: output   (Alpaca)
    prompt, completion             user: prompt; assistant: completion; or both lists of turns   (TRL)
    text                           plain

The first matching layout wins, so a dataset of conversations that also has a column `text` is rendered with the model's
own template. Rows of files are JSON objects or strings: one a line (.jsonl), a list (.json), or the rows of a table
(.parquet, with pyarrow). Rows that cannot be used (without any of these columns, no object, a line that is not JSON)
and empty rows are passed over and counted (`calibration.Reading`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, DependencyError, LowbitError, UsageError
from lowbit.files.regular import open_text, read_regular

ROWS_OF_ONE_KIND = 100  # a source whose first so many rows cannot be used is refused: datasets may be endless
Message = dict[str, Any]
Document = str | list[Message]

ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def _from_instruction(row: dict[str, Any]) -> list[Message]:
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if isinstance(part, str) and part)
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    return _messages(turns) if asked and isinstance(row["output"], str) and row["output"] else []


def _from_completion(row: dict[str, Any]) -> list[Message]:
    turns: list[Any] = []
    for role, said in (("user", row["prompt"]), ("assistant", row["completion"])):
        if not said or not isinstance(said, str | list):
            return []
        turns += [{"role": role, "content": said}] if isinstance(said, str) else said
    return _messages(turns)


def _from_text(row: dict[str, Any]) -> str:
    text = row["text"]
    return text if isinstance(text, str) and text.strip() else ""


# Columns of a row → its document; "" or [] for an empty row.
LAYOUTS: dict[tuple[str, ...], Callable[[dict[str, Any]], Document]] = {
    ("messages",): lambda row: _messages(row["messages"]),
    ("conversations",): lambda row: _messages(row["conversations"]),
    ("instruction", "output"): _from_instruction,
    ("prompt", "completion"): _from_completion,
    ("text",): _from_text,
}


class UnusableRow:
    """Stands for a row that cannot be read; `document_of` raises why."""

    def __init__(self, why: LowbitError):
        self.why = why


def document_of(row: Any, source: str) -> Document:
    """The document of one row; "" or [] where it holds nothing. CheckpointError, UsageError where it cannot be used."""
    if isinstance(row, UnusableRow):
        raise row.why
    row = {"text": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise CheckpointError(f"{source}: a row is {type(row).__name__}, not an object with columns")
    for columns, make in LAYOUTS.items():
        if all(column in row for column in columns):
            return make(row)
    understood = ", ".join(" + ".join(columns) for columns in LAYOUTS)
    raise UsageError(
        f"{source} has the columns {', '.join(map(str, row)) or '(none)'}; understood are {understood}",
        "rename a column, or save the text to a file and give that",
    )


def shuffled(rows: Iterable[Any], seed: int, buffer: int) -> Iterator[Any]:
    """Every row once, each drawn from the next `buffer` rows; a shorter source is shuffled whole.

    Not left to `datasets`, so that a seed gives the same order for files and in every version.
    """
    draw = random.Random(seed)
    waiting: list[Any] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) > buffer:
            yield _taken(waiting, draw)
    while waiting:
        yield _taken(waiting, draw)


def _taken(waiting: list[Any], draw: random.Random) -> Any:
    index = draw.randrange(len(waiting))
    waiting[index], waiting[-1] = waiting[-1], waiting[index]
    return waiting.pop()


def articles(rows: Iterable[Any], source: str) -> Iterator[str]:
    """WikiText's lines joined to articles, each with its heading (" = Title = "), by blank lines as in evaluation."""
    lines: list[str] = []
    for row in rows:
        line = document_of(row, source)
        if not isinstance(line, str):
            raise UsageError(f"{source} has conversations where the lines of one text were expected")
        if _is_title(line) and lines:
            yield "\n\n".join(lines)
            lines = []
        lines.append(line)
    if any(lines):
        yield "\n\n".join(lines)


def _is_title(line: str) -> bool:
    words = line.split()
    return len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "=" and words[-2] != "="


def file_rows(path: Path) -> Iterator[Any]:
    """Rows of a .jsonl, .json or .parquet file, in its order."""
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path)
    return _json_list(path) if path.suffix.lower() == ".json" else _json_lines(path)


def _json_lines(path: Path) -> Iterator[Any]:
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parsed(line, f"{path}: line {number}")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: {error}",
            f"convert it: iconv -f utf-16 -t utf-8 {path} > NEW.txt, or from what it is written in",
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error


def _json_list(path: Path) -> Iterator[Any]:
    """A list of rows, or one row a line, as in many files named .json."""
    try:
        rows = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):  # the lines say which
        yield from _json_lines(path)
        return
    yield from rows if isinstance(rows, list) else [rows]


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise DependencyError(f"reading {path} needs the package `pyarrow`", "pip install pyarrow") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise CheckpointError(f"{path} cannot be read as a table: {error}") from error


def _parsed(line: str, where: str) -> Any:
    """The row of a line; `UnusableRow` for one that is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "give one JSON object a line; rename plain text to .txt"
        return UnusableRow(CheckpointError(f"{where} is not JSON: {error}", hint))


def _messages(turns: Any) -> list[Message]:
    """Turns with a role and anything to say, other fields (tool calls, reasoning, names) as they are; [] without text.

    content  text, a list of parts, or None where the turn only calls tools
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return []
    found: list[Message] = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        content = [content] if isinstance(content, dict) else content
        says = bool(content) and isinstance(content, (str, list))
        if isinstance(role, str) and (says or turn.get("tool_calls") or turn.get("function_call")):
            kept = {key: value for key, value in turn.items() if key not in ("from", "value")}
            found.append(kept | {"role": _ROLES.get(role, role), "content": content if says else None})
    return found if any(texts_of(message)[0] for message in found) else []


def texts_of(message: Message) -> tuple[str, int]:
    """(the text of a turn, the number of its parts that are no text)."""
    content = message["content"]
    if not isinstance(content, list):
        return content or "", 0
    texts = [part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, (str, dict))]
    said = [text for text in texts if isinstance(text, str)]
    return "\n".join(said), len(content) - len(said)
