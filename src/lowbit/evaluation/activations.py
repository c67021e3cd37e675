"""Activation quantization as an engine does it at run time, simulated: x̂ = decode(encode(x)) in front of each linear.

    int, per token    s = max|x| / 127             codes = clamp(rint(x / s), −128, 127)
    e4m3, per token   s = max(max|x| / 448, 1/(448·512))    codes = e4m3(x / s), saturating
    e4m3, per group   the same over g channels of a token
    static            s is the stored input scale, for all tokens
    MX (e8m0)         s = 2^(floor(log2 max|x|) − emax) over 32 channels, emax 2 for E2M1 and 8 for E4M3
    NVFP4 (local)     s = e4m3(max|x| / 6 / s_global) · s_global over 16 channels; codes = e2m1(x / s)

All rounding is to nearest, ties to even, in float32; the result has the dtype of the input. A group of zeros stays
zeros. The last group of a row may be short.

Where implementations differ we do what vLLM's kernels do, or the specification:
  int8: vLLM divides by 127 (csrc/quantization/w8a8/int8/scaled_quant.cu); compressed-tensors' simulation by 127.5.
  e4m3: vLLM keeps s at least 1/(448·512) (input_quant_fp8.py); compressed-tensors has no such floor.
  MX:   the OCP Microscaling specification 1.0, section 6.3, takes the floor, so that values above 1.75 · 2^emax
        (E4M3) or 6 (E2M1) saturate; compressed-tensors goes one power of two up where max|x| has a mantissa ≥ 1.75.

Refused: a scheme on something that is not a linear, and a static scheme without its scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.errors import CheckpointError, UsageError
from lowbit.schemes import ActivationSpec, Scheme

_MAX = {"int": 127.0, "e4m3": 448.0, "e2m1": 6.0}
_MX_EMAX = {"e4m3": 8, "e2m1": 2}
_FP8_SMALLEST_SCALE = 1.0 / (448.0 * 512.0)
_E8M0_MIN, _E8M0_MAX = -127, 127


def quantize_activation(x: Tensor, spec: ActivationSpec, input_scale: float | None = None) -> Tensor:
    """x̂, of the shape [..., K] and dtype of x.

    input_scale  what a stored scale multiplies codes with: the static scale, or for NVFP4 the scale above the group
                 scales; None for dynamic schemes
    """
    if spec.needs_calibration and input_scale is None:
        raise UsageError("a static activation scheme needs the scale that calibration stored")
    values = x.to(torch.float32)
    if spec.per != "group":
        absmax = values.abs().amax(-1, keepdim=True) if spec.per == "token" else values.abs().amax()
        return _encode_decode(values, _scale(absmax, spec, input_scale), spec).to(x.dtype)
    assert spec.group_size is not None, "a group scheme names its group size"
    columns = values.shape[-1]
    groups = F.pad(values, (0, -columns % spec.group_size)).unflatten(-1, (-1, spec.group_size))
    scale = _scale(groups.abs().amax(-1, keepdim=True), spec, input_scale)
    return _encode_decode(groups, scale, spec).flatten(-2)[..., :columns].to(x.dtype)


def _scale(absmax: Tensor, spec: ActivationSpec, input_scale: float | None) -> Tensor:
    """The scale that codes are multiplied with; 0 where nothing but zeros is to be scaled."""
    if spec.scale_format == "e8m0":
        _, exponent = torch.frexp(absmax)  # absmax = m · 2^exponent, 0.5 ≤ m < 1: floor(log2 absmax) = exponent − 1
        power = (exponent - 1 - _MX_EMAX[spec.number]).clamp(_E8M0_MIN, _E8M0_MAX)
        return torch.where(absmax > 0, torch.exp2(power.to(torch.float32)), absmax)
    if not spec.needs_calibration:
        scale = absmax / _MAX[spec.number]
        return scale.clamp(min=_FP8_SMALLEST_SCALE) if spec.number == "e4m3" else scale
    assert input_scale is not None, "checked by the caller"
    if spec.scale_format == "e4m3":
        relative = (absmax / (_MAX[spec.number] * input_scale)).clamp(max=_MAX["e4m3"])
        return relative.to(torch.float8_e4m3fn).to(torch.float32) * input_scale
    return torch.full_like(absmax, input_scale)


def _encode_decode(values: Tensor, scale: Tensor, spec: ActivationSpec) -> Tensor:
    scaled = values / torch.where(scale > 0, scale, torch.ones_like(scale))
    if spec.number == "int":
        low, high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
        return scaled.round().clamp(low, high) * scale
    limit = _MAX[spec.number]
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
    model: nn.Module, schemes: Mapping[str, Scheme], input_scales: Mapping[str, float]
) -> Iterator[None]:
    """Inside, every linear whose scheme quantizes activations gets x̂ for its x.

    schemes       weight name → scheme
    input_scales  weight name → stored scale, for static and local schemes
    """
    handles = []
    try:
        for name, scheme in schemes.items():
            if scheme.activation is None:
                continue
            module_name = name.removesuffix(".weight")
            scale = _stored_scale(name, scheme, input_scales)
            handles.append(_linear(model, module_name).register_forward_pre_hook(_hook(scheme.activation, scale)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise CheckpointError(f"{name} has an activation scheme but is no linear layer of the model")
    return module


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


def _hook(spec: ActivationSpec, scale: float | None):
    def quantize_input(_module: nn.Module, args: tuple) -> tuple:
        return (quantize_activation(args[0], spec, scale), *args[1:])

    return quantize_input
