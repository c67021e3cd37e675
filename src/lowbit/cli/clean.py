"""`lowbit clean [FOLDER]`: what killed runs left, listed and removed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import Json


def clean(
    folder: Annotated[
        Path, typer.Argument(show_default=False, help="Where outputs were written. [default: here]")
    ] = Path(),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    json: Json = False,
) -> None:
    """List what killed runs left beside their outputs, and remove it when told."""
    from lowbit.calibrate.leftovers import find_leftovers, remove_leftover
    from lowbit.cli.console import print_json, say
    from lowbit.measure import human_bytes

    found = find_leftovers(folder)
    free = [leftover for leftover in found if leftover.in_use is None]
    if not json:
        for leftover in found:
            say(f"{leftover.path.name}  {human_bytes(leftover.bytes)}  {leftover.what}")
        if not free:
            say(f"nothing to remove in {folder.absolute()}")
    removes = bool(free) and (yes or (not json and sys.stdin is not None and sys.stdin.isatty() and _agreed(len(free))))
    removed = [leftover for leftover in free if remove_leftover(leftover)] if removes else []
    if json:
        print_json([
            {"path": str(each.path), "output": str(each.output), "bytes": each.bytes, "blocks": each.blocks,
             "in_use": each.in_use, "what": each.what, "removed": each in removed} for each in found
        ])  # fmt: skip
    elif free and not removes:
        say("nothing was removed; --yes removes what no run uses")
    for leftover in free if removes and not json else ():
        say(f"{'removed' if leftover in removed else 'kept, since something else lies in it:'} {leftover.path}")


def _agreed(count: int) -> bool:
    return typer.confirm(f"remove {'it' if count == 1 else f'these {count}'}?", err=True)
