"""Simulates the activation quantization of an engine at run time: x̂ = decode(encode(x)) before each linear
(`numerics.activations` has the formulas).

    behind an online rotation V (transform_config)    x̂ = decode(encode(x V)) Vᵀ, for a weight that is rotated back
    behind scales p (pre_quant_scale)    x̂ = decode(encode(x · p)) / p, for a weight whose columns are scaled back

Experts that transformers computes in one fused operation are simulated there: x̂ replaces the input of the operation
(routing copies tokens, and a dynamic scale depends on its token alone, so every expert sees the same x̂) and the output
of its gate, which the second matrix reads.

Refused: a scheme on something that is not a linear, a static scheme without its scale or its zero point, and, for fused
experts, a static scheme (every expert has a scale of its own) and experts of one block with different schemes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from torch import Tensor, nn

from lowbit.architecture.disk_layout import disk_layout
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.numerics.activations import quantize_activation, quantize_llm_int8
from lowbit.numerics.column_scales import InputBasis
from lowbit.schemes import ActivationSpec, Scheme


@contextlib.contextmanager
def simulated_activations(
    model: nn.Module, schemes: Mapping[str, Scheme], input_scales: Mapping[str, float],
    rotations: Mapping[str, InputBasis] | None = None, int8_threshold: float | None = None,
    zero_points: Mapping[str, int] | None = None,
) -> Iterator[None]:  # fmt: skip
    """Inside, every linear whose scheme quantizes activations gets x̂ for its x.

    schemes       weight name, as files have it → scheme
    input_scales  weight name → stored scale, for static and local schemes
    rotations     weight name → rotation or scales of its input by the engine; the model has the weight without them
    int8_threshold  of LLM.int8(); None for bitsandbytes' own
    zero_points   weight name → stored zero point, for static schemes that are not symmetric
    """
    threshold = 6.0 if int8_threshold is None else int8_threshold
    rotations = rotations or {}
    active = {name: scheme for name, scheme in schemes.items() if scheme.rounds_inputs}
    places = _places(model) if active else {}
    experts: dict[tuple[str, str], dict[str, Scheme]] = {}
    with contextlib.ExitStack() as stack:
        for name, scheme in active.items():
            owners, leaf, is_expert = places.get(name, ((name.removesuffix(".weight"),), "weight", False))
            if is_expert and name in rotations:
                raise CheckpointError(
                    f"{name}: the rotated or scaled input of an expert cannot be simulated in a fused operation",
                    "evaluate the weights alone with --activations none",
                )
            if is_expert:
                experts.setdefault((owners[0], leaf), {})[name] = scheme
                continue
            if scheme.activation is None:
                hook = _llm_int8_hook(threshold)
            else:
                scale, zero_point = _stored_scale(name, scheme, input_scales), (zero_points or {}).get(name)
                _check_zero_point(name, scheme, zero_point)
                hook = _hook(scheme.activation, scale, rotations.get(name), zero_point)
            for owner in owners:
                stack.callback(_linear(model, owner).register_forward_pre_hook(hook).remove)
        for (owner, leaf), members in experts.items():
            stack.enter_context(_fused_experts(model.get_submodule(owner), leaf, members))
        yield


def _places(model: nn.Module) -> dict[str, tuple[tuple[str, ...], str, bool]]:
    """Weight name, as files have it → (modules: several where files join matrices, their parameter, whether that holds
    all experts); nothing for a module that is none of transformers', whose names are taken as they are."""
    from transformers import PreTrainedModel

    places: dict[str, tuple[tuple[str, ...], str, bool]] = {}
    if not isinstance(model, PreTrainedModel):
        return places
    for parameter, placement in disk_layout(model, split_experts=True).items():
        owner, _, leaf = parameter.rpartition(".")
        for stored, _, expert in placement.pieces():
            owners = places[stored][0] if stored in places else ()
            places[stored] = (tuple(dict.fromkeys((*owners, owner))), leaf, expert is not None)
    return places


def _linear(model: nn.Module, module_name: str) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | Conv1D):
        raise CheckpointError(f"{module_name} has an activation scheme but is no linear layer of the model")
    return module


@contextlib.contextmanager
def _fused_experts(module: nn.Module, leaf: str, members: Mapping[str, Scheme]) -> Iterator[None]:
    """x̂ for the experts of one block: `leaf` is gate_up_proj, which reads the input of the module, or down_proj, which
    reads what `_apply_gate` gives (integrations/moe.py of transformers)."""
    first, scheme = next(iter(members.items()))
    spec = scheme.activation
    if spec is None:
        raise CheckpointError(
            f"{first}: LLM.int8() of experts that are computed in one operation cannot be simulated",
            "evaluate the weights alone with --activations none",
        )
    if set(members.values()) != {scheme}:
        raise CheckpointError(f"{first}: the experts of its block have different schemes", "quantize them alike")
    if spec.needs_calibration:
        raise CheckpointError(
            f"{first}: scheme {scheme.name} has a scale per expert, which cannot be simulated in a fused operation",
            "evaluate the weights alone with --activations none",
        )
    if leaf != "down_proj":
        handle = module.register_forward_pre_hook(_hook(spec, None))
        try:
            yield
        finally:
            handle.remove()
        return
    gate: Callable[[Tensor], Tensor] = module._apply_gate  # type: ignore[assignment]
    reached: list[bool] = []

    def gated(gate_up: Tensor) -> Tensor:
        reached.append(True)
        return quantize_activation(gate(gate_up), spec)

    def check(*_: object) -> None:
        if not reached:
            raise ArchitectureError(
                f"{type(module).__name__} of transformers does not gate by _apply_gate; its activations cannot be "
                f"simulated",
                "evaluate the weights alone with --activations none",
            )

    handle = module.register_forward_hook(check)
    module._apply_gate = gated  # type: ignore[assignment]
    try:
        yield
    finally:
        del module._apply_gate  # back to the method of its class
        handle.remove()


def _stored_scale(name: str, scheme: Scheme, input_scales: Mapping[str, float]) -> float | None:
    assert scheme.activation is not None
    if not scheme.activation.needs_calibration:
        return None
    scale = input_scales.get(name)
    if scale is None or not scale > 0:
        raise CheckpointError(
            f"{name}: scheme {scheme.name} needs a stored input scale > 0; found {scale}",
            "quantize again with calibration, or evaluate the weights alone with --activations none",
        )
    return scale


def _check_zero_point(name: str, scheme: Scheme, zero_point: int | None) -> None:
    spec = scheme.activation
    if spec is not None and spec.needs_calibration and not spec.symmetric and zero_point is None:
        raise CheckpointError(
            f"{name}: scheme {scheme.name} needs a stored zero point of its input; there is none",
            "quantize again with calibration, or evaluate the weights alone with --activations none",
        )


def _llm_int8_hook(threshold: float):
    def quantize_input(_module: nn.Module, args: tuple) -> tuple:
        return (quantize_llm_int8(args[0], threshold), *args[1:])

    return quantize_input


def simulation_of(checkpoint: Checkpoint) -> Callable[[nn.Module], AbstractContextManager[None]]:
    """What simulates, inside a model that has the weights of a checkpoint, how an engine rounds its inputs."""
    scales, zero_points = checkpoint.input_scales, checkpoint.input_zero_points
    return lambda model: simulated_activations(
        model, checkpoint.schemes, scales, checkpoint.rotations, checkpoint.int8_threshold, zero_points
    )


def _hook(spec: ActivationSpec, scale: float | None, rotation: InputBasis | None = None, zero_point: int | None = None):
    def quantize_input(_module: nn.Module, args: tuple) -> tuple:
        return (quantize_activation(args[0], spec, scale, zero_point), *args[1:])

    def quantize_rotated(_module: nn.Module, args: tuple) -> tuple:
        assert rotation is not None
        turned = quantize_activation(rotation.inputs(args[0].float()), spec, scale, zero_point)
        return (rotation.inputs_back(turned).to(args[0].dtype), *args[1:])

    if rotation is not None:
        return quantize_rotated

    return quantize_input
