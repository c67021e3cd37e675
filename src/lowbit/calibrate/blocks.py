"""Forward passes with one decoder block in memory at a time, while a visitor observes the inputs of its linears.

The model is transformers' own, on the meta device. Its decoder first runs with stubs for the blocks, which captures the
embedded tokens and the arguments of each block (masks and positions differ between full and sliding attention). Then

    for each block:  read its weights · run all windows through it · drop its weights

Memory holds one block in the compute dtype, once the embeddings, and the hidden states of all windows, which go to a
file above a bound (`HiddenStates`). `run` does all of this; the calibrated loop, which rewrites weights on the way,
calls the steps itself: `embed`, then `load`, `forward`, `put` and `drop` for each block.

Linears that read the same input (q, k and v) share one `BlockInput`; experts run one by one and have their own.

Arguments that depend on the tokens (the embeddings that Zamba 2 passes to each block) are kept for every batch, and so
is what blocks hand to later ones (`shared_states`).

Refused: experts that do not describe themselves, and arguments of that kind that exceed `max_memory`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lowbit.architecture.blocks import find_blocks
from lowbit.architecture.cache import discover_once
from lowbit.architecture.discover import decoder_of
from lowbit.architecture.disk_layout import disk_layout
from lowbit.architecture.head import KeptOutput, without_decoder
from lowbit.architecture.loading import Loader, module_names
from lowbit.architecture.trace import replaced_forward
from lowbit.calibrate.block_modules import Block, BlockInput, BlockVisitor, observed, observed_blocks
from lowbit.calibrate.shared_states import SharedMapping, SharedStates, without_mappings
from lowbit.calibrate.stream_axes import PROBE_TOKENS, StreamAxes, axis_of_windows, find_axes, of_some_windows
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import ArchitectureError, OutputError
from lowbit.measure import human_bytes, trim_memory
from lowbit.methods import RUNS_NO_TEXT

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
            f"{human_bytes(nbytes)} of hidden states cannot be put into {tempfile.gettempdir()}: {error}",
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
        self._calls: dict[int, list[_Call]] = {}  # number of windows → arguments that do not depend on their tokens
        self._own_calls: dict[int, list[_Call]] = {}  # first window of a batch → its arguments, where they do depend
        self._own_sizes: dict[int, int] = {}  # first window of a batch → its number of windows
        self._cuts: list[_Call] = []  # axes of the windows in the arguments of blocks
        self._shared = SharedStates("", 0)
        self.axes = StreamAxes(0, 1, 1, ())  # of the last text that was embedded
        self.model, self.notes = self._loader.model, self._loader.notes
        # Split fused experts too: every expert has inputs of its own.
        folder = str(checkpoint.folder)
        own = self._loader.architecture.own_names
        self.architecture = discover_once(
            checkpoint.config(), folder, options.trust_remote_code, split_experts=True, own_names=own
        )
        names = find_blocks(self.model)
        layout = disk_layout(self.model, split_experts=True, own_names=own)
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
                        states.values[batch] = self.forward(index, states.values[batch], batch=batch)
                        if progress is not None:
                            progress(block.name, index * len(ids) + batch.stop, total)
                    if visitor is not None:
                        visitor.finish(index)
                self.drop(index)
        return states

    def embed(self, ids: Tensor, present: Checkpoint | None = None) -> HiddenStates:
        """The input of the first block; also captures the arguments of every block, which `forward` needs.

        present  another model of the same architecture, whose tensors outside the blocks take the place of these
        """
        self._loader.fill(self._is_outside)
        if present is not None:
            for name in self.architecture.parameters:
                if self.architecture.block_of(name) is None and name in present.tensors:
                    self._loader.put({name: present.read(name).float()}, self._outside_parameter)
        states = None
        self._shared = SharedStates(type(self.model).__name__, self._max_memory)
        with torch.no_grad():  # not inference mode: sign-SGD runs the captured arguments with gradients
            self.axes = find_axes(type(self.model).__name__, lambda some: self._capture(some)[0].shape, ids)
            for batch in batches_of(ids):
                hidden, found = self._capture(ids[batch])
                flat = self.axes.flat(hidden)
                if states is None:
                    states = self.new_states((ids.shape[0], ids.shape[1], flat.shape[2]))
                    if not _same_calls(found, self._capture(ids[batch].flip(1))[1]):
                        self._own_calls[batch.start] = found
                        self._cuts = self._axes_in_calls(ids)
                states.values[batch] = flat
                if self._own_calls:
                    self._own_sizes[batch.start] = len(flat)
                    first = self._own_calls[next(iter(self._own_calls))]
                    self._own_calls[batch.start] = _sharing(found, first)
                elif len(flat) not in self._calls:
                    self._calls[len(flat)] = found
            if 1 not in self._calls and not self._own_calls:
                self._calls[1] = self._capture(ids[:1])[1]
            self._refuse_large_arguments()
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
        trim_memory()  # glibc keeps what blocks and statistics leave in pieces: 0.2 of 0.86 GB for SmolLM2

    def put(self, values: dict[str, Tensor]) -> None:
        """Replace stored tensors of a loaded block, by stored name, in the file's orientation."""
        self._loader.put(values)

    def put_into(self, copy: nn.Module, index: int, values: dict[str, Tensor]) -> None:
        """The same for a copy of a block's module."""
        prefix = self.blocks[index].name + "."
        self._loader.put(values, lambda name: copy.get_parameter(name.removeprefix(prefix)))

    @cached_property
    def module_names(self) -> dict[str, str]:
        """Linear → path of the module that computes it; without experts in one parameter."""
        return module_names(self.model, self.architecture)

    def linear_module(self, name: str) -> nn.Linear | None:
        """The module that computes a linear by itself; None for experts and for other classes."""
        path = self.module_names.get(name)
        module = None if path is None else self.model.get_submodule(path)
        return module if isinstance(module, nn.Linear) else None

    def forward(self, index: int, x: Tensor, module: nn.Module | None = None, batch: slice | None = None) -> Tensor:
        """The output of a loaded block, or of a copy of its module, for windows [windows, tokens, H].

        batch  the windows that x holds, for models whose blocks get arguments that depend on the tokens
        """
        own = bool(self._own_calls)
        if own:
            call = self._call_of(index, batch)
        elif len(x) in self._calls:
            call = self._calls[len(x)][index]
        else:  # split into known batch sizes; 1 always is
            size = max(known for known in self._calls if known < len(x))
            return torch.cat([self.forward(index, x[:size], module), self.forward(index, x[size:], module)])
        block = self.blocks[index].module if module is None else module
        arguments = (call.arguments, call.keywords)
        shared = self._shared.given(arguments, batch, module is not None) if own and batch else nullcontext(arguments)
        with _blamed_on(self.model), shared as (positional, keywords):
            output = block(self.axes.unflat(x.to(self.device)), *positional, **keywords)
        return self.axes.flat(output[0] if isinstance(output, tuple | list) else output)

    def _call_of(self, index: int, batch: slice | None) -> _Call:
        """The arguments of some windows of one batch of `embed`."""
        if batch is None:
            raise ArchitectureError(
                f"{type(self.model).__name__} passes its blocks arguments that depend on the tokens, which this method "
                f"cannot follow",
                "choose --method gptq or rtn",
            )
        start = max(known for known in self._own_calls if known <= batch.start)
        call, axes = self._own_calls[start][index], self._cuts[index]
        windows, part = self._own_sizes[start], slice(batch.start - start, batch.stop - start)

        def cut(leaf: Any, axis: int | None) -> Any:
            return of_some_windows(leaf, axis, windows, part) if isinstance(leaf, Tensor) else leaf

        return _Call(tree_map(cut, call.arguments, axes.arguments), tree_map(cut, call.keywords, axes.keywords))

    def _axes_in_calls(self, ids: Tensor) -> list[_Call]:
        """The axis of windows, or None, in place of every argument of every block."""
        one = self._capture(ids[:1, :PROBE_TOKENS])[1]
        two = self._capture(ids[:1, :PROBE_TOKENS].repeat(2, 1))[1]

        def axis(leaf: Any, other: Any) -> int | None:
            return axis_of_windows(leaf.shape, other.shape) if isinstance(leaf, Tensor) else None

        return [
            _Call(tree_map(axis, call.arguments, other.arguments), tree_map(axis, call.keywords, other.keywords))
            for call, other in zip(one, two, strict=True)
        ]

    def _refuse_large_arguments(self) -> None:
        """ArchitectureError if arguments that depend on the tokens take more than the memory for hidden states."""
        leaves = {leaf.data_ptr(): leaf.nbytes for calls in self._own_calls.values() for call in calls
                  for leaf in _tensors(call)}  # fmt: skip
        if self._own_calls and sum(leaves.values()) > self._max_memory:
            raise ArchitectureError(
                f"{type(self.model).__name__} passes its blocks arguments that depend on the tokens, "
                f"{human_bytes(sum(leaves.values()))} for this text; {human_bytes(self._max_memory)} are allowed",
                "give fewer --samples, a shorter --seqlen, or more --max-memory",
            )

    def load_outside(self) -> None:
        """Read everything outside the blocks: embeddings, last norm and head."""
        self._loader.fill(self._is_around)

    def watch(self, names: Collection[str]) -> None:
        """Have loaded tensors, by stored name, collect the gradients that `take_gradients` gives."""
        self._loader.watch(names)

    def take_gradients(self, names: Collection[str]) -> dict[str, Tensor]:
        """Stored name → gradient, in the file's orientation, where there is one; the next ones begin at zero."""
        return self._loader.take_gradients(names)

    def behind_blocks(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The input of the output head, [windows, T, H'], for hidden states behind the last block; everything outside
        the blocks is loaded."""
        behind = self.axes.unflat(hidden.to(self.device))
        # Every block stub returns the last hidden states, so that only the decoder's final norm computes.
        returned = self._as_returned(behind)
        with _standing_in(self.blocks, lambda index, call: returned), _blamed_on(self.model):
            return self._decoder(input_ids=ids.to(self.device), use_cache=False).last_hidden_state

    def logits(self, head_inputs: Tensor) -> Tensor:
        """[tokens, V] of inputs of the head [tokens, H'], which is loaded; soft-capped and scaled as the model does."""
        ids = torch.zeros((1, len(head_inputs)), dtype=torch.long, device=self.device)
        with without_decoder(self.model, KeptOutput(head_inputs[None])), _blamed_on(self.model):
            return self.model(input_ids=ids, use_cache=False).logits[0]

    def head_inputs(self, ids: Tensor, states: HiddenStates) -> Iterator[Tensor]:
        """The input of the output head, [tokens, H] for a batch of windows at a time; `states` come from `run`."""
        self._loader.fill(self._is_outside)
        with torch.inference_mode():
            for batch in batches_of(ids):
                out = self.behind_blocks(ids[batch], states.values[batch])
                yield out.reshape(-1, out.shape[-1])
        self._loader.drop(self._is_outside)

    @contextmanager
    def head_loaded(self) -> Iterator[None]:
        """Inside, the parameters outside the blocks are loaded, the head among them."""
        self.load_outside()
        yield
        self._loader.drop(self._is_around)

    @property
    def vocabulary(self) -> int:
        """Logits of a token; ArchitectureError for a model without a head."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise ArchitectureError(f"{type(self.model).__name__} has no head that computes logits",
                                    "its tokens cannot be weighed by a loss: take --hessian inputs")  # fmt: skip
        return head.weight.shape[0]  # type: ignore[union-attr]

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

        def stand_in(index: int, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
            arguments, keywords = call
            if not arguments:
                keywords = dict(keywords)
                arguments = (keywords.pop("hidden_states"),)
            first.append(arguments[0])
            calls.append(_Call(arguments[1:], keywords))
            if index == len(self.blocks) - 1:
                raise _Captured
            return self._as_returned(arguments[0])

        with _standing_in(self.blocks, stand_in):
            try:
                with _blamed_on(self.model):
                    self._decoder(input_ids=ids.to(self.device), use_cache=False)
            except _Captured:
                arguments = without_mappings([(call.arguments, call.keywords) for call in calls])
                return first[0], [_Call(*each) for each in arguments]
        raise ArchitectureError(f"{type(self.model).__name__} does not run its decoder blocks one after another")

    def _as_returned(self, hidden: Tensor) -> Any:
        """Hidden states in the form of a block's output."""
        entries = self.architecture.block_outputs
        return (hidden, *[None] * (entries - 1)) if entries else hidden

    def _outside_parameter(self, name: str) -> Tensor:
        """A parameter outside the blocks that is filled; of one that is not, a tensor that takes no part."""
        parameter = self.model.get_parameter(name)
        return torch.empty_like(parameter, device="cpu") if parameter.is_meta else parameter

    def _is_outside(self, name: str) -> bool:
        """True for parameters of the decoder outside its blocks: embeddings and norms."""
        decoder = f"{self._decoder_name}." if self._decoder_name else ""
        blocks = self.blocks[0].name.rpartition(".")[0] + "."
        return name.startswith(decoder) and not name.startswith(blocks)

    def _is_around(self, name: str) -> bool:
        """True outside the blocks: of the decoder, and the head; not of towers beside it."""
        return self._is_outside(name) or not name.startswith(f"{self.model.base_model_prefix}.")


class _Captured(Exception):
    """All block arguments are captured; ends the forward pass."""


def batches_of(ids: Tensor) -> list[slice]:
    """The windows [windows, tokens, …] that go through a block together."""
    windows, tokens = ids.shape[:2]
    step = max(1, BATCH_TOKENS // tokens)
    return [slice(start, min(start + step, windows)) for start in range(0, windows, step)]


@contextmanager
def _blamed_on(model: nn.Module) -> Iterator[None]:
    """Inside, what a model's code raises becomes an ArchitectureError."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ArchitectureError(
            f"{type(model).__name__} does not run block by block on text alone: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}",
            RUNS_NO_TEXT,
        ) from error


@contextmanager
def _standing_in(blocks: list[Block], stand_in: Callable[[int, Any], Any]) -> Iterator[None]:
    """Inside, calling block i calls stand_in(i, (arguments, keywords))."""
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            instead = partial(lambda i, *args, **kwargs: stand_in(i, (args, kwargs)), index)
            stack.enter_context(replaced_forward(block.module, instead))
        yield


def _tensors(call: _Call) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((call.arguments, call.keywords)) if isinstance(leaf, Tensor)]


def _same_calls(calls: list[_Call], others: list[_Call]) -> bool:
    """True if the arguments of all blocks are the same, and none is a mapping that blocks share."""
    pairs = zip(calls, others, strict=True)
    leaves = tree_leaves([(call.arguments, call.keywords) for call in calls])
    return not any(isinstance(leaf, SharedMapping) for leaf in leaves) and all(
        one.shape == two.shape and torch.equal(one, two)
        for call, other in pairs
        for one, two in zip(_tensors(call), _tensors(other), strict=True)
    )


def _sharing(calls: list[_Call], first: list[_Call]) -> list[_Call]:
    """The calls, with the tensors of `first` in place of equal ones, so that masks are kept once."""
    known: dict[int, Tensor] = {}

    def shared(leaf: Any, other: Any) -> Any:
        if not (isinstance(leaf, Tensor) and isinstance(other, Tensor)):
            return leaf
        if leaf.data_ptr() not in known:
            same = leaf.shape == other.shape and torch.equal(leaf, other)
            known[leaf.data_ptr()] = other if same else leaf
        return known[leaf.data_ptr()]

    return [
        _Call(tree_map(shared, call.arguments, other.arguments), tree_map(shared, call.keywords, other.keywords))
        for call, other in zip(calls, first, strict=True)
    ]
