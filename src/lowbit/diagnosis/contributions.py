"""Contribution of groups of tensors to the KLD: restore a group, measure the drop, split the groups that matter.

    drop = mean over tokens of KLD(base) − KLD(base with the group restored)       se = std / √n of the differences

First the head, the embedding, the blocks (or runs of them, where a pass for each is too much) and every suspect; then
each set of linears in all blocks; then, level by level and largest drop first, the parts of what matters, until the
budget of forward passes is spent. A group matters where its drop is over two standard errors and over SHARE of all.
Each level is one sweep (`sweep.py`), in which a group that begins at block b costs (L − b) / L forward passes.

Drops do not add up to the KLD: errors of several groups may cancel or compound.

In reverse, the base is the reference, groups are quantized, and the contribution is the KLD that this makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from lowbit.diagnosis.result import Contribution
from lowbit.diagnosis.sweep import Look, Sweeper, Variant
from lowbit.diagnosis.units import Node, Tree

# A group with a smaller share of the KLD is not looked into.
SHARE = 0.02
SIGNIFICANT = 2.0


@dataclass
class Search:
    """base  KLD of every token of the quantized model, float64 [tokens]; found: contributions in the order measured"""

    sweeper: Sweeper
    tree: Tree
    budget: float
    base: np.ndarray = field(default_factory=lambda: np.zeros(0))
    found: dict[str, Contribution] = field(default_factory=dict)
    tensors: dict[str, frozenset[str]] = field(default_factory=dict)
    stopped: bool = False

    def run(self, suspects: Iterable[frozenset[str]], look: Look | None = None, contributions: bool = True) -> None:
        """Fill `base` and `found`. suspects: groups that are measured whatever they cost; `look` sees the base."""
        if self.sweeper.reverse:
            whole = Variant("the quantized model", frozenset(self.sweeper.pair.names))
            self.base = self.sweeper.run([whole], look, whole.name)[whole.name]
        if not contributions:
            self._measure([], look)
            return
        first = self._first_level(suspects)
        drops = self._measure(first, look)
        if not np.isfinite(self.base).all():
            return
        everywhere = [node for node in self.tree.everywhere if node.name not in self.found]
        if everywhere and self._cost(everywhere) <= self._left:
            self._measure(everywhere, None)
        open_nodes = [node for node in first if node.level != "everywhere"]
        while open_nodes:
            chosen = self._worth_splitting(open_nodes, drops)
            if not chosen:
                break
            parts = [part for node in chosen for part in _split(node)]
            drops |= self.found | self._measure([part for part in parts if part.name not in self.found], None)
            open_nodes = [node for node in open_nodes if node not in chosen] + parts

    def _first_level(self, suspects: Iterable[frozenset[str]]) -> list[Node]:
        blocks = len(self.tree.blocks)
        length = 1
        while self._cost(self.tree.runs(length)) > self.budget / 2 and length < blocks:
            length *= 2
        nodes = {node.name: node for node in (*self.tree.outside, *self.tree.runs(length))}
        for tensors in suspects:
            node = self.tree.smallest(tensors)
            if node is not None:
                nodes.setdefault(node.name, node)
        return list(nodes.values())

    def _measure(self, nodes: list[Node], look: Look | None) -> dict[str, Contribution]:
        """One sweep; the contributions by name."""
        look = None if self.sweeper.reverse else look
        values = self.sweeper.run([Variant(node.name, node.tensors) for node in nodes], look)
        if not len(self.base):
            self.base = values[""]
        found = {}
        for node in nodes:
            self.tensors[node.name] = node.tensors
            difference = values[node.name] if self.sweeper.reverse else self.base - values[node.name]
            if np.isfinite(difference).all():
                found[node.name] = contribution(node, difference)
        self.found |= found
        return found

    def _worth_splitting(self, nodes: list[Node], drops: dict[str, Contribution]) -> list[Node]:
        """Nodes with parts that matter, largest drop first, as far as the budget goes."""
        whole = max(self.total, 1e-30)
        matter = [node for node in nodes if _split(node) and node.name in drops
                  and drops[node.name].significant and drops[node.name].kld > SHARE * whole]  # fmt: skip
        chosen, left = [], self._left
        for node in sorted(matter, key=lambda node: -drops[node.name].kld):
            cost = self._cost(_split(node))
            if cost > left:
                self.stopped = True
                continue
            chosen.append(node)
            left -= cost
        return chosen

    @property
    def total(self) -> float:
        """What shares are of: the mean KLD of the quantized model."""
        return float(self.base.mean())

    @property
    def _left(self) -> float:
        return self.budget - self.sweeper.forward_passes

    def _cost(self, nodes: Iterable[Node]) -> float:
        """Forward passes of a sweep, the base's included."""
        blocks = max(1, self.sweeper.blocks)
        return 1 + sum((blocks - self.sweeper.first_block(node.tensors)) / blocks for node in nodes)


def _split(node: Node) -> tuple[Node, ...]:
    """What a node falls into: several parts, or those of its only part."""
    parts = node.parts
    while len(parts) == 1:
        parts = parts[0].parts
    return parts


def contribution(node: Node, difference: np.ndarray) -> Contribution:
    """From the difference of every token."""
    mean = float(difference.mean())
    error = standard_error(difference)
    linears = [name for name in node.tensors if name.endswith(".weight")]
    tensor = linears[0] if node.level in ("outside", "tensor") and len(linears) == 1 else None
    return Contribution(
        block=node.block, role=node.role, tensor=tensor, kld=mean, se=error, bytes=node.bytes, level=node.level,
        name=node.name, last_block=node.last_block, significant=abs(mean) > SIGNIFICANT * error and mean != 0,
    )  # fmt: skip


def standard_error(values: np.ndarray) -> float:
    """Of the mean; 0 for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
