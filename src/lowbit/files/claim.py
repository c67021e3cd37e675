"""One run at a time writes to an output, and what a dead run left is found again.

    .NAME.lowbit-work/    beside the output, while a run writes it
        owner.json        who: process, machine, since when; and what it has under which hidden name. Locked (flock)
        …                 finished blocks of a calibrated run (`calibrate.store`)
    .NAME.partial-…       the output while it is written
    .NAME.earlier-…       the output that --overwrite replaces, where names cannot be exchanged

The kernel drops the lock when its process ends, however it ends. So whoever gets the lock and finds a record was
preceded by a run that was killed: `Claim` puts its half-done renames back and removes its hidden files, by the names
of the record and no others. A record of another machine is believed, since a lock may not reach across a network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from lowbit.errors import OutputError
from lowbit.files.system import translated_os_errors

try:
    import fcntl
except ImportError:  # Windows: names are claimed by the rename at the end alone
    fcntl = None

WORK = ".lowbit-work"
OWNER = "owner.json"
LONGEST_NAME = 255  # bytes of a file name, on every common file system
_HIDDEN = re.compile(r"\.[^/]+\.(partial|earlier)-[0-9a-f]{8}")
_log = logging.getLogger("lowbit")


@dataclass
class Owner:
    """The record of a run.

    machine  of the boot of the kernel: container and host agree on it
    since    seconds since 1970
    output   name of the output
    partial  name of the folder that it writes into
    earlier  name of the output that it moved aside, where names cannot be exchanged
    placing  file name → inode, of the files that get their names one after the other, in this order
    """

    pid: int
    host: str
    machine: str
    since: float
    output: str = ""
    partial: str | None = None
    earlier: str | None = None
    placing: dict[str, int] = field(default_factory=dict)

    @classmethod
    def myself(cls) -> Owner:
        return cls(os.getpid(), platform.node(), _machine(), time.time())

    @property
    def is_of_this_machine(self) -> bool:
        return self.host == platform.node() or (self.machine != "" and self.machine == _machine())

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host or 'this machine'}, since {since}"


def work_folder(output: Path) -> Path:
    """The hidden folder of an output's run."""
    return hidden(Path(os.path.abspath(output)), WORK)


def hidden(output: Path, suffix: str) -> Path:
    """`.NAME` + suffix beside an output; a long NAME is cut, and told apart by a hash."""
    name = output.name
    room = LONGEST_NAME - 1 - len(suffix.encode())
    if len(name.encode()) > room:
        name = os.fsdecode(os.fsencode(name)[: room - 9]) + "-" + hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return output.with_name(f".{name}{suffix}")


def read_owner(folder: Path) -> Owner | None:
    """The record in a work folder; None if there is none, or none that a run could have made."""
    try:
        owner = Owner(**json.loads((folder / OWNER).read_bytes()[: 1 << 20]))
        plain = all(os.sep not in name and name not in ("", ".", "..") for name in owner.placing)
        known = all(name is None or _HIDDEN.fullmatch(name) for name in (owner.partial, owner.earlier))
        plain = plain and os.sep not in owner.output and isinstance(owner.placing, dict)
        time.localtime(owner.since), int(owner.pid)  # a damaged record is none
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        return None
    return owner if plain and known else None


def refuse_claimed(output: Path) -> None:
    """OutputError where another run is writing to an output right now; nothing is created."""
    folder = work_folder(output)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        descriptor = os.open(folder / OWNER, os.O_RDWR)
        try:
            _lock(descriptor, output, folder)
        finally:
            os.close(descriptor)


class Claim:
    """The claim of this run on an output."""

    def __init__(self, output: Path):
        self.output = Path(os.path.abspath(output))
        self.folder = work_folder(self.output)
        self.owner = replace(Owner.myself(), output=self.output.name)
        self._descriptor = self._take()

    def new_partial(self) -> Path:
        """A fresh hidden folder for what is written."""
        path = hidden(self.output, f".partial-{uuid.uuid4().hex[:8]}")
        self.note(partial=path.name)
        path.mkdir()
        return path

    def note(self, **fields: object) -> None:
        """Change the record, durably: before the deed that it is about."""
        for name, value in fields.items():
            setattr(self.owner, name, value)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(asdict(self.owner)).encode(), 0)
        os.fsync(self._descriptor)

    def give_up_partial(self) -> None:
        """Put half-done renames back, and remove what was written."""
        _undo(self.output, self.owner)
        with contextlib.suppress(OSError):  # of a disk that is full; what the record names is gone already
            self.note(partial=None, earlier=None, placing={})

    def release(self) -> None:
        """Drop the claim; the folder goes too unless it holds finished blocks."""
        with contextlib.suppress(OSError):
            (self.folder / OWNER).unlink()
            self.folder.rmdir()
        os.close(self._descriptor)

    def _take(self) -> int:
        if len(os.fsencode(self.output.name)) > LONGEST_NAME:
            raise OutputError(f"{self.output.name[:60]}…: a file name has at most {LONGEST_NAME} bytes",
                              "choose a shorter name with -o")  # fmt: skip
        while True:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir()
            try:
                descriptor = os.open(self.folder / OWNER, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # the run before removed its folder just now
                continue
            try:
                _lock(descriptor, self.output, self.folder)
                if not _is_still(descriptor, self.folder / OWNER):
                    raise FileNotFoundError
                earlier = read_owner(self.folder)
                if earlier is not None:
                    _undo(self.output, earlier)
                    _log.warning(
                        "%s: a run was killed here (%s); its unfinished files are removed", self.output, earlier
                    )
                self._descriptor = descriptor
                self.note()
                return descriptor
            except FileNotFoundError:
                os.close(descriptor)
            except BaseException:
                os.close(descriptor)
                raise


@contextmanager
def claimed(output: Path) -> Iterator[Claim]:
    """This run's claim on an output, dropped at the end; OutputError where another run has it."""
    with translated_os_errors(output):
        claim = Claim(output)
    try:
        yield claim
    except BaseException:
        claim.give_up_partial()
        raise
    finally:
        claim.release()


def _lock(descriptor: int, output: Path, folder: Path) -> None:
    """OutputError where another run has the lock, or may have it on another machine."""
    owner = read_owner(folder)
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{output} is being written by another run ({owner or 'which just began'})",
                              "wait for it, or choose another name with -o") from error  # fmt: skip
        except OSError:  # a file system without locks: the record is all there is
            if owner is not None and owner.is_of_this_machine and _lives(owner.pid):
                raise OutputError(f"{output} is being written by another run ({owner})",
                                  "wait for it, or choose another name with -o") from None  # fmt: skip
    if owner is not None and not owner.is_of_this_machine:
        raise OutputError(
            f"{output}: a run on another machine has claimed it ({owner})",
            f"choose another name with -o; if that run is over, remove {folder / OWNER}, and finished blocks stay",
        )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _undo(output: Path, owner: Owner) -> None:
    """Bring an output back to what it was before a run that did not end; one that the run had placed whole stays."""
    partial = None if owner.partial is None else output.with_name(owner.partial)
    if owner.placing and partial is not None and not _is_placed(output, owner):
        for name, inode in owner.placing.items():
            _put_back(output.with_name(name), partial / name, inode)
    if owner.earlier is not None:
        earlier = output.with_name(owner.earlier)
        if earlier.exists() and not output.exists():
            os.rename(earlier, output)
            _log.warning("%s: the earlier output, moved aside by a run that was killed, is back", output)
        elif earlier.exists():
            remove_tree(earlier)
    if partial is not None:
        remove_tree(partial)


def _is_placed(output: Path, owner: Owner) -> bool:
    """True if the last of the files, which readers open, has its name: then all others have theirs."""
    last, inode = list(owner.placing.items())[-1]
    return _inode(output.with_name(last)) == inode


def _put_back(place: Path, ours: Path, inode: int) -> None:
    """Undo the renames of one file: ours out of its place, an earlier one back into it."""
    aside = ours.with_name(ours.name + ".earlier")
    if _inode(place) == inode:
        if _inode(ours) is not None:  # names were exchanged
            os.replace(ours, place)
        else:
            place.unlink()
    if aside.exists() and _inode(place) is None:
        os.rename(aside, place)


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None


def remove_tree(folder: Path) -> None:
    """Remove a folder that lowbit made, as far as that goes."""
    shutil.rmtree(folder, ignore_errors=True)


def _machine() -> str:
    """The boot of this kernel; "" where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
