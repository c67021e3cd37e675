"""The order in which a block computes its inputs, and the outputs worth keeping.

A block is measured in *stages*, one for each distinct input, so that every input is measured after all linears before
it are rounded: first the input of q, k and v, then that of o_proj, then gate and up, then down_proj. The experts of a
block are one stage, together with the other inputs of the same child.

The output of each direct child (attention, MLP) is kept for every window (`ChildOutputs`). Nearly all children end in a
linear; then the input of that linear is kept, and the output costs one product once it is rounded. So each linear runs
once, unless memory is short. When a child replays its kept output, the norm before it need not run (`find_idle`).

No table says any of this: one window runs through the block with hooks, which see the order of the modules and whether
the child's output equals the linear's. A norm is idle if the block's output stays the same with NaN in its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.architecture.trace import replaced_forward
from lowbit.calibrate.block_modules import AllSeen, Block, BlockInput
from lowbit.calibrate.stream_axes import axis_of_windows, shape_of_windows
from lowbit.errors import ArchitectureError

# What a part of a block raises that is given something else than it wants.
_NOT_ONE_TENSOR = (TypeError, ValueError, RuntimeError, AttributeError, ArchitectureError)


@dataclass(frozen=True)
class OutputForm:
    """How a child returns its output: in a tuple or list with `others` more (None: bare), in the shape that it has for
    one window, of which `axis` counts windows."""

    others: int | None = None
    shape: torch.Size | None = None
    axis: int = 0
    listed: bool = False

    def as_returned(self, out: Tensor) -> Any:
        """out [windows, rows, width], in the order of the child's own."""
        if self.shape is not None:
            out = out.reshape(*shape_of_windows(self.shape[:-1], self.axis, len(out)), out.shape[-1])
        if self.others is None:
            return out
        entries = [out, *[None] * self.others]
        return entries if self.listed else tuple(entries)


@dataclass(frozen=True)
class Stage:
    """Inputs of a block that are measured together.

    child  child module that reads them
    form   of the child's output
    last   the last stage of this child
    end    path of the linear whose output is the child's output; None if there is none
    """

    child: str
    inputs: tuple[BlockInput, ...]
    form: OutputForm = OutputForm()
    last: bool = True
    end: str | None = None


def find_stages(
    block: Block, run: Callable[[], object], run_more: Callable[[], object] | None = None
) -> list[Stage]:  # fmt: skip
    """Stages in the order of computation. Unreached inputs come last.

    run       sends a window through the block
    run_more  sends several, where the first axis of an output may not be that of windows
    """
    experts: dict[str, list[BlockInput]] = {}
    for path, sources in block.experts.items():  # of text and of images, in one MLP
        experts.setdefault(path.split(".")[0], []).extend(sources.values())
    children: dict[str, list[str]] = {child: [] for child in experts}
    for path in block.inputs:
        children.setdefault(path.split(".")[0], []).append(path)
    order, outputs = _watch(block, (*block.inputs, *children), run)
    of_more = {} if run_more is None else _watch(block, tuple(children), run_more)[1]
    runs = Counter(order)
    block.calls = {source.name: runs[path] for path, source in block.inputs.items() if runs[path] > 1}
    places = {path: place for place, path in reversed(list(enumerate(order)))}  # where each was reached first
    stages: list[Stage] = []
    for child in sorted(children, key=lambda path: places.get(path, len(order))):
        paths = sorted(children[child], key=lambda path: places.get(path, len(order)))
        inputs, out = [block.inputs[path] for path in paths], outputs.get(child)
        form = OutputForm() if out is None else _form(out, of_more.get(child))
        if child in experts:
            stages.append(Stage(child, (*inputs, *experts[child]), form))
            continue
        stages += [Stage(child, (source,), form, last=False) for source in inputs[:-1]]
        # Whether the child returns the output of its last linear unchanged.
        end, known = paths[-1], paths[-1] in outputs and child in outputs
        ends = known and torch.equal(_first(outputs[end]).flatten(), _first(outputs[child]).flatten())
        stages.append(Stage(child, (inputs[-1],), form, end=end if ends else None))
    return stages


def _watch(block: Block, paths: tuple[str, ...], run: Callable[[], object]) -> tuple[list[str], dict[str, Any]]:
    """(paths in the order they ran, first output of each module) of one run."""
    order: list[str] = []
    outputs: dict[str, Any] = {}

    def put_out(path: str, _module: nn.Module, _arguments: Any, out: Any) -> None:
        first = _first(out).clone()  # later operations may change it in place
        rest = out[1:] if isinstance(out, tuple | list) else ()
        outputs[path] = [first, *rest] if isinstance(out, list) else (first, *rest) if isinstance(out, tuple) else first

    with ExitStack() as stack:
        for path in dict.fromkeys(paths):
            module = block.module.get_submodule(path)
            for handle in (module.register_forward_pre_hook(lambda *_, path=path: order.append(path)),
                           module.register_forward_hook(partial(put_out, path))):  # fmt: skip
                stack.callback(handle.remove)
        run()
    return order, outputs


def _form(out: Any, of_more: Any | None) -> OutputForm:
    """Of a child's output for one window, and for several where it was seen."""
    others, shape = len(out) - 1 if isinstance(out, tuple | list) else None, _first(out).shape
    axis = None if of_more is None else axis_of_windows(shape, _first(of_more).shape)
    return OutputForm(others, shape, axis or 0, isinstance(out, list))


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple | list) else out


def by_child(stages: list[Stage]) -> list[Stage]:
    """One stage per child, for transforms: they change several linears of a child together."""
    children: dict[str, list[Stage]] = {}
    for stage in stages:
        children.setdefault(stage.child, []).append(stage)
    return [
        Stage(child, tuple(source for part in parts for source in part.inputs), parts[0].form)
        for child, parts in children.items()
    ]


def count_stages(block: Block) -> int:
    """The number of stages `find_stages` returns."""
    with_experts = {path.split(".")[0] for path in block.experts}
    return len(with_experts) + sum(path.split(".")[0] not in with_experts for path in block.inputs)


def find_idle(block: Block, stages: list[Stage], run: Callable[[], Tensor]) -> dict[str | None, tuple[str, ...]]:
    """Child → parts of the block, mostly norms, that need not run while all children before it (None: all children)
    replay their kept outputs."""
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


def added_to_stream(block: Block, stages: list[Stage], h: Tensor, run: Callable[[], Tensor]) -> tuple[str, ...]:
    """The children whose output the block adds to its input, both as they are, in order.

    h  the block's input in `run`. With zeros from every child the block must return h, and with h from one of them 2 h,
       both exactly
    """
    children = {stage.child: stage.form for stage in stages}

    def output(source: str | None) -> Tensor | None:
        with ExitStack() as stack:
            try:
                for child, form in children.items():
                    out = form.as_returned(h if child == source else torch.zeros_like(h))
                    stack.enter_context(replaced_forward(block.module.get_submodule(child), partial(_return, out)))
                return run()
            except _NOT_ONE_TENSOR:
                return None

    def is_(out: Tensor | None, wanted: Tensor) -> bool:
        return out is not None and torch.equal(out, wanted)

    return tuple(child for child in children if is_(output(child), h + h)) if is_(output(None), h) else ()


def _return(out: Any, *_arguments: Any, **_keywords: Any) -> Any:
    return out


def _same_without(block: Block, name: str, known: dict[str, Any], run: Callable[[], Tensor], expected: Tensor) -> bool:
    """True if the block's output stays the same with NaN from one part, while the `known` children replay."""
    with ExitStack() as stack:
        for child, out in known.items():
            stack.enter_context(replaced_forward(block.module.get_submodule(child), partial(_return, out)))
        nan = lambda x, *_arguments, **_keywords: torch.full_like(x, torch.nan)  # noqa: E731
        stack.enter_context(replaced_forward(block.module.get_submodule(name), nan))
        try:
            return torch.equal(run(), expected)
        except _NOT_ONE_TENSOR:
            return False


def _rows(values: Tensor, batch: slice) -> int:
    """Vectors of one window."""
    return values.numel() // values.shape[-1] // (batch.stop - batch.start)


class ChildOutputs:
    """The outputs of one child for every window, so that it computes once.

    room  (rows of a window, width, may spill) → a tensor [windows, rows, width], or None if memory is short

    What is kept of a batch are the child's own numbers in their order, whichever axis counts windows.
    """

    def __init__(self, form: OutputForm, room: Callable[[int, int, bool], Tensor | None]):
        self._form, self._room = form, room
        self._outputs: Tensor | None = None
        self._known: set[int] = set()  # first windows of the batches whose outputs are kept
        self._inputs: Tensor | None = None
        self._end: nn.Module | None = None

    def keep_input(self, end: nn.Module, batch: slice, x: Tensor) -> None:
        """Keep x [tokens, K], the input of `end`, the child's last linear, if there is room."""
        if self._end is None:
            self._end, self._inputs = end, self._room(_rows(x, batch), x.shape[-1], False)
        if self._inputs is not None:
            self._inputs[batch] = x.reshape(self._inputs[batch].shape)

    def has(self, batch: slice) -> bool:
        """True if the child need not compute for these windows."""
        return batch.start in self._known or self._inputs is not None

    @contextmanager
    def standing_in(self, child: nn.Module, batch: slice, device: str, records: bool = True,
                    stops: bool = False) -> Iterator[None]:  # fmt: skip
        """Inside, the child replays its kept output, or computes it.

        records  keep the output it computes
        stops    end the run with `AllSeen` after it computed
        """
        inner = child.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            if batch.start in self._known:
                assert self._outputs is not None
                return self._form.as_returned(self._outputs[batch].to(device))
            if self._end is not None and self._inputs is not None:
                end = inner if self._end is child else self._end  # OPT: a linear of the block itself
                out = self._form.as_returned(end(self._inputs[batch].to(device)))
            else:
                out = inner(*arguments, **keywords)
            if records:
                values = _first(out)
                of_window = _rows(values, batch), values.shape[-1]
                if self._outputs is None:
                    in_place = self._inputs is not None and self._inputs.shape[-1] == values.shape[-1]
                    self._outputs = self._inputs if in_place else self._room(*of_window, True)
                assert self._outputs is not None
                self._outputs[batch] = values.reshape(self._outputs[batch].shape)
                self._known.add(batch.start)
            if stops:
                raise AllSeen
            return out

        with replaced_forward(child, forward):
            yield

    def kept(self, batch: slice) -> Tensor:
        """The output kept for some windows, [windows, rows, width]."""
        assert self._outputs is not None, "it was not computed yet"
        assert batch.start in self._known, "it was not computed yet"
        return self._outputs[batch]
