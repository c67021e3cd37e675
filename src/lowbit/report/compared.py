"""`Comparison`: several quantized models of one source, measured on the same text, with the sentences of its page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowbit.evaluation.result import Evaluation
from lowbit.report.chart import Mark, on_front
from lowbit.report.schema import Neighbour, Report
from lowbit.report.summary import quality_words, rounds_activations
from lowbit.report.units import DASH, NBSP, number, percent, plus_minus, significant, size

_SAME_SIZE = 0.02  # files that differ by less are called equally large


@dataclass(frozen=True)
class Compared:
    """One of the models.

    label        unique name in table, chart and samples
    path         as given
    evaluations  one per variant, the one that an engine runs last
    origin       "report": the figures were in its report, measured on the same text in the same way; "measured": now
    report       None if lowbit did not make it
    """

    label: str
    path: str
    evaluations: tuple[Evaluation, ...]
    origin: Literal["report", "measured"]
    report: Report | None = None

    @property
    def headline(self) -> Evaluation:
        return self.evaluations[-1]

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes of a folder's linears, the most frequent first; the file type of a GGUF, which names a mix."""
        if self.report is None or self.report.output.format == "gguf":
            return ((self.report.settings.scheme if self.report else self.headline.scheme) or "16 bits",)
        count = Counter(tensor.scheme for tensor in self.report.tensors if tensor.scheme is not None)
        return tuple(name for name, _ in count.most_common()) or ("16 bits",)

    @property
    def scheme(self) -> str:
        """In words: "W4A16 + W8A16" where a model mixes them, "Q4_K_M, with overrides"."""
        mixed = self.report is not None and self.report.output.format == "gguf" and "overrides" in (
            self.report.settings.given
        )  # fmt: skip
        return " + ".join(self.schemes) + (", with overrides" if mixed else "")

    @property
    def leaves_activations(self) -> bool:
        """True if an engine would round activations and the figures do not include it."""
        return self.headline.activations == "none" and any(map(rounds_activations, self.schemes))

    def mark(self, href: str | None = None) -> Mark:
        run = self.headline
        return Mark(self.label, run.file_bytes, run.bits_per_weight, run.kld_mean, run.kld_se, run.same_top1, href=href)

    def neighbour(self) -> Neighbour:
        """As the reports of the others have it."""
        run = self.headline
        return Neighbour(
            origin="compare", label=self.label, scheme=self.scheme, bytes=run.file_bytes,
            bits_per_weight=run.bits_per_weight, kld_mean=run.kld_mean, kld_se=run.kld_se, same_top1=run.same_top1,
        )  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """`models` in the order given; all have a KLD from `reference` on the same text."""

    reference: str
    models: tuple[Compared, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        marks = [model.mark() for model in self.models]
        models = [
            {"label": model.label, "path": model.path, "scheme": model.scheme, "figures_from": model.origin,
             "on_front": on_front(mark, marks),
             "evaluations": [run.model_dump(mode="json") for run in model.evaluations],
             "kv_cache": [row.model_dump(mode="json") for row in (model.report.kv_cache if model.report else ())]}
            for model, mark in zip(self.models, marks, strict=True)
        ]  # fmt: skip
        return {"reference": self.reference, "models": models}


def summary(models: Sequence[Compared]) -> str:
    """The closest model, the smallest, and those that another beats in both."""
    closest = min(models, key=lambda model: model.headline.kld_mean or 0.0)
    smallest = min(models, key=lambda model: model.headline.file_bytes)
    sentences = [f"Closest to the source is {closest.label}, {_divergence(closest.headline)}"]
    if smallest is closest:
        sentences[0] += ", and it is the smallest"
    else:
        at = f"{size(smallest.headline.file_bytes)}, {_divergence(smallest.headline)}"
        sentences.append(f"Smallest is {smallest.label}, {at}")
    sentences += [sentence for model in models if (sentence := _beaten(model, models)) is not None]
    return ". ".join(sentences) + "."


def _divergence(run: Evaluation) -> str:
    return f"KLD {plus_minus(run.kld_mean or 0.0, run.kld_se)}, {quality_words(run)}"


def _beaten(model: Compared, models: Sequence[Compared]) -> str | None:
    """A sentence if another model is no larger and closer by more than two standard errors of the difference."""
    own = model.headline
    for other in models:
        run = other.headline
        gap = (own.kld_mean or 0.0) - (run.kld_mean or 0.0)
        error = math.hypot(own.kld_se or 0.0, run.kld_se or 0.0)
        if other is not model and run.file_bytes <= own.file_bytes * (1 + _SAME_SIZE / 4) and gap > 2 * error:
            return f"{other.label} beats {model.label}: no larger and closer"
    return None


def sizes_differ(models: Sequence[Compared]) -> str:
    """A sentence on how much the sizes of the files differ."""
    ordered = sorted(models, key=lambda model: model.headline.file_bytes)
    least, most = ordered[0], ordered[-1]
    ratio = most.headline.file_bytes / max(least.headline.file_bytes, 1) - 1
    if ratio <= _SAME_SIZE:
        return "The files are of equal size, within 2 %."
    return (
        f"The files are not of equal size: {most.label} takes {percent(ratio, 0)} more than {least.label}, so a lower "
        "divergence of a larger file is no merit of its method."
    )


@dataclass(frozen=True)
class FiguresRow:
    """One model and variant; a first row has the size, and says where the figures are from."""

    name: str
    beside: str
    figures: tuple[str, ...]
    origin: str
    first: bool


def figures_rows(models: Sequence[Compared]) -> list[FiguresRow]:
    """One row per model and variant."""
    rows = []
    for model in models:
        for run in reversed(model.evaluations):
            first = run is model.headline
            values = (
                size(run.file_bytes) if first else "",
                number(run.bits_per_weight, 2) if first else "",
                plus_minus(run.kld_mean, run.kld_se),
                DASH if run.kld_p99 is None else significant(run.kld_p99),
                plus_minus(run.ppl_ratio, run.ppl_ratio_se),
                plus_minus(run.same_top1, run.same_top1_se, 100, f"{NBSP}%"),
            )
            beside = "activations rounded" if first and run.activations == "simulated" else ""
            origin = {"report": "from its report", "measured": "measured now"}[model.origin] if first else ""
            rows.append(FiguresRow(model.label if first else "weights alone", beside, values, origin, first))
    return rows


def facts(model: Compared, front: bool) -> list[tuple[str, str]]:
    """Where it lies, how it was made, whether it would load."""
    report, run = model.report, model.headline
    rows = [("Path", model.path), ("On the front", "yes" if front else "no")]
    if report is None:
        rows.append(("Scheme", model.scheme))
        rows.append(("Report", "none: lowbit did not make it, so its errors are not known tensor by tensor"))
    else:
        settings, text = report.settings, report.settings.calibration
        rows += [("Scheme", settings.scheme), ("Method", settings.method), ("Format", report.output.format)]
        if text is not None:
            rows.append(("Calibration", f"{text.name}, {text.tokens:,} tokens, sha256 {(text.sha256 or DASH)[:12]}"))
        if (checked := report.verification) is not None:
            count = len(checked.checks)
            rows.append(("Verified", f"{checked.engine}: {count - len(checked.failed)} of {count} rules hold"))
        rows.append(("Made by", f"lowbit {report.lowbit}, {report.created:%Y-%m-%d}"))
    rows += [("Reference", run.reference or DASH), ("Computed in", run.dtype)]
    return [*rows, ("Notes", "; ".join(run.notes))] if run.notes else rows
