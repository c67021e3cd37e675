"""What the commands share: progress on stderr, tables on stdout, sizes in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ProgressCallback = Callable[[str, int, int], None]


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

    title_column = TextColumn("{task.description}", markup=False)
    columns = (title_column, BarColumn(), amount, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_table(table: Any) -> None:
    """A rich table on stdout, as wide as it needs to be where stdout is not a terminal."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)  # names are somebody else's text
    if not console.is_terminal:
        console = Console(width=200, markup=False, emoji=False)
    console.print(table)


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
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def say(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


def human_bytes(count: float) -> str:
    """1234567 → "1.23 MB"; decimal, as disks and hubs count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def add_to_report(output: Path, quiet: bool, **parts: Any) -> None:
    """Put parts into lowbit-report.json and report.html if quantizing wrote them, and print where."""
    from lowbit import reporting
    from lowbit.checkpoint.base import HTML_NAME, report_path

    if reporting.add_to_report(output, **parts) is not None and not quiet:
        say(f"added to {report_path(output, HTML_NAME)}")
