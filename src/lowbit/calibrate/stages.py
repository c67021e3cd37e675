"""The order in which a block computes: which inputs come first, and what need not be computed twice.

A block is measured in *stages*, one for each distinct input, so that every input is seen behind all that was rounded
before it: the input of q, k and v; with those rounded, that of o_proj; with attention rounded, that of gate and up;
with those, that of down_proj. The experts of a block are one stage, together with what else lies in the same child.

What a direct child of a block puts out (attention, the MLP) is kept for every window (`ChildOutputs`). Where a child
ends in a linear, as nearly all do, the input of that linear is kept instead, before it is rounded, and what the child
puts out is one product away. So each linear runs once, except where there is no room.

Where a child puts out what was kept, the norm in front of it need not be computed either (`find_idle`).

None of this is in a table of ours: a window is run through the block. Hooks see what is reached when, and whether what
the child puts out equals what the linear did; a norm is idle where the block puts out the same with NaN in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibrate.block_modules import AllSeen, Block, BlockInput


@dataclass(frozen=True)
class OutputForm:
    """How a child returns what it puts out: in a tuple with `others` more (None: in none), flat: as [tokens, width]."""

    others: int | None = None
    flat: bool = False


@dataclass(frozen=True)
class Stage:
    """Inputs of a block that are measured together.

    child  of the block, in which they are read
    form   of what the child puts out
    last   True behind which nothing else of this child is measured
    end    path of the module that reads the input and whose output is what the child puts out; None where there is none
    """

    child: str
    inputs: tuple[BlockInput, ...]
    form: OutputForm = OutputForm()
    last: bool = True
    end: str | None = None


def find_stages(block: Block, run: Callable[[], object]) -> list[Stage]:
    """In the order in which a block computes; `run` puts a window through it. Inputs that are not reached come last."""
    seen = _watch(block, run)
    children: dict[str, list[tuple[str, BlockInput]]] = {}
    for path, source in block.inputs.items():
        children.setdefault(path.split(".")[0], []).append((path, source))
    experts = {path.split(".")[0]: sources for path, sources in block.experts.items()}
    stages: list[Stage] = []
    for child in sorted(children.keys() | experts.keys(), key=seen.place):
        paths = sorted(children.get(child, []), key=lambda pair: seen.place(pair[0]))
        if child in experts:
            sources = (*(source for _, source in paths), *experts[child].values())
            stages.append(Stage(child, sources, seen.form(child)))
            continue
        for number, (path, source) in enumerate(paths):
            last = number == len(paths) - 1
            end = path if last and seen.ends(path, child) else None
            stages.append(Stage(child, (source,), seen.form(child), last, end))
    return stages


def by_child(stages: list[Stage]) -> list[Stage]:
    """One stage for each child: what transforms look at, who change several linears of it together."""
    children: dict[str, list[Stage]] = {}
    for stage in stages:
        children.setdefault(stage.child, []).append(stage)
    return [
        Stage(child, tuple(source for part in parts for source in part.inputs), parts[0].form)
        for child, parts in children.items()
    ]


def count_stages(block: Block) -> int:
    """How many `find_stages` will find."""
    with_experts = {path.split(".")[0] for path in block.experts}
    return len(with_experts) + sum(path.split(".")[0] not in with_experts for path in block.inputs)


def find_idle(block: Block, stages: list[Stage], run: Callable[[], Tensor]) -> dict[str | None, tuple[str, ...]]:
    """Child → the parts of the block, norms mostly, that need not be computed when all children before it (for None:
    all of them) put out what was kept."""
    children = list(dict.fromkeys(stage.child for stage in stages))
    others = [name for name, _ in block.module.named_children() if name not in children]
    outputs: dict[str, Any] = {}
    with ExitStack() as stack:
        for child in children:
            keep = partial(lambda child, _module, _arguments, out: outputs.update({child: out}), child)
            stack.callback(block.module.get_submodule(child).register_forward_hook(keep).remove)
        expected = run().clone()
    found: dict[str | None, tuple[str, ...]] = {children[0]: ()}
    for number in range(1, len(children) + 1):
        known = {child: outputs[child] for child in children[:number] if child in outputs}
        idle = tuple(name for name in others if _same_without(block, name, known, run, expected))
        found[children[number] if number < len(children) else None] = idle
    return found


def _same_without(block: Block, name: str, known: dict[str, Any], run: Callable[[], Tensor], expected: Tensor) -> bool:
    """True where the block puts out the same with NaN from a part of it, and from `known` children what they did."""
    with ExitStack() as stack:
        for child, out in known.items():
            replay = partial(lambda out, *_arguments, **_keywords: out, out)
            stack.enter_context(replaced_forward(block.module.get_submodule(child), replay))
        stack.enter_context(replaced_forward(block.module.get_submodule(name), _nan))
        try:
            return torch.equal(run(), expected)
        except (TypeError, ValueError, RuntimeError, AttributeError):  # it is not called with a tensor alone
            return False


def _nan(x: Tensor, *_arguments: Any, **_keywords: Any) -> Tensor:
    return torch.full_like(x, torch.nan)


@contextmanager
def idle(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Inside, these parts of a block, or of a copy, compute nothing."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(replaced_forward(module.get_submodule(name), _unchanged))
        yield


def _unchanged(x: Tensor, *_arguments: Any, **_keywords: Any) -> Tensor:
    return x


@dataclass
class _Seen:
    """order: children and paths of inputs as they were reached; outputs: what they put out first."""

    order: list[str]
    outputs: dict[str, Any]

    def place(self, path: str) -> int:
        return self.order.index(path) if path in self.order else len(self.order)

    def form(self, child: str) -> OutputForm:
        out = self.outputs.get(child)
        others = len(out) - 1 if isinstance(out, tuple) else None
        return OutputForm(others, out is not None and _first(out).dim() == 2)

    def ends(self, path: str, child: str) -> bool:
        """True where the child puts out, unchanged, what the module at `path` does."""
        if path not in self.outputs or child not in self.outputs:
            return False
        one, other = _first(self.outputs[path]).flatten(), _first(self.outputs[child]).flatten()
        return torch.equal(one, other)


def _watch(block: Block, run: Callable[[], object]) -> _Seen:
    seen = _Seen([], {})

    def reached(path: str, *_: Any) -> None:
        seen.order.append(path)

    def put_out(path: str, _module: nn.Module, _arguments: Any, out: Any) -> None:
        first = _first(out).clone()  # which may be changed in place later
        seen.outputs[path] = (first, *out[1:]) if isinstance(out, tuple) else first

    children = (path.split(".")[0] for path in (*block.inputs, *block.experts))
    with ExitStack() as stack:
        for path in dict.fromkeys((*block.inputs, *children)):
            module = block.module.get_submodule(path)
            for handle in (module.register_forward_pre_hook(partial(reached, path)),
                           module.register_forward_hook(partial(put_out, path))):  # fmt: skip
                stack.callback(handle.remove)
        run()
    return seen


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


class ChildOutputs:
    """What one child of a block puts out for every window, kept so that it is computed once.

    room  (width, may spill) → a tensor [windows, tokens, width], or None where it has no place in memory
    """

    def __init__(self, form: OutputForm, room: Callable[[int, bool], Tensor | None]):
        self._form, self._room = form, room
        self._outputs: Tensor | None = None
        self._known: set[int] = set()  # windows at which batches begin whose outputs are kept
        self._inputs: Tensor | None = None
        self._end: nn.Module | None = None

    def keep_input(self, end: nn.Module, batch: slice, x: Tensor) -> None:
        """x [tokens, K] goes into `end`, the linear that the child ends in; dropped where there is no room."""
        if self._end is None:
            self._end, self._inputs = end, self._room(x.shape[-1], False)
        if self._inputs is not None:
            self._inputs[batch] = x.reshape(self._inputs[batch].shape)

    def has(self, batch: slice) -> bool:
        """True where the child need not compute for these windows."""
        return batch.start in self._known or self._inputs is not None

    @contextmanager
    def standing_in(
        self, child: nn.Module, batch: slice, device: str, records: bool = True, stops: bool = False
    ) -> Iterator[None]:
        """Inside, the child puts out what was kept; else it computes.

        records  what it computes is kept
        stops    the run ends in `AllSeen` behind what it computes
        """
        inner = child.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            if batch.start in self._known:
                assert self._outputs is not None
                return self._as_returned(self._outputs[batch].to(device))
            if self._end is not None and self._inputs is not None:
                end = inner if self._end is child else self._end  # OPT: a linear of the block itself
                out = self._as_returned(end(self._inputs[batch].to(device)))
            else:
                out = inner(*arguments, **keywords)
            if records:
                self._record(_first(out), batch)
            if stops:
                raise AllSeen
            return out

        with replaced_forward(child, forward):
            yield

    def _record(self, out: Tensor, batch: slice) -> None:
        if self._outputs is None:
            width = out.shape[-1]
            in_place = self._inputs is not None and self._inputs.shape[-1] == width
            self._outputs = self._inputs if in_place else self._room(width, True)
        assert self._outputs is not None
        self._outputs[batch] = out.reshape(self._outputs[batch].shape)
        self._known.add(batch.start)

    def _as_returned(self, out: Tensor) -> Any:
        out = out.reshape(-1, out.shape[-1]) if self._form.flat else out
        return out if self._form.others is None else (out, *(None for _ in range(self._form.others)))


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
