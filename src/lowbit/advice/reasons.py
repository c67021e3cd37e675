"""Why a scheme stands where it stands, in one sentence made of the figures that put it there."""

from __future__ import annotations

from lowbit.advice.engines import Support
from lowbit.advice.result import Memory
from lowbit.advice.roofline import Speed
from lowbit.advice.score import Ratios
from lowbit.hardware import Device

_ARITHMETIC = {"fp8": "FP8", "int8": "INT8", "fp4": "FP4"}


def reason_for(
    device: Device, how: Support | None, memory: Memory, ratios: Ratios, reached: Speed, loss: float,
    fp8_cache: bool,
) -> str:  # fmt: skip
    """One sentence without full stop."""
    if not memory.fits:
        return (f"needs {_gb(memory.total)}, {_gb(memory.total - memory.usable)} more than the engine can use of "
                f"{device.label}")  # fmt: skip
    if how is None:
        return f"the original, for comparison: nothing is lost, and {reached.bound} bound its decoding"
    sentence = (f"{_computes(device, how)}: decoding {ratios.decode:.1f} ×, prompts {ratios.prefill:.1f} × as fast as "
                f"in 16 bits, {1 / ratios.memory:.0%} of the memory, expected loss {loss:.1f} %")  # fmt: skip
    if fp8_cache:
        sentence += "; half the KV cache"
    return f"{sentence}; {how.note}" if how.note else sentence


def _computes(device: Device, how: Support) -> str:
    if how.compute == "16":
        return "fallback, weights are decoded" if how.fallback else "weight-only, fewer bytes but no quicker arithmetic"
    name = _ARITHMETIC[how.compute]
    return f"{name} arithmetic" if device.has(how.compute) else f"{name} arithmetic, which {device.label} lacks"


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
