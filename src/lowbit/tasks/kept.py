"""What a server or a model has answered so far, on disk, so that a run which was stopped does not ask again.

    CACHE/PLACE/NAME.jsonl        a line per answer: {"key": …, "value": …}

A line that a kill cut, or that is damaged, is passed over, and asked again. The file goes when the run is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit.checkpoint.base import cache_root


def key_of(*texts: str) -> str:
    """A short name of texts, the same in every run."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:24]


def kept_file(place: str, name: str) -> Path:
    """Where the answers of an unfinished run lie. place  a folder of the cache"""
    return cache_root() / place / f"{name}.jsonl"


@contextmanager
def kept(path: Path) -> Iterator[tuple[dict[str, Any], Callable[[str, Any], None]]]:
    """(what an unfinished run has, by key; how to add to it)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    known: dict[str, Any] = {}
    for line in before.splitlines():
        try:
            entry = json.loads(line)
            known[str(entry["key"])] = entry["value"]
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
    with path.open("a", encoding="utf-8") as file:

        def add(key: str, value: Any) -> None:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
            file.flush()
            known[key] = value

        if before and not before.endswith("\n"):
            file.write("\n")  # ends a line that was cut
        yield known, add
