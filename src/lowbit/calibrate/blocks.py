"""Forward passes with one decoder block in memory at a time, and somebody looking at the inputs of its linears.

The model is transformers' own, on the meta device. Its decoder runs with stand-ins in place of the blocks, which gives
the embedded tokens and the arguments that each block is called with (masks and positions differ between full and
sliding attention). Then

    for each block:  read its weights · run all windows through it · drop its weights

with the hidden states of all windows kept between blocks. What it takes is therefore: one block in the compute dtype,
once the embeddings, and the hidden states, which go to a file above a bound (`HiddenStates`).

Linears that read the same input (q, k and v) are seen as one `BlockInput`. The experts of a block, which transformers
computes in one fused operation, are run one by one (`experts.py`) and have inputs of their own.

Refused: a model type without a row in the table of families, experts that do not describe themselves, and blocks whose
arguments depend on the tokens (they are captured once per batch size).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowbit.architecture.discover import describe, find_family
from lowbit.architecture.disk_layout import disk_layout
from lowbit.architecture.loading import Loader
from lowbit.architecture.structure import Linear, Placement
from lowbit.calibrate.experts import is_described, run_experts
from lowbit.calibrate.hidden_states import HiddenStates
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import ArchitectureError

# Tokens that go through a block at once: enough for the matrix products, few enough for the caches.
BATCH_TOKENS = 2048
MAX_MEMORY = 1 << 30

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BlockInput:
    """One distinct input of a block.

    name     as the table of families has it: model.layers.3.attention_input
    linears  those that read it, in the order of the table; all of one expert, or of none
    """

    name: str
    linears: tuple[Linear, ...]


class BlockVisitor(Protocol):
    """Who looks. Called in order: every input of a block for every batch of windows, then `finish`, block by block."""

    def look(self, source: BlockInput, x: Tensor) -> None:
        """x [tokens, K] in the compute dtype: what the linears of `source` multiply. Experts see their tokens only."""
        ...

    def finish(self, block: int) -> None:
        """All windows have gone through the block; its weights are still there."""
        ...


@dataclass(frozen=True)
class _Call:
    """How a block is called, but for the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass
class _Block:
    """inputs   module whose input is seen → what that is
    experts  module of fused experts → (expert, "input" or "hidden") → what that is"""

    name: str
    module: nn.Module
    inputs: dict[nn.Module, BlockInput]
    experts: dict[nn.Module, dict[tuple[int, str], BlockInput]]


class BlockRunner:
    """Runs windows of tokens through a checkpoint, block by block.

    inputs  every distinct input of every block
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        options: OpenOptions | None = None,
        max_memory: int = MAX_MEMORY,
    ):
        family = find_family(checkpoint.config(), checkpoint.source)
        self._loader = Loader(checkpoint, dtype, device, options)
        self._dtype, self._device, self._max_memory = dtype, device, max_memory
        self._returns_tuples = False
        self.model = self._loader.model
        # One by one, also where the files store experts fused: whoever looks wants each one's inputs.
        self.architecture = describe(self.model, family, split_experts=True)
        layout = disk_layout(self.model, family, split_experts=True)
        self._blocks = _find_blocks(self.model, self.architecture.linears, layout, len(self.architecture.blocks))
        self._decoder = self.model.get_submodule(self._blocks[0].name.rsplit(".", 2)[0])
        self.inputs: list[BlockInput] = [
            source
            for block in self._blocks
            for source in (*block.inputs.values(), *(one for each in block.experts.values() for one in each.values()))
        ]

    def run(self, ids: Tensor, visitor: BlockVisitor, progress: Progress | None = None) -> HiddenStates:
        """Run windows, int64 [windows, tokens], through all blocks; the hidden states behind the last one."""
        batches = _batches(ids)
        total = len(self._blocks) * len(ids)
        with torch.inference_mode():
            states, calls = self._embed(ids, batches)
            for index, block in enumerate(self._blocks):
                self._loader.fill(_below(block.name))
                with _observed(block, visitor):
                    for batch in batches:
                        call = calls[batch.stop - batch.start][index]
                        x = states.values[batch].to(self._device)
                        output = block.module(x, *call.arguments, **call.keywords)
                        self._returns_tuples = isinstance(output, tuple)
                        states.values[batch] = output[0] if isinstance(output, tuple) else output
                        if progress is not None:
                            progress(block.name, index * len(ids) + batch.stop, total)
                    visitor.finish(index)
                self._loader.drop(_below(block.name))
        return states

    def head_inputs(self, ids: Tensor, states: HiddenStates) -> Iterator[Tensor]:
        """What the output head multiplies, [tokens, H] of some windows at a time; `states` come from `run`."""
        self._loader.fill(self._is_outside)
        with torch.inference_mode():
            for batch in _batches(ids):
                behind = states.values[batch].to(self._device)
                # The decoder takes from the last block what it puts behind it; the others need not compute anything.
                with _standing_in(self._blocks, lambda index, call, behind=behind: self._as_returned(behind)):
                    out = self._decoder(input_ids=ids[batch].to(self._device), use_cache=False)
                yield out.last_hidden_state.reshape(-1, out.last_hidden_state.shape[-1])
        self._loader.drop(self._is_outside)

    def _embed(self, ids: Tensor, batches: list[slice]) -> tuple[HiddenStates, dict[int, list[_Call]]]:
        """(hidden states before the first block, windows per batch → how each block is called)."""
        self._loader.fill(self._is_outside)
        calls: dict[int, list[_Call]] = {}
        states = None
        for batch in batches:
            hidden, found = self._capture(ids[batch])
            if states is None:
                shape = (ids.shape[0], ids.shape[1], hidden.shape[-1])
                states = HiddenStates(shape, self._dtype, self._max_memory)
            states.values[batch] = hidden
            if len(hidden) not in calls:
                _, others = self._capture(ids[batch].flip(1))
                _check_same(found, others, type(self.model).__name__)
                calls[len(hidden)] = found
        assert states is not None, "there is at least one window"
        self._loader.drop(self._is_outside)
        return states, calls

    def _capture(self, ids: Tensor) -> tuple[Tensor, list[_Call]]:
        """(what the first block is given, how each block is called)."""
        first: list[Tensor] = []
        calls: list[_Call] = []

        def stand_in(index: int, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
            arguments, keywords = call
            first.append(arguments[0])
            calls.append(_Call(arguments[1:], keywords))
            if index == len(self._blocks) - 1:
                raise _Captured
            return arguments[0]

        with _standing_in(self._blocks, stand_in):
            try:
                self._decoder(input_ids=ids.to(self._device), use_cache=False)
            except _Captured:
                return first[0], calls
        raise ArchitectureError(f"{type(self.model).__name__} does not run its decoder blocks one after another")

    def _is_outside(self, name: str) -> bool:
        """Parameters of the decoder that are in no block: embeddings and norms."""
        decoder = self._blocks[0].name.rsplit(".", 2)[0] + "."
        blocks = self._blocks[0].name.rpartition(".")[0] + "."
        return name.startswith(decoder) and not name.startswith(blocks)

    def _as_returned(self, hidden: Tensor) -> Any:
        return (hidden,) if self._returns_tuples else hidden


class _Captured(Exception):
    """Everything that was wanted of a forward pass is known."""


def _batches(ids: Tensor) -> list[slice]:
    windows, tokens = ids.shape
    step = max(1, BATCH_TOKENS // tokens)
    return [slice(start, min(start + step, windows)) for start in range(0, windows, step)]


def _below(name: str) -> Callable[[str], bool]:
    return lambda parameter: parameter.startswith(name + ".")


@contextmanager
def _standing_in(blocks: list[_Block], stand_in: Callable[[int, Any], Any]) -> Iterator[None]:
    """Inside, calling block i calls stand_in(i, (arguments, keywords))."""
    for index, block in enumerate(blocks):
        block.module.forward = partial(lambda i, *args, **kwargs: stand_in(i, (args, kwargs)), index)
    try:
        yield
    finally:
        for block in blocks:
            del block.module.forward


@contextmanager
def _observed(block: _Block, visitor: BlockVisitor) -> Iterator[None]:
    """Inside, the visitor sees the inputs of the block."""
    with ExitStack() as stack:
        for module, source in block.inputs.items():
            stack.enter_context(_hooked(module, source, visitor))
        for module, sources in block.experts.items():
            module.forward = partial(run_experts, module, partial(_look_at_expert, sources, visitor))
            stack.callback(delattr, module, "forward")
        yield


@contextmanager
def _hooked(module: nn.Module, source: BlockInput, visitor: BlockVisitor) -> Iterator[None]:
    def look(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        visitor.look(source, arguments[0].reshape(-1, arguments[0].shape[-1]))

    handle = module.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _look_at_expert(
    sources: dict[tuple[int, str], BlockInput], visitor: BlockVisitor, expert: int, which: str, x: Tensor
) -> None:
    visitor.look(sources[expert, which], x)


def _find_blocks(
    model: nn.Module, linears: dict[str, Linear], layout: dict[str, Placement], count: int
) -> list[_Block]:
    """The decoder blocks as transformers has them, and where the inputs of their linears can be seen."""
    shared: dict[str, list[Linear]] = {}
    for linear in linears.values():
        if linear.reads is not None:
            shared.setdefault(linear.reads, []).append(linear)
    inputs = {name: BlockInput(name, tuple(readers)) for name, readers in shared.items()}
    blocks: dict[int, _Block] = {}
    seen: set[str] = set()
    for parameter, placement in layout.items():
        for stored, part, expert in placement.pieces():
            linear = linears.get(stored.removesuffix(".weight"))
            if linear is None or linear.block is None or linear.reads is None or not stored.endswith(".weight"):
                continue
            block = blocks.setdefault(linear.block, _block_around(model, parameter, linear.block))
            owner = model.get_submodule(parameter.rpartition(".")[0])
            source = inputs[linear.reads]
            if expert is not None:
                which = "hidden" if parameter.endswith(".down_proj") else "input"
                block.experts.setdefault(_described(owner, linear), {})[expert, which] = source
            elif part.whole and source.name not in seen:
                block.inputs[owner] = source
                seen.add(source.name)
    return [blocks[index] for index in range(count)]


def _block_around(model: nn.Module, parameter: str, index: int) -> _Block:
    """The block that a parameter lies in: the first number in its name that is the block's, in a list of modules."""
    for match in re.finditer(rf"\.{index}(?=\.)", parameter):
        if isinstance(model.get_submodule(parameter[: match.start()]), nn.ModuleList):
            name = parameter[: match.end()]
            return _Block(name, model.get_submodule(name), {}, {})
    raise ArchitectureError(f"{parameter} lies in no list of decoder blocks")


def _described(experts: nn.Module, linear: Linear) -> nn.Module:
    if not is_described(experts):
        raise ArchitectureError(
            f"{linear.name} runs inside {type(experts).__name__}, an operation of transformers that does not say how "
            f"it computes; its input cannot be measured"
        )
    return experts


def _check_same(calls: list[_Call], others: list[_Call], model: str) -> None:
    """ArchitectureError where what blocks are given beside the hidden states depends on the tokens."""
    for call, other in zip(calls, others, strict=True):
        leaves, other_leaves = (tree_leaves((each.arguments, each.keywords)) for each in (call, other))
        pairs = zip(leaves, other_leaves, strict=True)
        if any(isinstance(one, Tensor) and not torch.equal(one, two) for one, two in pairs):
            raise ArchitectureError(f"{model} gives its blocks more of the tokens than their hidden states")
