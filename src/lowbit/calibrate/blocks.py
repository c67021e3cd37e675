"""Forward passes with one decoder block in memory at a time, while a visitor observes the inputs of its linears.

The model is transformers' own, on the meta device. Its decoder first runs with stubs for the blocks, which captures the
embedded tokens and the arguments of each block (masks and positions differ between full and sliding attention). Then

    for each block:  read its weights · run all windows through it · drop its weights

Memory holds one block in the compute dtype, once the embeddings, and the hidden states of all windows, which go to a
file above a bound (`HiddenStates`). `run` does all of this; the calibrated loop, which rewrites weights on the way,
calls the steps itself: `embed`, then `load`, `forward`, `put` and `drop` for each block.

Linears that read the same input (q, k and v) share one `BlockInput`; experts run one by one and have their own.

Refused: experts that do not describe themselves, and blocks whose
arguments depend on the tokens (they are captured once per batch size).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowbit.architecture.cache import discover_once
from lowbit.architecture.discover import decoder_of, find_blocks
from lowbit.architecture.disk_layout import disk_layout
from lowbit.architecture.loading import Loader, module_names
from lowbit.calibrate.block_modules import Block, BlockInput, BlockVisitor, observed, observed_blocks
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import ArchitectureError, OutputError

# Tokens per batch: enough for efficient matrix products, few enough for the caches.
BATCH_TOKENS = 2048
MAX_MEMORY = 1 << 30

Progress = Callable[[str, int, int], None]


class HiddenStates:
    """The activations between two decoder blocks, for every window of a text.

    values   [windows, tokens, width], read and written in place
    spilled  True if they exceed `max_memory` bytes and lie in a mapped, unnamed temporary file (under TMPDIR), of which
             nothing is left however the run ends
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, max_memory: int):
        nbytes = math.prod(shape) * dtype.itemsize
        self.spilled = nbytes > max_memory
        self.values: Tensor = _mapped(shape, dtype, nbytes) if self.spilled else torch.empty(shape, dtype=dtype)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> Tensor:
    try:
        with tempfile.NamedTemporaryFile(prefix="lowbit-hidden-") as file:
            file.truncate(nbytes)
            return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"{nbytes / 1e9:.1f} GB of hidden states cannot be put into {tempfile.gettempdir()}: {error}",
            "name a larger disk with TMPDIR, allow more memory, or take fewer samples",
        ) from error


@dataclass(frozen=True)
class _Call:
    """The arguments of a block, without the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class BlockRunner:
    """Runs windows of tokens through a checkpoint, block by block.

    blocks  in order
    inputs  every distinct input of every block
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu",
        options: OpenOptions | None = None, max_memory: int = MAX_MEMORY,
    ):  # fmt: skip
        options = options or OpenOptions()
        self._loader = Loader(checkpoint, dtype, device, options)
        self.dtype, self.device, self._max_memory = dtype, device, max_memory
        self._returns_tuples = False
        self._calls: dict[int, list[_Call]] = {}
        self.model = self._loader.model
        # Split fused experts too: every expert has inputs of its own.
        folder = str(checkpoint.folder)
        self.architecture = discover_once(checkpoint.config(), folder, options.trust_remote_code, split_experts=True)
        names = find_blocks(self.model)
        layout = disk_layout(self.model, split_experts=True)
        self.blocks = observed_blocks(self.model, names, self.architecture.linears, layout)
        self._decoder_name = decoder_of(self.model, names[0])
        self._decoder = self.model.get_submodule(self._decoder_name)

    @property
    def inputs(self) -> list[BlockInput]:
        return [source for block in self.blocks for source in block.all_inputs]

    def run(self, ids: Tensor, visitor: BlockVisitor | None, progress: Progress | None = None) -> HiddenStates:
        """Run windows, int64 [windows, tokens], through all blocks; returns the last hidden states."""
        total = len(self.blocks) * len(ids)
        with torch.inference_mode():
            states = self.embed(ids)
            for index, block in enumerate(self.blocks):
                self.load(index)
                with nullcontext() if visitor is None else observed(block, block.module, visitor):
                    for batch in batches_of(ids):
                        states.values[batch] = self.forward(index, states.values[batch])
                        if progress is not None:
                            progress(block.name, index * len(ids) + batch.stop, total)
                    if visitor is not None:
                        visitor.finish(index)
                self.drop(index)
        return states

    def embed(self, ids: Tensor) -> HiddenStates:
        """The input of the first block; also captures the arguments of every block, which `forward` needs."""
        self._loader.fill(self._is_outside)
        states = None
        with torch.no_grad():  # not inference mode: sign-SGD runs the captured arguments with gradients
            for batch in batches_of(ids):
                hidden, found = self._capture(ids[batch])
                if states is None:
                    states = self.new_states((ids.shape[0], ids.shape[1], hidden.shape[-1]))
                states.values[batch] = hidden
                if len(hidden) not in self._calls:
                    _, others = self._capture(ids[batch].flip(1))
                    _check_same(found, others, type(self.model).__name__)
                    self._calls[len(hidden)] = found
            if 1 not in self._calls:
                self._calls[1] = self._capture(ids[:1])[1]
        assert states is not None, "there is at least one window"
        self._loader.drop(self._is_outside)
        return states

    def new_states(self, shape: tuple[int, int, int]) -> HiddenStates:
        """Uninitialised [windows, tokens, width] in the compute dtype."""
        return HiddenStates(shape, self.dtype, self._max_memory)

    def has_room(self, shape: tuple[int, int, int]) -> bool:
        """True if [windows, tokens, width] in the compute dtype would stay in memory."""
        return math.prod(shape) * self.dtype.itemsize <= self._max_memory

    def load(self, index: int) -> None:
        """Read the weights of a block."""
        prefix = self.blocks[index].name + "."
        self._loader.fill(lambda parameter: parameter.startswith(prefix))

    def drop(self, index: int) -> None:
        """Free the weights of a block."""
        prefix = self.blocks[index].name + "."
        self._loader.drop(lambda parameter: parameter.startswith(prefix))

    def put(self, values: dict[str, Tensor]) -> None:
        """Replace stored tensors of a loaded block, by stored name, in the file's orientation."""
        self._loader.put(values)

    def put_into(self, copy: nn.Module, index: int, values: dict[str, Tensor]) -> None:
        """The same for a copy of a block's module."""
        prefix = self.blocks[index].name + "."
        self._loader.put(values, lambda name: copy.get_parameter(name.removeprefix(prefix)))

    def linear_module(self, name: str) -> nn.Linear | None:
        """The module that computes a linear by itself; None for experts and for other classes."""
        path = module_names(self.model, self.architecture).get(name)
        module = None if path is None else self.model.get_submodule(path)
        return module if isinstance(module, nn.Linear) else None

    def forward(self, index: int, x: Tensor, module: nn.Module | None = None) -> Tensor:
        """The output of a loaded block, or of a copy of its module, for windows [windows, tokens, H]."""
        if len(x) not in self._calls:  # split into known batch sizes; 1 always is
            size = max(known for known in self._calls if known < len(x))
            return torch.cat([self.forward(index, x[:size], module), self.forward(index, x[size:], module)])
        call = self._calls[len(x)][index]
        block = self.blocks[index].module if module is None else module
        output = block(x.to(self.device), *call.arguments, **call.keywords)
        self._returns_tuples = isinstance(output, tuple)
        return output[0] if isinstance(output, tuple) else output

    def head_inputs(self, ids: Tensor, states: HiddenStates) -> Iterator[Tensor]:
        """The input of the output head, [tokens, H] for a batch of windows at a time; `states` come from `run`."""
        self._loader.fill(self._is_outside)
        with torch.inference_mode():
            for batch in batches_of(ids):
                behind = states.values[batch].to(self.device)
                # Every block stub returns the last hidden states, so that only the decoder's final norm computes.
                returned = (behind,) if self._returns_tuples else behind
                with _standing_in(self.blocks, lambda index, call, returned=returned: returned):
                    out = self._decoder(input_ids=ids[batch].to(self.device), use_cache=False)
                yield out.last_hidden_state.reshape(-1, out.last_hidden_state.shape[-1])
        self._loader.drop(self._is_outside)

    def through_last_norm(self, ids: Tensor, states: HiddenStates) -> HiddenStates:
        """`head_inputs` of all windows, [windows, T, H], written over `states` unless their width differs (OPT)."""
        kept, start, tokens = states, 0, ids.shape[1]
        for x in self.head_inputs(ids, states):
            if start == 0 and x.shape[-1] != states.values.shape[2]:
                kept = self.new_states((len(ids), tokens, x.shape[-1]))
            stop = start + len(x) // tokens
            kept.values[start:stop] = x.reshape(stop - start, tokens, -1)
            start = stop
        return kept

    def _capture(self, ids: Tensor) -> tuple[Tensor, list[_Call]]:
        """(input of the first block, arguments of each block)."""
        first: list[Tensor] = []
        calls: list[_Call] = []

        def stand_in(index: int, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
            arguments, keywords = call
            first.append(arguments[0])
            calls.append(_Call(arguments[1:], keywords))
            if index == len(self.blocks) - 1:
                raise _Captured
            return arguments[0]

        with _standing_in(self.blocks, stand_in):
            try:
                self._decoder(input_ids=ids.to(self.device), use_cache=False)
            except _Captured:
                return first[0], calls
        raise ArchitectureError(f"{type(self.model).__name__} does not run its decoder blocks one after another")

    def _is_outside(self, name: str) -> bool:
        """True for parameters of the decoder outside its blocks: embeddings and norms."""
        decoder = f"{self._decoder_name}." if self._decoder_name else ""
        blocks = self.blocks[0].name.rpartition(".")[0] + "."
        return name.startswith(decoder) and not name.startswith(blocks)


class _Captured(Exception):
    """All block arguments are captured; ends the forward pass."""


def batches_of(ids: Tensor) -> list[slice]:
    """The windows [windows, tokens, …] that go through a block together."""
    windows, tokens = ids.shape[:2]
    step = max(1, BATCH_TOKENS // tokens)
    return [slice(start, min(start + step, windows)) for start in range(0, windows, step)]


@contextmanager
def _standing_in(blocks: list[Block], stand_in: Callable[[int, Any], Any]) -> Iterator[None]:
    """Inside, calling block i calls stand_in(i, (arguments, keywords))."""
    for index, block in enumerate(blocks):
        block.module.forward = partial(lambda i, *args, **kwargs: stand_in(i, (args, kwargs)), index)
    try:
        yield
    finally:
        for block in blocks:
            del block.module.forward


def _check_same(calls: list[_Call], others: list[_Call], model: str) -> None:
    """ArchitectureError if arguments other than the hidden states depend on the tokens."""
    for call, other in zip(calls, others, strict=True):
        leaves, other_leaves = (tree_leaves((each.arguments, each.keywords)) for each in (call, other))
        pairs = zip(leaves, other_leaves, strict=True)
        if any(isinstance(one, Tensor) and not torch.equal(one, two) for one, two in pairs):
            raise ArchitectureError(f"{model} passes its blocks arguments that depend on the tokens")
