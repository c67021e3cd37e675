"""How much the loss depends on what a linear computes for each token: weights for the Hessian (GuidedQuant, Kim et al.
2025, arXiv 2505.07004).

    z_t = W x_t                                     outputs of a linear for token t
    f[t, g] = mean of (∂ℓ/∂z_t)² over the output channels of group g
    s[t, g] = f[t, g]^γ / mean over t               γ = ½
    H_g = Σ_t s[t, g] x_t x_tᵀ                      in place of Σ x xᵀ, for the rows of W in group g

To second order an error ΔW takes the model ½ Σ_t (∂ℓ/∂z_t · ΔW x_t)² away from the unquantized one, in KL divergence:
its curvature is the Fisher information, the mean of the products of gradients of ℓ = −log p(y), y drawn by the model
itself. With γ = 1, Σ_g tr(ΔW_g H_g ΔW_gᵀ) is that sum without the products of different channels, and with the squares
of a group replaced by their mean (GuidedQuant); γ = 0 is Σ x xᵀ, which counts the output of every token alike, whatever
becomes of it. Squared gradients are heavy-tailed: with γ = 1, H is in effect a sum over a seventh of the tokens, for
some inputs over one or two. The square root keeps most of the tokens, and measured better than either (docs/log.md).

The same gradients give the curvature of the loss in pairs of outputs, which `rounding.row_feedback` reads:

    G = Σ_t g_t g_tᵀ / (mean over outputs of g_t²)^(1 − γ)      g_t = ∂ℓ/∂z_t, of at most LARGEST_PART outputs at once

The gradients are those of the unquantized model, so they must be known before the first block is rounded:

    forward     embed, then block by block; keep the input of every block
    head        y ~ softmax(logits), ∂ℓ/∂logits = softmax(logits) − onehot(y), back through head and last norm
    backward    blocks in reverse: run one again with autograd, take s of its linears, and the gradient of its input

Memory: one block, the activations and gradients of one batch of windows in it, one gradient of the hidden states of all
windows, and the weights s, float32. The kept inputs go to a file where memory is short. About three forward passes,
and the head once and back.

What has no weights is measured as before, and says why: linears that run inside a fused operation (experts), more than
once, or without a gradient; and all blocks up to one through which no gradient comes. The weights of a group have mean
1, so that damping means the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowbit.calibrate.block_modules import BlockInput
from lowbit.calibrate.blocks import BlockRunner, HiddenStates, batches_of
from lowbit.errors import ArchitectureError, NonFiniteError, OutputError
from lowbit.rounding.hessian import row_groups
from lowbit.rounding.row_feedback import curvature_of, parts_of

LOGIT_BYTES = 16 << 20  # of float32 logits at once
_DRAWN = 256  # tokens of the vocabulary whose probabilities are summed at once
_POWER = 0.5  # γ
PASSES = 3  # windows through a block, for the progress bar: forward, and twice as much for the pass back
Tick = Callable[[int], None]
KeepCurvature = Callable[[int, dict[str, tuple[Tensor, ...]]], None]  # block, linear → float32 [n, n] of its parts


@dataclass
class TokenWeights:
    """
    weights  linear → float32 [windows, T, G], with mean 1 in every group
    missing  linear → why it has none
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def of(self, source: BlockInput, batch: slice) -> dict[str, Tensor]:
        """Readers of an input that have weights → [tokens of the batch, G]."""
        known = {linear.name: self.weights[linear.name] for linear in source.linears if linear.name in self.weights}
        return {name: values[batch].flatten(0, 1) for name, values in known.items()}


def token_weights(
    runner: BlockRunner, ids: Tensor, groups: Mapping[str, int], seed: int, memory: int, tick: Tick | None = None,
    keep: KeepCurvature | None = None,
) -> TokenWeights:  # fmt: skip
    """Weights of every token of int64 [windows, T] for linears of decoder blocks.

    groups  linear → groups of consecutive output channels, as equal as they can be
    seed    of the tokens drawn
    memory  bytes of the inputs of all blocks that may stay in memory
    keep    takes G of the linears of each block, which is measured only then

    Deterministic for a seed, a machine and a number of threads. NonFiniteError if a logit is not finite.
    """
    tick = tick or (lambda windows: None)
    found = TokenWeights()
    modules = runner.module_names
    with torch.no_grad():
        states = runner.embed(ids)
        inputs = inputs_of_blocks(runner, ids, states, memory, tick)
        gradient = states.values  # from here on ∂ℓ/∂(what they hold)
        try:
            back_through_head(runner, ids, gradient, torch.Generator().manual_seed(seed))
        except ArchitectureError as error:
            why = f"no gradient comes through the head: {_first_line(error)}"
            return TokenWeights({}, dict.fromkeys(groups, why))
        for index in reversed(range(len(runner.blocks))):
            here = {name: linear for name, linear in runner.architecture.linears.items() if linear.block == index}
            wanted = {name: min(groups[name], linear.shape[0]) for name, linear in here.items() if name in groups}
            try:
                curvature = _back_through(runner, index, ids, inputs[index], gradient, wanted, modules, found, tick,
                                          keep is not None)  # fmt: skip
                if keep is not None:
                    keep(index, {name: parts for name, parts in curvature.items() if name in found.weights})
            except (ArchitectureError, NonFiniteError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                why = f"no gradient comes through {runner.blocks[index].name}: {_first_line(error)}"
                before = {name for name in groups if (runner.architecture.linears[name].block or 0) <= index}
                found.missing |= dict.fromkeys(sorted(before), why)
                break
            finally:
                runner.drop(index)
    return found


def inputs_of_blocks(runner: BlockRunner, ids: Tensor, states: HiddenStates, memory: int, tick: Tick) -> Tensor:
    """The inputs of all blocks, [blocks, windows, T, width]; `states` become the output of the last."""
    windows, tokens, width = states.values.shape
    try:
        states_of_all = HiddenStates((len(runner.blocks) * windows, tokens, width), runner.dtype, memory)
    except OutputError as error:
        raise OutputError(str(error), f"{error.hint}; --hessian inputs keeps those of one block alone") from error
    kept = states_of_all.values.reshape(len(runner.blocks), windows, tokens, width)
    for index in range(len(runner.blocks)):
        kept[index] = states.values
        runner.load(index)
        for batch in batches_of(ids):
            states.values[batch] = runner.forward(index, states.values[batch], batch=batch)
            tick(batch.stop - batch.start)
        runner.drop(index)
    return kept


def back_through_head(runner: BlockRunner, ids: Tensor, states: Tensor, generator: torch.Generator) -> None:
    """Replace the last hidden states [windows, T, width] by the gradient of the loss."""
    with runner.head_loaded():
        blocks = -(-runner.vocabulary // _DRAWN)
        step = max(1, LOGIT_BYTES // (4 * blocks * _DRAWN))
        room = torch.empty(step, blocks, _DRAWN, device=runner.device)
        for batch in batches_of(ids):
            x = states[batch].to(runner.device).requires_grad_()
            with torch.enable_grad():
                hidden = runner.behind_blocks(ids[batch], x)
            flat, slope = hidden.detach().flatten(0, 1), torch.empty_like(hidden)
            for start in range(0, len(flat), step):
                now = slice(start, start + step)
                slope.view_as(flat)[now] = _loss_gradient(runner, flat[now], room, generator)
            states[batch] = torch.autograd.grad(hidden, x, slope)[0]


def _loss_gradient(runner: BlockRunner, hidden: Tensor, room: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of −log p(y), y drawn from p, at outputs of the decoder [n, H].

    room  float32 [n or more, blocks, _DRAWN]: memory for the logits, since new arrays of this size cost more time than
          what is computed in them
    """
    x = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = runner.logits(x)
    room, vocabulary = room[: len(hidden)], logits.shape[-1]
    flat = room.flatten(1)
    flat[:, :vocabulary], flat[:, vocabulary:] = logits.detach(), -torch.inf
    flat.sub_(flat.amax(dim=1, keepdim=True)).exp_()
    sums = room.sum(dim=2).cumsum(dim=1)
    if not torch.isfinite(sums[:, -1]).all():
        raise NonFiniteError("the logits of the unquantized model are not finite on the calibration text",
                             "compute in float32 (--compute float32), or check the checkpoint")  # fmt: skip
    drawn = torch.rand(len(hidden), 1, generator=generator).to(flat.device) * sums[:, -1:]
    label = _place_of(drawn, sums, room).clamp_(max=vocabulary - 1)
    flat.div_(sums[:, -1:]).scatter_add_(1, label, torch.full_like(drawn, -1.0))
    return torch.autograd.grad(logits, x, flat[:, :vocabulary].to(logits.dtype))[0]


def _place_of(drawn: Tensor, sums: Tensor, values: Tensor) -> Tensor:
    """Where running sums of `values` [n, blocks, width] pass `drawn` [n, 1]: int64 [n, 1]; `sums` [n, blocks] run over
    blocks, so that only one block of each row is summed one by one."""
    block = torch.searchsorted(sums, drawn).clamp_(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inner = values[torch.arange(len(values), device=values.device), block[:, 0]].cumsum(dim=1)
    return block * values.shape[2] + torch.searchsorted(inner, drawn - before).clamp_(max=values.shape[2] - 1)


def _back_through(
    runner: BlockRunner, index: int, ids: Tensor, inputs: Tensor, gradient: Tensor, groups: Mapping[str, int],
    modules: Mapping[str, str], found: TokenWeights, tick: Tick, measures_pairs: bool,
) -> dict[str, tuple[Tensor, ...]]:  # fmt: skip
    """Take the weights of a block's linears, and turn the gradient of its output into that of its input; returns G of
    the linears, if it `measures_pairs`."""
    runner.load(index)
    prefix = f"{runner.blocks[index].name}."
    paths: dict[str, str] = {}
    for name in groups:
        if name in modules and modules[name].startswith(prefix):
            paths[name] = modules[name].removeprefix(prefix)
        else:
            found.missing[name] = "it runs inside a fused operation"
    weights = {name: torch.empty(*ids.shape, groups[name]) for name in paths}
    curvature: dict[str, tuple[Tensor, ...]] = {}
    for batch in batches_of(ids):
        slope_of_input, calls = slopes_through(runner, index, inputs[batch], gradient[batch], paths, batch)
        for name in [name for name in paths if name in weights]:
            slope = calls[name].slope
            if slope is None:
                del weights[name]
                times = calls[name].times
                found.missing[name] = f"it runs {times} times" if times > 1 else "no gradient of the loss reaches it"
                continue
            weights[name][batch] = _mean_squares(slope, groups[name]).reshape(*ids[batch].shape, -1)
            if measures_pairs:
                sums = [curvature_of(slope[:, part], _POWER) for part in parts_of(slope.shape[1])]
                before = curvature.get(name)
                curvature[name] = tuple(sums if before is None else map(Tensor.add_, before, sums))
        gradient[batch] = slope_of_input  # the slope of a last linear may be a view of what this replaces
        tick(2 * (batch.stop - batch.start))
    for name, values in weights.items():
        mean = values.mean(dim=(0, 1))
        if not (mean > 0).all():
            found.missing[name] = "the loss does not depend on its output"
            continue
        values.pow_(_POWER)
        found.weights[name] = values.div_(values.mean(dim=(0, 1)))
    return curvature


@dataclass
class LinearCalls:
    """What a linear did as its block ran once with gradients.

    times  that it ran
    input  [tokens, K], of the one time that it ran
    slope  [tokens, N], gradient of the loss by its output; None unless it ran once, for every token, and mattered
    """

    times: int
    input: Tensor | None = None
    slope: Tensor | None = None


def slopes_through(
    runner: BlockRunner, index: int, states: Tensor, gradient: Tensor, paths: Mapping[str, str], batch: slice
) -> tuple[Tensor, dict[str, LinearCalls]]:
    """Run a loaded block with gradients: (gradient by its input, linear → what it did).

    states, gradient  the input of the block and the gradient by its output, [windows, T, width]
    paths             linear → path of its module in the block

    ArchitectureError where no gradient comes through, NonFiniteError for one that is not finite.
    """
    x = states.to(runner.device).detach().requires_grad_()
    with torch.enable_grad(), _calls_of(runner.blocks[index].module, paths) as calls:
        out = runner.forward(index, x, batch=batch)
    once = {name: its[0][1] for name, its in calls.items() if len(its) == 1 and its[0][1].requires_grad}
    slope, *slopes = torch.autograd.grad(out, [x, *once.values()], gradient.to(out), allow_unused=True)
    if slope is None:
        raise ArchitectureError("its output does not depend on its input")
    if not torch.isfinite(slope).all():
        raise NonFiniteError("the gradient is not finite")
    found = {name: LinearCalls(len(its)) for name, its in calls.items()}
    tokens = states.shape[0] * states.shape[1]
    for name, own in zip(once, slopes, strict=True):
        if own is not None and own.numel() // own.shape[-1] == tokens:
            read = calls[name][0][0]
            found[name].input = read.reshape(-1, read.shape[-1])
            found[name].slope = own.reshape(-1, own.shape[-1])
    return slope, found


def _mean_squares(slope: Tensor, groups: int) -> Tensor:
    """Mean of the squares of [tokens, N] over consecutive groups of channels; float32 [tokens, G]."""
    norms = [torch.linalg.vector_norm(slope[:, part], dim=1, dtype=torch.float32) / (part.stop - part.start) ** 0.5
             for part in row_groups(slope.shape[1], groups)]  # fmt: skip
    return torch.stack(norms, dim=1).square_()


@contextmanager
def _calls_of(module: nn.Module, paths: Mapping[str, str]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Inside, linear → (input, output) of its calls, where a call returns the output alone."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in paths}

    def keep(name: str) -> Callable[..., None]:
        # A router returns more than its product: what is chosen, and how much.
        return lambda _module, arguments, out: (
            calls[name].append((arguments[0].detach(), out)) if isinstance(out, Tensor) else None
        )

    with ExitStack() as stack:
        for name, path in paths.items():
            stack.callback(module.get_submodule(path).register_forward_hook(keep(name)).remove)
        yield calls


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
