"""What can be restored by itself: the tree of a model's quantized tensors.

    model ─┬─ lm_head, embedding                               "outside"
           ├─ one set of linears in all blocks                 "everywhere"
           └─ runs of blocks ─ blocks ─ sets ─ linears         "blocks" "block" "set" "tensor"

A *set* is what engines fuse and what must therefore share a scheme (q, k and v; all experts of a block), so it is also
what a suggestion can change. Experts are halved until one is left.

Where a transform has moved scales from one tensor into others (AWQ: a norm and its readers; v into o; up into down),
either side is the reference's only together with the other (`ties.py`): such sets are one set, and the norm belongs to
it. A linear's bias goes with its weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from lowbit.diagnosis.pair import Pair
from lowbit.diagnosis.result import Level
from lowbit.diagnosis.ties import Tie

# Experts of a block up to this many are restored one by one, more are halved first.
SINGLE_EXPERTS = 4


@dataclass(frozen=True)
class Node:
    """Tensors that are restored together, and what they can be split into.

    tensors  stored names, biases and what a transform ties to them included; bytes: what they take in the files
    block    the first block they lie in, last_block the last; None outside of blocks, and where they lie in all
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
    """All nodes that a search may begin with.

    tied  what transforms tie together, by set: for the notes
    """

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
    """Set → (its linears, what else must go along); sets that share a tie are one."""
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
