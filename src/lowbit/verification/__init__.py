"""Verification: does the engine load the checkpoint, and are its weights right?

    verify(folder, reference="model", engine="vllm") -> Verification

The files are opened again and checked by the engine's rules, without knowledge of how they were written. Given the
source, all decoded weights are compared with it. Memory: one slab of rows per thread. The rules on files, architecture
and tensors apply to unquantized folders too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.checkpoint.base import Checkpoint, OpenOptions, first_part, is_gguf, read_json_object
from lowbit.checkpoint.opening import find_gguf
from lowbit.checkpoint.quantized import usual_name
from lowbit.errors import LowbitError, UsageError
from lowbit.registry import ENGINES, FORMATS, load
from lowbit.verification.result import (
    ALL,
    GGUF,
    GGUF_FILES,
    QUANTIZED,
    Check,
    Finding,
    Rule,
    Verification,
    loading_of,
    shortened,
)

if TYPE_CHECKING:
    from lowbit.verification.subject import Verified
    from lowbit.verification.survey import Progress

__all__ = ["Check", "Finding", "Rule", "Verification", "rules", "verify"]


def rules(engine: str | None = None, format: str | None = None) -> dict[Rule, tuple[str, ...]]:
    """Every rule (of an engine, of a format) → the engines that have it, in checking order.

    Raises UsageError for an unknown engine or format.
    """
    from lowbit.verification.table import all_rules

    if engine is not None and engine not in ENGINES:
        raise UsageError(f"there are no rules for engine {engine!r}", f"known engines: {', '.join(ENGINES)}")
    if format is not None and format not in (*ALL, *GGUF_FILES):
        raise UsageError(
            f"there are no rules for format {format!r}", f"known formats: {', '.join((*ALL, *GGUF_FILES))}"
        )
    return {
        rule: engines
        for rule, engines in all_rules().items()
        if (engine is None or engine in engines) and (format is None or format in rule.formats)
    }


def verify(
    folder: str | Path,
    *,
    reference: str | Path | None = None,
    source: Checkpoint | None = None,
    engine: str | None = None,
    options: OpenOptions | None = None,
    nearest: bool | None = None,
    errors: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a folder, or a GGUF file (or the folder of one), against the rules of an engine.

    engine    None: vllm for folders, one that loads the format where vllm does not, llama.cpp for GGUF files
    reference the original model, quantized or not; without it weights are not compared
    source    the same, open; for GGUF files also a raw GGUF
    nearest   True where every code must be the nearest one; None: as lowbit-report.json states
    errors    tensor → ‖W − Ŵ‖² / ‖W‖² that rounding left, which may be more than its bits alone allow: at 2 bits error
              feedback moves weights far. None: as lowbit-report.json states
    progress  called with (name, bytes done, bytes in all)

    Raises UsageError for an unknown engine or a path that is no folder; problems of the files are in the result.
    """
    from lowbit.verification.subject import Subject, rewritten_by, rounded_to_nearest

    if reference is not None:
        if source is not None:
            raise UsageError("reference and source name the same model", "give one of them")
        from lowbit.checkpoint import open_checkpoint

        with contextlib.closing(open_checkpoint(reference, options or OpenOptions())) as opened:
            return verify(
                folder, source=opened, engine=engine, options=options, nearest=nearest, errors=errors, progress=progress
            )  # fmt: skip
    folder, options = _place_of(Path(folder)), options or OpenOptions()
    engine = engine or default_engine(folder)
    rules(engine)
    reads_gguf = loading_of(engine).reads_gguf
    if is_gguf(folder) != reads_gguf:
        gguf = ", ".join(name for name in ENGINES if loading_of(name).reads_gguf)
        raise UsageError(f"{folder}: {engine} does not load this kind of model",
                         f"{gguf} loads .gguf files, the other engines folders")  # fmt: skip
    if nearest is None:
        nearest = rounded_to_nearest(folder, source, options)
    given = {"folder": folder, "engine": engine, "source": source, "nearest": nearest, "progress": progress,
             "errors": errors}  # fmt: skip
    if reads_gguf:
        if not folder.is_file():
            raise UsageError(f"{folder}: there is no such file", "give a GGUF file; of a split one, its first part")
        return _checked(load(FORMATS[GGUF].inspect or "")(**given), rewritten_by(folder))
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", "give the folder that `lowbit quantize` wrote")
    return _checked(Subject(**given, options=options), rewritten_by(folder))


def _place_of(path: Path) -> Path:
    """What a path stands for: of a split GGUF file its first part, of a folder that holds one GGUF model that file."""
    path = first_part(path)
    return (find_gguf(path) or path) if path.is_dir() else path


def default_engine(path: Path) -> str:
    """The engine of the files' format where it has a loader for them, else the first of the table that has."""
    path = _place_of(path)
    stated = _stated_format(path)
    row = FORMATS.get(usual_name(stated)) or FORMATS.get(stated.replace("_", "-"))
    for name in (*(() if row is None else (row.engine,)), *ENGINES):
        loading = loading_of(name)
        if loading.reads_gguf == is_gguf(path) and (row is None or row.name not in loading.no_loader):
            return name
    return next(name for name in ENGINES if loading_of(name).reads_gguf == is_gguf(path))


def _stated_format(folder: Path) -> str:
    """config.json's quant_method, as far as there is one to read; what is wrong with it, rules say."""
    try:
        stated = read_json_object(folder / "config.json").get("quantization_config")
    except (LowbitError, OSError):
        return ""
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    return method if isinstance(method, str) else ""


def _checked(subject: Verified, rewritten: str) -> Verification:
    """Check the engine's rules for the format; for an unknown format, the rules for all quantized formats.

    rewritten  what changed weights beside rounding, whose weights are not the source's; "" for nothing
    """
    checks: list[Check] = []
    unchecked: dict[str, str] = {}
    failed_gate = ""
    known = subject.known_format
    try:
        for rule in rules(subject.engine):
            if not (set(QUANTIZED) <= set(rule.formats) if known is None else known in rule.formats):
                continue
            reason = failed_gate
            if rule.needs_source and subject.source is None:
                reason = reason or "no source was given to compare with"
            elif rule.compares_weights and rewritten:
                reason = reason or f"{rewritten} rewrote weights, which are not the source's any more"
            elif rule.needs_nearest and not subject.nearest:
                reason = reason or "nothing says that all codes were rounded to nearest, from this source"
            elif rule.needs_checksums and not subject.checksums:
                reason = reason or "no report with checksums lies beside it"
            if reason:
                unchecked[rule.name] = reason
                continue
            try:
                finding = rule.check(subject)
            except LowbitError as error:
                finding = Finding([str(error)], "")
            detail = shortened(finding.problems) if finding.problems else finding.summary
            checks.append(
                Check(
                    rule=rule.name, passed=not finding.problems, detail=detail, limit=rule.limit, outcome=rule.outcome
                )
            )
            if rule.gate and finding.problems:
                failed_gate = f"the rule {rule.name!r} failed"
    finally:
        subject.close()
    return Verification(
        ok=bool(checks) and all(check.passed for check in checks), engine=subject.engine, checks=tuple(checks),
        folder=str(subject.folder), unchecked=unchecked, format=known or "",
    )  # fmt: skip
