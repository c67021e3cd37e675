"""What runs that were killed left beside their outputs: found by its names, and removed where no run lives.

.NAME.lowbit-work        record of a run, and its finished blocks, which --resume would go on from
.NAME.partial-01234567   an output that was not finished
.NAME.earlier-01234567   an output that was being replaced; it gets its name back where that is free
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lowbit.calibrate.store import STORED
from lowbit.errors import LowbitError, UsageError
from lowbit.files.claim import OWNER, WORK, Claim, Owner, hidden, read_owner, refuse_claimed, remove_tree

_HIDDEN = re.compile(r"\.(?P<name>.+)(?P<kind>\.lowbit-work|\.partial-[0-9a-f]{8}|\.earlier-[0-9a-f]{8})", re.DOTALL)


@dataclass(frozen=True)
class Leftover:
    """One hidden folder.

    output  that it belongs to
    owner   the record of the run; None without one: a run of lowbit 0.1, or one that ended in order
    blocks  finished blocks in it
    in_use  why it must stay; None where no run lives
    others  names in it that are not lowbit's, which stay
    """

    path: Path
    output: Path
    bytes: int
    owner: Owner | None = None
    blocks: int = 0
    in_use: str | None = None
    others: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """One line for the user."""
        if self.in_use is not None:
            return self.in_use
        if self.path.name.endswith(WORK):
            blocks = f"{self.blocks} finished blocks, which --resume would go on from" if self.blocks else "a record"
            if not self.blocks and (self.path / "learning.safetensors").exists():
                blocks = "the state of a training, which --resume would go on from"
            if self.others and not self.owner and len(os.listdir(self.path)) == len(self.others):
                blocks = "nothing of lowbit's"
            kept = f"; what lowbit did not write stays: {', '.join(self.others)}" if self.others else ""
            return f"{blocks}; left by {self.owner}{kept}" if self.owner else f"{blocks}{kept}"
        return "an output that was being replaced" if ".earlier-" in self.path.name else "an unfinished output"


def find_leftovers(folder: Path) -> list[Leftover]:
    """The hidden folders of runs in a folder, by name; UsageError where it is none."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder", "give the folder that outputs were written to")
    found = []
    for path in sorted(folder.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        work = path if match["kind"] == WORK else hidden(folder / match["name"], WORK)
        owner = read_owner(work)
        output = folder / match["name"]
        if owner is not None and owner.output and hidden(folder / owner.output, WORK) == work:
            output = folder / owner.output  # a long name, which is cut in hidden ones
        try:
            refuse_claimed(output)
            in_use = None
        except LowbitError as error:
            in_use = str(error)
        blocks = len(list(path.glob("block-*.safetensors")))
        others = _not_stored(path) if match["kind"] == WORK else ()
        found.append(Leftover(path, output, _size(path), owner, blocks, in_use, others))
    return found


def remove_leftover(leftover: Leftover) -> bool:
    """Remove it, as far as lowbit wrote it; False where it stays: a run lives, or something else lies in it."""
    if leftover.in_use is not None:
        return False
    claim = Claim(leftover.output)  # puts half-done renames back
    try:
        if leftover.path.name.endswith(WORK):
            for path in leftover.path.iterdir():
                if STORED.fullmatch(path.name):
                    path.unlink()
        elif ".earlier-" in leftover.path.name and leftover.path.exists() and not os.path.lexists(leftover.output):
            os.rename(leftover.path, leftover.output)
        else:
            remove_tree(leftover.path)
    finally:
        claim.release()
    return not leftover.path.exists()


def _not_stored(work: Path) -> tuple[str, ...]:
    """Names in a folder of finished blocks that no run puts there."""
    return tuple(sorted(path.name for path in work.iterdir() if path.name != OWNER and not STORED.fullmatch(path.name)))


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.name != OWNER)
