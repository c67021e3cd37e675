"""The tree of a model's quantized tensors: the groups that can be restored by themselves.

    model ─┬─ lm_head, embedding                               "outside"
           ├─ one set of linears in all blocks                 "everywhere"
           └─ runs of blocks ─ blocks ─ sets ─ linears         "blocks" "block" "set" "tensor"

A *set* is a group of linears that engines fuse and that must share a scheme (q, k and v; all experts of a block), so it
is also the unit of suggestions. Experts are halved until one is left. A linear's bias goes with its weight.

A *tie* is a group of tensors that a transform rewrote together: scales moved from a norm or a linear into its readers
(AWQ: a norm and its readers; v into o; up into down). They can only be restored together, so tied sets are joined, with
the norm. A place counts as rewritten if the report says so, if a norm differs from the reference, or, without our
report, if the rows of a linear and the columns of its readers are scaled against each other:

    r[c] = ⟨Ŵ[c, :], W[c, :]⟩ / ⟨W[c, :], W[c, :]⟩          rows of the feeding linear
    k[c] = the same of the columns that read channel c     of the first reader
    rewritten where the spread of log r is over SPREAD and its correlation with log k under −CORRELATED

Rounding alone moves either by a few hundredths, without relation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lowbit.diagnosis.pair import Pair
from lowbit.errors import ArchitectureError
from lowbit.report.diagnosis import Level
from lowbit.transform.facts import ScalingPoint, model_facts

SPREAD = 0.05
CORRELATED = 0.7


@dataclass(frozen=True)
class Tie:
    """A rewritten place; tensors: all tensors rewritten there."""

    point: ScalingPoint
    plus_one: bool
    tensors: frozenset[str]


def transform_ties(pair: Pair, applied: Iterable[str], differing: Iterable[str], reported: bool) -> dict[str, Tie]:
    """Feeder → the tie there.

    applied    norms and linears where the report says that scales were moved
    differing  weights of norms that differ from the reference
    reported   True if there is such a report; else the weights are examined
    """
    applied, differing = set(applied), set(differing)
    try:
        facts = model_facts(pair.architecture)
    except ArchitectureError:
        return {}
    ties: dict[str, Tie] = {}
    for block in range(len(pair.architecture.blocks)):
        for point in facts.points(block)[0]:
            feeder = f"{point.feeder}.weight"
            found = point.feeder in applied or feeder in differing
            if found or (not reported and point.kind == "linear" and _moved(pair, point)):
                names = {feeder, f"{point.feeder}.bias", *(f"{reader.name}.weight" for reader in point.readers)}
                ties[point.feeder] = Tie(point, point.plus_one, frozenset(names & set(pair.names)))
    return ties


def tied_factors(pair: Pair, ties: Iterable[Tie]) -> dict[tuple[str, ...], float]:
    """Rewritten weights → their factor beyond the scales that were moved on purpose; 1 if all is right.

    After a norm, whose ratio to the reference's norm is known, each reader by itself; after a linear, the linear and
    its reader together, by the median over channels of r · k.
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
    """True if rows of the feeding linear and columns of its first reader are scaled against each other."""
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
    if pair.linears[name].transposed and name not in pair.quantized.schemes:
        q, w = q.t(), w.t()
    w = w if moved is None else w * moved
    return (q * w).sum(dim) / (w * w).sum(dim).clamp(min=torch.finfo(torch.float32).tiny)


SINGLE_EXPERTS = 4  # more experts of a block are halved before they are restored one by one


@dataclass(frozen=True)
class Node:
    """Tensors that are restored together, and the parts they split into.

    tensors  stored names, including biases and tied tensors; bytes: of these in the files
    block    first block, last_block: last block; None outside of blocks, and for all blocks
    """

    level: Level
    name: str
    role: str
    tensors: frozenset[str]
    bytes: int
    block: int | None = None
    last_block: int | None = None
    parts: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Tree:
    """All nodes that a search may begin with; tied: ties by feeder."""

    pair: Pair
    quantized: frozenset[str]
    tied: Mapping[str, Tie]
    head: frozenset[str]

    @cached_property
    def outside(self) -> tuple[Node, ...]:
        """The head and the embedding, where they are quantized; one node where they are tied."""
        nodes = []
        for name in self.pair.names:
            role = self.pair.architecture.roles[name]
            block = self.pair.architecture.block_of(name)
            if block is None and name in self.quantized and (name in self.head or role == "embedding"):
                shown = "lm_head" if name in self.head and role != "embedding" else "embedding"
                tied = name in self.head and role == "embedding"
                shown = "embedding and lm_head" if tied else shown
                nodes.append(self._node("outside", name, shown, frozenset({name})))
        return tuple(nodes)

    @cached_property
    def blocks(self) -> tuple[Node, ...]:
        """One node for each block that holds something quantized."""
        found = []
        for index, name in enumerate(self.pair.architecture.blocks):
            sets = self._sets(index)
            if sets:
                tensors = frozenset().union(*(each.tensors for each in sets))
                found.append(self._node("block", name, "block", tensors, index, parts=sets))
        return tuple(found)

    def runs(self, length: int) -> tuple[Node, ...]:
        """The blocks, so many together."""
        if length <= 1:
            return self.blocks
        return tuple(_run(self.blocks[at : at + length]) for at in range(0, len(self.blocks), length))

    @cached_property
    def everywhere(self) -> tuple[Node, ...]:
        """One node for each role of a set, in all blocks."""
        roles: dict[str, list[Node]] = {}
        for block in self.blocks:
            for each in block.parts:
                roles.setdefault(each.role, []).append(each)
        return tuple(
            Node("everywhere", role, role, frozenset().union(*(each.tensors for each in sets)),
                 sum(each.bytes for each in sets))
            for role, sets in roles.items() if len(sets) > 1
        )  # fmt: skip

    def smallest(self, tensors: frozenset[str]) -> Node | None:
        """The smallest node under a block, or outside the blocks, that holds all of these tensors."""
        nodes = (*self.outside, *(part for block in self.blocks for part in block.parts))
        found = next((node for node in nodes if tensors <= node.tensors), None)
        while found is not None:
            inner = next((part for part in found.parts if tensors <= part.tensors), None)
            if inner is None:
                return found
            found = inner
        return None

    def _sets(self, block: int) -> tuple[Node, ...]:
        members: dict[str, list[str]] = {}
        for name, linear in self.pair.linears.items():
            if linear.block == block and name in self.quantized:
                members.setdefault(_set_name(linear.name, linear.fused, linear.expert), []).append(name)
        fused = [name for name in self.quantized if self.pair.architecture.roles[name] == "experts"
                 and self.pair.architecture.block_of(name) == block]  # fmt: skip
        members |= {name: [name] for name in fused}
        joined = _joined(
            members,
            [tie.tensors for feeder, tie in self.tied.items() if self.pair.architecture.block_of(feeder) == block],
        )
        nodes = []
        for name, (linears, extra) in joined.items():
            role = "+".join(dict.fromkeys(part.rsplit(".", 1)[-1] for part in name.split("+")))
            parts = () if extra or len(linears) < 2 else self._parts(block, name, linears)
            tensors = frozenset(linears) | extra | self._biases(linears)
            nodes.append(self._node("set", name, role, tensors, block, parts=parts))
        return tuple(nodes)

    def _parts(self, block: int, name: str, linears: list[str]) -> tuple[Node, ...]:
        experts: dict[int, list[str]] = {}
        for linear in linears:
            number = self.pair.linears[linear].expert
            if number is not None:
                experts.setdefault(number, []).append(linear)
        if not experts:
            return tuple(self._single(block, linear) for linear in linears)
        return self._experts(block, name, sorted(experts.items()))

    def _experts(self, block: int, name: str, experts: list[tuple[int, list[str]]]) -> tuple[Node, ...]:
        if len(experts) <= SINGLE_EXPERTS:
            return tuple(
                self._node("tensor", f"{name}.{number}", f"expert {number}", frozenset(linears) | self._biases(linears),
                           block, parts=tuple(self._single(block, linear) for linear in linears))
                for number, linears in experts
            )  # fmt: skip
        halves = (experts[: len(experts) // 2], experts[len(experts) // 2 :])
        nodes = []
        for half in halves:
            linears = [linear for _, each in half for linear in each]
            shown = f"experts {half[0][0]} to {half[-1][0]}"
            nodes.append(
                self._node("tensor", f"{name}, {shown}", shown, frozenset(linears) | self._biases(linears), block,
                           parts=self._experts(block, name, half))
            )  # fmt: skip
        return tuple(nodes)

    def _single(self, block: int, linear: str) -> Node:
        tensors = frozenset({linear}) | self._biases([linear])
        return self._node("tensor", linear, self.pair.linears[linear].role, tensors, block)

    def _biases(self, weights: Iterable[str]) -> frozenset[str]:
        names = {f"{weight.removesuffix('.weight')}.bias" for weight in weights}
        return frozenset(names & set(self.pair.names))

    def _node(
        self, level: Level, name: str, role: str, tensors: frozenset[str], block: int | None = None,
        parts: tuple[Node, ...] = (),
    ) -> Node:  # fmt: skip
        nbytes = sum(self.pair.quantized.tensors[each].nbytes for each in tensors)
        return Node(level, name, role, tensors, nbytes, block, block, parts)


def _set_name(linear: str, fused: str | None, expert: int | None) -> str:
    """Experts of a block are one set, as engines stack them."""
    if expert is not None:
        return linear.rpartition(f".{expert}.")[0]
    return fused or linear


def _joined(members: dict[str, list[str]], ties: list[frozenset[str]]) -> dict[str, tuple[list[str], frozenset[str]]]:
    """Set → (its linears, other tied tensors); sets that share a tie are joined."""
    groups: list[tuple[list[str], set[str]]] = [([name], set()) for name in members]
    for tie in ties:
        touched = [group for group in groups if any(tie & set(members[name]) for name in group[0])]
        if not touched:
            continue
        names = [name for group in touched for name in group[0]]
        extra = set(tie).union(*(group[1] for group in touched))
        groups = [group for group in groups if group not in touched] + [(names, extra)]
    found = {}
    for names, extra in groups:
        linears = [linear for name in names for linear in members[name]]
        found["+".join(names)] = (linears, frozenset(extra - set(linears)))
    return found


def _run(blocks: tuple[Node, ...]) -> Node:
    if len(blocks) == 1:
        return blocks[0]
    first, last = blocks[0], blocks[-1]
    name = f"{first.name} to {last.block}"
    tensors = frozenset().union(*(each.tensors for each in blocks))
    nbytes = sum(each.bytes for each in blocks)
    return replace(first, level="blocks", name=name, role="blocks", tensors=tensors, bytes=nbytes, parts=blocks,
                   last_block=last.block)  # fmt: skip
