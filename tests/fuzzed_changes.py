"""Changes that damage a model, a file or a recipe: a value, bytes, a file that is gone or is a folder."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fuzzing import Sample, mutate

# Values that config files should not have.
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 3, 7, 2**31, 10**9, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "0",
    "re:(a+)+$", "../../etc/passwd", "\x1b[31mred", "\ud800", "a" * 5000, "[bold]", "{{ x }}", [], [[]], [None],
    ["x"] * 50, {}, {"a": {}}, {"x": None},
]  # fmt: skip
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


GONE = "a file is gone, or a folder"
CUT = "a file is cut short, or is no JSON"
WEIGHTS = "bytes of weights or of another file"
OF_GGUF = "bytes of a GGUF file"
ROW = "a row of a text, or a line of a recipe"
VALUE = "a value of a JSON file"
KINDS = (GONE, CUT, WEIGHTS, OF_GGUF, ROW, VALUE)


class Change(NamedTuple):
    kind: str
    words: str


def change(damaged: Path, samples: dict[str, Sample], rng: random.Random) -> Change:
    """Change one thing in a file or in a file of a folder. samples: of GGUF files, by name"""
    if damaged.is_file():
        if damaged.suffix == ".gguf":
            damaged.write_bytes(mutate(samples[damaged.name], list(samples.values()), rng))
            return Change(OF_GGUF, "bytes of the GGUF")
        return _change_rows(damaged, rng) if damaged.suffix == ".jsonl" else _change_text(damaged, rng)
    files = sorted(path for path in damaged.iterdir() if path.is_file())
    if not files:
        return Change(GONE, "nothing is left")
    path = rng.choice(files)
    choice = rng.random()
    if choice < 0.08:
        path.unlink()
        return Change(GONE, f"{path.name} is gone")
    if choice < 0.12:
        path.unlink()
        path.mkdir()
        return Change(GONE, f"{path.name} is a folder")
    if choice < 0.2:
        with path.open("r+b") as file:
            file.truncate(rng.randrange(path.stat().st_size + 1))
        return Change(CUT, f"{path.name} is cut")
    with contextlib.suppress(IndexError):  # config.json more often than all others
        path = rng.choice([each for each in files if each.name in JSON_FILES + ("config.json",) * 3])
    if choice < 0.8 and path.suffix == ".json":
        return change_json(path, rng)
    weights = [each for each in files if each.suffix == ".safetensors"]
    path = rng.choice(weights) if weights else path
    content = path.read_bytes()
    head = min(len(content), 8 + int.from_bytes(content[:8], "little"))
    path.write_bytes(mutate(Sample(path.name, content, max(head, 1)), [Sample(path.name, content, max(head, 1))], rng))
    return Change(WEIGHTS, f"bytes of {path.name}")


def change_json(path: Path, rng: random.Random) -> Change:
    """Another value at a random place, a key that is gone, or one more."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return Change(CUT, f"{path.name} is no JSON any more")
    places = list(_places(value))
    if not places:
        path.write_text(json.dumps(rng.choice(ODD)), encoding="utf-8")
        return Change(CUT, f"{path.name} is one value")
    holder, key = rng.choice(places)
    old = holder[key]
    change = rng.random()
    if change < 0.15 and isinstance(holder, dict):
        del holder[key]
        what = f"{key} is gone"
    elif change < 0.3 and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = rng.choice((old + 1, old - 1, old * 2, -old, old // 2 if old else 1, str(old), [old]))
        what = f"{key}: {old} → {holder[key]}"
    else:
        holder[key] = rng.choice(ODD)
        what = f"{key} → {str(holder[key])[:40]!r}"
    path.write_text(json.dumps(value), encoding="utf-8")
    return Change(VALUE, f"{path.name}: {what}")


def _places(value: Any, most: int = 3000) -> Iterator[tuple[Any, Any]]:
    """(dict or list, key) of the values in it, breadth first, the long lists of tokenizers cut."""
    waiting = [value] if isinstance(value, dict | list) else []
    while waiting and most > 0:
        holder = waiting.pop(0)
        keys = (
            list(holder) if isinstance(holder, dict) else list(range(len(holder))) if isinstance(holder, list) else []
        )
        for key in keys[:50]:
            most -= 1
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


def _change_text(path: Path, rng: random.Random) -> Change:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    index = rng.randrange(len(lines))
    key = lines[index].partition(":")[0]
    odd = rng.choice(ODD)
    lines[index] = rng.choice(
        (f"{key}: {odd}", f"{key}x: 1", f"{key}: [[[", f"{key}:\n  - {odd}", "\0", "&a [*a]", f"- {key}")
    )
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return Change(ROW, f"line {index}: {lines[index]!r}")


def _change_rows(path: Path, rng: random.Random) -> Change:
    """Another value in all rows, or in one; or a line that is no JSON."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError:
        return Change(ROW, "a line is no JSON any more")
    if rng.random() < 0.2:
        line = rng.choice(("{", "", "\0", "[1]", "null", '{"text": "a"}', "{" * 3000, "\udcff"))
        lines[rng.randrange(len(lines))] = line
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
        return Change(ROW, f"a line is {line[:20]!r}")
    key, odd = "nothing", rng.choice(ODD)
    number = rng.randrange(max(1, len(list(_places(rows[0])))))
    for row in rows if rng.random() < 0.7 else rows[:1]:
        places = list(_places(row))
        if number < len(places):  # an earlier change may have left another shape
            holder, key = places[number]
            holder[key] = odd
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return Change(ROW, f"{key} of rows → {str(odd)[:40]!r}")
