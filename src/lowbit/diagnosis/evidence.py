"""Everything that was measured, and the questions that findings ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from lowbit.diagnosis.inputs import ClippedInput, Mismatch, OutlierInput
from lowbit.diagnosis.result import Contribution
from lowbit.diagnosis.weights import Ends, TensorFacts, median_bits


@dataclass(frozen=True)
class Evidence:
    """
    facts          of every tensor
    contributions  by name; members: name → the tensors that were restored
    total          mean KLD of the quantized model; None where it is not finite
    tied           tensors that transforms rewrote together; tied_factors: what they are multiplied with by mistake
    other_basis    True where the weights are those of a rotated model, which cannot be exchanged one by one
    report         the report beside the weights, parsed
    unseen         share of the text's tokens that the calibration text does not have; None where that is not known
    """

    facts: Mapping[str, TensorFacts]
    contributions: Mapping[str, Contribution]
    members: Mapping[str, frozenset[str]]
    total: float | None
    head: frozenset[str]
    tied: frozenset[str] = frozenset()
    tied_factors: Mapping[tuple[str, ...], float] = field(default_factory=dict)
    other_basis: bool = False
    mismatch: Mismatch | None = None
    unseen: float | None = None
    outliers: tuple[OutlierInput, ...] = ()
    clipped: tuple[ClippedInput, ...] = ()
    ends: tuple[Ends, ...] = ()
    quantizes_activations: bool = False
    report: dict[str, Any] | None = None
    base: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @cached_property
    def median_bits(self) -> float:
        return median_bits(self.facts.values())

    def contribution_of(self, tensors: frozenset[str]) -> Contribution | None:
        """The smallest group that was measured with all of these tensors in it; not those over all blocks."""
        holding = [name for name, members in self.members.items() if tensors <= members and name in self.contributions
                   and self.contributions[name].level != "everywhere"]  # fmt: skip
        smallest = min(holding, key=lambda name: len(self.members[name]), default=None)
        return None if smallest is None else self.contributions[smallest]

    def is_just(self, contribution: Contribution, tensors: frozenset[str]) -> bool:
        """True where nothing quantized but these tensors was restored."""
        others = self.members[contribution.name] - tensors
        return not any(self.facts[name].quantized for name in others if name in self.facts)

    def share(self, kld: float) -> float | None:
        return kld / self.total if self.total else None

    @cached_property
    def culprits(self) -> list[Contribution]:
        """Significant contributions of the smallest groups that explain those around them, largest first.

        A group stands for its parts unless one of them has at least 60 % of its drop.
        """
        kept = []
        for name, each in self.contributions.items():
            if not each.significant or each.kld <= 0 or each.level == "everywhere":
                continue
            parts = [other for other in self.contributions.values()
                     if other.level != "everywhere" and self.members[other.name] < self.members[name]]  # fmt: skip
            if not any(part.kld >= 0.6 * each.kld for part in parts):
                kept.append(each)
        return sorted(kept, key=lambda each: -each.kld)
