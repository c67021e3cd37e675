"""All errors that a user can cause.

The command line prints `error: <message>`, a blank line and `hint: <hint>`, and exits with `exit_code`. Any other
exception is a bug of lowbit and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_LONGEST_VALUE = 60  # characters
_LONGEST_NAME = 80


def brief(value: str) -> str:
    """A value as a message shows it, cut where it is long."""
    return value if len(value) <= _LONGEST_VALUE else value[: _LONGEST_VALUE - 1] + "…"


def brief_name(name: object) -> str:
    """A name that a file states, as a message shows it: quoted, control characters as their codes, cut where it is
    long."""
    text = repr(name)
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 3] + "…"


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", count: int = 1, cutoff: float = 0.6) -> str:
    """A hint with the names nearest to one that does not exist, at most `count`; `otherwise` where none is near."""
    return meaning(difflib.get_close_matches(name, list(dict.fromkeys(known)), count, cutoff), otherwise)


def meaning(near: Sequence[str], otherwise: str = "") -> str:
    """A hint with names that may have been meant; `otherwise` where there are none."""
    return f"did you mean {' or '.join(near)}?" if near else otherwise


class LowbitError(Exception):
    """Base of the errors that the user can act on.

    message  one sentence without full stop: file, tensor, actual value, required value
    hint     one sentence: the next step; by default what usually helps with this kind of error
    """

    exit_code = 1
    usual_hint = "if it should work, please report it"

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint or self.usual_hint
        self.add_note(f"hint: {self.hint}")  # which Python prints below the message


class UsageError(LowbitError):
    """An option or argument that makes no sense: an unknown scheme, a bad regex, two options that contradict."""

    exit_code = 2
    usual_hint = "--help lists the options and what they take"


class CheckpointError(LowbitError):
    """A file that cannot be read as what it claims to be: truncated, hostile header, missing shard, absent tensor."""

    usual_hint = "get the file again from where it comes from; this copy is damaged, or not what its name says"


class UnsafeError(LowbitError):
    """Reading it would run foreign code (pickle, remote modelling code), which the user has not allowed."""


class ArchitectureError(LowbitError):
    """A model whose layout is not known."""

    usual_hint = "upgrade lowbit and transformers if the model is newer than they are, or ask for support of it"


class ShapeError(LowbitError):
    """A weight whose shape does not fit the scheme (group size, block, tensor-parallel split)."""


class NonFiniteError(LowbitError):
    """NaN or inf where a number is needed."""


class FormatError(LowbitError):
    """A scheme that the output format cannot hold."""


class OutputError(LowbitError):
    """The output cannot be written: it exists, the disk is full, no permission."""


class NoGainError(LowbitError):
    """A refined file that is no nearer to its reference than the file it started from, so it was not written."""


class VerificationError(LowbitError):
    """A checkpoint that its engine would refuse or misread."""


class EngineFailure(LowbitError):
    """An engine that lowbit started, or a server that it asked, failed or ran out of memory."""


class DependencyError(LowbitError):
    """An optional package that this command needs is not installed."""
