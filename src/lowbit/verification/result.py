"""What a verification says: one `Check` per rule, and the rules that could not be checked with the reason why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.verification.subject import Subject

_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """What a rule found. problems name the tensor, what was found and what was needed; summary is said without any."""

    problems: list[str]
    summary: str


@dataclass(frozen=True)
class Rule:
    """One thing an engine relies on.

    gate          True where nothing after it can be checked once it fails
    needs_source  True where the original weights are compared with
    needs_nearest True where it holds only for codes that were rounded to nearest
    """

    name: str
    engines: tuple[str, ...]
    summary: str
    check: Callable[[Subject], Finding] = field(repr=False)
    gate: bool = False
    needs_source: bool = False
    needs_nearest: bool = False


@dataclass(frozen=True)
class Check:
    rule: str
    passed: bool
    detail: str

    @classmethod
    def of(cls, rule: str, finding: Finding) -> Check:
        return cls(rule, not finding.problems, finding.summary if not finding.problems else shortened(finding.problems))


@dataclass(frozen=True)
class Verification:
    """engine     whose rules were applied
    checks     in the order of the rules
    unchecked  rule → why it was not checked; does not count against `ok`, except after a failed gate
    """

    engine: str
    folder: str
    checks: list[Check]
    unchecked: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


def shortened(problems: list[str]) -> str:
    """The first few problems, and how many more there are."""
    shown = "; ".join(problems[:_SHOWN])
    return shown if len(problems) <= _SHOWN else f"{shown}; and {len(problems) - _SHOWN} more"
