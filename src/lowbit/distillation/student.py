"""The quantized model while it learns: one decoder block in memory at a time, and the exact gradient through all of it.

    forward    x₀ → block 1 → … → block L          keeps the input of every block, no graph
    backward   block L … 1                         runs the block again from its input, with a graph, and hands the
                                                   gradient of its input to the block before

So memory is that of one block with its gradients, beside the inputs of blocks for the windows of one step. A block's
weights are decoded from codes and changes each time it is loaded. Gradients of weights become gradients of changes at
once, block by block, and are freed. A model that fits is kept loaded (`resident`), which saves reading it twice a step,
and one whose graphs fit too runs forward only once (`graphs`). All three compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.calibrate.blocks import BlockRunner, HiddenStates, batches_of
from lowbit.numerics.hadamard import Rotation
from lowbit.rounding.learnable import Learnable

# Name of a stored tensor → parameter → relative change, or the gradient in it.
Changes = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class LearnedTensor:
    """A learnable tensor of the model.

    turned  the file has the transposed weight
    online  rotation V of the input by the engine: what is learned is W V, and the model has W
    """

    learnable: Learnable
    turned: bool = False
    online: Rotation | None = None

    def decoded(self, changes: dict[str, Tensor]) -> Tensor:
        """What the model has after these changes, in the file's orientation."""
        values = self.learnable.decoded(changes)
        values = values if self.online is None else self.online.back(values)
        return values.t() if self.turned else values

    def gradients(self, changes: dict[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
        """Of the changes, from that of what the model has."""
        values = gradient.t() if self.turned else gradient
        return self.learnable.gradients(changes, values if self.online is None else self.online.columns(values))


# Of each block, then of what lies behind the last: stored name → the tensor, opened when it is needed.
Parts = Sequence[Mapping[str, Callable[[], LearnedTensor]]]


# Of one block, for every batch of windows: its input, and its output with the graph, or None where it is run again.
Kept = list[tuple[Tensor, Tensor | None]]


class Student:
    """
    runner    of a checkpoint with everything that is not learned
    ids       int64 [windows, tokens]
    parts     an entry per block, and one for the last norm; linears that cannot change are among them too
    resident  keep all blocks loaded
    graphs    keep the graphs of all blocks of a step, so that none is run twice; only with `resident`
    """

    def __init__(self, runner: BlockRunner, ids: Tensor, parts: Parts, resident: bool, graphs: bool = False):
        assert len(parts) == len(runner.blocks) + 1
        self.runner, self.ids, self.parts = runner, ids, parts
        self.resident, self.keeps_graphs = resident, resident and graphs
        self._states: HiddenStates = runner.embed(ids)
        runner.load_outside()
        runner.watch(parts[-1])
        self._loaded: set[int] = set()

    def start(self) -> Changes:
        """No change of anything; opens every tensor once."""
        found: Changes = {}
        for part in self.parts:
            found |= {name: changes for name, open_one in part.items() if (changes := open_one().learnable.start())}
        return found

    @torch.no_grad()
    def prepare(self, changes: Changes) -> None:
        """Decode what stays loaded; call it whenever changes were made."""
        self._put(len(self.parts) - 1, changes)
        if self.resident:
            for index in range(len(self.runner.blocks)):
                self._load(index)
                self._put(index, changes)

    def embedded(self, windows: Tensor, changes: Changes) -> Tensor:
        """The input of the first block, [len(windows), T, H]."""
        return self._states.values[windows]

    @torch.no_grad()
    def forward(self, windows: Tensor, changes: Changes) -> Tensor:
        """Hidden states [len(windows), T, H] behind the last block."""
        x = self.embedded(windows, changes)
        for index in range(len(self.runner.blocks)):
            self._enter(index, changes)
            x = torch.cat([self.runner.forward(index, x[batch]) for batch in batches_of(x)])
            self._leave(index)
        return x

    def forward_kept(self, windows: Tensor, changes: Changes) -> tuple[list[Kept], Tensor]:
        """(what `backward` needs of every block, hidden states behind the last one)."""
        x, kept = self.embedded(windows, changes), list[Kept]()
        for index in range(len(self.runner.blocks)):
            self._enter(index, changes)
            before = [x[batch].clone().requires_grad_(self.keeps_graphs) for batch in batches_of(x)]
            with torch.set_grad_enabled(self.keeps_graphs):
                behind = [self.runner.forward(index, part) for part in before]
            x = torch.cat([part.detach() for part in behind])
            kept.append([(part, out if self.keeps_graphs else None) for part, out in zip(before, behind, strict=True)])
            self._leave(index)
        return kept, x

    def backward(self, kept: list[Kept], gradient: Tensor, changes: Changes, found: Changes) -> Tensor:
        """Add the gradients in all changes of blocks to `found`; takes from `kept` what it used. Returns the gradient
        of the input of the first block.

        kept      of `forward_kept`
        gradient  of the hidden states behind the last block
        """
        for index in reversed(range(len(self.runner.blocks))):
            self._enter(index, changes)
            passed = torch.empty_like(gradient)
            for batch, (x, y) in zip(batches_of(gradient), kept.pop(), strict=True):
                if y is None:
                    x.requires_grad_()
                    with torch.enable_grad():
                        y = self.runner.forward(index, x)
                y.backward(gradient[batch])
                assert x.grad is not None
                passed[batch] = x.grad
            gradient = passed
            self.collect(index, changes, found)
            self._leave(index)
        return gradient

    def collect(self, index: int, changes: Changes, found: Changes) -> None:
        """Turn the gradients that the tensors of a part hold into gradients of their changes."""
        for name, of_tensor in self.runner.take_gradients(self._learned(index, changes)).items():
            one = self.parts[index][name]()
            for parameter, gradient in one.gradients(changes[name], of_tensor).items():
                found[name][parameter] += gradient

    def _learned(self, index: int, changes: Changes) -> set[str]:
        return {name for name in self.parts[index] if name in changes}

    def _enter(self, index: int, changes: Changes) -> None:
        if not self.resident:
            self._load(index)
            self._put(index, changes)

    def _leave(self, index: int) -> None:
        if not self.resident:
            self.runner.drop(index)
            self._loaded.discard(index)

    def _load(self, index: int) -> None:
        if index not in self._loaded:
            self.runner.load(index)
            self.runner.watch(self.parts[index])
            self._loaded.add(index)

    @torch.no_grad()
    def _put(self, index: int, changes: Changes) -> None:
        for name, open_one in self.parts[index].items():
            self.runner.put({name: open_one().decoded(changes.get(name, {}))})
