"""Which tensors a transform has rewritten together: scales moved from a norm or a linear into what reads its output.

A place is taken to be rewritten where the report says so, where a norm is not the reference's, or, in a checkpoint
without our report, where the rows of a linear and the columns of its readers are scaled against each other:

    r[c] = ⟨Ŵ[c, :], W[c, :]⟩ / ⟨W[c, :], W[c, :]⟩          rows of the feeding linear
    k[c] = the same of the columns that read channel c     of the first reader
    rewritten where the spread of log r is over SPREAD and its correlation with log k under −CORRELATED

Rounding alone moves either by a few hundredths, without relation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.checkpoint.base import is_decoded
from lowbit.diagnosis.pair import Pair
from lowbit.errors import ArchitectureError
from lowbit.transform.facts import ScalingPoint, model_facts

SPREAD = 0.05
CORRELATED = 0.7


@dataclass(frozen=True)
class Tie:
    """A place that was rewritten. tensors: all that were rewritten together, the feeder's weight first among them"""

    point: ScalingPoint
    plus_one: bool
    tensors: frozenset[str]


def transform_ties(pair: Pair, applied: Iterable[str], differing: Iterable[str], reported: bool) -> dict[str, Tie]:
    """Feeder → what a transform rewrote there.

    applied    norms and linears at which the report says scales were moved
    differing  norms' weights that are not the reference's
    reported   True where there is such a report; else the weights are looked at
    """
    applied, differing = set(applied), set(differing)
    try:
        facts = model_facts(pair.architecture, pair.quantized.config())
    except ArchitectureError:
        return {}
    ties: dict[str, Tie] = {}
    for block in range(len(pair.architecture.blocks)):
        for point in facts.points(block)[0]:
            feeder = f"{point.feeder}.weight"
            found = point.feeder in applied or feeder in differing
            if found or (not reported and point.kind == "linear" and _moved(pair, point)):
                names = {feeder, f"{point.feeder}.bias", *(f"{reader.name}.weight" for reader in point.readers)}
                ties[point.feeder] = Tie(point, facts.plus_one, frozenset(names & set(pair.names)))
    return ties


def tied_factors(pair: Pair, ties: Iterable[Tie]) -> dict[tuple[str, ...], float]:
    """Rewritten weights → what they are multiplied with beyond what was moved on purpose; 1 where scales are right.

    Behind a norm, whose ratio to the reference's norm is known, each reader by itself; behind a linear, that and its
    reader together, by the median over channels of r · k.
    """
    ties = sorted(ties, key=lambda tie: tie.point.kind != "norm")  # norms first: what they moved is known exactly
    feeders = {f"{tie.point.feeder}.weight" for tie in ties}
    moved: dict[str, Tensor] = {}
    factors: dict[tuple[str, ...], float] = {}
    for tie in ties:
        point, feeder = tie.point, f"{tie.point.feeder}.weight"
        readers = [f"{reader.name}.weight" for reader in point.readers if pair.is_quantized(f"{reader.name}.weight")]
        if point.kind == "norm":
            added = 1.0 if tie.plus_one else 0.0
            scale = (pair.read_original(feeder) + added) / (pair.read(feeder) + added)
            moved |= {reader: scale for reader in readers if torch.isfinite(scale).all()}
            for reader in (reader for reader in readers if reader in moved and reader not in feeders):
                factors[reader,] = _median(_gains(pair, reader, 0, scale))
        elif readers and pair.is_quantized(feeder):
            rows = _gains(pair, feeder, 1, moved.get(feeder))
            rows = rows if point.rows is None else rows[point.rows]
            columns = point.of_channels(_gains(pair, readers[0], 0, moved.get(readers[0])))
            factors[feeder, readers[0]] = _median(rows * columns)
    return factors


def _moved(pair: Pair, point: ScalingPoint) -> bool:
    """True where rows of the feeding linear and columns of its first reader are scaled against each other."""
    feeder, reader = f"{point.feeder}.weight", f"{point.readers[0].name}.weight"
    if not (pair.is_quantized(feeder) and pair.is_quantized(reader)):
        return False
    rows, columns = _gains(pair, feeder, 1), point.of_channels(_gains(pair, reader, 0))
    if point.rows is not None:
        rows = rows[point.rows]
    both = (rows > 0) & (columns > 0)
    if int(both.sum()) < 8:
        return False
    r, k = rows[both].log(), columns[both].log()
    r, k = r - r.mean(), k - k.mean()
    if r.square().mean().sqrt() < SPREAD:
        return False
    return bool((r * k).sum() < -CORRELATED * r.norm() * k.norm())


def _median(gains: Tensor) -> float:
    seen = gains[gains != 0]
    return float(seen.median()) if len(seen) else 0.0


def _gains(pair: Pair, name: str, dim: int, moved: Tensor | None = None) -> Tensor:
    """⟨Ŵ, W⟩ / ⟨W, W⟩ over one dimension of a weight [N, K] as linears have it; moved [K] multiplies W's columns."""
    q, w = pair.read(name), pair.read_original(name)
    pair.release(name)
    if pair.linears[name].transposed and not is_decoded(pair.quantized, name):
        q, w = q.t(), w.t()
    w = w if moved is None else w * moved
    return (q * w).sum(dim) / (w * w).sum(dim).clamp(min=torch.finfo(torch.float32).tiny)
