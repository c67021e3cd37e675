"""Windows of text through one block, stage by stage, in one or two streams.

    quantized    hidden states behind rounded blocks: what the statistics are taken from
    unquantized  hidden states of the model as it was, where the difference of the two is wanted (`drift`)

When the inputs of a stage are measured, everything before it is rounded already. What a child of the block put out is
kept (`calibrate/stages.py`), so that a block of the usual shape costs one forward pass in each stream:

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

import torch
from torch import Tensor, nn

from lowbit.calibrate.block_modules import AllSeen, BlockInput, observed
from lowbit.calibrate.blocks import BlockRunner, batches_of
from lowbit.calibrate.hidden_states import HiddenStates
from lowbit.calibrate.stages import ChildOutputs, Stage, find_idle, find_stages, idle
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
    """The passes through one loaded block; make it before any weight of the block is replaced.

    stages  in the order in which they are to be measured and rounded
    """

    @torch.no_grad()
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
        self.stages = find_stages(self.block, self._one_window)
        self._idle = find_idle(self.block, self.stages, self._one_window)
        self._children = dict.fromkeys(stage.child for stage in self.stages)
        # The weights as they were, for the unquantized stream.
        self._original = None if streams.unquantized is None else copy.deepcopy(self.block.module)
        self._kept: dict[tuple[str, bool], ChildOutputs] = {}
        self._rewritten: set[str] = set()

    def _one_window(self) -> Tensor:
        return self._runner.forward(self._index, self._streams.quantized.values[:1])

    @torch.no_grad()
    def measure(self, stage: Stage, tick: Tick, compare: bool = True) -> dict[str, LayerStats]:
        """Statistics of the inputs of a stage by name; those that no token reached are absent.

        compare  with the unquantized stream, where there is one; stages are compared once, in their order
        """
        original = self._original if compare else None
        keeper = None if original is None else InputKeeper()
        statistics = InputStatistics(self._runner.dtype, self._channels, keeper)
        visitor = _Keeping(statistics, self._keep_input(stage))
        with ExitStack() as stack:
            if keeper is not None and original is not None:
                # The last stage of a child goes on to the child's end, except where `advance` will have to do it.
                stops = not stage.last or (self._ends(stage) and bool(self._rewritten))
                stack.enter_context(observed(self.block, original, keeper, stage.inputs, stops))
            seen = observed(self.block, self.block.module, visitor, stage.inputs, True, self._all_experts)
            stack.enter_context(seen)
            for batch in batches_of(self._streams.ids):
                visitor.batch = batch
                compared = original is not None and batch.start < self._streams.compared
                if compared:
                    self._unquantized(stage, batch)
                with self._behind(self.block.module, stage.child, False, batch), suppress(AllSeen):
                    self._runner.forward(self._index, self._streams.quantized.values[batch])
                if compared and batch.stop >= self._streams.compared:
                    statistics.end_of_unquantized()
                tick(batch.stop - batch.start)
        return statistics.take()

    def transformed(self, values: dict[str, Tensor]) -> None:
        """Stored tensors that transforms rewrote: in the unquantized stream too, since its inputs are compared."""
        if self._original is not None:
            self._runner.put_into(self._original, self._index, values)
            self._rewritten |= values.keys()

    def forget(self) -> None:
        """Weights have changed that had been rounded: nothing that was kept behind them holds."""
        self._forget(unquantized=False)

    def _forget(self, unquantized: bool) -> None:
        self._kept = {key: outputs for key, outputs in self._kept.items() if key[1] != unquantized}

    @torch.no_grad()
    def advance(self, tick: Tick, read: Callable[[str], Tensor]) -> None:
        """Both streams go on to the next block.

        read  stored name → its values as they were: what transforms rewrote rounds otherwise in the compute dtype, and
              the unquantized stream must not depend on it, or a resumed run could not repeat it
        """
        states = self._streams.quantized.values
        if self._original is not None and self._rewritten:
            self._runner.put_into(self._original, self._index, {name: read(name) for name in self._rewritten})
            self._forget(unquantized=True)
        for batch in batches_of(self._streams.ids):
            with self._behind(self.block.module, None, False, batch):
                states[batch] = self._runner.forward(self._index, states[batch])
            if self._rewritten and batch.start < self._streams.compared:
                self._advance_unquantized(batch)
            tick(batch.stop - batch.start)

    def _advance_unquantized(self, batch: slice) -> None:
        assert self._original is not None
        assert self._streams.unquantized is not None
        states = self._streams.unquantized.values
        with self._behind(self._original, None, True, batch):
            states[batch] = self._runner.forward(self._index, states[batch], self._original)

    def _unquantized(self, stage: Stage, batch: slice) -> None:
        """One batch of the other stream up to the inputs of a stage; for the last one of a child, through the child."""
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
            out = self._runner.forward(self._index, states[batch], self._original)
            if self._ends(stage):  # not reached where that is for `advance` to do
                states[batch] = out

    def _ends(self, stage: Stage) -> bool:
        """True where the block has nothing behind it."""
        return stage.last and stage.child == list(self._children)[-1]

    @contextmanager
    def _behind(self, module: nn.Module | None, child: str | None, unquantized: bool, batch: slice) -> Iterator[None]:
        """Inside, children before `child` (all, for None) put out what was kept, or compute it and it is kept."""
        assert module is not None
        with ExitStack() as stack:
            computed = child  # the first that computes
            for stage in reversed(self._before(child)):
                outputs = self._outputs(stage, unquantized)
                computed = computed if outputs.has(batch) else stage.child
                records = child is not None  # nothing of this block is wanted behind it
                part = module.get_submodule(stage.child)
                stack.enter_context(outputs.standing_in(part, batch, self._runner.device, records))
            stack.enter_context(idle(module, self._idle[computed]))
            yield

    def _before(self, child: str | None) -> list[Stage]:
        """The last stages of the children before one, or of all."""
        children = list(self._children)
        wanted = children if child is None else children[: children.index(child)]
        return [stage for stage in self.stages if stage.last and stage.child in wanted]

    def _keep_input(self, stage: Stage) -> Callable[[slice, Tensor], None] | None:
        """What to do with the input of a linear that its child ends in."""
        if stage.end is None:
            return None
        end, outputs = self.block.module.get_submodule(stage.end), self._outputs(stage, False)
        return lambda batch, x: outputs.keep_input(end, batch, x)

    def _outputs(self, stage: Stage, unquantized: bool) -> ChildOutputs:
        key = (stage.child, unquantized)
        if key not in self._kept:
            tokens = self._streams.quantized.values.shape[1]
            windows = self._streams.compared if unquantized else len(self._streams.ids)
            runner = self._runner  # not `self`, which holds these: a circle is freed late

            def room(width: int, may_spill: bool) -> Tensor | None:
                shape = (windows, tokens, width)
                return runner.new_states(shape).values if may_spill or runner.has_room(shape) else None

            self._kept[key] = ChildOutputs(stage.form, room)
        return self._kept[key]


class _Keeping:
    """A `BlockVisitor` that shows everything to another one, and keeps it for later where that is wanted."""

    def __init__(self, visitor: InputStatistics, keep: Callable[[slice, Tensor], None] | None):
        self._visitor, self._keep = visitor, keep
        self.batch = slice(0)

    def look(self, source: BlockInput, x: Tensor) -> None:
        self._visitor.look(source, x)
        if self._keep is not None:
            self._keep(self.batch, x)

    def finish(self, block: int) -> None:
        pass


@torch.no_grad()
def run_through(runner: BlockRunner, index: int, states: HiddenStates, ids: Tensor) -> None:
    """One stream through a loaded block, nobody looking."""
    for batch in batches_of(ids):
        states.values[batch] = runner.forward(index, states.values[batch])
