"""The prompts of a blind comparison: 24 packaged ones of six kinds, or the user's.

    FILE.jsonl   an object on each line: "prompt", and "kind" if the result is to be told apart by it
    other files  one prompt on each line

Empty lines are passed over; a prompt that comes twice is asked once, and said to be. Refused: a file that is empty or
not UTF-8, or larger than any list of prompts; a line that is no such object (CheckpointError, with its number).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import CheckpointError
from lowbit.files.regular import open_regular

PACKAGED = Path(__file__).parent.parent / "data" / "blind_prompts.jsonl"
LARGEST_FILE = 16 * 2**20  # bytes
_FORM = 'write each line as {"prompt": "…"}, with "kind": "…" if you like'


@dataclass(frozen=True)
class BlindPrompt:
    """kind is "" where none is given."""

    text: str
    kind: str = ""


def read_prompts(path: Path | None = None) -> tuple[list[BlindPrompt], list[str]]:
    """(prompts, notes) of a file; the packaged ones of None."""
    path = PACKAGED if path is None else path
    lines = _text(path).splitlines()
    read = _of_json if path.suffix == ".jsonl" else lambda line, place: BlindPrompt(line.strip())
    found = [read(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise CheckpointError(f"{path} has no prompts", "write one on each line")
    first: dict[str, BlindPrompt] = {}
    for prompt in found:
        first.setdefault(prompt.text, prompt)
    once = list(first.values())
    twice = len(found) - len(once)
    return once, [f"{twice} of {len(found)} prompts of {path} came again and were passed over"] if twice else []


def _text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise CheckpointError(f"{path} is larger than {LARGEST_FILE} bytes", "give a shorter list of prompts")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: byte {error.start}", "save the prompts as UTF-8") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}", "--prompts takes a file of prompts") from None


def _of_json(line: str, place: str) -> BlindPrompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place} is not JSON: {error}", _FORM) from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise CheckpointError(f'{place} has no "prompt" with a text', _FORM)
    kind = entry.get("kind", "")
    if not isinstance(kind, str) or set(entry) - {"prompt", "kind"}:
        more = ", ".join(sorted(set(entry) - {"prompt", "kind"})) or "a kind that is no text"
        raise CheckpointError(f"{place} has {more}", _FORM)
    return BlindPrompt(entry["prompt"].strip(), kind.strip())
