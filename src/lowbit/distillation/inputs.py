"""Inputs of linears rounded while a model learns, as the engine rounds them at run time.

    x̂ = decode(encode(x))              straight through: the gradient of x̂ is that of x
    x̂ = decode(encode(x V)) Vᵀ         behind a rotation V that the engine applies; the weight here is without it

Static scales are those of the batch, since the stored ones are measured of the finished model (`input_ranges.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from lowbit.calibrate.blocks import BlockRunner
from lowbit.numerics.activations import fake_quantize_activation
from lowbit.numerics.hadamard import Rotation
from lowbit.schemes import ActivationSpec


def round_inputs(
    runner: BlockRunner, activations: Mapping[str, ActivationSpec], online: Mapping[str, Rotation]
) -> tuple[str, ...]:
    """Round the inputs of linears of decoder blocks from now on, in every pass of `runner`.

    activations  linear → how its input is rounded;  online: linear → rotation of its input by the engine

    Returns the linears whose inputs stay as they are, since no nn.Linear of their own computes them: experts of a fused
    operation, and Conv1D.
    """
    apart = []
    for name, spec in activations.items():
        module = runner.linear_module(name)
        if module is None:
            apart.append(name)
        else:
            module.register_forward_pre_hook(rounding_hook(spec, online.get(name)))
    return tuple(apart)


def rounding_hook(spec: ActivationSpec, online: Rotation | None = None) -> Callable[[nn.Module, tuple], tuple]:
    """A forward pre-hook that rounds the first input of a module; online: rotation of it by the engine."""

    def round_input(_module: nn.Module, inputs: tuple) -> tuple:
        x = inputs[0]
        if online is None:
            return (fake_quantize_activation(x, spec), *inputs[1:])
        return (online.inputs_back(fake_quantize_activation(online.inputs(x), spec)), *inputs[1:])

    return round_input
