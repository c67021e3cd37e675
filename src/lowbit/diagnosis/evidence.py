"""`Evidence`: all measurements of a diagnosis, with the queries of the findings.

Flips are positions whose most probable next token changed; the worst by KLD are kept, with the text before them. They
are collected while the base stream is compared, some positions at a time. Ties go to the smaller token id.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lowbit.diagnosis.inputs import ClippedInput, Mismatch, OutlierInput
from lowbit.diagnosis.pair import Ends, TensorFacts, median_bits
from lowbit.evaluation.metrics import token_kld
from lowbit.report.diagnosis import Contribution, Flip

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 16
WORST = 10


@dataclass
class FlipCollector:
    """Called by a sweep with (window, positions, log p, log q).

    same, tokens  positions where both models prefer the same token, and all
    """

    ids: Tensor
    tokenizer: PreTrainedTokenizerBase
    same: int = 0
    tokens: int = 0
    _worst: list[tuple[float, int, int, int, float, int, float]] = field(default_factory=list)

    def __call__(self, window: int, positions: range, log_p: Tensor, log_q: Tensor) -> None:
        kld = token_kld(log_p, log_q)
        p_top, q_top = log_p.max(-1), log_q.max(-1)
        changed = p_top.indices != q_top.indices
        self.tokens += len(changed)
        self.same += int((~changed).sum())
        score = torch.where(changed & torch.isfinite(kld), kld, -1.0)
        for at in score.topk(min(WORST, len(score))).indices.tolist():
            if score[at] < 0:
                break
            entry = (
                score[at].item(), window, positions[at], int(p_top.indices[at]), p_top.values[at].exp().item(),
                int(q_top.indices[at]), q_top.values[at].exp().item(),
            )  # fmt: skip
            (heapq.heappush if len(self._worst) < WORST else heapq.heappushpop)(self._worst, entry)

    @property
    def same_top1(self) -> float | None:
        return self.same / self.tokens if self.tokens else None

    def worst(self) -> tuple[Flip, ...]:
        """Largest KLD first."""
        return tuple(self._flip(*entry) for entry in sorted(self._worst, reverse=True))

    def _flip(self, kld: float, window: int, position: int, p: int, p_p: float, q: int, q_p: float) -> Flip:
        ids = self.ids[window]
        before = ids[max(0, position + 1 - CONTEXT_TOKENS) : position + 1].tolist()
        return Flip(
            window=window, position=position, context=self._text(before), token=self._text([int(ids[position + 1])]),
            reference=self._text([p]), reference_p=p_p, quantized=self._text([q]), quantized_p=q_p, kld=kld,
        )  # fmt: skip

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


@dataclass(frozen=True)
class Evidence:
    """
    facts          of every tensor
    contributions  by name; members: name → the restored tensors
    total          mean KLD of the quantized model; None if it is not finite
    tied           tensors that transforms rewrote together; tied_factors: their wrong factors
    other_basis    True for a rotated model, whose weights cannot be exchanged one by one
    report         the report beside the weights, parsed
    unseen         share of the text's tokens that the calibration text lacks; None if unknown
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
        """The smallest measured group with all of these tensors, except those over all blocks."""
        holding = [name for name, members in self.members.items() if tensors <= members and name in self.contributions
                   and self.contributions[name].level != "everywhere"]  # fmt: skip
        smallest = min(holding, key=lambda name: len(self.members[name]), default=None)
        return None if smallest is None else self.contributions[smallest]

    def is_just(self, contribution: Contribution, tensors: frozenset[str]) -> bool:
        """True if these were the only quantized tensors restored."""
        others = self.members[contribution.name] - tensors
        return not any(self.facts[name].quantized for name in others if name in self.facts)

    def share(self, kld: float) -> float | None:
        return kld / self.total if self.total else None

    @cached_property
    def culprits(self) -> list[Contribution]:
        """Significant contributions, largest first, without groups one of whose parts has at least 60 % of the drop."""
        kept = []
        for name, each in self.contributions.items():
            if not each.significant or each.kld <= 0 or each.level == "everywhere":
                continue
            parts = [other for other in self.contributions.values()
                     if other.level != "everywhere" and self.members[other.name] < self.members[name]]  # fmt: skip
            if not any(part.kld >= 0.6 * each.kld for part in parts):
                kept.append(each)
        return sorted(kept, key=lambda each: -each.kld)
