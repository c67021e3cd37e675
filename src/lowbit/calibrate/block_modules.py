"""The decoder blocks of a transformers model, and the modules whose inputs are observed.

Experts that transformers computes in one fused operation run expert by expert (`run_experts`), so that the inputs of
each are seen. transformers keeps the experts of a block in three-dimensional parameters and describes the class
uniformly (integrations/moe.py, `use_experts_implementation`); `run_experts` follows that description:

    x = tokens routed to expert e
    h = gate(x · W_gate_up[e] + b)        `_apply_gate`, or `act_fn` without a gate
    y = h · W_down[e] + b                 then `post_expert_norm` if it has one
    out[token] += routing weight · y

Weights are [E, out, in], or [E, in, out] if the class says `is_transposed`. Of classes without that description the
products are watched (`watched_experts`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lowbit.architecture.structure import Linear, Placement
from lowbit.architecture.trace import lies_transposed
from lowbit.calibrate.watched_experts import Look, WatchedExperts
from lowbit.errors import ArchitectureError

# Attributes by which a module of fused experts describes its computation.
DESCRIPTION = ("has_gate", "has_bias", "is_transposed", "down_proj")


@dataclass(frozen=True)
class BlockInput:
    """One distinct input of a block.

    name     model.layers.3.attention_input
    linears  its readers, in the order of the architecture; all of one expert, or of none
    expert   index of that expert
    """

    name: str
    linears: tuple[Linear, ...]

    @property
    def expert(self) -> int | None:
        return self.linears[0].expert if self.linears else None


class BlockVisitor(Protocol):
    """An observer: called with every input of a block for every batch of windows, then `finish`, block by block."""

    def look(self, source: BlockInput, x: Tensor) -> None:
        """x [tokens, K] in the compute dtype: the input of `source`; for an expert, the tokens routed to it."""
        ...

    def finish(self, block: int) -> None:
        """All windows went through the block; its weights are still loaded."""
        ...


@dataclass
class Block:
    """A decoder block. Paths are relative to it.

    inputs   path of the observed module → its input
    experts  path of fused experts → (expert, "input" or "hidden") → input
    calls    name of an input → times that one run reads it, where that is more than once; `find_stages` fills it
    """

    name: str
    module: nn.Module
    inputs: dict[str, BlockInput] = field(default_factory=dict)
    experts: dict[str, dict[tuple[int, str], BlockInput]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def all_inputs(self) -> list[BlockInput]:
        return [*self.inputs.values(), *(one for each in self.experts.values() for one in each.values())]


class AllSeen(Exception):
    """All requested inputs were seen; the rest of the block need not run."""


@contextmanager
def observed(
    block: Block, module: nn.Module, visitor: BlockVisitor, only: tuple[BlockInput, ...] | None = None,
    stops: bool = False, all_experts: bool = False,
) -> Iterator[None]:  # fmt: skip
    """Inside, the visitor sees the inputs of the block when `module`, the block or a copy, runs.

    only         observe these inputs alone
    stops        end the run with `AllSeen` once all of `only` were seen, unless experts are among them
    all_experts  show every token to every expert, whatever the router chose
    """
    wanted = None if only is None else {source.name for source in only}
    remaining: Counter[str] = Counter()
    watched: list[WatchedExperts] = []
    all_calls: Counter[str] = Counter()
    whole = not stops or only is None or any(source.expert is not None for source in only)

    def look(source: BlockInput, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        visitor.look(source, arguments[0].reshape(-1, arguments[0].shape[-1]))
        remaining[source.name] -= 1
        if not whole and not +remaining:
            remaining.update(all_calls)
            raise AllSeen

    def look_at(sources: dict[tuple[int, str], BlockInput]) -> Look:
        def look_at_one(expert: int, which: Literal["input", "hidden"], x: Tensor) -> None:
            if (expert, which) in sources:
                visitor.look(sources[expert, which], x)

        return look_at_one

    with ExitStack() as stack:
        for path, source in block.inputs.items():
            if wanted is None or source.name in wanted:
                remaining[source.name] = block.calls.get(source.name, 1)
                handle = module.get_submodule(path).register_forward_pre_hook(partial(look, source))
                stack.callback(handle.remove)
        for path, sources in block.experts.items():
            if wanted is None or any(source.name in wanted for source in sources.values()):
                experts = module.get_submodule(path)
                experts.forward = partial(_runner(experts, look_at(sources), watched), all_tokens=all_experts)
                stack.callback(delattr, experts, "forward")
        all_calls = remaining.copy()
        yield
        for each in watched:
            each.check()


def observed_blocks(
    model: nn.Module, names: list[str], linears: dict[str, Linear], layout: dict[str, Placement]
) -> list[Block]:
    """The decoder blocks of a model with the modules whose inputs to observe; `names` are their modules, in order."""
    shared: dict[str, list[Linear]] = {}
    for linear in linears.values():
        if linear.reads is not None:
            shared.setdefault(linear.reads, []).append(linear)
    inputs = {name: BlockInput(name, tuple(readers)) for name, readers in shared.items()}
    blocks = [Block(name, model.get_submodule(name)) for name in names]
    seen: set[str] = set()
    for parameter, placement in layout.items():
        for stored, _, expert in placement.pieces():
            linear = linears.get(stored.removesuffix(".weight"))
            if linear is None or linear.block is None or linear.reads is None or not stored.endswith(".weight"):
                continue
            block = blocks[linear.block]
            owner = parameter.rpartition(".")[0]
            path = owner.removeprefix(block.name + ".")
            source = inputs[linear.reads]
            if expert is not None:
                which = "hidden" if parameter.endswith(".down_proj") else "input"
                block.experts.setdefault(path, {})[expert, which] = source
            elif source.name not in seen:
                block.inputs[path] = source
                seen.add(source.name)
    return blocks


def _runner(experts: nn.Module, look: Look, watched: list[WatchedExperts]) -> Callable[..., Tensor]:
    """The forward of a module of experts that shows their inputs; one that only its products show is added to
    `watched`."""
    if _describes_itself(experts):
        return partial(run_experts, experts, look)
    if _is_stacked(experts):
        return partial(run_stacked_experts, experts, look)
    watched.append(WatchedExperts(experts, look))
    return watched[-1]


def run_experts(
    experts: Any, look: Look, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor,
    all_tokens: bool = False,
) -> Tensor:  # fmt: skip
    """The output of `experts`, [tokens, H], for tokens [tokens, H], chosen experts and routing weights [tokens, k].

    all_tokens  show `look` every token for every expert; the output stays the same
    """
    chosen = top_k_index.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    tokens = order // top_k_index.shape[1]
    weights = top_k_weights.reshape(-1)[order, None]
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    first_bias = _bias(experts, "gate_up_proj" if experts.has_gate else "up_proj")
    down_bias = _bias(experts, "down_proj")
    out = torch.zeros_like(hidden_states)
    stop = 0
    for expert, count in enumerate(torch.bincount(chosen, minlength=first.shape[0]).tolist()):
        start, stop = stop, stop + count
        if all_tokens:
            every = _linear(experts, hidden_states, first[expert], first_bias, expert)
            look(expert, "input", hidden_states)
            look(expert, "hidden", experts._apply_gate(every) if experts.has_gate else experts.act_fn(every))
        if not count:
            continue
        rows = tokens[start:stop]
        x = hidden_states[rows]
        if not all_tokens:
            look(expert, "input", x)
        inner = _linear(experts, x, first[expert], first_bias, expert)
        h = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        if not all_tokens:
            look(expert, "hidden", h)
        y = _linear(experts, h, experts.down_proj[expert], down_bias, expert)
        if experts.has_post_expert_norm:
            y = experts.post_expert_norm(y)
        out.index_add_(0, rows, (y * weights[start:stop]).to(out.dtype))
    return out


def run_stacked_experts(experts: Any, look: Look, hidden_states: Tensor, all_tokens: bool = False) -> Tensor:
    """The output of experts that get [E · tokens, H], every token once per expert, already times its routing weight and
    zero where the router chose others (Llama 4); `look` sees what is not zero.

    all_tokens  is refused: what the router did not choose is zero
    """
    if all_tokens:
        raise ArchitectureError(
            f"{type(experts).__name__} gets zeros for tokens that the router gave to others; "
            f"not every expert can see every token"
        )
    out = []
    for expert, x in enumerate(hidden_states.view(len(experts.gate_up_proj), -1, hidden_states.shape[-1])):
        chosen = x.abs().amax(dim=-1) > 0
        gate, up = (x @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        h = up * experts.act_fn(gate)
        if bool(chosen.any()):
            look(expert, "input", x[chosen])
            look(expert, "hidden", h[chosen])
        out.append(h @ experts.down_proj[expert])
    return torch.cat(out)


def _describes_itself(experts: nn.Module) -> bool:
    return all(hasattr(experts, name) for name in DESCRIPTION)


def _is_stacked(experts: nn.Module) -> bool:
    """True for experts [E, H, 2I] and [E, I, H] with gate before up, that get tokens sorted by expert."""
    parameters = inspect.signature(type(experts).forward).parameters
    return list(parameters) == ["self", "hidden_states"] and hasattr(experts, "act_fn") and lies_transposed(experts)


def _linear(experts: Any, x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    y = x @ (weight if experts.is_transposed else weight.t())
    return y if bias is None else y + bias[expert]


def _bias(experts: Any, parameter: str) -> Tensor | None:
    return getattr(experts, f"{parameter}_bias") if experts.has_bias else None
