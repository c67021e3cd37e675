"""Contribution of groups of tensors to the KLD: restore a group, measure the drop, split the groups that matter.

    drop = mean over tokens of KLD(base) − KLD(base with the group restored)       se = std / √n of the differences

Measured first: the head, the embedding, the blocks (or runs of blocks, if a pass for each costs too much) and every
suspect; then each set of linears in all blocks; then, level by level and largest drop first, the parts of the groups
that matter, until the budget of forward passes is spent. A group matters if its drop exceeds two standard errors and
SHARE of the total. Each level is one sweep. Drops do not add up to the KLD: errors may cancel or compound.

In reverse, the base is the reference, groups are quantized, and the contribution is the KLD that this adds.

A sweep runs many variants of a model over the same windows at once:

    base stream      the quantized model (or, in reverse, the reference)
    a variant        the base with the other model's weights in the tensors it names; it shares the base's hidden
                     states up to the first block it touches, and runs from there on

    for each block:  read its weights once · for each set of exchanged tensors: exchange, run the streams that need it,
                     put back · run the base
    last norm of all streams, then the heads: compare log-probabilities of some positions at a time

So v variants that begin at blocks b cost Σ (L − b) / L forward passes and one reading of the model. Memory holds one
block, the tensors exchanged in it, and the hidden states of v streams (in a file above a limit). A head is exchanged by
giving the stream's states to the other model's head.

    KLD[token] = KL(reference ‖ variant)        float64 [tokens], window by window; NaN if it is not finite
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lowbit.calibrate.blocks import BlockRunner, HiddenStates, batches_of
from lowbit.diagnosis.pair import Pair
from lowbit.diagnosis.tree import Node, Tree
from lowbit.evaluation.forward import Runner, slices
from lowbit.evaluation.metrics import standard_error, token_kld
from lowbit.report.diagnosis import Contribution
from lowbit.text import Windows

HEADS = ("lm_head", "embed_out")  # names of output heads
Progress = Callable[[str, int, int], None]  # (what, done, in all)
# (window, positions, log p, log q), float32 [positions, V], of one stream
Look = Callable[[int, range, Tensor, Tensor], None]


@dataclass(frozen=True)
class Variant:
    """exchanged  names of the tensors that come from the other model"""

    name: str
    exchanged: frozenset[str]


@dataclass
class Sweeper:
    """Runs sweeps over one pair of models.

    head_inputs  of the reference, [windows, T, H]
    repaired     tensors taken from the reference in every variant: those with NaN, which would hide everything else
    reverse      the base is the reference, and variants quantize the tensors they name
    block_runs   streams × blocks run so far
    """

    pair: Pair
    windows: Windows
    judged: BlockRunner
    reference: BlockRunner
    head_inputs: Tensor
    repaired: frozenset[str] = frozenset()
    reverse: bool = False
    progress: Progress | None = None
    block_runs: int = field(default=0, init=False)

    @property
    def blocks(self) -> int:
        return len(self.judged.blocks)

    @property
    def forward_passes(self) -> float:
        return self.block_runs / max(1, self.blocks)

    def first_block(self, exchanged: Iterable[str]) -> int:
        """The first block that these tensors touch; 0 for the embedding, the number of blocks for the head alone."""
        block_of, before = self.pair.architecture.block_of, self._embedding
        inside = ((name, block_of(name)) for name in exchanged)
        firsts = (block if block is not None else 0 if name in before else self.blocks for name, block in inside)
        return min(firsts, default=self.blocks)

    @torch.inference_mode()
    def run(self, variants: Sequence[Variant], look: Look | None = None, looked_at: str = "") -> dict[str, np.ndarray]:
        """KLD of every token for every variant, and of the base under ""; `look` sees one of them."""
        ids = self.windows.ids
        count = len(ids)
        streams: list[frozenset[str]] = [frozenset(), *(each.exchanged for each in variants)]
        starts = [self.first_block(each) for each in streams]
        embedded = self._embedded(streams)
        width = embedded[False].values.shape[2]
        states = self.judged.new_states((len(streams) * count, ids.shape[1], width))
        parts = [slice(index * count, (index + 1) * count) for index in range(len(streams))]
        states.values[parts[0]] = embedded[self.reverse].values
        for index, exchanged in enumerate(streams):
            if index and starts[index] == 0:
                other = self._exchanges_embedding(exchanged)
                states.values[parts[index]] = embedded[other != self.reverse].values
        for block in range(self.blocks):
            self._through(block, states, streams, starts, parts)
            if self.progress is not None:
                self.progress("blocks", block + 1, self.blocks)
        for index in range(1, len(streams)):
            if starts[index] == self.blocks:
                states.values[parts[index]] = states.values[parts[0]]
        behind = self.judged.through_last_norm(ids.repeat(len(streams), 1), states).values
        names = ["", *(each.name for each in variants)]
        heads = {name: (behind[part], self._other_head(exchanged))
                 for name, part, exchanged in zip(names, parts, streams, strict=True)}  # fmt: skip
        return self._scored(heads, look, looked_at)

    def _through(
        self, block: int, states: HiddenStates, streams: list[frozenset[str]], starts: list[int], parts: list[slice]
    ) -> None:
        """Run all streams that have begun through one block; those that begin here first copy the base's states."""
        runner, prefix = self.judged, self.pair.architecture.blocks[block] + "."
        wanted: dict[frozenset[str], list[int]] = {}
        for index, exchanged in enumerate(streams):
            if index and starts[index] <= block:
                here = frozenset(name for name in exchanged if name.startswith(prefix))
                wanted.setdefault(here, []).append(index)
                if starts[index] == block and block > 0:
                    states.values[parts[index]] = states.values[parts[0]]
        wanted.setdefault(frozenset(), []).append(0)
        runner.load(block)
        everything = frozenset(name for name in self.pair.names if name.startswith(prefix))
        now: frozenset[str] = frozenset()
        for exchanged, indices in wanted.items():
            original = (everything - exchanged if self.reverse else exchanged) | (self.repaired & everything)
            self._put(now ^ original, original)
            now = original
            for index in indices:
                stream = states.values[parts[index]]
                for batch in batches_of(stream):
                    stream[batch] = runner.forward(block, stream[batch])
                self.block_runs += 1
        runner.drop(block)

    def _put(self, changed: frozenset[str], original: frozenset[str]) -> None:
        """Set weights of a loaded block: the reference's for names in `original`, else the quantized model's."""
        for name in sorted(changed):
            read = self.pair.read_original if name in original else self.pair.read
            self.judged.put({name: read(name)})
            self.pair.release(name)

    def _embedded(self, streams: list[frozenset[str]]) -> dict[bool, HiddenStates]:
        """Inputs of the first block, by whether they use the reference's embedding; both if a variant exchanges it."""
        ids = self.windows.ids
        found = {False: self.judged.embed(ids)}  # also captures the arguments of the blocks
        if any(self._exchanges_embedding(each) for each in streams) or self.reverse or self._embedding & self.repaired:
            found[True] = self.reference.embed(ids)
        if self._embedding & self.repaired:
            found[False] = found[True]
        return found

    def _scored(
        self, heads: Mapping[str, tuple[Tensor, bool]], look: Look | None, looked_at: str
    ) -> dict[str, np.ndarray]:
        judged, reference = self.pair.judged.model, self.pair.reference.model
        base = Runner(reference, head_inputs=self.head_inputs)
        runners = {name: Runner(reference if other else judged, head_inputs=kept)
                   for name, (kept, other) in heads.items()}  # fmt: skip
        found: dict[str, list[np.ndarray]] = {name: [] for name in runners}
        windows = self.windows
        positions = range(windows.first_scored - 1, windows.ids.shape[1] - 1)
        for index in range(len(windows.ids)):
            decoded = base.decode(windows.ids, index)
            others = {name: runner.decode(windows.ids, index) for name, runner in runners.items()}
            for part in slices(positions, base.vocabulary):
                log_p = decoded.log_probabilities(part)
                for name, other in others.items():
                    log_q = other.log_probabilities(part)
                    if look is not None and name == looked_at:
                        look(index, part, log_p, log_q)
                    values = token_kld(log_p, log_q).double().cpu().numpy()
                    found[name].append(np.where(np.isfinite(values), values, np.nan))
            if self.progress is not None:
                self.progress("heads", index + 1, len(windows.ids))
        return {name: np.concatenate(parts) for name, parts in found.items()}

    @property
    def _embedding(self) -> frozenset[str]:
        """Tensors in front of the blocks."""
        roles = self.pair.architecture.roles
        return frozenset(name for name in self.pair.names if roles[name] == "embedding")

    def _exchanges_embedding(self, exchanged: frozenset[str]) -> bool:
        return bool(exchanged & self._embedding)

    def _other_head(self, exchanged: frozenset[str]) -> bool:
        """True if the logits come from the reference's head."""
        head = self.head_names
        return bool(exchanged & head) != self.reverse or bool(head & self.repaired)

    @property
    def head_names(self) -> frozenset[str]:
        """The stored tensor of the output head; the embedding where it is tied."""
        architecture = self.pair.architecture
        outside = {f"{each.name}.weight" for each in architecture.linears.values() if each.block is None}
        heads = {name for name in outside | set(architecture.tied) if name.split(".")[-2] in HEADS}
        return frozenset(architecture.tied.get(name, name) for name in heads)


SHARE = 0.02  # groups with a smaller share of the KLD are not split
SIGNIFICANT = 2.0  # standard errors


@dataclass
class ContributionSearch:
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
        """Nodes that matter and have parts, largest drop first, within the budget."""
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
        """The mean KLD of the quantized model."""
        return float(self.base.mean())

    @property
    def _left(self) -> float:
        return self.budget - self.sweeper.forward_passes

    def _cost(self, nodes: Iterable[Node]) -> float:
        """Forward passes of a sweep, the base's included."""
        blocks = max(1, self.sweeper.blocks)
        return 1 + sum((blocks - self.sweeper.first_block(node.tensors)) / blocks for node in nodes)


def _split(node: Node) -> tuple[Node, ...]:
    """The parts of a node; for an only part, its parts."""
    parts = node.parts
    while len(parts) == 1:
        parts = parts[0].parts
    return parts


def contribution(node: Node, difference: np.ndarray) -> Contribution:
    """From the KLD difference of every token."""
    mean, error = float(difference.mean()), standard_error(difference)
    linears = [name for name in node.tensors if name.endswith(".weight")]
    tensor = linears[0] if node.level in ("outside", "tensor") and len(linears) == 1 else None
    return Contribution(
        block=node.block, role=node.role, tensor=tensor, kld=mean, se=error, bytes=node.bytes, level=node.level,
        name=node.name, last_block=node.last_block, significant=abs(mean) > SIGNIFICANT * error and mean != 0,
    )  # fmt: skip
