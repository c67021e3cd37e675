"""What `lowbit.advise` answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.advice.engines import SIXTEEN, Support
from lowbit.advice.quality import Expectation
from lowbit.advice.roofline import Load, Speed
from lowbit.advice.score import Goal, Ratios, Workload
from lowbit.hardware import Device


@dataclass(frozen=True)
class Memory:
    """Bytes: of the weights, of the KV cache of all sequences, and beside them; of what the engine may use."""

    weights: int
    cache: int
    overhead: int
    usable: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.overhead

    @property
    def fits(self) -> bool:
        return self.total <= self.usable


@dataclass(frozen=True)
class Option:
    """One scheme, as the engine would run it here.

    how          its row of the capability table; None for 16 bits
    fp8_cache    True where the KV cache is kept in FP8
    ratios       against 16 bits with a cache in 16 bits
    loss         percent, the cache's share included
    settings     of `lowbit.quantize`; None where nothing is to be quantized, or lowbit cannot write it
    quantize     the line to run; None likewise, and then `instead` may say what does
    cost_output, cost_input   dollars per million tokens, where a price was given
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
    left_out     scheme → why it is not among them
    assumptions, notes   in words
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

    @property
    def best(self) -> Option:
        return self.options[0]

    def option(self, scheme: str, fp8_cache: bool = False) -> Option | None:
        """The row of a scheme, if it is there."""
        found = (each for each in self.options if (each.scheme, each.fp8_cache) == (scheme, fp8_cache))
        return next(found, None)
