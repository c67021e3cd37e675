"""Stage 7: would this engine load the checkpoint, and is everything in it what it should be?

    verify(folder, source=…, engine="vllm") -> Verification

The files are opened anew and judged by the engine's rules, knowing nothing of how they were written. With the source,
decoded weights are compared with the original ones, all of them. Needs the memory of a slab of rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import LowbitError, UsageError
from lowbit.verification.result import Check, Finding, Rule, Verification

if TYPE_CHECKING:
    from lowbit.verification.survey import Progress

__all__ = ["Check", "Rule", "Verification", "rules", "verify"]


def rules() -> list[Rule]:
    """Every rule, in the order in which they are checked."""
    from lowbit.verification.table import RULES

    return list(RULES)


def verify(
    folder: str | Path,
    *,
    source: Checkpoint | None = None,
    engine: str = "vllm",
    options: OpenOptions | None = None,
    nearest: bool | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a quantized folder against the rules of an engine.

    source    the original model, open; without it nothing is said of whether the weights are the right ones
    nearest   True where codes were rounded to nearest, so that each can be checked; None: what lowbit-report.json says
    progress  called with (what, bytes done, bytes in all)

    Raises UsageError for an unknown engine or a path that is no folder; what is wrong with the files is in the result.
    """
    from lowbit.verification.subject import Subject, rounded_to_nearest
    from lowbit.verification.table import ENGINES

    if engine not in ENGINES:
        raise UsageError(f"there are no rules for engine {engine!r}", f"known engines: {', '.join(ENGINES)}")
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", "give the folder that `lowbit quantize` wrote")
    if nearest is None:
        nearest = rounded_to_nearest(folder)
    subject = Subject(folder, engine, source, nearest, options or OpenOptions(), progress)
    try:
        return _checked(subject)
    finally:
        subject.close()


def _checked(subject) -> Verification:
    checks: list[Check] = []
    unchecked: dict[str, str] = {}
    failed_gate = ""
    for rule in rules():
        if subject.engine not in rule.engines:
            continue
        reason = failed_gate or _why_not(rule, subject)
        if reason:
            unchecked[rule.name] = reason
            continue
        checks.append(_check(rule, subject))
        if rule.gate and not checks[-1].passed:
            failed_gate = f"the rule {rule.name!r} failed"
    return Verification(subject.engine, str(subject.folder), checks, unchecked)


def _check(rule: Rule, subject) -> Check:
    try:
        finding = rule.check(subject)
    except LowbitError as error:
        finding = Finding([str(error)], "")
    return Check.of(rule.name, finding)


def _why_not(rule: Rule, subject) -> str:
    if rule.needs_source and subject.source is None:
        return "no source was given to compare with"
    if rule.needs_nearest and not subject.nearest:
        return "nothing says that the codes were rounded to nearest"
    return ""
