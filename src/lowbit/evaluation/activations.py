"""Simulates the activation quantization of an engine at run time: x̂ = decode(encode(x)) before each linear.

    int, per token    s = max|x| / (2^(b−1) − 1)   codes = clamp(rint(x / s), −2^(b−1), 2^(b−1) − 1); 127 of 8 bits
    int, per group    the same over g channels of a token
    int, asymmetric   s = (max x − min x) / 255    codes = clamp(rint(x / s) + z, −128, 127), z = rint(−128 − min x / s)
    e4m3, per token   s = max(max|x| / 448, 1/(448·512))    codes = e4m3(x / s), saturating
    e4m3, per group   the same over g channels of a token
    static            s is the stored input scale, for all tokens; int8 and e4m3
    static, asymmetric   s and z are stored: codes = clamp(rint(x / s) + z, −128, 127), x̂ = s · (codes − z)
    MX (e8m0)         s = 2^(floor(log2 max|x|) − emax) over 32 channels, emax 2 for E2M1 and 8 for E4M3
    NVFP4 (local)     s = e4m3(max|x| / 6 / s_global) · s_global over 16 channels; codes = e2m1(x / s)
    LLM.int8()        channels with some |x| ≥ 6 in the batch stay; the others int8 per token, s = max of |x| < 6 / 127
    behind an online rotation V (transform_config)    x̂ = decode(encode(x V)) Vᵀ, for a weight that is rotated back
    behind scales p (pre_quant_scale)    x̂ = decode(encode(x · p)) / p, for a weight whose columns are scaled back

All rounding is to nearest, ties to even, in float32; the result has the dtype of the input. A group of zeros stays
zeros. The last group of a row may be short. Where implementations differ, vLLM's kernels or the specification count:
  int8: vLLM divides by 127 (csrc/quantization/w8a8/int8/scaled_quant.cu); compressed-tensors' simulation by 127.5.
  e4m3: vLLM keeps s at least 1/(448·512) (input_quant_fp8.py); compressed-tensors has no such floor.
  MX:   the OCP Microscaling specification 1.0, section 6.3, takes the floor, so that values above 1.75 · 2^emax
        (E4M3) or 6 (E2M1) saturate; compressed-tensors goes one power of two up where max|x| has a mantissa ≥ 1.75.

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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.architecture.disk_layout import disk_layout
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import ArchitectureError, CheckpointError, UsageError
from lowbit.numerics.column_scales import InputBasis
from lowbit.schemes import ActivationSpec, Scheme

_MAX = {"e4m3": 448.0, "e2m1": 6.0}
_MX_EMAX = {"e4m3": 8, "e2m1": 2}
_FP8_SMALLEST_SCALE = 1.0 / (448.0 * 512.0)
_E8M0_MIN, _E8M0_MAX = -127, 127


def quantize_activation(
    x: Tensor, spec: ActivationSpec, input_scale: float | None = None, zero_point: int | None = None
) -> Tensor:
    """x̂, of the shape [..., K] and dtype of x.

    input_scale  the stored scale: the static one, or for NVFP4 the scale above the group scales; None for dynamic
                 schemes
    zero_point   the stored code of 0, of static schemes that are not symmetric
    """
    if spec.needs_calibration and input_scale is None:
        raise UsageError("a static activation scheme needs the scale that calibration stored")
    values = x.to(torch.float32)
    if not spec.symmetric:
        return _asymmetric(values, spec, input_scale, zero_point).to(x.dtype)
    if spec.per != "group":
        absmax = values.abs().amax(-1, keepdim=True) if spec.per == "token" else values.abs().amax()
        return _encode_decode(values, _scale(absmax, spec, input_scale), spec).to(x.dtype)
    assert spec.group_size is not None, "a group scheme names its group size"
    columns = values.shape[-1]
    groups = F.pad(values, (0, -columns % spec.group_size)).unflatten(-1, (-1, spec.group_size))
    scale = _scale(groups.abs().amax(-1, keepdim=True), spec, input_scale)
    return _encode_decode(groups, scale, spec).flatten(-2)[..., :columns].to(x.dtype)


def quantize_llm_int8(x: Tensor, threshold: float) -> Tensor:
    """x̂ of bitsandbytes' INT8, of the shape [..., K] and dtype of x; all tokens are one batch.

    threshold  channels with some |x| of at least this in the batch stay as they are; 0 for none. The others are rounded
               to float16 first
    """
    rows = x.reshape(-1, x.shape[-1])
    values = rows.to(torch.float16).to(torch.float32)
    outliers = values.abs() >= threshold if threshold > 0 else torch.zeros_like(values, dtype=torch.bool)
    values = values.masked_fill(outliers, 0.0)
    absmax = values.abs().amax(-1, keepdim=True)
    codes = (values * (127.0 / torch.where(absmax > 0, absmax, torch.ones_like(absmax)))).round()
    rounded = (codes * (absmax / 127.0)).to(x.dtype)
    return torch.where(outliers.any(dim=0), rows, rounded).reshape(x.shape)


def _asymmetric(values: Tensor, spec: ActivationSpec, static: float | None, stored: int | None) -> Tensor:
    """Integers that cover [min, max] of every token (or of all), which need not hold 0; or the stored range."""
    if spec.number != "int" or spec.per == "group":
        raise CheckpointError(
            f"asymmetric {spec.bits}-bit {spec.number} activations, per {spec.per}, cannot be simulated",
            "evaluate the weights alone with --activations none",
        )
    if spec.needs_calibration:
        if static is None or stored is None:
            raise UsageError("a static asymmetric scheme needs the scale and the zero point that calibration stored")
        codes = ((values / static).round() + stored).clamp(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1)
        return (codes - stored) * static
    across = (-1,) if spec.per == "token" else tuple(range(values.dim()))
    low, high = values.amin(across, keepdim=True), values.amax(across, keepdim=True)
    least, largest = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
    scale = (high - low) / (largest - least)
    scale = torch.where(scale > 0, scale, torch.where(high != 0, high.abs(), torch.ones_like(high)))
    zero_point = (least - low / scale).round()
    codes = ((values / scale).round() + zero_point).clamp(least, largest)
    return (codes - zero_point) * scale


def _scale(absmax: Tensor, spec: ActivationSpec, input_scale: float | None) -> Tensor:
    """The scale that multiplies the codes; 0 for zeros."""
    if spec.scale_format == "e8m0":
        _, exponent = torch.frexp(absmax)  # absmax = m · 2^exponent, 0.5 ≤ m < 1: floor(log2 absmax) = exponent − 1
        power = (exponent - 1 - _MX_EMAX[spec.number]).clamp(_E8M0_MIN, _E8M0_MAX)
        return torch.where(absmax > 0, torch.exp2(power.to(torch.float32)), absmax)
    if not spec.needs_calibration:
        scale = absmax / _largest(spec)
        return scale.clamp(min=_FP8_SMALLEST_SCALE) if spec.number == "e4m3" else scale
    assert input_scale is not None, "checked by the caller"
    if spec.scale_format == "e4m3":
        relative = (absmax / (_largest(spec) * input_scale)).clamp(max=_MAX["e4m3"])
        return relative.to(torch.float8_e4m3fn).to(torch.float32) * input_scale
    return torch.full_like(absmax, input_scale)


def _largest(spec: ActivationSpec) -> float:
    """The largest code."""
    return float(2 ** (spec.bits - 1) - 1) if spec.number == "int" else _MAX[spec.number]


def _encode_decode(values: Tensor, scale: Tensor, spec: ActivationSpec) -> Tensor:
    scaled = values / torch.where(scale > 0, scale, torch.ones_like(scale))
    if spec.number == "int":
        low, high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
        return scaled.round().clamp(low, high) * scale
    limit = _largest(spec)
    scaled = scaled.clamp(-limit, limit)
    codes = scaled.to(torch.float8_e4m3fn).to(torch.float32) if spec.number == "e4m3" else _round_e2m1(scaled)
    return codes * scale


def _round_e2m1(values: Tensor) -> Tensor:
    """Nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with the sign of the value (|value| ≤ 6); ties to the even code."""
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, values)


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
    schemes, scales = getattr(checkpoint, "schemes", {}), getattr(checkpoint, "input_scales", {})
    rotations, threshold = getattr(checkpoint, "rotations", {}), getattr(checkpoint, "int8_threshold", None)
    zero_points = getattr(checkpoint, "input_zero_points", {})
    return lambda model: simulated_activations(model, schemes, scales, rotations, threshold, zero_points)


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
