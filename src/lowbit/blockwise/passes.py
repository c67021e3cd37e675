"""Windows of text through one block, stage by stage, in one or two streams.

    quantized    hidden states behind rounded blocks: what the statistics are taken from
    unquantized  hidden states of the model as it was, where the difference of the two is wanted (`cross`)

A stage is a child of the block (attention, then MLP). When its inputs are measured, the stages before it are rounded
already. What they put out is computed once with their rounded weights and kept (`ChildOutputs`), so that a block costs
about two forward passes in the quantized stream and one in the other:

    measure(0)   attention up to the input of o_proj
    measure(1)   attention, rounded, and the MLP up to the input of down_proj
    advance()    the MLP, rounded, behind what attention put out
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn

from lowbit.calibrate.block_modules import ChildOutputs, StageDone, observed
from lowbit.calibrate.blocks import BlockRunner, batches_of
from lowbit.calibrate.hidden_states import HiddenStates
from lowbit.calibrate.statistics import InputKeeper, InputStatistics
from lowbit.tensors import LayerStats

Tick = Callable[[int], None]  # called with the number of windows that went on


class Streams:
    """Hidden states of all windows in front of a block; of the unquantized model those of the first `compared` windows,
    whole batches of them."""

    def __init__(self, runner: BlockRunner, ids: Tensor, compared: int):
        self.ids = ids
        self.quantized = runner.embed(ids)
        self.unquantized = None
        self.compared = next((batch.stop for batch in batches_of(ids) if batch.stop >= compared), len(ids))
        if compared:
            values = self.quantized.values[: self.compared]
            self.unquantized = runner.new_states((self.compared, values.shape[1], values.shape[2]))
            self.unquantized.values.copy_(values)

    @property
    def all(self) -> list[Tensor]:
        return [states.values for states in (self.quantized, self.unquantized) if states is not None]


class BlockPasses:
    """The passes through one loaded block; make it before any weight of the block is replaced."""

    def __init__(
        self,
        runner: BlockRunner,
        index: int,
        streams: Streams,
        all_experts: bool = False,
        channels: bool = True,
    ):
        self._runner, self._index, self._streams = runner, index, streams
        self._all_experts, self._channels = all_experts, channels
        self.block = runner.blocks[index]
        self.stages = self.block.stages
        # The weights as they were, for the unquantized stream.
        self._original = None if streams.unquantized is None else copy.deepcopy(self.block.module)
        self._kept: dict[tuple[int, bool], ChildOutputs] = {}

    @torch.no_grad()
    def measure(self, number: int, tick: Tick) -> dict[str, LayerStats]:
        """Statistics of the inputs of a stage by name; those that no token reached are absent."""
        stage = self.stages[number]
        keeper = InputKeeper() if self._original is not None else None
        visitor = InputStatistics(self._runner.dtype, self._channels, keeper)
        with ExitStack() as stack:
            if keeper is not None and self._original is not None:
                stack.enter_context(observed(self.block, self._original, keeper, stage))
            seen = observed(self.block, self.block.module, visitor, stage, True, self._all_experts)
            stack.enter_context(seen)
            for batch in batches_of(self._streams.ids):
                compared = self._original is not None and batch.start < self._streams.compared
                if compared:
                    self._unquantized(number, batch)
                with self._going_on(self.block.module, number - 1, False, batch), suppress(StageDone):
                    self._runner.forward(self._index, self._streams.quantized.values[batch])
                if compared and batch.stop >= self._streams.compared:
                    visitor.end_of_unquantized()
                tick(batch.stop - batch.start)
        return visitor.take()

    @torch.no_grad()
    def advance(self, tick: Tick) -> None:
        """The quantized stream goes on to the next block; the other one has done so with the last stage."""
        states = self._streams.quantized.values
        for batch in batches_of(self._streams.ids):
            with self._going_on(self.block.module, len(self.stages) - 1, False, batch, records=False):
                states[batch] = self._runner.forward(self._index, states[batch])
            tick(batch.stop - batch.start)

    def _unquantized(self, number: int, batch: slice) -> None:
        """One batch of the other stream: through this stage and no further, but for the last one."""
        assert self._original is not None
        assert self._streams.unquantized is not None
        states = self._streams.unquantized.values
        last = number == len(self.stages) - 1
        with self._going_on(self._original, number, True, batch, records=not last), suppress(StageDone):
            behind = self._runner.forward(self._index, states[batch], self._original)
            if last:
                states[batch] = behind

    @contextmanager
    def _going_on(
        self, module: nn.Module, computed: int, unquantized: bool, batch: slice, records: bool = True
    ) -> Iterator[None]:
        """Inside, children before stage `computed` replay what they put out, and that one records it."""
        with ExitStack() as stack:
            for number, stage in enumerate(self.stages[: computed + 1]):
                child = module.get_submodule(stage.child)
                if number < computed:
                    kept = self._kept[number, unquantized]
                    stack.enter_context(kept.replaying(child, batch, self._runner.device))
                elif records:
                    stack.enter_context(self._outputs(number, unquantized).recording(child, batch, stops=unquantized))
            yield

    def _outputs(self, number: int, unquantized: bool) -> ChildOutputs:
        key = (number, unquantized)
        if key not in self._kept:
            tokens = self._streams.quantized.values.shape[1]
            windows = self._streams.compared if unquantized else len(self._streams.ids)
            new_states = self._runner.new_states  # not `self`, which holds these: a circle is freed late
            self._kept[key] = ChildOutputs(lambda width: new_states((windows, tokens, width)).values)
        return self._kept[key]


@torch.no_grad()
def run_through(runner: BlockRunner, index: int, states: HiddenStates, ids: Tensor) -> None:
    """One stream through a loaded block, nobody looking."""
    for batch in batches_of(ids):
        states.values[batch] = runner.forward(index, states.values[batch])
