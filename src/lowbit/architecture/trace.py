"""What the blocks of a model do, found by running them once on a few tokens.

Nothing large is read or allocated: a linear is replaced by a projection that permutes channels and changes signs, so
that the decoder of a model of any size runs in its true shapes within a few hundred megabytes. Small parameters (norms,
convolutions, routers) get random values, block by block. Of equal blocks one runs; the others hand hidden states on.

Seen are the order of linears, and the inputs that they share (equal values). `perturb` then finds what feeds an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.architecture.feeding import Feed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 8
_VOCABULARY = 64
_ROWS = _VOCABULARY + 2 * TOKENS  # of an embedding
# Elements of a parameter that is no linear, embedding or expert; a larger one is not given values.
_LARGEST = 1 << 26
# Weights above which a linear becomes a projection; smaller ones get values, since some classes use them directly.
_LARGE_LINEAR = 1 << 22


@dataclass
class BlockTrace:
    """One block; paths are relative to it.

    order    linears, routers and fused experts in the order they ran
    inputs   path → number of the input it reads, in the order of `order`
    feeds    number of an input → what feeds it; absent where nothing alone does
    routers  modules that are no nn.Linear and apply their 2-D weight as one
    """

    order: list[str] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    feeds: dict[int, Feed] = field(default_factory=dict)
    routers: set[str] = field(default_factory=set)

    def readers(self, number: int) -> list[str]:
        return [path for path, source in self.inputs.items() if source == number]


@dataclass(frozen=True)
class BlockCall:
    """A block with the arguments of one call."""

    block: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self) -> Any:
        first = [each.clone() if isinstance(each, Tensor) else each for each in self.arguments]
        return self.block(*first, **self.keywords)


def trace_blocks(
    model: PreTrainedModel, decoder: str, blocks: list[str], look: Callable[[str, BlockCall], BlockTrace]
) -> tuple[dict[str, BlockTrace], int, str | None]:
    """(block → what was seen, entries of a block's output or 0 for a tensor, why the pass ended early or None).

    model    with parameters on the meta device, which it has again afterwards
    decoder  module that runs the blocks, on token ids
    look     (name of a block, its call) → what was seen; called once for each kind of block
    """
    seen: dict[str, BlockTrace] = {}
    kinds: dict[Any, BlockTrace] = {}
    module = model.get_submodule(decoder)
    last: list[Any] = []

    def stand_in(name: str, inner: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        block = model.get_submodule(name)
        kind = _kind(block)
        if kind in kinds and last and (handed_on := _handed_on(last[0], arguments, keywords)) is not None:
            seen[name] = kinds[kind]
            return handed_on
        with replaced_forward(block, inner), filled(block):
            if kind not in kinds:
                kinds[kind] = look(name, BlockCall(block, arguments, keywords))
            seen[name] = kinds[kind]
            out = inner(*arguments, **keywords)
        last[:] = [out]
        return out

    inside = {part for name in blocks for part in model.get_submodule(name).modules()}
    ids = torch.arange(2, 2 + TOKENS)[None] * 3 % _VOCABULARY
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(filled(module, without=inside))
        for name in blocks:
            block = model.get_submodule(name)
            stack.enter_context(replaced_forward(block, partial(stand_in, name, block.forward)))
        try:
            module(input_ids=ids, use_cache=False)
        except Exception as error:  # whatever a model's code raises on its way
            return seen, _entries(last), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return seen, _entries(last), None


def _entries(last: list[Any]) -> int:
    return len(last[0]) if last and isinstance(last[0], tuple | list) else 0


def _handed_on(out: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any | None:
    """A block's hidden states in the form of another block's output; None where the shapes differ."""
    hidden = arguments[0] if arguments else keywords.get("hidden_states")
    first = first_tensor(out)
    if not isinstance(hidden, Tensor) or first is None or hidden.shape != first.shape:
        return None
    return (hidden, *out[1:]) if isinstance(out, tuple | list) else hidden


def _kind(block: nn.Module) -> Any:
    """What tells blocks apart: classes, shapes, and the switches that their modules were built with."""
    shapes = tuple((name, tuple(value.shape)) for name, value in block.named_parameters())
    switches = tuple(
        (path, type(module).__name__, key, value)
        for path, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | str) and key != "training" and not key.startswith("_")
    )
    return shapes, switches


def first_tensor(out: Any) -> Tensor | None:
    """The tensor of a module's output or first argument, where it has several."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, list | tuple):
        return next((found for each in out if (found := first_tensor(each)) is not None), None)
    return None


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling the module calls `forward`."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def is_linear(module: nn.Module | None) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def output_width(linear: nn.Module) -> int:
    weight = linear._parameters["weight"]
    assert weight is not None
    return weight.shape[0] if isinstance(linear, nn.Linear) else weight.shape[1]


def is_experts(module: nn.Module | None) -> bool:
    """True for a module that holds the matrices of all experts in 3-D parameters."""
    if module is None:
        return False
    own = {name for name, value in module._parameters.items() if value is not None and value.dim() == 3}
    return "down_proj" in own and bool(own & {"gate_up_proj", "up_proj"})


@contextmanager
def filled(root: nn.Module, without: set[nn.Module] | None = None) -> Iterator[None]:
    """Inside, the modules below `root` compute: linears and experts as projections without weights, the others with
    random values in their parameters."""
    random = torch.Generator().manual_seed(0)
    changed: list[tuple[nn.Module, str, Any]] = []
    padding: list[tuple[nn.Embedding, int | None]] = []
    with ExitStack() as stack:
        for module in root.modules():
            if without is not None and module in without:
                continue
            weight = module._parameters.get("weight")
            if is_linear(module) and weight is not None and weight.numel() > _LARGE_LINEAR:
                rows = output_width(module)
                projection = _projection(rows, weight.numel() // rows, random)
                stack.enter_context(replaced_forward(module, projection))
                continue
            if is_experts(module):
                width = _experts_width(module)
                stack.enter_context(replaced_forward(module, _routed(_projection(width, width, random))))
                continue
            if isinstance(module, nn.Embedding) and (module.padding_idx or 0) >= _ROWS:  # a few rows are there
                padding.append((module, module.padding_idx))
                module.padding_idx = None
            for name, value in module._parameters.items():
                if value is not None and value.is_meta:
                    changed.append((module, name, value))
                    module._parameters[name] = _random(module, tuple(value.shape), value.dtype, random)
        try:
            yield
        finally:
            for module, name, value in changed:
                module._parameters[name] = value
            for embedding, index in padding:
                embedding.padding_idx = index


def _projection(rows: int, columns: int, random: torch.Generator) -> Callable[..., Tensor]:
    """A linear [rows, columns] of which each row has one weight, +1 or −1."""
    # every column is read equally often, and none twice in a row
    index = torch.cat([torch.randperm(columns, generator=random) for _ in range(-(-rows // columns))])[:rows]
    sign = torch.randint(0, 2, (rows,), generator=random) * 2.0 - 1.0

    def forward(x: Tensor, *_arguments: Any, **_keywords: Any) -> Tensor:
        return x[..., index] * sign.to(x.dtype)

    return forward


def _routed(projection: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Fused experts that depend on the router's choice and weights, [tokens, chosen] each."""

    def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        others = [each for each in (*arguments, *keywords.values()) if isinstance(each, Tensor)]
        routing = [each for each in others if len(each) == len(x)]
        factor = torch.ones(len(x), 1)
        for each in routing:
            steps = torch.arange(1, each[0].numel() + 1)
            factor = factor * (1 + (each.reshape(len(x), -1).float().cos() * steps).sum(1, keepdim=True).abs())
        return projection(x) * factor.to(x.dtype) if x.dim() == 2 else projection(x)

    return forward


def _experts_width(module: nn.Module) -> int:
    """Width of the hidden states that experts read and write: the dimension that `down_proj` does not share with the
    input of the gate."""
    down = module._parameters["down_proj"]
    assert down is not None
    return int(down.shape[2] if lies_transposed(module) else down.shape[1])


def lies_transposed(module: nn.Module) -> bool:
    """True if experts' weights are [E, in, out]; their class says it, or the shapes of its parameters do. Without a
    fused gate the shapes are alike either way, and transformers' classes have [E, out, in]."""
    stated = getattr(module, "is_transposed", None)
    if stated is not None:
        return bool(stated)
    first, down = module._parameters.get("gate_up_proj"), module._parameters["down_proj"]
    assert down is not None
    # [E, H, 2I] and [E, I, H] against [E, 2I, H] and [E, H, I]
    return first is not None and (first.shape[1], first.shape[2]) == (down.shape[2], 2 * down.shape[1])


def _random(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> nn.Parameter:
    if isinstance(module, nn.Embedding):  # ids and positions are small numbers
        shape = (min(shape[0], _ROWS), *shape[1:])
    if math.prod(shape) > _LARGEST:
        raise ValueError(f"{type(module).__name__} holds a parameter {list(shape)} that is neither linear nor experts")
    if len(shape) < 2:
        values = torch.rand(shape, generator=random) + 0.5
    else:
        values = torch.randn(shape, generator=random) / math.sqrt(shape[-1] if len(shape) == 2 else 1)
        values = values if not isinstance(module, nn.Embedding) else values * math.sqrt(shape[-1])
    return nn.Parameter(values.to(dtype if dtype.is_floating_point else torch.float32), requires_grad=False)
