"""Attention over a cache whose newest tokens are still in 16 bits: each query as if its token were being decoded.

    token t attends to  k̂_j, v̂_j  for j < quantized(t), and to k_j, v_j for the others

    scores[t, j] = q_t · (k̂_j or k_j) · scaling       soft-capped, masked
    p = softmax(scores)                               with a sink in the denominator where the model has one
    out_t = Σ_j p[t, j] · (v̂_j or v_j)

Queries are taken some at a time, so that scores are [heads, queries, T] of a part and never of the whole text. All keys
behind a query are left out before the mask: the models are causal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kv.types import Window

QUERIES = 128  # at a time


@dataclass(frozen=True)
class TwoVersions:
    """States [B, heads, T, D]: exact, and as the cache gives them back."""

    exact: Tensor
    cached: Tensor


def windowed_attention(
    query: Tensor, keys: TwoVersions, values: TwoVersions, window: Window, mask: Tensor | None, scaling: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The output [B, T, query heads, D_v], in the query's dtype; computed in float32.

    query  [B, query heads, T, D]
    mask   added to the scores, or bool where attention is allowed, [B or 1, 1 or heads, T, T]; None: causal
    sinks  [query heads], one more score of each query
    """
    batch, heads, length, _ = query.shape
    shared = heads // keys.exact.shape[1]
    grouped = query.float().unflatten(1, (-1, shared))  # [B, kv heads, query heads of each, T, D]
    parts = []
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        counts = {side: [window.quantized(t, side) for t in range(start, stop)] for side in ("keys", "values")}
        scores = _scores(grouped[..., start:stop, :], keys, counts["keys"], stop) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = _masked(scores, mask, start, stop, shared)
        if sinks is not None:
            extra = sinks.float().reshape(1, -1, shared, 1, 1).expand(batch, -1, -1, stop - start, 1)
            scores = torch.cat([scores, extra], dim=-1)
        weights = scores.softmax(-1)[..., :stop]
        parts.append(_summed(weights, values, counts["values"], stop))
    return torch.cat(parts, dim=-2).flatten(1, 2).transpose(1, 2).contiguous().to(query.dtype)


def _scores(query: Tensor, keys: TwoVersions, counts: list[int], stop: int) -> Tensor:
    """[B, kv heads, shared, C, stop]: columns below every count from the cache, above every count exact."""
    low, high = min(counts), min(max(counts), stop)

    def dot(states: Tensor) -> Tensor:
        return query @ states.float()[:, :, None].transpose(-1, -2)

    parts = [dot(keys.cached[:, :, :low])]
    if high > low:
        chosen = _chosen(counts, low, high, query.device)
        parts.append(torch.where(chosen, dot(keys.cached[:, :, low:high]), dot(keys.exact[:, :, low:high])))
    parts.append(dot(keys.exact[:, :, high:stop]))
    return torch.cat(parts, dim=-1)


def _summed(weights: Tensor, values: TwoVersions, counts: list[int], stop: int) -> Tensor:
    low, high = min(counts), min(max(counts), stop)
    total = weights[..., :low] @ values.cached.float()[:, :, None, :low]
    if high > low:
        chosen = _chosen(counts, low, high, weights.device)
        between = weights[..., low:high]
        total = total + (between * chosen) @ values.cached.float()[:, :, None, low:high]
        total = total + (between * ~chosen) @ values.exact.float()[:, :, None, low:high]
    return total + weights[..., high:] @ values.exact.float()[:, :, None, high:stop]


def _chosen(counts: list[int], low: int, high: int, device: torch.device) -> Tensor:
    """bool [C, high − low]: which columns each query takes from the cache."""
    return torch.arange(low, high, device=device) < torch.tensor(counts, device=device)[:, None]


def _masked(scores: Tensor, mask: Tensor | None, start: int, stop: int, shared: int) -> Tensor:
    if mask is None:
        rows, columns = torch.arange(start, stop, device=scores.device), torch.arange(stop, device=scores.device)
        return scores.masked_fill(columns > rows[:, None], -torch.inf)
    part = mask[:, :, start:stop, :stop]
    part = part.unflatten(1, (-1, shared)) if part.shape[1] > 1 else part[:, :, None]
    return scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.float()
