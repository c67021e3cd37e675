"""`compare`: several quantized models of one source, measured on the same text and put on one page.

Each is evaluated by `lowbit.evaluate`. Figures come from a model's report, and are marked so, if it measured them the
same way: same text (SHA-256), reference (fingerprint of its weights), protocol, windows, tokens per window, dtype, and
files of the same size. Refused: fewer than two models, and one model twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions, report_path
from lowbit.errors import UsageError
from lowbit.evaluation import Evaluation, evaluate
from lowbit.evaluation.footprint import file_bytes, fingerprint
from lowbit.report import schema
from lowbit.report.compared import Compared, Comparison
from lowbit.reporting import add_to_report
from lowbit.text import Protocol, read_text

# (which model, windows done, windows in all)
Progress = Callable[[str, int, int], None]


def compare(
    models: Sequence[str | Path],
    reference: str | Path | None = None,
    text: str | Path | None = None,
    *,
    windows: int = 40,
    window_tokens: int = 512,
    protocol: Protocol = "full",
    bos: bool | Literal["auto"] = "auto",
    samples: int = 3,
    fresh: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_memory: int | None = None,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure every model against the reference on the same text.

    reference  the unquantized model; by default the source that the first model's report names
    samples    packaged prompts that source and model answer, see `lowbit.evaluate`
    fresh      measure all anew, whatever their reports say

    The other parameters are those of `lowbit.evaluate`. Raises LowbitError.
    """
    if len(models) < 2:
        raise UsageError("one model alone cannot be compared" if models else "no model was named", "name two or more")
    options = options or OpenOptions()
    paths = [str(model) for model in models]
    _refuse_twice(paths)
    reports = [_report(path) for path in paths]
    source = str(reference)
    if reference is None:
        named_source = _named_source(reports[0], paths[0])
        source, options = named_source.model, replace(options, adapter=named_source.adapter)
    wanted = {
        "reference_sha256": _fingerprint(source, options),
        "text": read_text(text).sha256,
        "protocol": protocol,
        "windows_asked": windows,
        "window_tokens": window_tokens,
        "dtype": str(dtype).removeprefix("torch."),
    }
    found: list[Compared] = []
    for path, report in zip(paths, reports, strict=True):
        known = () if fresh or report is None else _known(report, path, wanted, bos, samples, options)
        if known:
            found.append(Compared(path, path, known, "report", report))
            continue
        measured = evaluate(
            path, source, text, windows=windows, window_tokens=window_tokens, protocol=protocol, bos=bos,
            samples=samples, dtype=dtype, device=device, max_memory=max_memory, options=options,
            progress=None if progress is None else lambda done, total, path=path: progress(path, done, total),
        )  # fmt: skip
        found.append(Compared(path, path, tuple(measured), "measured", report))
    return Comparison(source, named(found))


def _refuse_twice(paths: Sequence[str]) -> None:
    """UsageError for one model under two spellings: it would be measured twice, and be told apart by nothing."""
    places = [Path(path).resolve() if Path(path).exists() else path for path in paths]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UsageError(f"{paths[index]} was given twice", "name every model once")


def add_to_reports(comparison: Comparison) -> list[Path]:
    """Put new figures, and what the others weigh and cost, into the reports of the models; the pages written.

    In a report's list of neighbours a model that was measured replaces the planned one of its name or scheme.
    """
    written = []
    for model in comparison.models:
        if model.report is None:
            continue
        others = tuple(other.neighbour() for other in comparison.models if other is not model)
        measured = {other.scheme for other in others} | {other.label for other in others}
        planned = tuple(
            each for each in model.report.neighbours if each.origin == "plan" and each.scheme not in measured
        )
        add_to_report(Path(model.path), neighbours=(*others, *planned), evaluation=model.evaluations)
        written.append(Path(model.path))
    return written


def named(models: Sequence[Compared]) -> tuple[Compared, ...]:
    """With labels as short as they can be told apart by: scheme, then the method, then the format, then the path."""
    labels = [model.scheme if model.scheme != "16 bits" else Path(model.path).name or model.path for model in models]
    for more in (_method, _format, lambda model: Path(model.path).name, lambda model: model.path):
        count = Counter(labels)
        labels = [
            f"{label} {more(model)}".strip() if count[label] > 1 else label
            for label, model in zip(labels, models, strict=True)
        ]
    if len(set(labels)) < len(labels):
        twice = next(model.path for model, label in zip(models, labels, strict=True) if labels.count(label) > 1)
        raise UsageError(f"{twice} was given twice", "name every model once")
    return tuple(replace(model, label=label) for model, label in zip(models, labels, strict=True))


def _method(model: Compared) -> str:
    return "" if model.report is None else model.report.settings.method


def _format(model: Compared) -> str:
    return "" if model.report is None else model.report.output.format


def _report(path: str) -> schema.Report | None:
    """The report beside the weights; None if there is none."""
    beside = report_path(Path(path))
    return schema.load(beside) if beside.is_file() else None


def _named_source(report: schema.Report | None, path: str) -> schema.ReportSource:
    if report is None:
        raise UsageError(f"{path} has no report that names its source",
                         f"give --reference MODEL, or --reference {path} if that is the unquantized one")  # fmt: skip
    return report.source


def _fingerprint(source: str, options: OpenOptions) -> str:
    checkpoint = open_checkpoint(source, replace(options, revision=None))
    try:
        return fingerprint(checkpoint)
    finally:
        checkpoint.close()


def _known(
    report: schema.Report, path: str, wanted: dict[str, Any], bos: bool | Literal["auto"], samples: int,
    options: OpenOptions,
) -> tuple[Evaluation, ...]:  # fmt: skip
    """The evaluations of a report, where they answer this very question; none otherwise."""
    runs = report.evaluation
    if not runs or any(run.kld_mean is None for run in runs):
        return ()
    for run in runs:
        if run.model_dump(include=set(wanted)) | {"text": run.text.sha256} != wanted or (
            bos != "auto" and run.bos != bos
        ):
            return ()
    could_speak = not any(note.startswith("no samples") for note in runs[-1].notes)
    if could_speak and len(runs[-1].samples) < samples:
        return ()
    checkpoint = open_checkpoint(path, replace(options, adapter=None))
    try:
        same = file_bytes(checkpoint) == runs[-1].file_bytes
    finally:
        checkpoint.close()
    return runs if same else ()
