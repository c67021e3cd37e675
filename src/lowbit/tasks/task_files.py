"""Task files of lm-eval, which are programs of their authors: looked at before lm-eval reads them, bounded as they run.

    !function utils.f     Python beside the file, or any module: with --trust-remote-code alone
    include, aliases      what is included is looked at too; NODES values at most, those of an alias wherever it stands
    data_files            a path of this machine is a regular file: a pipe would be waited for
    {{ templates }}       in Jinja's sandbox, with the bounds of a chat template
    regex_pattern         at most SECONDS for one answer, where Python's `re` may take exponential time
    repeats and the like  no more than MOST

Refused as UsageError: what the file may not do; as CheckpointError and PatternError: what takes too long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit.errors import UsageError
from lowbit.files.regular import read_regular
from lowbit.patterns import PatternError
from lowbit.text.template_limits import bounded_template

NODES = 100_000  # of a file with all that it includes
SECONDS = 1.0
# Of fields that multiply the work, or the memory, by what they say.
MOST = {"repeats": 1000, "num_fewshot": 1000, "max_gen_toks": 1 << 17, "max_new_tokens": 1 << 17, "max_length": 1 << 20}
_LARGEST = 4 << 20  # bytes of a file
_DEEPEST = 100  # of values inside of one another


def check_task_file(path: Path, trust_remote_code: bool) -> None:
    """UsageError for a file that runs Python which nobody trusted, grows beyond bounds, or waits for a pipe."""
    seen: dict[Path, int] = {}
    _check(path, trust_remote_code, seen)
    if sum(seen.values()) > NODES:
        raise UsageError(f"{path}: it and what it includes have more than {NODES:,} values", "write a shorter task")


def _check(path: Path, trusted: bool, seen: dict[Path, int]) -> None:
    if path.resolve() in seen:
        return
    seen[path.resolve()] = 0
    root = _parsed(path)
    seen[path.resolve()] = _size(root, path, {}, 0)
    for node in _nodes(root, set()):
        called = node.tag.startswith(("!function", "tag:yaml.org,2002:python/"))
        if called and (not trusted or not node.tag.startswith("!function")):
            hint = "add --trust-remote-code, if you trust who wrote it" if node.tag.startswith("!function") else (
                "write plain values")  # fmt: skip
            what = f"{node.tag} {node.value[:60]}" if isinstance(node.value, str) else node.tag
            raise UsageError(f"{path}: it runs Python of its own ({what})", hint)
        for key, value in node.value if node.id == "mapping" else []:
            most = MOST.get(key.value) if key.id == value.id == "scalar" else None
            if most is not None and value.value.isdecimal() and int(value.value[:20]) > most:
                raise UsageError(f"{path}: {key.value} is {value.value[:40]}; at most {most:,} are run", "give less")
    for key, value in getattr(root, "value", []) if root.id == "mapping" else []:
        if key.value == "include":
            for each in (node for node in [value, *_children(value)] if node.id == "scalar"):
                _check(path.parent / Path(str(each.value)).expanduser(), trusted, seen)
        elif key.value in ("dataset_kwargs", "data_files"):
            _check_data(value, path)


def _parsed(path: Path) -> Any:
    """The nodes of a YAML file: nothing is constructed."""
    import yaml

    try:
        text = read_regular(path)
        if len(text) > _LARGEST:
            raise UsageError(f"{path}: {len(text)} bytes; at most {_LARGEST} are read", "write a shorter task")
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}",
                         "give the path of a task's YAML, and all that it includes") from None  # fmt: skip
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{path}: lm-eval cannot load this task: {str(error)[:300]}", "write it as YAML") from None
    if root is None or root.id != "mapping":
        raise UsageError(f"{path}: lm-eval cannot load this task: it holds no mapping", "begin with task: NAME")
    return root


def _size(node: Any, path: Path, known: dict[int, int], depth: int) -> int:
    """Values of a node, those of an alias counted wherever it stands; UsageError for one inside of itself."""
    if id(node) not in known:
        if depth > _DEEPEST:
            raise UsageError(f"{path}: values lie inside of one another more than {_DEEPEST} times, or in themselves",
                             "write a flat task")  # fmt: skip
        known[id(node)] = 1 + sum(_size(each, path, known, depth + 1) for each in _children(node))
    return known[id(node)]


def _nodes(node: Any, seen: set[int]) -> Iterator[Any]:
    if id(node) not in seen:
        seen.add(id(node))
        yield node
        for each in _children(node):
            yield from _nodes(each, seen)


def _children(node: Any) -> list[Any]:
    if node.id == "mapping":
        return [each for pair in node.value for each in pair]
    return node.value if node.id == "sequence" else []


def _check_data(value: Any, path: Path) -> None:
    for node in _nodes(value, set()):
        named = Path(str(node.value)).expanduser() if node.id == "scalar" and len(str(node.value)) < 4096 else None
        if named is not None and named.exists() and not (named.is_file() or named.is_dir()):
            raise UsageError(f"{path}: {named} is no regular file", "name a file of data")


@contextmanager
def bounded_tasks(files: tuple[str, ...]) -> Iterator[None]:
    """Inside, lm-eval renders templates in a sandbox, and neither they nor patterns of answers run on and on.

    files  of tasks; without any, lm-eval's own tasks are run as it runs them
    """
    if not files:
        yield
        return
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils  # type: ignore[import-not-found]
    from lm_eval.filters import extraction  # type: ignore[import-not-found]

    sandbox = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= utils.env.filters | {"regex_replace": _replaced}

    def apply_template(template: str, doc: dict[str, Any]) -> str:
        with bounded_template(", ".join(files), "a template", "one item", "write it without such loops"):
            return sandbox.from_string(template).render(**doc)

    before = utils.apply_template, extraction.re
    utils.apply_template, extraction.re = apply_template, _TimedRe()
    try:
        yield
    finally:
        utils.apply_template, extraction.re = before


def _replaced(text: str, pattern: str, repl: str, count: int = 0) -> str:
    return _Timed(pattern).sub(repl, text, count=count)


class _TimedRe:
    """Stands for the module `re` in lm-eval's filters."""

    escape = staticmethod(re.escape)

    def compile(self, pattern: str, flags: int = 0) -> _Timed:
        return _Timed(pattern, flags)

    def findall(self, pattern: str, text: str) -> list[Any]:
        return _Timed(pattern).findall(text)

    def sub(self, pattern: str, repl: str, text: str) -> str:
        return _Timed(pattern).sub(repl, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(re, name)


class _Timed:
    """A pattern whose matching ends: PatternError after SECONDS."""

    def __init__(self, pattern: str, flags: int = 0):
        import regex

        re.compile(pattern, flags)  # what Python refuses is refused in its words
        self.pattern, self._compiled = pattern, regex.compile(pattern, flags)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._compiled, name)

        def timed(*arguments: Any, **more: Any) -> Any:
            try:
                return method(*arguments, timeout=SECONDS, **more)
            except TimeoutError:
                raise PatternError(
                    f"the pattern {self.pattern[:80]!r} takes too long to match what the model wrote"
                ) from None

        return timed
