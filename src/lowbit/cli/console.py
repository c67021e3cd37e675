"""What the commands share: progress and messages on stderr, tables on stdout, sizes in words.

Everything goes through `plain`, and rich markup is off, so that a name is shown and not obeyed.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.plain import one_line, plain, plain_table
from lowbit.errors import UsageError
from lowbit.files.regular import open_regular

if TYPE_CHECKING:
    from lowbit.report.schema import Report

ProgressCallback = Callable[[str, int, int], None]
HEARTBEAT = 60.0  # seconds between two lines of progress where nobody sees a bar
SOON = 5.0  # seconds into a stage before which nothing is foretold
_LOG_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
_log = logging.getLogger("lowbit")


def start_logging(verbose: bool, log_file: Path | None) -> None:
    """Messages of a run to stderr: warnings, and with `verbose` all; and all of them, with times, to a file.

    UsageError where the file cannot be appended to, or is no log.
    """
    _log.handlers, _log.propagate = [], False
    _log.setLevel(logging.INFO)
    handlers: list[tuple[logging.Handler, str, int]] = [
        (logging.StreamHandler(), "%(message)s", logging.INFO if verbose else logging.WARNING)
    ]
    if log_file is not None:
        handlers.append((_opened_log(log_file), "%(asctime)s %(message)s", logging.INFO))
    for handler, form, level in handlers:
        handler.setFormatter(_PlainFormatter(form, "%Y-%m-%d %H:%M:%S"))
        handler.setLevel(level)
        _log.addHandler(handler)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def _opened_log(path: Path) -> logging.Handler:
    try:
        if path.exists():
            with open_regular(path) as file:
                begin = file.read(20)
            if begin and not _LOG_LINE.match(begin):
                raise UsageError(f"{path} is no log of lowbit", "name another file with --log-file")
        return logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}", "name another file with --log-file") from error


@contextmanager
def byte_progress(title: str, quiet: bool = False) -> Iterator[ProgressCallback]:
    """A bar on stderr with the time left, fed with (what, bytes done, bytes in all)."""
    from rich.progress import DownloadColumn

    with _bar(title, DownloadColumn(), quiet) as update:
        yield lambda what, done, total: update(done, total)


@contextmanager
def window_progress(title: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with the time left, fed with (windows done, windows in all); it starts while models load."""
    from rich.progress import MofNCompleteColumn

    with _bar(title, MofNCompleteColumn(), quiet) as update:
        yield update


@contextmanager
def _bar(title: str, amount: Any, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    console = Console(stderr=True, markup=False, emoji=False)
    seen = console.is_terminal and not quiet
    heartbeat = _Heartbeat(one_line(title), logging.INFO if seen or quiet else logging.WARNING)
    with Progress(*columns, console=console, transient=True, disable=not seen) as bar:
        task = bar.add_task(one_line(title), total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            heartbeat.tell(done, total)

        yield update


class _Heartbeat:
    """A line a minute about a long run: on stderr where it is no terminal, and in the log. A total that changes is the
    next stage, whose time is counted anew: steps of a distillation say nothing of blocks."""

    def __init__(self, title: str, level: int):
        self.title, self.level = title, level
        self.began = self.last = time.monotonic()
        self.total: int | None = None

    def tell(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.total not in (None, total):
            self.began = now
        self.total = total
        if now - self.last < HEARTBEAT or not total:
            return
        self.last, spent = now, now - self.began
        known = total <= 100 * done < 100 * total and spent >= SOON
        left = f", about {_duration(spent * (total - done) / done)} left" if known else ""
        _log.log(self.level, "%s: %.0f %%, %s%s", self.title, 100 * done / total, _duration(spent), left)


def _duration(seconds: float) -> str:
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def print_table(table: Any) -> None:
    """A rich table on stdout, as wide as it needs to be where stdout is not a terminal."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(width=200, markup=False, emoji=False, highlight=False)
    console.print(plain_table(table))


def name_table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Any:
    """An empty rich table of tensors: names in the first column are never cut or folded, so that they can be copied."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("tensor", no_wrap=True)
    for column in (*left, *right):
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    return table


def print_json(value: Any) -> None:
    """JSON on stdout; what a terminal might obey is escaped, as JSON escapes it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not text.isprintable():
        text = re.sub(r"[^\n]", lambda char: json.dumps(char[0])[1:-1] if plain(char[0]) != char[0] else char[0], text)
    sys.stdout.write(text + "\n")


def say(message: str) -> None:
    """A line on stderr."""
    print(plain(message), file=sys.stderr, flush=True)


def say_how_to_serve(report: Report, label: str = "serve it:") -> None:
    """The command that serves what was written, where there is one, below an empty line."""
    say("\n" + (f"{label} {report.serve[0].command}" if report.serve else "nothing serves it: there is no tokenizer"))


def echo(message: str = "", end: str = "\n") -> None:
    """A line on stdout."""
    print(plain(message), end=end, flush=not end)


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def add_to_report(output: Path, quiet: bool, **parts: Any) -> None:
    """Put parts into lowbit-report.json and report.html if quantizing wrote them, and print where."""
    from lowbit import reporting
    from lowbit.checkpoint.base import HTML_NAME, report_path

    if reporting.add_to_report(output, **parts) is not None and not quiet:
        say(f"added to {report_path(output, HTML_NAME)}")
