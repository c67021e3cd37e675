"""Windows of text through one block, stage by stage, in one or two streams.

    quantized    hidden states after rounded blocks; the statistics come from these
    unquantized  hidden states of the original model, for methods that use the difference of the two (`drift`)

When a stage is measured, everything before it is rounded already. The outputs of children are kept
(`calibrate/stages.py`), so that a block of the usual shape costs one forward pass in each stream:

    measure(q, k, v)     the norm
    measure(o)           q, k, v, rounded, and attention
    measure(gate, up)    o, rounded, and the norm
    measure(down)        gate and up, rounded
    advance()            down, rounded
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn

from lowbit.calibrate.block_modules import AllSeen, observed
from lowbit.calibrate.blocks import BlockRunner, HiddenStates, batches_of
from lowbit.calibrate.gradients import TokenWeights
from lowbit.calibrate.stages import ChildOutputs, Stage, added_to_stream, find_idle, find_stages, replaced_forward
from lowbit.calibrate.statistics import InputKeeper, InputStatistics
from lowbit.checkpoint.base import Checkpoint
from lowbit.tensors import LayerStats

Tick = Callable[[int], None]  # called with the number of windows done


class Streams:
    """Hidden states of all windows before a block, and those of the unquantized model for the first `compared` windows,
    rounded up to whole batches."""

    def __init__(self, runner: BlockRunner, ids: Tensor, compared: int, present: Checkpoint | None = None):
        """present: a finished model that refinement starts from, whose embedding the quantized stream has"""
        self.ids = ids
        self.quantized = runner.embed(ids) if present is None else runner.embed(ids, present)
        self.unquantized = None
        self.compared = next((batch.stop for batch in batches_of(ids) if batch.stop >= compared), len(ids))
        if compared:
            if present is not None:
                self.unquantized = runner.embed(ids[: self.compared])
                return
            values = self.quantized.values[: self.compared]
            self.unquantized = runner.new_states((self.compared, values.shape[1], values.shape[2]))
            self.unquantized.values.copy_(values)

    @property
    def all(self) -> list[Tensor]:
        return [states.values for states in (self.quantized, self.unquantized) if states is not None]


class BlockPasses:
    """The passes through one loaded block; create it before replacing any weight of the block.

    stages     in the order to measure and round them
    shrinkage  of the Hessians that the differences between the streams are foretold by
    lost       measure what the residual stream has lost too, where an output is added to it
    """

    @torch.no_grad()
    def __init__(self, runner: BlockRunner, index: int, streams: Streams, all_experts: bool = False,
                 channels: bool = True, shrinkage: float = 0.0, lost: bool = True):  # fmt: skip
        self._runner, self._index, self._streams = runner, index, streams
        self._all_experts, self._channels, self._shrinkage = all_experts, channels, shrinkage
        self.block = runner.blocks[index]

        def one_window() -> Tensor:
            return runner.forward(index, streams.quantized.values[:1], batch=slice(0, 1))

        def one_batch() -> Tensor:
            batch = batches_of(streams.ids)[0]
            return runner.forward(index, streams.quantized.values[batch], batch=batch)

        usual = runner.axes.usual
        self.stages = find_stages(self.block, one_window, None if usual else one_batch)
        self._idle = find_idle(self.block, self.stages, one_window)
        self._children = dict.fromkeys(stage.child for stage in self.stages)
        self._added: tuple[str, ...] = ()  # children whose output is added to the residual stream
        if lost and usual and streams.unquantized is not None:
            h = streams.quantized.values[:1].to(runner.device)
            self._added = added_to_stream(self.block, self.stages, h, one_window)
        # The original weights, for the unquantized stream.
        self._original = None if streams.unquantized is None else copy.deepcopy(self.block.module)
        self._kept: dict[tuple[str, bool], ChildOutputs] = {}
        self._rewritten: set[str] = set()

    @torch.no_grad()
    def measure(
        self, stage: Stage, tick: Tick, compare: bool = True, weights: TokenWeights | None = None
    ) -> dict[str, LayerStats]:
        """Statistics of the inputs of a stage by name, without inputs that no token reached.

        compare  with the unquantized stream, if there is one; each stage is compared once, in order
        weights  of the tokens, for the Hessians of the linears that have any
        """
        original = self._original if compare else None
        keeper = None if original is None else InputKeeper()
        statistics = InputStatistics(self._runner.dtype, self._channels, keeper, self._shrinkage)
        batches = batches_of(self._streams.ids)
        batch = batches[0]
        if stage.end is not None:  # keep the input of the child's last linear
            end, outputs = self.block.module.get_submodule(stage.end), self._outputs(stage, False)
            statistics.keep = lambda x: outputs.keep_input(end, batch, x)
        with ExitStack() as stack:
            if keeper is not None and original is not None:
                # The last stage of a child runs to the child's end, unless `advance` has to do that.
                stops = not stage.last or (self._ends(stage) and bool(self._rewritten))
                stack.enter_context(observed(self.block, original, keeper, stage.inputs, stops))
            seen = observed(self.block, self.block.module, statistics, stage.inputs, True, self._all_experts)
            stack.enter_context(seen)
            for batch in batches:
                if weights is not None:
                    statistics.weights = partial(weights.of, batch=batch)
                compared = keeper is not None and batch.start < self._streams.compared
                if compared and keeper is not None:
                    keeper.inputs.clear()
                    if stage.end is not None and stage.child in self._added:
                        statistics.lost = partial(self._lost, stage.child, batch, self._input_lost(batch))
                    self._unquantized(stage, batch)
                with self._behind(self.block.module, stage.child, False, batch), suppress(AllSeen):
                    self._runner.forward(self._index, self._streams.quantized.values[batch], batch=batch)
                if compared and batch.stop >= self._streams.compared:
                    statistics.end_of_unquantized()
                tick(batch.stop - batch.start)
        return statistics.take()

    def transformed(self, values: dict[str, Tensor]) -> None:
        """Put the tensors that transforms rewrote into the unquantized stream too, since its inputs are compared."""
        if self._original is not None:
            self._runner.put_into(self._original, self._index, values)
            self._rewritten |= values.keys()

    def forget(self, unquantized: bool = False) -> None:
        """Drop the outputs kept for a stream whose weights changed."""
        self._kept = {key: outputs for key, outputs in self._kept.items() if key[1] != unquantized}

    @torch.no_grad()
    def advance(self, tick: Tick, read: Callable[[str], Tensor]) -> None:
        """Move both streams on to the next block.

        read  stored name → original values. Rewritten tensors round differently in the compute dtype; a resumed run
              could not repeat an unquantized stream that depends on them
        """
        states = self._streams.quantized.values
        if self._original is not None and self._rewritten:
            self._runner.put_into(self._original, self._index, {name: read(name) for name in self._rewritten})
            self.forget(unquantized=True)
        for batch in batches_of(self._streams.ids):
            with self._behind(self.block.module, None, False, batch):
                states[batch] = self._runner.forward(self._index, states[batch], batch=batch)
            if self._original is not None and self._rewritten and batch.start < self._streams.compared:
                assert self._streams.unquantized is not None
                others = self._streams.unquantized.values
                with self._behind(self._original, None, True, batch):
                    others[batch] = self._runner.forward(self._index, others[batch], self._original, batch)
            tick(batch.stop - batch.start)

    def _unquantized(self, stage: Stage, batch: slice) -> None:
        """Run one unquantized batch up to the inputs of a stage, or through the child for its last stage."""
        assert self._original is not None
        assert self._streams.unquantized is not None
        states = self._streams.unquantized.values
        with ExitStack() as stack:
            stack.enter_context(self._behind(self._original, stage.child, True, batch))
            if stage.last and not self._ends(stage):
                child = self._original.get_submodule(stage.child)
                outputs = self._outputs(stage, True)
                stack.enter_context(outputs.standing_in(child, batch, self._runner.device, stops=True))
            stack.enter_context(suppress(AllSeen))
            out = self._runner.forward(self._index, states[batch], self._original, batch)
            if self._ends(stage):  # not reached if `advance` has to do it
                states[batch] = out

    def _input_lost(self, batch: slice) -> Tensor:
        """What the block's input has lost, float32 [windows, tokens, H]."""
        assert self._streams.unquantized is not None
        return self._streams.unquantized.values[batch].float() - self._streams.quantized.values[batch].float()

    def _lost(self, child: str, batch: slice, input_lost: Tensor) -> Tensor:
        """What the residual stream has lost that the output of `child` is added to, float32 [tokens, H]."""
        lost = input_lost
        for stage in self.stages:
            if stage.child == child:
                break
            if stage.last and stage.child in self._added:
                unquantized, quantized = (self._outputs(stage, each).kept(batch) for each in (True, False))
                lost = lost + (unquantized.float() - quantized.float())
        return lost.flatten(0, 1)

    def _ends(self, stage: Stage) -> bool:
        """True for the last stage of the block."""
        return stage.last and stage.child == list(self._children)[-1]

    @contextmanager
    def _behind(self, module: nn.Module | None, child: str | None, unquantized: bool, batch: slice) -> Iterator[None]:
        """Inside, children before `child` (None: all) replay their kept output, or compute and keep it."""
        assert module is not None
        children = list(self._children)
        before = children if child is None else children[: children.index(child)]
        with ExitStack() as stack:
            computed = child  # the first that computes
            for stage in reversed([stage for stage in self.stages if stage.last and stage.child in before]):
                outputs = self._outputs(stage, unquantized)
                computed = computed if outputs.has(batch) else stage.child
                records = child is not None  # without one this is the block's last pass
                part = module.get_submodule(stage.child)
                stack.enter_context(outputs.standing_in(part, batch, self._runner.device, records))
            for name in self._idle[computed]:  # their output is unused, so skip them
                part = module.get_submodule(name)
                stack.enter_context(replaced_forward(part, lambda x, *_arguments, **_keywords: x))
            yield

    def _outputs(self, stage: Stage, unquantized: bool) -> ChildOutputs:
        key = (stage.child, unquantized)
        if key not in self._kept:
            windows = self._streams.compared if unquantized else len(self._streams.ids)
            runner = self._runner  # not `self`: a reference cycle would be freed late

            def room(rows: int, width: int, may_spill: bool) -> Tensor | None:
                shape = (windows, rows, width)
                return runner.new_states(shape).values if may_spill or runner.has_room(shape) else None

            self._kept[key] = ChildOutputs(stage.form, room)
        return self._kept[key]


@torch.no_grad()
def run_through(runner: BlockRunner, index: int, states: HiddenStates, ids: Tensor) -> None:
    """Send one stream through a loaded block without measuring."""
    for batch in batches_of(ids):
        states.values[batch] = runner.forward(index, states.values[batch], batch=batch)
