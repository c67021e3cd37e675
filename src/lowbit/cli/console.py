"""What the commands share: progress on stderr, tables on stdout, sizes in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_table(table: Any) -> None:
    """A rich table on stdout, as wide as it needs to be where stdout is not a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


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
