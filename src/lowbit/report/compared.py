"""`Comparison`: several quantized models of one source, measured on the same text, as the page and JSON have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lowbit.report.chart import Mark, on_front
from lowbit.report.schema import Evaluation, Neighbour, Report
from lowbit.report.summary import rounds_activations


@dataclass(frozen=True)
class Compared:
    """One of the models.

    label        what table, chart and samples call it; no two are the same
    path         as given
    evaluations  one per variant, the one that an engine runs last
    origin       "report": the figures were in its report, measured on the same text in the same way; "measured": now
    report       None where lowbit did not make it
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
    def scheme(self) -> str:
        return (self.report.settings.scheme if self.report else self.headline.scheme) or "16 bits"

    @property
    def leaves_activations(self) -> bool:
        """True where an engine would round activations and the figures do not have that."""
        return self.headline.activations == "none" and rounds_activations(self.scheme)

    def mark(self, href: str | None = None) -> Mark:
        run = self.headline
        return Mark(self.label, run.file_bytes, run.bits_per_weight, run.kld_mean, run.kld_se, run.same_top1, href=href)

    def neighbour(self) -> Neighbour:
        """As the reports of the others have it."""
        run = self.headline
        return Neighbour(
            origin="compare",
            label=self.label,
            scheme=self.scheme,
            bytes=run.file_bytes,
            bits_per_weight=run.bits_per_weight,
            kld_mean=run.kld_mean,
            kld_se=run.kld_se,
            same_top1=run.same_top1,
        )


@dataclass(frozen=True)
class Comparison:
    """`models` in the order given; all have a KLD from `reference` on the same text."""

    reference: str
    models: tuple[Compared, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        marks = [model.mark() for model in self.models]
        return {
            "reference": self.reference,
            "models": [
                {
                    "label": model.label,
                    "path": model.path,
                    "scheme": model.scheme,
                    "figures_from": model.origin,
                    "on_front": on_front(mark, marks),
                    "evaluations": [run.model_dump(mode="json") for run in model.evaluations],
                }
                for model, mark in zip(self.models, marks, strict=True)
            ],
        }
