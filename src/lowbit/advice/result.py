"""The result of `lowbit.advise`, and the sentence that explains an option from its figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.advice.measured import MeasuredSpeed
from lowbit.advice.quality import Expectation
from lowbit.advice.roofline import Load, Speed
from lowbit.advice.score import Goal, Ratios, Workload
from lowbit.engines.engine import SIXTEEN, Support
from lowbit.hardware import Device

_ARITHMETIC = {"fp8": "FP8", "int8": "INT8", "fp4": "FP4"}


@dataclass(frozen=True)
class Memory:
    """Bytes of the weights, of the KV cache of all sequences, of the rest; usable: the engine's limit."""

    weights: int
    cache: int
    overhead: int
    usable: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.overhead

    @property
    def chosen(self) -> int:
        """What the scheme decides."""
        return self.weights + self.cache

    @property
    def fits(self) -> bool:
        return self.total <= self.usable


@dataclass(frozen=True)
class Option:
    """One scheme, as the engine would run it here.

    how          its row of the capability table; None for 16 bits
    fp8_cache    True if the KV cache is kept in FP8
    ratios       against 16 bits with a cache in 16 bits
    loss         percent, the cache's share included
    settings     of `lowbit.quantize`; None for 16 bits, or if lowbit cannot write the scheme
    quantize     its command line; None likewise, and `instead` may name another tool
    cost_output, cost_input   dollars per million tokens, if a price was given
    reason       one sentence
    """

    scheme: str
    how: Support | None
    fp8_cache: bool
    memory: Memory
    speed: Speed
    expectation: Expectation
    ratios: Ratios
    loss: float
    score: float
    reason: str
    output: str | None = None
    settings: dict[str, Any] | None = None
    quantize: str | None = None
    serve: str | None = None
    instead: str | None = None
    cost_output: float | None = None
    cost_input: float | None = None

    @property
    def label(self) -> str:
        """ "FP8_DYNAMIC, FP8 cache" """
        return f"{self.scheme}, FP8 cache" if self.fp8_cache else self.scheme

    @property
    def writable(self) -> bool:
        return self.scheme == SIXTEEN or self.settings is not None


@dataclass(frozen=True)
class Advice:
    """
    options      ranked, best first
    left_out     scheme → reason
    assumptions, notes   sentences
    price        dollars per hour of one card; None if neither stated nor known
    measured     what `lowbit bench` measured on this machine, if that is the machine asked about
    """

    model: str
    billions: float
    active_billions: float
    device: Device
    engine: str
    goal: Goal
    workload: Workload
    load: Load
    options: tuple[Option, ...]
    left_out: dict[str, str]
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
    price: float | None = None
    measured: tuple[MeasuredSpeed, ...] = ()

    @property
    def best(self) -> Option:
        return self.options[0]

    def option(self, scheme: str, fp8_cache: bool = False) -> Option | None:
        """The row of a scheme, if it is there."""
        found = (each for each in self.options if (each.scheme, each.fp8_cache) == (scheme, fp8_cache))
        return next(found, None)


def reason_for(
    device: Device, how: Support | None, memory: Memory, ratios: Ratios, reached: Speed, loss: float,
    fp8_cache: bool,
) -> str:  # fmt: skip
    """One sentence without full stop."""
    if not memory.fits:
        total, more = (f"{count / 1e9:.2g} GB" for count in (memory.total, memory.total - memory.usable))
        return f"needs {total}, {more} more than the engine can use of {device.label}"
    if how is None:
        return f"the original, for comparison: nothing is lost, and {reached.bound} bound its decoding"
    sentence = (f"{_computes(device, how)}: decoding {ratios.decode:.1f} ×, prompts {ratios.prefill:.1f} × as fast "
                f"as in 16 bits, {1 / ratios.memory:.0%} of the bytes, expected loss {loss:.2g} %")  # fmt: skip
    if fp8_cache:
        sentence += "; half the KV cache"
    return f"{sentence}; {how.note}" if how.note else sentence


def _computes(device: Device, how: Support) -> str:
    if how.compute == "16":
        return "fallback, weights are decoded" if how.fallback else "weight-only, fewer bytes but no quicker arithmetic"
    name = _ARITHMETIC[how.compute]
    return f"{name} arithmetic" if device.has(how.compute) else f"{name} arithmetic, which {device.label} lacks"
