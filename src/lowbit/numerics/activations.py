"""The rounding of activations as engines do it at run time: x̂ = decode(encode(x)).

    int, per token    s = max|x| / r               codes = clamp(rint(x / s), −2^(b−1), 2^(b−1) − 1)
                      r = 127 of 8 bits, (2^b − 1) / 2 of fewer: 7.5 of 4, so that all codes are used
    int, per group    the same over g channels of a token
    int, asymmetric   s = (max x − min x) / (2^b − 1)    codes = clamp(rint(x / s) + z, −2^(b−1), 2^(b−1) − 1)
                      z = rint(−2^(b−1) − min x / s); of fewer than 8 bits the range is widened to hold 0
    e4m3, per token   s = max(max|x| / 448, 1/(448·512))    codes = e4m3(x / s), saturating
    e4m3, per group   the same over g channels of a token
    static            s is the stored input scale, for all tokens; int8 and e4m3
    static, asymmetric   s and z are stored: codes = clamp(rint(x / s) + z, −128, 127), x̂ = s · (codes − z)
    MX (e8m0)         s = 2^(floor(log2 max|x|) − emax) over 32 channels, emax 2 for E2M1 and 8 for E4M3
    NVFP4 (local)     s = e4m3(max|x| / 6 / s_global) · s_global over 16 channels; codes = e2m1(x / s)
    LLM.int8()        channels with some |x| ≥ 6 in the batch stay; the others int8 per token, s = max of |x| < 6 / 127

All rounding is to nearest, ties to even, in float32; the result has the dtype of the input. A group of zeros stays
zeros. The last group of a row may be short. Where implementations differ, vLLM's kernels or the specification count:
  int8: vLLM divides by 127 (csrc/quantization/w8a8/int8/scaled_quant.cu); compressed-tensors' simulation by 127.5.
  int4: no kernel of an engine; compressed-tensors, through which transformers runs it, divides by 7.5.
  e4m3: vLLM keeps s at least 1/(448·512) (input_quant_fp8.py); compressed-tensors has no such floor.
  MX:   the OCP Microscaling specification 1.0, section 6.3, takes the floor, so that values above 1.75 · 2^emax
        (E4M3) or 6 (E2M1) saturate; compressed-tensors goes one power of two up where max|x| has a mantissa ≥ 1.75.

Refused: a static scheme without its scale or its zero point.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.errors import CheckpointError, UsageError
from lowbit.numerics.straight_through import straight_through
from lowbit.schemes import ActivationSpec
from lowbit.tensors import InputRange

_MAX = {"e4m3": 448.0, "e2m1": 6.0}
# The largest |value| of codes at a static scale of 1; of NVFP4 times that of its group scales.
_REACH = {"int": 127.0, "e4m3": 448.0, "e2m1": 6.0 * 448.0}
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
    if spec.per != "group":
        return _rounded(values, spec, input_scale, zero_point).to(x.dtype)
    assert spec.group_size is not None, "a group scheme names its group size"
    columns = values.shape[-1]
    groups = F.pad(values, (0, -columns % spec.group_size)).unflatten(-1, (-1, spec.group_size))
    return _rounded(groups, spec, input_scale, zero_point).flatten(-2)[..., :columns].to(x.dtype)


def _rounded(values: Tensor, spec: ActivationSpec, input_scale: float | None, zero_point: int | None) -> Tensor:
    """x̂ of float32 values, whose last axis is what shares a scale: a token or a group of it."""
    if not spec.symmetric:
        return _asymmetric(values, spec, input_scale, zero_point)
    absmax = values.abs().amax() if spec.per == "tensor" else values.abs().amax(-1, keepdim=True)
    return _encode_decode(values, _scale(absmax, spec, input_scale), spec)


def fake_quantize_activation(x: Tensor, spec: ActivationSpec) -> Tensor:
    """x̂ as an engine computes it, of the shape and dtype of x, with the gradient of x.

    A static scale is that of the batch: the one that is stored is measured at the export.
    """
    with torch.no_grad():
        scale = zero_point = None
        if spec.needs_calibration and spec.symmetric:
            scale = max(x.abs().max().item(), 1e-12) / _REACH[spec.number]
        elif spec.needs_calibration:
            covered = InputRange(min(x.min().item(), 0.0), max(x.max().item(), 1e-12))
            scale, zero_point = covered.affine(spec.bits)
        rounded = quantize_activation(x, spec, scale, zero_point)
    return straight_through(x, rounded)


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
    """Integers that cover [min, max] of every token or group (or of all), or the stored range. 8 bits need not hold 0,
    as in vLLM's kernel; fewer do, as in compressed-tensors."""
    if spec.number != "int":
        raise CheckpointError(
            f"asymmetric {spec.bits}-bit {spec.number} activations, per {spec.per}, cannot be simulated",
            "evaluate the weights alone with --activations none",
        )
    if spec.needs_calibration:
        if static is None or stored is None:
            raise UsageError("a static asymmetric scheme needs the scale and the zero point that calibration stored")
        codes = ((values / static).round() + stored).clamp(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1)
        return (codes - stored) * static
    across = tuple(range(values.dim())) if spec.per == "tensor" else (-1,)
    low, high = values.amin(across, keepdim=True), values.amax(across, keepdim=True)
    if spec.bits < 8:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
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
    """The |value| of codes at a scale of 1 that the largest input takes."""
    if spec.number != "int":
        return _MAX[spec.number]
    return 127.0 if spec.bits == 8 else (2**spec.bits - 1) / 2


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
