"""What a verification says: one `Check` per rule, and the rules that could not be checked with the reason why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lowbit.checkpoint.quantized import KINDS

PLAIN = "plain"  # a folder of 16-bit weights, without quantization_config
QUANTIZED: tuple[str, ...] = KINDS
ALL: tuple[str, ...] = (PLAIN, *KINDS)  # of folders
GGUF = "gguf"

_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """What a rule found. problems name the tensor, what was found and what was needed; summary is said without any."""

    problems: list[str]
    summary: str


@dataclass(frozen=True)
class Rule:
    """One thing an engine relies on.

    formats       quant_method of the folders that it is about, and "plain" for those that are not quantized
    follows       the place in a loader's source that it follows, or what it rests on otherwise
    gate          True where nothing after it can be checked once it fails
    limit         True where it speaks of what an engine has kernels or a loader for, not of the files: a checkpoint
                  that fails it is sound, and other engines (or cards) may run it
    needs_source  True where the original weights are compared with
    needs_nearest True where it holds only for codes that were rounded to nearest
    """

    name: str
    engines: tuple[str, ...]
    formats: tuple[str, ...]
    summary: str
    check: Callable[[Any], Finding] = field(repr=False)  # of a `Subject`, or a `GGUFSubject`
    follows: str
    gate: bool = False
    limit: bool = False
    needs_source: bool = False
    needs_nearest: bool = False


@dataclass(frozen=True)
class Check:
    """limit: as in `Rule`."""

    rule: str
    passed: bool
    detail: str
    limit: bool = False

    @classmethod
    def of(cls, rule: Rule, finding: Finding) -> Check:
        detail = finding.summary if not finding.problems else shortened(finding.problems)
        return cls(rule.name, not finding.problems, detail, rule.limit)


@dataclass(frozen=True)
class Verification:
    """engine     whose rules were applied
    checks     in the order of the rules
    unchecked  rule → why it was not checked; does not count against `ok`, except after a failed gate
    format     quant_method of the folder, "plain" for one that is not quantized, "" where that could not be told
    """

    engine: str
    folder: str
    checks: list[Check]
    unchecked: dict[str, str] = field(default_factory=dict)
    format: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def broken(self) -> list[Check]:
        """What fails because the files are wrong; the rest of `failed` the engine has no kernel or loader for."""
        return [check for check in self.failed if not check.limit]


def shortened(problems: list[str]) -> str:
    """The first few problems, and how many more there are."""
    shown = "; ".join(problems[:_SHOWN])
    return shown if len(problems) <= _SHOWN else f"{shown}; and {len(problems) - _SHOWN} more"
