"""What it costs a model to store each of its tensors in each of several types, in nats per token.

To second order, an error ΔW of one tensor takes the model this far from the unquantized one, in KL divergence, of which
the curvature is the Fisher information (as in `calibrate.gradients`, from where the gradients come):

    ½ · mean over tokens of (g · Δz)²        g = ∂ℓ/∂z,  ℓ = −log p(y),  y drawn by the model itself

    linear       Δz = ΔW x               z, its output
    experts      Δz = block' − block     z, the output of the block with them rounded, since they run in one operation
    embedding    Δz = rows' − rows       z, the input of the first block
    head         KL itself, of the logits that the rounded head gives

Products of gradients at different tokens are left out: their mean is zero but for tokens that read each other. A token
counts for one nat at most, because beyond that the second order no longer holds: for the few tokens of massive
activations (Sun et al. 2024, arXiv 2402.17762), the first of a text among them, it gives hundreds of nats where the
model loses nearly nothing, and they would decide for all others. Weights are rounded to nearest, with the squared
inputs of the same text as importance. The costs of all tensors are added up as if errors were independent.

Memory: one block, its inputs and gradients for all windows, and the inputs of all blocks, in a file above the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from lowbit.architecture.structure import Linear
from lowbit.calibrate.block_modules import observed
from lowbit.calibrate.blocks import BlockRunner, batches_of
from lowbit.calibrate.gradients import Tick, back_through_head, inputs_of_blocks, slopes_through
from lowbit.calibrate.tensors import OverlaidCheckpoint, Replacement
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import ArchitectureError, NonFiniteError
from lowbit.formats.gguf.imatrix import SquaredSums

PASSES = 3  # windows through each block, for the progress bar
_CAP = 1.0  # nats that a token counts for at most
_EVERY = 4  # tokens from one whose logits are compared to the next
_LOGITS = 256 << 20  # bytes of logits at once

# (type, name of a weight, the weight [N, K], importance [K] or None) → what an engine decodes, float32 [N, K]
RoundTo = Callable[[str, str, Tensor, Tensor | None], Tensor]
Costs = dict[str, dict[str, float]]  # tensor of the output → type → nats per token


@dataclass(frozen=True)
class Weighed:
    """One tensor of the output.

    sources  names of the weights it is made of: one, or those of stacked experts
    types    that it may be stored in
    """

    name: str
    sources: tuple[str, ...]
    types: tuple[str, ...]


@dataclass(frozen=True)
class Tensors:
    """What is weighed: tensors of decoder blocks, the embedding and the head; a tied one is both."""

    of_blocks: Sequence[Weighed]
    embedding: Weighed | None = None
    head: Weighed | None = None

    @property
    def all(self) -> dict[str, Weighed]:
        """By name."""
        outside = [each for each in (self.embedding, self.head) if each is not None]
        return {each.name: each for each in (*outside, *self.of_blocks)}


@dataclass
class _Seen:
    """What one linear read and the gradient of what it gave, batch by batch."""

    inputs: list[Tensor] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)


def measure_costs(
    runner: BlockRunner, checkpoint: Checkpoint, ids: Tensor, tensors: Tensors, round_to: RoundTo, seed: int,
    memory: int, tick: Tick | None = None,
) -> Costs:  # fmt: skip
    """The cost of every tensor in each of its types, on int64 [windows, T] tokens.

    checkpoint  of the weights, under the names of the runner's architecture
    seed        of the tokens drawn
    memory      bytes of the inputs of all blocks that may stay in memory
    tick        called with the windows that went through one block

    ArchitectureError where no gradient comes through the model; NonFiniteError for logits that are not finite.
    """
    tick = tick or (lambda windows: None)
    costs: Costs = {name: dict.fromkeys(tensor.types, 0.0) for name, tensor in tensors.all.items()}
    of_linear = {f"{name}.weight": linear for name, linear in runner.architecture.linears.items()}
    with torch.no_grad():
        states = runner.embed(ids)
        embedded = states.values.clone()
        inputs = inputs_of_blocks(runner, ids, states, memory, tick)
        gradient = states.values  # from back_through_head on, ∂ℓ/∂(what they hold)
        if tensors.head is not None:
            costs[tensors.head.name] = _costs_of_head(runner, checkpoint, ids, gradient, tensors.head, round_to)
        back_through_head(runner, ids, gradient, torch.Generator().manual_seed(seed))
        for index in reversed(range(len(runner.blocks))):
            runner.load(index)
            block = _WeighedBlock(runner, checkpoint, index, ids, inputs[index], round_to)
            here = [tensor for tensor in tensors.of_blocks if of_linear[tensor.sources[0]].block == index]
            costs |= block.costs(here, of_linear, gradient)
            runner.drop(index)
            tick(2 * len(ids))
        if tensors.embedding is not None:
            (source,) = tensors.embedding.sources
            weight = checkpoint.read(source).float()
            for name in tensors.embedding.types:
                value = Replacement(partial(round_to, name, source, weight, None), torch.float32)
                moved = runner.embed(ids, OverlaidCheckpoint(checkpoint, {source: value}))
                costs[tensors.embedding.name][name] += _nats(moved.values - embedded, gradient) / ids.numel()
    return costs


@dataclass(frozen=True)
class _WeighedBlock:
    """A loaded block and its inputs [windows, T, width]."""

    runner: BlockRunner
    checkpoint: Checkpoint
    index: int
    ids: Tensor
    inputs: Tensor
    round_to: RoundTo

    def costs(self, tensors: Sequence[Weighed], linears: Mapping[str, Linear], gradient: Tensor) -> Costs:
        """What tensors of the block cost; turns the gradient of its output into that of its input."""
        of_output = gradient.clone()
        seen = self._back([name for tensor in tensors for name in tensor.sources], linears, gradient)
        importance = {
            name: torch.stack([x.float().square().sum(dim=0).cpu() for x in its.inputs]).sum(dim=0)
            for name, its in seen.items()
        }
        if any(name not in seen for tensor in tensors for name in tensor.sources):
            importance |= self._importance_of_experts(linears)
        found: Costs = {}
        for tensor in tensors:
            weights = {name: self._rows(name, linears, self.checkpoint.read(name).float()) for name in tensor.sources}
            found[tensor.name] = {}
            for kind in tensor.types:
                rounded = {
                    name: self.round_to(kind, name, weight, importance.get(name)) for name, weight in weights.items()
                }
                if all(name in seen for name in weights):
                    total = sum(_product_cost(seen[name], rounded[name] - weights[name]) for name in weights)
                else:
                    total = self._cost_at_output(
                        {name: self._rows(name, linears, value) for name, value in weights.items()},
                        {name: self._rows(name, linears, value) for name, value in rounded.items()}, of_output,
                    )  # fmt: skip
                found[tensor.name][kind] = total / self.ids.numel()
        return found

    def _rows(self, name: str, linears: Mapping[str, Linear], values: Tensor) -> Tensor:
        """[N, K] ↔ the orientation of the file."""
        turns = linears[name].transposed and name not in self.checkpoint.schemes
        return values.t().contiguous() if turns else values

    def _back(self, names: Sequence[str], linears: Mapping[str, Linear], gradient: Tensor) -> dict[str, _Seen]:
        """Run the block with gradients; what its linears saw, of those that run once and by themselves."""
        runner, block = self.runner, self.runner.blocks[self.index]
        alone = {name: linears[name].name for name in names if runner.linear_module(linears[name].name) is not None}
        paths = {name: runner.module_names[linear].removeprefix(f"{block.name}.") for name, linear in alone.items()}
        seen = {name: _Seen() for name in paths}
        for batch in batches_of(self.ids):
            # a copy: the slope of a last linear may be a view of it, and what it was is replaced below
            of_output = gradient[batch].clone()
            try:
                slope, calls = slopes_through(runner, self.index, self.inputs[batch], of_output, paths, batch)
            except ArchitectureError as error:
                raise ArchitectureError(f"no gradient comes through {block.name}: {error}", error.hint) from error
            except NonFiniteError as error:
                raise NonFiniteError(f"{error} in {block.name}", error.hint) from error
            for name, its in seen.items():
                call = calls[name]
                if call.input is not None and call.slope is not None:
                    its.inputs.append(call.input)
                    its.slopes.append(call.slope)
            gradient[batch] = slope
        batches = len(batches_of(self.ids))
        return {name: its for name, its in seen.items() if len(its.slopes) == batches}

    def _importance_of_experts(self, linears: Mapping[str, Linear]) -> dict[str, Tensor]:
        """Σ x² of the inputs of linears that run inside another operation; without those that no token reached."""
        block, squared = self.runner.blocks[self.index], SquaredSums()
        with observed(block, block.module, squared):
            for batch in batches_of(self.ids):
                self.runner.forward(self.index, self.inputs[batch], batch=batch)
        found = {name: squared.sums.get(str(linear.reads)) for name, linear in linears.items()}
        return {name: values.float() for name, values in found.items() if values is not None and values.any()}

    def _cost_at_output(self, weights: Mapping[str, Tensor], rounded: Mapping[str, Tensor], slopes: Tensor) -> float:
        """Σ over tokens of ½ (g · Δz)² at the output of the block, at most 1 each; weights as in the file."""
        total = 0.0
        for batch in batches_of(self.ids):
            before = self.runner.forward(self.index, self.inputs[batch], batch=batch)
            self.runner.put(dict(rounded))
            after = self.runner.forward(self.index, self.inputs[batch], batch=batch)
            self.runner.put(dict(weights))
            total += _nats(after - before, slopes[batch])
        return total


def _nats(moved: Tensor, slopes: Tensor) -> float:
    """Σ over tokens of ½ (g · Δz)², at most 1 each; both [..., width]."""
    return ((moved * slopes).sum(dim=-1).square() / 2).clamp(max=_CAP).sum().item()


def _product_cost(seen: _Seen, error: Tensor) -> float:
    """Σ over tokens of ½ (g · ΔW x)², at most 1 each; error [N, K]."""
    error = error.T.to(seen.inputs[0])
    return sum(_nats(x @ error, slope) for x, slope in zip(seen.inputs, seen.slopes, strict=True))


def _costs_of_head(
    runner: BlockRunner, checkpoint: Checkpoint, ids: Tensor, states: Tensor, head: Weighed, round_to: RoundTo
) -> dict[str, float]:
    """Type → mean KL(logits ‖ logits of the rounded head), from hidden states [windows, T, width] behind all blocks."""
    (name,) = head.sources
    weight, found = checkpoint.read(name).float(), dict.fromkeys(head.types, 0.0)
    with runner.head_loaded():
        hidden = [runner.behind_blocks(ids[batch], states[batch]).flatten(0, 1)[::_EVERY] for batch in batches_of(ids)]
        rows = torch.cat(hidden)
        for kind in head.types:
            rounded = round_to(kind, name, weight, None)
            for part in rows.split(max(1, _LOGITS // (4 * len(weight)))):
                runner.put({name: weight})
                expected = runner.logits(part).float().log_softmax(dim=-1)
                runner.put({name: rounded})
                given = runner.logits(part).float().log_softmax(dim=-1)
                found[kind] += kl_div(given, expected, log_target=True, reduction="sum").item() / len(rows)
    return found
