"""Rows of a comparison on KV caches: what `lowbit evaluate --kv-cache` put into the reports of its models.

Each figure is a model's divergence from itself with its cache in 16 bits. Figures stand in one row where they were
measured alike: same type, context, text (SHA-256), protocol, number of windows and BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.evaluation.cache_result import CacheEvaluation, context_label
from lowbit.report.compared import Compared
from lowbit.report.units import DASH, plus_minus


@dataclass(frozen=True)
class CacheRow:
    """One cache type at one context; `figures` has one entry for each model, None where its report lacks it."""

    figures: tuple[CacheEvaluation | None, ...]

    @property
    def first(self) -> CacheEvaluation:
        return next(each for each in self.figures if each is not None)

    @property
    def name(self) -> str:
        return f"{self.first.type} at {context_label(self.first.context)}"

    @property
    def how(self) -> str:
        """On which text, in words."""
        row = self.first
        bos = ", opened with BOS" if row.bos else ""
        return f"{row.text.name}, {row.windows} × {row.context} tokens, {row.protocol}{bos}"

    @property
    def cells(self) -> tuple[str, ...]:
        """Mean KLD ± its error, one for each model."""
        return tuple(DASH if each is None else plus_minus(each.kld_mean, each.kld_se) for each in self.figures)


def cache_rows(models: Sequence[Compared]) -> list[CacheRow]:
    """By type in the order of the reports, then by context; none where no report has figures of caches."""
    found: dict[tuple, list[CacheEvaluation | None]] = {}
    for index, model in enumerate(models):
        for row in () if model.report is None else model.report.kv_cache:
            alike = (row.type, row.context, row.text.sha256, row.protocol, row.windows, row.bos)
            found.setdefault(alike, [None] * len(models))[index] = row
    types = list(dict.fromkeys(alike[0] for alike in found))
    ordered = sorted(found, key=lambda alike: (types.index(alike[0]), alike[1]))
    return [CacheRow(tuple(found[alike])) for alike in ordered]
