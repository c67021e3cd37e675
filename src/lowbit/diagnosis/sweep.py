"""Many variants of a model over the same windows at once, each with some tensors taken from the other model.

    base stream      the quantized model (or, in reverse, the reference)
    a variant        the base with the other model's weights in the tensors it names; it shares the base's hidden
                     states up to the first block that it touches, and is run from there on

    for each block:  read its weights once · for each set of exchanged tensors: exchange, run the streams that want it,
                     put back · run the base
    last norm of all streams, then the heads: log-probabilities of some positions at a time, compared and dropped

so v variants that begin at blocks b cost Σ (L − b) / L forward passes and one reading of the model, and memory holds
one block, the tensors exchanged in it, and the hidden states of v streams (in a file above a bound). A head is
exchanged by giving the stream's states to the other model's head.

    KLD[token] = KL(reference ‖ variant)        float64 [tokens], windows after each other; NaN where it is not finite
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lowbit.calibrate.blocks import BlockRunner, batches_of
from lowbit.calibrate.hidden_states import HiddenStates
from lowbit.diagnosis.pair import Pair
from lowbit.evaluation.forward import Runner, slices
from lowbit.evaluation.metrics import token_kld
from lowbit.text import Windows

# What models call their output head.
HEADS = ("lm_head", "embed_out")
# Called with (what, done, in all).
Progress = Callable[[str, int, int], None]
# Called with (window, positions, log p, log q), float32 [positions, V], of one stream.
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
    repaired     tensors that are the reference's in every variant: what holds NaN, which would hide all else
    reverse      the base is the reference, and variants quantize what they name
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
        firsts = [self._block_of(name) for name in exchanged]
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
        behind = through_last_norm(self.judged, states, ids.repeat(len(streams), 1))
        names = ["", *(each.name for each in variants)]
        heads = {name: (behind[part], self._other_head(exchanged))
                 for name, part, exchanged in zip(names, parts, streams, strict=True)}  # fmt: skip
        return self._scored(heads, look, looked_at)

    def _through(
        self, block: int, states: HiddenStates, streams: list[frozenset[str]], starts: list[int], parts: list[slice]
    ) -> None:
        """All streams that have begun through one block; those that begin here take the base's states first."""
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
        """The weights of a loaded block: the reference's where `original` says so, else the quantized model's."""
        for name in sorted(changed):
            read = self.pair.read_original if name in original else self.pair.read
            self.judged.put({name: read(name)})
            self.pair.release(name)

    def _embedded(self, streams: list[frozenset[str]]) -> dict[bool, HiddenStates]:
        """What the first block is given, by whether the reference's embedding is used; both where one is exchanged."""
        ids = self.windows.ids
        found = {False: self.judged.embed(ids)}  # also finds how blocks are called
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
        """True where the logits come from the reference's head."""
        head = self.head_names
        return bool(exchanged & head) != self.reverse or bool(head & self.repaired)

    @property
    def head_names(self) -> frozenset[str]:
        """The stored tensor of the output head; the embedding where it is tied."""
        architecture = self.pair.architecture
        outside = {f"{each.name}.weight" for each in architecture.linears.values() if each.block is None}
        heads = {name for name in outside | set(architecture.tied) if name.split(".")[-2] in HEADS}
        return frozenset(architecture.tied.get(name, name) for name in heads)

    def _block_of(self, name: str) -> int:
        block = self.pair.architecture.block_of(name)
        if block is not None:
            return block
        return 0 if name in self._embedding else self.blocks


def through_last_norm(runner: BlockRunner, states: HiddenStates, ids: Tensor) -> Tensor:
    """What the head multiplies, [windows, T, H], written over the states unless their width differs (OPT)."""
    kept, start = states.values, 0
    tokens = ids.shape[1]
    for x in runner.head_inputs(ids, states):
        if start == 0 and x.shape[-1] != kept.shape[2]:
            kept = runner.new_states((len(ids), tokens, x.shape[-1])).values
        stop = start + len(x) // tokens
        kept[start:stop] = x.reshape(stop - start, tokens, -1)
        start = stop
    return kept
