"""Files of the user's own rules, which tensor becomes which type: `--tensor-type-file`.

    # a comment
    attn_v = Q6_K
    blk\\.(0|1|31)\\.ffn_down = Q8_0

One rule a line, a regex that is searched in the name as that of `--override` is, and a ggml type. Files of
llama-quantize's option of that name are read too: rules without spaces in them, separated by spaces or newlines. The
first rule that matches a tensor decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import UsageError
from lowbit.files.regular import open_regular
from lowbit.formats.gguf.stored_types import asked_type
from lowbit.patterns import PatternError, compiled

_BYTES = 1 << 20
_RULES = 20_000
_HINT = "one rule a line: attn_v = Q6_K"


@dataclass(frozen=True)
class TypeRules:
    """The rules of a file, (regex, ggml type), in their order. path  as it was given"""

    path: str
    rules: tuple[tuple[str, str], ...]


def read_type_rules(path: str) -> TypeRules:
    """UsageError where the file cannot be read, or a line holds no rule or one whose regex is none."""
    try:
        with open_regular(Path(path)) as file:
            content = file.read(_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such file", "its rules are lines: attn_v = Q6_K") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a file of types: {error}", _HINT) from error
    if len(content) > _BYTES:
        raise UsageError(f"{path}: a file of types has at most {_BYTES} bytes", _HINT)
    rules: list[tuple[str, str]] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line.startswith("#"):
            continue
        spaced = re.fullmatch(r"(\S+)\s*=\s*([^\s=]+)", line)
        for pattern, equals, name in [(spaced[1], "=", spaced[2])] if spaced else map(_split, line.split()):
            if not (pattern and equals and name):
                raise UsageError(f"{path}, line {number}: {line[:80]!r} is no rule", _HINT)
            try:
                compiled(pattern)
                rules.append((pattern, asked_type(name).name))
            except PatternError as error:
                raise UsageError(
                    f"{path}, line {number}: {pattern[:80]!r} is not a regular expression: {error}", _HINT
                ) from error
            except UsageError as error:
                raise UsageError(f"{path}, line {number}: {error}", error.hint) from error
    if not rules:
        raise UsageError(f"{path}: there is no rule in it", _HINT)
    if len(rules) > _RULES:
        raise UsageError(f"{path}: {len(rules)} rules; at most {_RULES} are read", "write patterns that match more")
    return TypeRules(path, tuple(rules))


def _split(word: str) -> tuple[str, str, str]:
    return word.rpartition("=")
