"""Weighted k-means of single numbers, of many rows at once (Lloyd 1982): the tables of SqueezeLLM (arXiv 2306.07629).

    minimise over t_1 ≤ … ≤ t_L   Σ_k mass_k · min_l (w_k − t_l)²          of every row by itself

In one dimension a cluster is an interval of the sorted weights, so that one step is two look-ups in prefix sums:

    borders   the middles of neighbouring t, found in the sorted row; a weight halfway between two goes to the smaller
    t_l       Σ mass · w / Σ mass of what lies between two borders; where nothing does, t_l stays

Lloyd's steps end in a local minimum, so they begin near the global one, which is found among fewer borders: 32 that cut
the mass of a row into equal shares, and 32 that are evenly spaced over its range. Of these, dynamic programming chooses
the best L − 1 (Wang and Song 2011, Ckmeans.1d.dp). Nothing is drawn at random. Prefix sums are float64.

    D_1(j) = cost(0, j)      D_l(j) = min_i D_(l−1)(i) + cost(i, j)      cost(i, j): of one cluster between two borders

A row with no more distinct weights than values gets exactly these, the last of them repeated; so a row of zeros gets
zeros. Weights of mass 0 have no influence; in a row without mass all count alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 60  # at most
_CANDIDATES = 32  # borders of each kind
_ROWS = 512  # at once


def fit_tables(weight: Tensor, levels: int, mass: Tensor | None = None) -> Tensor:
    """The values of every row, float32 [N, levels], ascending.

    weight  float [N, K], finite
    mass    float [K] or [N, K], ≥ 0; None: all weights count alike
    """
    tables = []
    for first in range(0, len(weight), _ROWS):
        part = slice(first, first + _ROWS)
        rows = _Sorted.of(weight[part], mass if mass is None or mass.dim() == 1 else mass[part])
        tables.append(_with_exact_rows(rows, _descended(rows, _started(rows, levels))).float())
    return torch.cat(tables)


@dataclass(frozen=True)
class _Sorted:
    """Weights of every row in ascending order, float64 [N, K], with prefix sums, float64 [N, K + 1]."""

    values: Tensor
    mass: Tensor
    first: Tensor  # Σ mass · w
    second: Tensor  # Σ mass · w²

    @classmethod
    def of(cls, weight: Tensor, mass: Tensor | None) -> _Sorted:
        weight = weight.to(torch.float64)
        mass = torch.ones_like(weight) if mass is None else mass.to(torch.float64).expand_as(weight)
        mass = torch.where(mass.sum(dim=1, keepdim=True) > 0, mass, 1.0)
        # what has no mass takes the place of a weight that has, so that it is no distinct value
        heaviest = weight.gather(1, mass.argmax(dim=1, keepdim=True))
        values, order = torch.where(mass > 0, weight, heaviest).sort(dim=1)
        mass = mass.gather(1, order)

        def summed(terms: Tensor) -> Tensor:
            return torch.nn.functional.pad(terms.cumsum(dim=1), (1, 0))

        return cls(values, summed(mass), summed(mass * values), summed(mass * values.square()))

    def within(self, borders: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of mass, mass · w and mass · w² between neighbouring borders, int64 [N, n] → [N, n − 1]."""
        mass, first, second = (sums.gather(1, borders).diff(dim=1) for sums in (self.mass, self.first, self.second))
        return mass, first, second


def _started(rows: _Sorted, levels: int) -> Tensor:
    """Means of the best clusters between candidate borders, float64 [N, levels], ascending."""
    borders = _candidates(rows)
    mass, first, second = (sums.gather(1, borders) for sums in (rows.mass, rows.first, rows.second))
    mass, first, second = (sums[:, None] - sums[:, :, None] for sums in (mass, first, second))  # [N, from, to]
    cost = torch.where(mass > 0, (second - first.square() / mass).clamp(min=0), 0.0)
    cost.masked_fill_(torch.ones_like(cost[0], dtype=torch.bool).tril(-1), torch.inf)
    least, origins = cost[:, 0], []
    for _ in range(levels - 1):
        least, origin = (least[:, :, None] + cost).min(dim=1)
        origins.append(origin)
    place = torch.full_like(borders[:, :1], borders.shape[1] - 1)
    chosen = [place]
    for origin in reversed(origins):
        chosen.append(origin.gather(1, chosen[-1]))
    chosen.append(torch.zeros_like(place))
    mass, first, _ = rows.within(borders.gather(1, torch.cat(chosen[::-1], dim=1)))
    # a cluster of nothing takes the value after which it stands
    means = torch.where(mass > 0, first / mass, rows.values[:, :1])
    return means.cummax(dim=1).values


def _candidates(rows: _Sorted) -> Tensor:
    """int64 [N, 66]: borders as numbers of sorted weights below, ascending, from 0 to K."""
    shares = torch.arange(1, _CANDIDATES + 1, dtype=torch.float64, device=rows.mass.device) / (_CANDIDATES + 1)
    low, high = rows.values[:, :1], rows.values[:, -1:]
    by_mass = torch.searchsorted(rows.mass[:, 1:].contiguous(), rows.mass[:, -1:] * shares, right=True)
    by_range = torch.searchsorted(rows.values, low + (high - low) * shares, right=True)
    ends = torch.zeros_like(low, dtype=torch.int64)
    return torch.cat([ends, by_mass, by_range, ends + rows.values.shape[1]], dim=1).sort(dim=1).values


def _descended(rows: _Sorted, table: Tensor) -> Tensor:
    """The table after Lloyd's steps."""
    former = None
    for _ in range(_STEPS):
        inside = torch.searchsorted(rows.values, (table[:, 1:] + table[:, :-1]) / 2, right=True)
        borders = torch.nn.functional.pad(inside, (1, 1))
        borders[:, -1] = rows.values.shape[1]
        if former is not None and torch.equal(borders, former):
            break
        mass, first, _ = rows.within(borders)
        former, table = borders, torch.where(mass > 0, first / mass, table)
    return table


def _with_exact_rows(rows: _Sorted, table: Tensor) -> Tensor:
    """The table, with the distinct weights themselves in rows that have no more of them than values."""
    levels = table.shape[1]
    rank = torch.nn.functional.pad((rows.values.diff(dim=1) > 0).cumsum(dim=1), (1, 0))
    few = rank[:, -1] < levels
    if not bool(few.any()):
        return table
    exact = rows.values[few, -1:].repeat(1, levels)
    exact.scatter_(1, rank[few], rows.values[few])
    table = table.clone()
    table[few] = exact
    return table
