"""Ranges of the inputs of linears over a calibration text, for static activation scales.

    absmax[L] = max over tokens and channels of |x|, x the input of linear L
    low[L] = min(0, min x), high[L] = max(0, max x)     for scales with a zero point

or a smaller range by percentile or squared error (`range_choice.py`). The model runs one block at a time (`blocks.py`),
in its own dtype. Each distinct input keeps its least and largest value and, if the method needs it, a histogram of |x|
of either sign.

Linears that read one input share its range. An expert that no token reached is listed in `unseen` and gets the largest
range of the other experts of its block, with a note.

Refused: NaN and inf in an input, a block none of whose experts was reached, and a linear outside the decoder blocks
other than the output head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.calibrate.blocks import BlockInput, BlockRunner, Progress
from lowbit.calibrate.kv_cache import CacheRanges, observed_cache
from lowbit.calibrate.range_choice import (
    BINS,
    RANGE_METHODS,
    RangeMethod,
    mse_ends,
    mse_range,
    percentile_range,
    signed_histogram,
)
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import ArchitectureError, NonFiniteError, UsageError
from lowbit.numerics.hadamard import Rotation
from lowbit.schemes import ActivationSpec, Number
from lowbit.tensors import InputRange

# Keeps scales above zero; an input that is always zero is exact with any scale.
SMALLEST_RANGE = 1e-6
PERCENTILE = 99.99


@dataclass(frozen=True)
class Ranges:
    """The ranges that one run over a text measured.

    inputs   linear → the range that its static scale covers
    cache    ranges of the KV cache, None if not requested
    unseen   names of the inputs that no token reached; they have the largest range of the other experts
    notes    sentences on them
    """

    inputs: dict[str, InputRange]
    cache: CacheRanges | None
    unseen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class _SeenRange:
    """Range of one input. counts: int64 [2, bins], of x < 0 and of the others, from `first_bin` on; None without a
    histogram."""

    low: float
    high: float
    counts: Tensor | None
    first_bin: int = 0


class InputRanges:
    """A `BlockVisitor` that measures the range of every input.

    wanted      names of the inputs to measure; None for all
    histograms  also count |x|, which `range_of` needs for "percentile" and "mse"
    rotations   linear → rotation of its input, which has no other reader: measured as the engine rounds it
    """

    def __init__(self, wanted: Iterable[str] | None = None, histograms: bool = True,
                 rotations: Mapping[str, Rotation] | None = None):  # fmt: skip
        self._wanted = None if wanted is None else set(wanted)
        self._rotations = rotations or {}
        self._histograms = histograms
        self._seen: dict[str, _SeenRange] = {}
        self._of_block: list[_SeenRange] = []

    def look(self, source: BlockInput, x: Tensor) -> None:
        """x [tokens, K]. NonFiniteError, naming the input, where one is NaN or inf."""
        if (self._wanted is not None and source.name not in self._wanted) or not x.numel():
            return
        rotation = self._rotations.get(source.linears[0].name) if source.linears else None
        x = x if rotation is None else rotation.columns(x.float())
        low, high = (bound.float().item() for bound in torch.aminmax(x))
        if not math.isfinite(high - low):
            value = low if not math.isfinite(low) else high
            reader = f", which {source.linears[0].name} reads," if source.linears else ""
            raise NonFiniteError(
                f"{source.name}{reader} is {value} for some token of the calibration text",
                "run it in float32, or look for damage with `lowbit evaluate`",
            )
        counts = signed_histogram(x).cpu() if self._histograms else None
        seen = self._seen.get(source.name)
        if seen is None:
            seen = self._seen[source.name] = _SeenRange(low, high, counts)
            self._of_block.append(seen)
            return
        seen.low, seen.high = min(seen.low, low), max(seen.high, high)
        if seen.counts is not None and counts is not None:
            seen.counts += counts

    def finish(self, block: int) -> None:
        """Cut the histograms of the block to their occupied bins."""
        for seen in self._of_block:
            if seen.counts is not None:
                occupied = seen.counts.sum(0).nonzero()
                first, last = int(occupied[0]), int(occupied[-1])
                seen.counts, seen.first_bin = seen.counts[:, first : last + 1].clone(), first
        self._of_block.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._seen

    def absmax(self, name: str) -> float:
        """Largest |x| of an input."""
        return max(-self._seen[name].low, self._seen[name].high)

    def range_of(self, name: str, method: RangeMethod = "minmax", percentile: float = PERCENTILE,
                 number: Number = "int", bits: int = 8) -> float:  # fmt: skip
        """The |x| that a symmetric static scale of this number format covers, at least `SMALLEST_RANGE`."""
        absmax, seen = self.absmax(name), self._seen[name]
        if method == "minmax" or absmax == 0:
            return max(absmax, SMALLEST_RANGE)
        counts = self._counts(seen).sum(0)
        if method == "percentile":
            return max(percentile_range(counts, absmax, percentile), SMALLEST_RANGE)
        return max(mse_range(counts, absmax, number, bits), SMALLEST_RANGE)

    def ends_of(self, name: str, method: RangeMethod = "minmax", percentile: float = PERCENTILE,
                bits: int = 8) -> InputRange:  # fmt: skip
        """The range that a static integer scale with a zero point covers; it holds 0, and has `SMALLEST_RANGE` on a
        side at least. "percentile": both ends clipped to that of |x|."""
        seen = self._seen[name]
        low, high = min(seen.low, 0.0), max(seen.high, 0.0)
        if method == "percentile" and low < high:
            beyond = self.range_of(name, "percentile", percentile)
            low, high = max(low, -beyond), min(high, beyond)
        elif method == "mse" and low < high:
            low, high = mse_ends(self._counts(seen), low, high, bits)
        return InputRange(low, max(high, SMALLEST_RANGE) if low > -SMALLEST_RANGE else high)

    def _counts(self, seen: _SeenRange) -> Tensor:
        """int64 [2, BINS]."""
        if seen.counts is None:
            raise AssertionError("a range by percentile or error needs histograms")
        counts = torch.zeros(2, BINS, dtype=torch.int64)
        counts[:, seen.first_bin : seen.first_bin + seen.counts.shape[1]] = seen.counts
        return counts

    def unseen(self, sources: Iterable[BlockInput]) -> list[str]:
        """Names of the inputs that no token reached: experts that the router never chose."""
        return list(dict.fromkeys(source.name for source in sources if source.name not in self))


def measure_ranges(
    checkpoint: Checkpoint,
    linears: Iterable[str],
    ids: Tensor,
    *,
    cache: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    options: OpenOptions | None = None,
    progress: Progress | None = None,
    method: RangeMethod = "minmax",
    percentile: float = PERCENTILE,
    activations: Mapping[str, ActivationSpec] | None = None,
    rotations: Mapping[str, Rotation] | None = None,
) -> Ranges:
    """Run windows of tokens through a model and measure the ranges of linear inputs and of the KV cache.

    ids          int64 [windows, tokens]
    linears      module names as in the files; may be empty with `cache`
    cache        also measure the keys and values of every block
    activations  linear → format of its input, which "mse" and "percentile" need. Two-level scales (NVFP4) always take
                 minmax: their range only bounds the group scales, so clipping gains nothing
    rotations    linear → rotation of its input that the engine applies
    progress     called with (block, windows done, windows in all, over all blocks)

    Raises for what this module and `kv_cache.py` refuse, and UsageError for an unknown method.
    """
    check_method(method, percentile)
    runner = BlockRunner(checkpoint, dtype, device, options)
    sources = _sources(runner, linears)
    visitor = InputRanges([source.name for source in sources.values()], method != "minmax", rotations)
    with observed_cache(runner.model) if cache else nullcontext() as observed:
        states = runner.run(ids, visitor, progress)
    for source in {source.name: source for source in sources.values() if not source.linears[0].reads}.values():
        for x in runner.head_inputs(ids, states):
            visitor.look(source, x)
        visitor.finish(len(runner.architecture.blocks))
    missing = visitor.unseen(sources.values())
    inputs: dict[str, InputRange] = {}
    chosen: dict[tuple[str, ActivationSpec | None], InputRange] = {}
    for linear, source in sources.items():
        key = (source.name, (activations or {}).get(linear))
        if key not in chosen:
            chosen[key] = _range(visitor, source, runner.inputs, method, percentile, key[1])
        inputs[linear] = chosen[key]
    return Ranges(inputs, observed, tuple(missing), _unseen_notes(missing, sources.values()))


def check_method(method: str, percentile: float = PERCENTILE) -> None:
    """UsageError for an unknown method or a percentile outside (50, 100]."""
    if method not in RANGE_METHODS:
        raise UsageError(f"unknown method {method!r} for activation ranges", f"use one of {', '.join(RANGE_METHODS)}")
    if not 50 < percentile <= 100:
        raise UsageError(f"percentile {percentile} is not in (50, 100]", "99.99 clips one value in ten thousand")


def _sources(runner: BlockRunner, linears: Iterable[str]) -> dict[str, BlockInput]:
    """Linear → its input."""
    by_linear = {linear.name: source for source in runner.inputs for linear in source.linears}
    found = {}
    for name in linears:
        linear = runner.architecture.linears[name]
        if name not in by_linear and (linear.block is not None or not name.endswith("lm_head")):
            raise ArchitectureError(
                f"{name} is outside the decoder blocks; its input cannot be measured",
                "leave it in 16 bits with --ignore, or give it a scheme with dynamic activations",
            )
        found[name] = by_linear.get(name) or BlockInput(f"the input of {name}", (linear,))
    return found


def _range(
    visitor: InputRanges, source: BlockInput, inputs: list[BlockInput], method: RangeMethod, percentile: float,
    spec: ActivationSpec | None,
) -> InputRange:  # fmt: skip
    """The range of an input; for an unreached expert, the largest of the same input of the block's other experts."""
    if method != "minmax" and spec is None:
        raise AssertionError(f"method {method} needs to know how {source.linears[0].name} is quantized")
    if spec is not None and spec.scale_format == "e4m3":
        method = "minmax"
    number, bits = ("e4m3", 8) if spec is None else (spec.number, spec.bits)
    names = [source.name]
    if source.name not in visitor:
        first, readers = source.linears[0], ((other.name, other.linears[0]) for other in inputs)
        names = [name for name, one in readers if one.expert is not None and name in visitor
                 and (one.block, one.role) == (first.block, first.role)]  # fmt: skip
    if not names:
        raise ArchitectureError(
            f"no token of the calibration text reached any expert of block {source.linears[0].block}",
            "give a longer text",
        )
    if spec is not None and not spec.symmetric:
        ends = [visitor.ends_of(name, method, percentile, bits) for name in names]
        return InputRange(min(each.low for each in ends), max(each.high for each in ends))
    return InputRange.within(max(visitor.range_of(name, method, percentile, number, bits) for name in names))


def _unseen_notes(missing: list[str], sources: Iterable[BlockInput]) -> tuple[str, ...]:
    by_name = {source.name: source for source in sources}
    blocks: dict[int | None, set[int | None]] = {}
    for source in (by_name[name] for name in missing):
        blocks.setdefault(source.linears[0].block, set()).add(source.linears[0].expert)
    return tuple(
        f"no token of the calibration text reached {len(experts)} experts of block {block} "
        f"({_some(sorted(expert for expert in experts if expert is not None))}); their activation scales are the "
        f"largest of the other experts there"
        for block, experts in blocks.items()
    )


def _some(numbers: list[int], shown: int = 8) -> str:
    more = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return ", ".join(map(str, numbers[:shown])) + more
