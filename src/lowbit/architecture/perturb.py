"""What feeds an input, tested by perturbation: scales s go into the output of a module and 1/s into everything that is
thought to read it; if the block's output stays the same, nothing but elementwise factors lies between, and nobody else
reads the module.

The test stands for what AWQ, SmoothQuant and rotations do later to the weights. It needs no names.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowbit.architecture.feeding import ARRANGEMENTS, FedRows, Feed, fed_rows
from lowbit.architecture.trace import (
    BlockCall,
    BlockTrace,
    first_tensor,
    is_experts,
    is_linear,
    lies_transposed,
    output_width,
)

_TOLERANCE = 1e-3


def look_at_block(heads: int, run: BlockCall) -> BlockTrace:
    """What one block shows: order, shared inputs, what feeds them. `heads` are query heads of attention."""
    seen = _Observed(run)
    trace = BlockTrace()
    found: list[Tensor] = []
    for path, x in seen.inputs.items():
        if path not in seen.weighted or _applies_as_linear(run.block.get_submodule(path), x, *seen.weighted[path]):
            number = next((n for n, other in enumerate(found) if _same(x, other)), len(found))
            if number == len(found):
                found.append(x)
            trace.order.append(path)
            trace.inputs[path] = number
            if path in seen.weighted:
                trace.routers.add(path)
    base = seen.out
    if base is None or not _close(_output(run), base):
        return trace  # not deterministic: nothing can be tested
    for number, x in enumerate(found):
        feed = _find_feed(run, base, trace, number, x, seen, heads)
        if feed is not None:
            trace.feeds[number] = feed
    return trace


class _Observed:
    """One run of a block.

    inputs    path → input [tokens, K] of linears, experts, and modules with a 2-D weight, in the order they ran
    weighted  those of `inputs` that are neither linears nor experts → the arguments of their call
    vectors   path → output [tokens, K] of modules with a weight [K], such as norms
    out       the block's output, one vector; None if it has none
    """

    def __init__(self, run: BlockCall):
        self.inputs: dict[str, Tensor] = {}
        self.weighted: dict[str, tuple[Any, Any]] = {}
        self.vectors: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for path, module in run.block.named_modules():
                weight = module._parameters.get("weight")
                if is_linear(module) or is_experts(module) or (weight is not None and weight.dim() == 2):
                    if isinstance(module, nn.Embedding):
                        continue
                    hook = module.register_forward_pre_hook(partial(self._put_input, path), with_kwargs=True)
                elif weight is not None and weight.dim() == 1:
                    hook = module.register_forward_hook(partial(self._put_output, path))
                else:
                    continue
                stack.callback(hook.remove)
            self.out = _output(run)

    def _put_input(self, path: str, module: nn.Module, arguments: Any, keywords: Any) -> None:
        x = first_tensor(arguments) if arguments else first_tensor(list(keywords.values()))
        if x is not None and path not in self.inputs:
            self.inputs[path] = x.reshape(-1, x.shape[-1]).clone()
            if not (is_linear(module) or is_experts(module)):
                self.weighted[path] = (arguments, keywords)

    def _put_output(self, path: str, module: nn.Module, arguments: Any, out: Any) -> None:
        values = first_tensor(out)
        if values is not None:
            self.vectors[path] = values.reshape(-1, values.shape[-1]).clone()


def _output(run: BlockCall) -> Tensor | None:
    leaves = [leaf.flatten().float() for leaf in tree_leaves(run()) if isinstance(leaf, Tensor)]
    return torch.cat(leaves) if leaves else None


def _same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two)


def _close(one: Tensor | None, two: Tensor) -> bool:
    if one is None or one.shape != two.shape or not bool(torch.isfinite(one).all()):
        return False
    return float((one - two).norm()) <= _TOLERANCE * float(two.norm())


def _applies_as_linear(module: nn.Module, x: Tensor, arguments: Any, keywords: Any) -> bool:
    """True if a module's result depends on its input only through the product with its 2-D weight."""
    weight = module._parameters["weight"]
    if weight is None or x.shape[-1] != weight.shape[1]:
        return False
    scales = _scales(x.shape[-1])
    try:
        before = [leaf.float() for leaf in tree_leaves(module(*arguments, **keywords)) if isinstance(leaf, Tensor)]
        module._parameters["weight"] = nn.Parameter(weight * scales, requires_grad=False)
        arguments, keywords = _scaled_input(1 / scales, module, arguments, keywords)
        after = [leaf.float() for leaf in tree_leaves(module(*arguments, **keywords)) if isinstance(leaf, Tensor)]
    except Exception:  # it changes with its arguments
        return False
    finally:
        module._parameters["weight"] = weight
    pairs = zip(before, after, strict=True)
    return bool(before) and all(one.shape == two.shape and _close(one.flatten(), two.flatten()) for one, two in pairs)


def _scales(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(count)) * 1.5 + 0.5


def _find_feed(
    run: BlockCall, base: Tensor, trace: BlockTrace, number: int, x: Tensor, seen: _Observed, heads: int
) -> Feed | None:
    readers = trace.readers(number)
    columns = x.shape[-1]
    for path, values in seen.vectors.items():
        if _same(values, x) and _stays(run, base, path, FedRows(), readers, columns):
            return Feed(path, "norm")
    before = trace.order[: trace.order.index(readers[0])]
    for path in reversed(before):
        module = run.block.get_submodule(path)
        if not is_linear(module) or trace.inputs[path] == number:
            continue
        rows = output_width(module)
        for arrangement in ARRANGEMENTS:
            fed = fed_rows(arrangement, rows, columns, heads)
            if fed is not None and _stays(run, base, path, fed, readers, columns):
                return Feed(path, arrangement)
    return None


def _stays(run: BlockCall, base: Tensor, feeder: str, fed: FedRows, readers: list[str], columns: int) -> bool:
    """True if scales in the feeder's output and their inverse in the readers' input change nothing, and the scales
    alone do."""
    module = run.block.get_submodule(feeder)
    channels = columns if fed.channel is None else int(fed.channel.max()) + 1
    scales = _scales(channels)
    inverse = 1 / (scales if fed.channel is None else scales[fed.channel])
    with ExitStack() as stack, suppress(RuntimeError, IndexError):  # shapes that do not fit after all
        stack.callback(module.register_forward_hook(partial(_scaled_output, fed, scales)).remove)
        if _close(_output(run), base):
            return False
        for path in readers:
            reader, hook = run.block.get_submodule(path), partial(_scaled_input, inverse)
            stack.callback(reader.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return _close(_output(run), base)
    return False


def _scaled_output(fed: FedRows, scales: Tensor, module: nn.Module, arguments: Any, out: Any) -> Any:
    def turned(values: Tensor) -> Tensor:
        factors = scales.to(values.dtype)
        if fed.rows is None:
            return values * factors
        values = values.clone()
        values[..., fed.rows] *= factors
        return values

    return _replace_first(out, turned)


def _scaled_input(factors: Tensor, module: nn.Module, arguments: Any, keywords: Any) -> Any:
    def turned(values: Tensor) -> Tensor:
        return values * factors.to(values.dtype)

    if arguments:
        return _replace_first(arguments, turned), keywords
    name = next(key for key, value in keywords.items() if isinstance(value, Tensor))
    return arguments, {**keywords, name: turned(keywords[name])}


def _replace_first(out: Any, turned: Callable[[Tensor], Tensor]) -> Any:
    """The first tensor of a nested tuple or list replaced."""
    if isinstance(out, Tensor):
        return turned(out)
    for index, each in enumerate(out):
        if first_tensor(each) is not None:
            return (*out[:index], _replace_first(each, turned), *out[index + 1 :])
    return out


def gate_passes(module: nn.Module) -> bool:
    """True if scales in the second part of fused experts' gate_up_proj pass the gate's own function unchanged."""
    gate = getattr(module, "_apply_gate", None)
    parameter = module._parameters.get("gate_up_proj")
    if gate is None or parameter is None:
        return False
    rows = parameter.shape[2 if lies_transposed(module) else 1]
    alternate = not getattr(module, "is_concatenated", True)
    chosen = torch.arange(1, rows, 2) if alternate else torch.arange(rows // 2, rows)
    x = torch.randn(4, rows, generator=torch.Generator().manual_seed(0))
    scales = _scales(rows // 2)
    scaled = x.clone()
    scaled[:, chosen] *= scales
    try:
        with torch.no_grad():
            return _close(gate(scaled).flatten(), (gate(x) * scales).flatten())
    except Exception:  # a gate with weights of its own, which are not there
        return False


def norm_kind(module: nn.Module, width: int) -> str | None:
    """What a norm computes, from its results: "rms" x/rms(x) · w, "rms_plus_one" x/rms(x) · (1 + w), "layer" LayerNorm;
    None for other modules."""
    weight = module._parameters.get("weight")
    if weight is None or tuple(weight.shape) != (width,):
        return None
    bias = module._parameters.get("bias")
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(1))

    def result(value: float, shift: float = 0.0) -> Tensor:
        module._parameters["weight"] = nn.Parameter(torch.full((width,), value), requires_grad=False)
        return module((x + shift)[None]).float()

    try:
        if bias is not None:
            module._parameters["bias"] = nn.Parameter(torch.zeros(width), requires_grad=False)
        with torch.no_grad():
            ones, zeros, negative = result(1.0), result(0.0), result(-1.0)
            shifted = result(1.0, 3.0)
    except Exception:  # it needs more than its input
        return None
    finally:
        module._parameters["weight"] = weight
        if bias is not None:
            module._parameters["bias"] = bias
    if not bool(zeros.any()) and bool(ones.any()):
        return "layer" if torch.allclose(shifted, ones, atol=1e-3) else "rms"
    return "rms_plus_one" if not bool(negative.any()) and bool(ones.any()) else None
