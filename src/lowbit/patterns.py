"""Regular expressions of users and of checkpoints, matched without waiting for ever.

Python's `re` takes exponential time for some patterns, and a config.json may hold one: `(([a-z0-9._])+)+X`. RE2 takes
time linear in the name for all that it knows. What it does not know (lookaround, references back), and names that are
not ASCII or hold a line feed, where its classes and `$` differ from Python's, go to the package `regex`, which
stops after `SECONDS`.

The language is Python's: a pattern that `re` refuses is refused, and both engines find what `re` finds.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from lowbit.errors import UsageError

SECONDS = 1.0  # of the processor, for one pattern and one name
LONGEST = 10_000  # characters of a pattern
_RE2_MEMORY = 1 << 23


class PatternError(UsageError):
    """No regular expression, or one that takes too long to match."""

    usual_hint = "write it without repetitions inside of repetitions, or name the modules"


class Pattern:
    """A compiled pattern; `match` and `search` are those of `re`, and say True or False."""

    def __init__(self, text: str):
        self.text = text
        if len(text) > LONGEST:
            raise PatternError(f"it has {len(text)} characters; at most {LONGEST} are allowed")
        import regex  # when the first pattern is seen: importing takes as long as `lowbit --help`

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                re.compile(text)
                self._slow = regex.compile(_as_python(text))
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise PatternError(str(error)) from error
        self._fast = _re2(text)

    def match(self, name: str) -> bool:
        """True where the pattern matches at the beginning of a name."""
        return self._find("match", name)

    def search(self, name: str) -> bool:
        """True where the pattern matches anywhere in a name."""
        return self._find("search", name)

    def _find(self, how: str, name: str) -> bool:
        if self._fast is not None and name.isascii() and "\n" not in name:
            return getattr(self._fast, how)(name) is not None
        try:
            return getattr(self._slow, how)(name, timeout=SECONDS) is not None
        except TimeoutError as error:
            raise PatternError(f"the pattern {self.text[:80]!r} takes too long to match {name[:80]!r}") from error


@lru_cache(maxsize=4096)
def compiled(text: str) -> Pattern:
    """A pattern, compiled once; PatternError where it is none."""
    return Pattern(text)


def up_to_a_dot(entry: str) -> Pattern:
    """transformers' pattern of an entry in a list of modules: the beginning of a name, up to a dot or the end."""
    return compiled(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")


def _as_python(text: str) -> str:
    """A pattern in which [[:alpha:]] is what it is to Python: a set with a bracket in it."""
    return text.replace("[[:", r"[\[:")


def _re2(text: str) -> Any:
    """The pattern for RE2; None where RE2 does not know it."""
    import re2

    if not text.isascii():
        return None
    options = re2.Options()
    options.log_errors, options.max_mem = False, _RE2_MEMORY
    try:
        return re2.compile(_as_python(text), options=options)
    except re2.error:
        return None


def user_pattern(pattern: str) -> str:
    """The pattern as it is searched for; llm-compressor's `re:` stands for a pattern from the beginning of a name."""
    written = pattern.removeprefix("re:")
    if not written:
        raise UsageError("an empty pattern matches every linear", "write '.' where that is meant")
    try:
        compiled(written)
    except PatternError as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}") from error
    return f"^(?:{written})" if pattern.startswith("re:") else pattern


def check_patterns(option: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """UsageError for a pattern that matches none of the names, most likely a typo."""
    names = list(names)
    for pattern in patterns:
        if not any(compiled(pattern).search(name) for name in names):
            raise UsageError(f"{option} {pattern!r} matches no linear of the model",
                             f"names look like {names[0]}; `lowbit inspect` lists them")  # fmt: skip


def pattern_for(names: list[str], every: list[str]) -> str:
    """A regular expression that matches exactly these names of `every`."""
    names = sorted(names)
    prefix = names[0] if len(names) == 1 else _common(names)
    rests = [name[len(prefix) :] for name in names]
    shorter = [f"^{re.escape(prefix)}$", f"^{re.escape(prefix)}"] if len(names) == 1 else [f"^{re.escape(prefix)}"]
    shorter += [_numbered(names), f"^{re.escape(prefix)}({'|'.join(map(re.escape, rests))})$"]
    for pattern in shorter:
        if {name for name in every if compiled(pattern).search(name)} == set(names):
            return pattern
    return "^(" + "|".join(map(re.escape, names)) + ")$"


def _numbered(names: list[str]) -> str:
    """The same linears of any block: numbers between dots become \\d+."""
    shapes = sorted({re.sub(r"\.\d+(?=\.)", ".#", name) for name in names})
    prefix = shapes[0] if len(shapes) == 1 else _common(shapes)
    rests = [shape[len(prefix) :] for shape in shapes]
    pattern = re.escape(prefix) + ("" if len(shapes) == 1 else f"({'|'.join(map(re.escape, rests))})")
    return f"^{pattern.replace(re.escape('#'), chr(92) + 'd+')}$"


def _common(names: list[str]) -> str:
    """The common prefix, up to a dot."""
    first, last = min(names), max(names)
    length = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[: first.rfind(".", 0, length) + 1]
