"""The decoder blocks of a transformers model, and where the inputs of their linears can be seen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

from torch import Tensor, nn

from lowbit.architecture.structure import Linear, Placement
from lowbit.calibrate.experts import is_described, run_experts
from lowbit.errors import ArchitectureError


@dataclass(frozen=True)
class BlockInput:
    """One distinct input of a block.

    name     as the table of families has it: model.layers.3.attention_input
    linears  those that read it, in the order of the table; all of one expert, or of none
    expert   its number, of the input of an expert
    """

    name: str
    linears: tuple[Linear, ...]

    @property
    def expert(self) -> int | None:
        return self.linears[0].expert if self.linears else None


class BlockVisitor(Protocol):
    """Who looks. Called in order: every input of a block for every batch of windows, then `finish`, block by block."""

    def look(self, source: BlockInput, x: Tensor) -> None:
        """x [tokens, K] in the compute dtype: what the linears of `source` multiply. Experts see their tokens only."""
        ...

    def finish(self, block: int) -> None:
        """All windows have gone through the block; its weights are still there."""
        ...


@dataclass
class Block:
    """A decoder block. Paths are relative to it.

    inputs   path of a module whose input is seen → what that is
    experts  path of fused experts → (expert, "input" or "hidden") → what that is
    """

    name: str
    module: nn.Module
    inputs: dict[str, BlockInput] = field(default_factory=dict)
    experts: dict[str, dict[tuple[int, str], BlockInput]] = field(default_factory=dict)

    @property
    def all_inputs(self) -> list[BlockInput]:
        return [*self.inputs.values(), *(one for each in self.experts.values() for one in each.values())]


class AllSeen(Exception):
    """Everything that was to be seen has been seen; the rest of the block need not be computed."""


@contextmanager
def observed(
    block: Block,
    module: nn.Module,
    visitor: BlockVisitor,
    only: tuple[BlockInput, ...] | None = None,
    stops: bool = False,
    all_experts: bool = False,
) -> Iterator[None]:
    """Inside, the visitor sees the inputs of the block when `module`, the block or a copy, runs.

    only         these inputs and no others
    stops        the run ends in `AllSeen` once all of `only` were seen, unless some are of experts
    all_experts  every expert is shown every token, whoever it is routed to
    """
    wanted = None if only is None else {source.name for source in only}
    remaining: set[str] = set()
    whole = not stops or only is None or any(source.expert is not None for source in only)

    def look(source: BlockInput, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        visitor.look(source, arguments[0].reshape(-1, arguments[0].shape[-1]))
        remaining.discard(source.name)
        if not whole and not remaining:
            remaining.update(wanted or ())
            raise AllSeen

    with ExitStack() as stack:
        for path, source in block.inputs.items():
            if wanted is None or source.name in wanted:
                remaining.add(source.name)
                handle = module.get_submodule(path).register_forward_pre_hook(partial(look, source))
                stack.callback(handle.remove)
        for path, sources in block.experts.items():
            if wanted is None or any(source.name in wanted for source in sources.values()):
                experts = module.get_submodule(path)
                seen = partial(_look_at_expert, sources, visitor)
                experts.forward = partial(run_experts, experts, seen, all_tokens=all_experts)
                stack.callback(delattr, experts, "forward")
        yield


def _look_at_expert(
    sources: dict[tuple[int, str], BlockInput],
    visitor: BlockVisitor,
    expert: int,
    which: Literal["input", "hidden"],
    x: Tensor,
) -> None:
    visitor.look(sources[expert, which], x)


def find_blocks(model: nn.Module, linears: dict[str, Linear], layout: dict[str, Placement], count: int) -> list[Block]:
    """The decoder blocks as transformers has them, and where the inputs of their linears can be seen."""
    shared: dict[str, list[Linear]] = {}
    for linear in linears.values():
        if linear.reads is not None:
            shared.setdefault(linear.reads, []).append(linear)
    inputs = {name: BlockInput(name, tuple(readers)) for name, readers in shared.items()}
    blocks: dict[int, Block] = {}
    seen: set[str] = set()
    for parameter, placement in layout.items():
        for stored, part, expert in placement.pieces():
            linear = linears.get(stored.removesuffix(".weight"))
            if linear is None or linear.block is None or linear.reads is None or not stored.endswith(".weight"):
                continue
            block = blocks.setdefault(linear.block, _block_around(model, parameter, linear.block))
            owner = parameter.rpartition(".")[0]
            path = owner.removeprefix(block.name + ".")
            source = inputs[linear.reads]
            if expert is not None:
                which = "hidden" if parameter.endswith(".down_proj") else "input"
                _refuse_undescribed(model.get_submodule(owner), linear)
                block.experts.setdefault(path, {})[expert, which] = source
            elif part.whole and source.name not in seen:
                block.inputs[path] = source
                seen.add(source.name)
    return [blocks[index] for index in range(count)]


def _block_around(model: nn.Module, parameter: str, index: int) -> Block:
    """The block that a parameter lies in: the first number in its name that is the block's, in a list of modules."""
    for match in re.finditer(rf"\.{index}(?=\.)", parameter):
        if isinstance(model.get_submodule(parameter[: match.start()]), nn.ModuleList):
            name = parameter[: match.end()]
            return Block(name, model.get_submodule(name))
    raise ArchitectureError(f"{parameter} lies in no list of decoder blocks")


def _refuse_undescribed(experts: nn.Module, linear: Linear) -> None:
    if not is_described(experts):
        raise ArchitectureError(
            f"{linear.name} runs inside {type(experts).__name__}, an operation of transformers that does not say how "
            f"it computes; its input cannot be measured"
        )
