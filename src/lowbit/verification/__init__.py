"""Stage 7: would this engine load the checkpoint, and is everything in it what it should be?

    verify(folder, source=…, engine="vllm") -> Verification

The files are opened anew and judged by the engine's rules, knowing nothing of how they were written. With the source,
decoded weights are compared with the original ones, all of them. Needs the memory of a slab of rows. A folder that is
not quantized is verified too: the rules on files, architecture and tensors apply to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import LowbitError, UsageError
from lowbit.verification.result import ALL, GGUF, QUANTIZED, Check, Finding, Rule, Verification

if TYPE_CHECKING:
    from lowbit.checkpoint.gguf_raw import RawGGUF
    from lowbit.verification.gguf_subject import GGUFSubject
    from lowbit.verification.subject import Subject
    from lowbit.verification.survey import Progress

__all__ = ["Check", "Finding", "Rule", "Verification", "rules", "verify"]


def rules(engine: str | None = None, format: str | None = None) -> list[Rule]:
    """Every rule (of an engine, of a format), in the order in which they are checked.

    Raises UsageError for an engine without rules and a format that nothing reads.
    """
    from lowbit.verification.table import ALL_ENGINES, RULES

    if engine is not None and engine not in ALL_ENGINES:
        raise UsageError(f"there are no rules for engine {engine!r}", f"known engines: {', '.join(ALL_ENGINES)}")
    if format is not None and format not in (*ALL, GGUF):
        raise UsageError(f"there are no rules for format {format!r}", f"known formats: {', '.join((*ALL, GGUF))}")
    return [
        rule
        for rule in RULES
        if (engine is None or engine in rule.engines) and (format is None or format in rule.formats)
    ]


def verify(
    folder: str | Path,
    *,
    source: Checkpoint | RawGGUF | None = None,
    engine: str | None = None,
    options: OpenOptions | None = None,
    nearest: bool | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a folder, or a GGUF file, against the rules of an engine.

    engine    None: vllm for folders, llama.cpp for GGUF files
    source    the original model, open, quantized or not; without it nothing is said of whether the weights are right
    nearest   True where codes were rounded to nearest, so that each can be checked; None: what lowbit-report.json says
    progress  called with (what, bytes done, bytes in all)

    Raises UsageError for an unknown engine or a path that is no folder; what is wrong with the files is in the result.
    """
    from lowbit.checkpoint.gguf_raw import RawGGUF
    from lowbit.verification.subject import Subject, rounded_to_nearest

    folder = Path(folder)
    engine = engine or default_engine(folder)
    rules(engine)
    if (folder.suffix == ".gguf") != (engine == "llama.cpp"):
        raise UsageError(f"{folder}: {engine} does not load this kind of model",
                         "llama.cpp loads .gguf files, the other engines folders")  # fmt: skip
    if engine == "llama.cpp":
        return _verify_gguf(folder, source, progress)
    if isinstance(source, RawGGUF):
        raise AssertionError("a folder is compared with a checkpoint")
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", "give the folder that `lowbit quantize` wrote")
    if nearest is None:
        nearest = rounded_to_nearest(folder)
    subject = Subject(folder, engine, source, nearest, options or OpenOptions(), progress)
    try:
        return _checked(subject)
    finally:
        subject.close()


def default_engine(path: Path) -> str:
    """Whose rules a model is checked against when none are named."""
    return "llama.cpp" if path.suffix == ".gguf" else "vllm"


def _verify_gguf(path: Path, source: Checkpoint | RawGGUF | None, progress: Progress | None) -> Verification:
    from lowbit.verification.gguf_subject import GGUFSubject

    if not path.is_file():
        raise UsageError(f"{path}: there is no such file", "give a GGUF file; of a split one, its first part")
    subject = GGUFSubject(path, "llama.cpp", source, progress)
    try:
        return _checked(subject)
    finally:
        subject.close()


def _checked(subject: Subject | GGUFSubject) -> Verification:
    checks: list[Check] = []
    unchecked: dict[str, str] = {}
    failed_gate = ""
    for rule in rules(subject.engine):
        if not _applies(rule, subject):
            continue
        reason = failed_gate or _why_not(rule, subject)
        if reason:
            unchecked[rule.name] = reason
            continue
        checks.append(_check(rule, subject))
        if rule.gate and not checks[-1].passed:
            failed_gate = f"the rule {rule.name!r} failed"
    return Verification(subject.engine, str(subject.folder), checks, unchecked, subject.known_format or "")


def _applies(rule: Rule, subject: Subject | GGUFSubject) -> bool:
    """True where a rule is about the folder's format; where that is not known, about every format."""
    if subject.known_format is None:
        return set(QUANTIZED) <= set(rule.formats)
    return subject.known_format in rule.formats


def _check(rule: Rule, subject: Subject | GGUFSubject) -> Check:
    try:
        finding = rule.check(subject)
    except LowbitError as error:
        finding = Finding([str(error)], "")
    return Check.of(rule, finding)


def _why_not(rule: Rule, subject: Subject | GGUFSubject) -> str:
    if rule.needs_source and subject.source is None:
        return "no source was given to compare with"
    if rule.needs_nearest and not subject.nearest:
        return "nothing says that the codes were rounded to nearest"
    return ""
