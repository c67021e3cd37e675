"""How far one next-token distribution is from another, token by token.

    KLD    Σ_v p(v) · (log p(v) − log q(v))       nats; p the reference's, q the quantized model's
    NLL    −log q(next token)                     PPL = exp(mean NLL)
    ratio  exp(mean(NLL_q − NLL_p))               PPL over the reference's PPL, paired
    top-1  argmax p = argmax q                    ties go to the smaller token id
    Δp     q(next token) − p(next token)

Log-softmax is computed in float32 whatever the model computes in; per-token values are float32; means and errors over
tokens are float64. Standard errors are std / √n (n − 1 in the std) of the per-token values, tokens taken as
independent; the error of the ratio is that of the mean log ratio times the ratio (delta method).

A NaN or an infinity in a per-token value is refused: a mean over the rest would hide a broken model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import NonFiniteError


@dataclass(frozen=True)
class Divergence:
    """Everything that needs the reference. Fractions, not percent; nats."""

    ppl_reference: float
    ppl_ratio: float
    ppl_ratio_se: float
    kld_mean: float
    kld_se: float
    kld_median: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    same_top1: float
    same_top1_se: float
    delta_p_mean: float
    delta_p_rms: float


@dataclass(frozen=True)
class Scores:
    """A summary over tokens; `divergence` is None without a reference."""

    tokens: int
    ppl: float
    ppl_se: float
    divergence: Divergence | None


@dataclass
class TokenValues:
    """Per-token values of one model, collected window by window; logits are never kept."""

    nll: list[np.ndarray] = field(default_factory=list)
    nll_reference: list[np.ndarray] = field(default_factory=list)
    kld: list[np.ndarray] = field(default_factory=list)
    same_top1: list[np.ndarray] = field(default_factory=list)

    def add(self, log_q: Tensor, targets: Tensor, log_p: Tensor | None = None) -> None:
        """Score some positions: log-softmax float32 [T, V] of the model and of the reference; targets int64 [T]."""
        nll = _nll(log_q, targets)
        self.nll.append(_finite(nll, "the loss of the quantized model"))
        if log_p is None:
            return
        self.nll_reference.append(_finite(_nll(log_p, targets), "the loss of the reference"))
        self.kld.append(_finite(token_kld(log_p, log_q), "the KL divergence"))
        self.same_top1.append((log_p.argmax(-1) == log_q.argmax(-1)).to(torch.float32).cpu().numpy())

    def summary(self) -> Scores:
        """Means, errors and quantiles over all tokens so far."""
        nll = _joined(self.nll)
        ppl = math.exp(nll.mean())
        return Scores(len(nll), ppl, ppl * standard_error(nll), self._divergence(nll) if self.kld else None)

    def _divergence(self, nll: np.ndarray) -> Divergence:
        nll_reference, kld, same = _joined(self.nll_reference), _joined(self.kld), _joined(self.same_top1)
        log_ratio = nll - nll_reference
        ratio = math.exp(log_ratio.mean())
        delta_p = np.exp(-nll) - np.exp(-nll_reference)
        median, p99, p999 = np.quantile(kld, [0.5, 0.99, 0.999])
        return Divergence(
            ppl_reference=math.exp(nll_reference.mean()),
            ppl_ratio=ratio,
            ppl_ratio_se=ratio * standard_error(log_ratio),
            kld_mean=float(kld.mean()),
            kld_se=standard_error(kld),
            kld_median=float(median),
            kld_p99=float(p99),
            kld_p999=float(p999),
            kld_max=float(kld.max()),
            same_top1=float(same.mean()),
            same_top1_se=standard_error(same),
            delta_p_mean=float(delta_p.mean()),
            delta_p_rms=float(np.sqrt((delta_p**2).mean())),
        )


def token_kld(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of each row, float32 [T], from log-probabilities float32 [T, V].

    Exactly 0 for equal rows; never negative: rounding may take the sum a few 1e-8 below zero, and it is clamped.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def _nll(log_q: Tensor, targets: Tensor) -> Tensor:
    return -log_q.gather(-1, targets[:, None])[:, 0]


def _finite(values: Tensor, what: str) -> np.ndarray:
    array = values.to(torch.float32).cpu().numpy()
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise NonFiniteError(
            f"{what} is NaN or infinite at {bad} of {len(array)} tokens",
            "the model overflows: look at its scales with `lowbit verify`; float32 is the widest --dtype",
        )
    return array


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.float64)


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean; 0 for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
