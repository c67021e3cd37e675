"""Tokens whose most probable successor changed, and the worst of them by KLD, with the text around.

Collected while the base stream is compared: of every window some positions at a time, nothing but the top tokens and
their probabilities is kept. Ties go to the smaller token id.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.diagnosis.result import Flip
from lowbit.evaluation.metrics import token_kld

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
