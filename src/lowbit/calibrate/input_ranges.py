"""How large the inputs of linears get over a calibration text: what static activation scales are made of.

    absmax[L] = max over tokens and channels of |x|, x the input of linear L

or a smaller range by percentile or squared error (`range_choice.py`). The model runs one block at a time (`blocks.py`),
in its own dtype; kept of every distinct input are three numbers and, where a method needs it, a histogram of |x|, of
which the occupied part alone is left once its block is done.

Linears that read one input share its range. An expert that no token reached has none: it is listed in `unseen`, and
given the largest range among the other experts of its block, with a note that says so.

Refused: NaN and inf in an input, a block none of whose experts was reached, and a linear that runs outside the decoder
and is not the output head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.architecture import Architecture
from lowbit.architecture.loading import load_tokenizer
from lowbit.calibrate.blocks import BlockInput, BlockRunner, Progress
from lowbit.calibrate.kv_cache import CacheRanges, observed_cache
from lowbit.calibrate.range_choice import BINS, RANGE_METHODS, RangeMethod, histogram, mse_range, percentile_range
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import ArchitectureError, NonFiniteError, UsageError
from lowbit.schemes import ActivationSpec, Number
from lowbit.text import Text, cut_windows

# A range of zero would be a scale of zero; an input that is always zero is exact with any other.
SMALLEST_RANGE = 1e-6
PERCENTILE = 99.99

Note = Callable[[str], None]


@dataclass(frozen=True)
class Ranges:
    """What one run over a text found.

    inputs   linear → the |input| that its static scale covers
    cache    what the KV cache would hold; None where it was not asked for
    unseen   names of inputs that no token reached, whose ranges are the largest of the other experts
    notes    sentences that say so
    """

    inputs: dict[str, float]
    cache: CacheRanges | None
    unseen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class _Seen:
    """Of one input. counts: int64, of the bins from `first_bin` on; None without a histogram."""

    low: float
    high: float
    counts: Tensor | None
    first_bin: int = 0


class InputRanges:
    """A `BlockVisitor`: the range of every input that it is shown.

    wanted      names of the inputs to look at; None for all
    histograms  count |x| too, which `range_of` needs for "percentile" and "mse"
    """

    def __init__(self, wanted: Iterable[str] | None = None, histograms: bool = True):
        self._wanted = None if wanted is None else set(wanted)
        self._histograms = histograms
        self._seen: dict[str, _Seen] = {}
        self._of_block: list[_Seen] = []

    def look(self, source: BlockInput, x: Tensor) -> None:
        """x [tokens, K]. NonFiniteError, naming the input, where one is NaN or inf."""
        if (self._wanted is not None and source.name not in self._wanted) or not x.numel():
            return
        low, high = (bound.float().item() for bound in torch.aminmax(x))
        if not math.isfinite(high - low):
            value = low if not math.isfinite(low) else high
            reader = f", which {source.linears[0].name} reads," if source.linears else ""
            raise NonFiniteError(
                f"{source.name}{reader} is {value} for some token of the calibration text",
                "run it in float32, or look for damage with `lowbit evaluate`",
            )
        counts = histogram(x).cpu() if self._histograms else None
        seen = self._seen.get(source.name)
        if seen is None:
            seen = self._seen[source.name] = _Seen(low, high, counts)
            self._of_block.append(seen)
            return
        seen.low, seen.high = min(seen.low, low), max(seen.high, high)
        if seen.counts is not None and counts is not None:
            seen.counts += counts

    def finish(self, block: int) -> None:
        """Of the histograms of the block, only what is occupied stays."""
        for seen in self._of_block:
            if seen.counts is not None:
                occupied = seen.counts.nonzero()
                first, last = int(occupied[0]), int(occupied[-1])
                seen.counts, seen.first_bin = seen.counts[first : last + 1].clone(), first
        self._of_block.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._seen

    def extent(self, name: str) -> tuple[float, float]:
        """(least, largest) value of an input."""
        return self._seen[name].low, self._seen[name].high

    def absmax(self, name: str) -> float:
        """Largest |x| of an input."""
        return max(-self._seen[name].low, self._seen[name].high)

    def range_of(
        self,
        name: str,
        method: RangeMethod = "minmax",
        percentile: float = PERCENTILE,
        number: Number = "int",
        bits: int = 8,
    ) -> float:
        """The |x| that a symmetric static scale of this number format covers, by the method; more saturates.

        Never below `SMALLEST_RANGE`.
        """
        absmax = self.absmax(name)
        if method == "minmax" or absmax == 0:
            return max(absmax, SMALLEST_RANGE)
        counts = self._counts(name)
        if method == "percentile":
            chosen = percentile_range(counts, absmax, percentile)
        else:
            chosen = mse_range(counts, absmax, number, bits)
        return max(chosen, SMALLEST_RANGE)

    def unseen(self, sources: Iterable[BlockInput]) -> list[str]:
        """Names of the inputs that no token reached: of experts that the router never chose."""
        return list(dict.fromkeys(source.name for source in sources if source.name not in self))

    def _counts(self, name: str) -> Tensor:
        seen = self._seen[name]
        if seen.counts is None:
            raise AssertionError("a range by percentile or error needs histograms")
        full = torch.zeros(BINS, dtype=torch.int64)
        full[seen.first_bin : seen.first_bin + len(seen.counts)] = seen.counts
        return full


def measure_input_ranges(
    checkpoint: Checkpoint,
    architecture: Architecture,
    linears: Iterable[str],
    text: Text,
    windows: int,
    window_tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    options: OpenOptions | None = None,
    progress: Progress | None = None,
    method: RangeMethod = "minmax",
    percentile: float = PERCENTILE,
    activations: Mapping[str, ActivationSpec] | None = None,
    note: Note | None = None,
) -> tuple[dict[str, float], int]:
    """(linear → the |input| to scale by, number of windows there were) over the first windows of a text.

    The rest is as in `measure_ranges`; its notes go to `note`, by default to the notes of the checkpoint.

    Raises CheckpointError where the text is shorter than a window.
    """
    names = list(linears)
    absent = next((name for name in names if name not in architecture.linears), None)
    if absent is not None:
        raise ArchitectureError(f"the model has no linear {absent}")
    ids = cut_windows(text, load_tokenizer(checkpoint, options), windows, window_tokens).ids
    found = measure_ranges(
        checkpoint, names, ids, dtype=dtype, device=device, options=options, progress=progress, method=method,
        percentile=percentile, activations=activations,
    )  # fmt: skip
    for sentence in found.notes:
        (note or checkpoint.notes.append)(sentence)
    return found.inputs, len(ids)


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
) -> Ranges:
    """Run windows of tokens through a model, and see how large inputs of linears and the KV cache get.

    ids          int64 [windows, tokens]
    linears      module names as the files have them; none where only the cache is asked for
    cache        measure the keys and values of every block too
    activations  linear → how its input is quantized, which "mse" and "percentile" need. Two levels of scales (NVFP4)
                 are always given minmax: their range limits only the scales of groups, and nothing is won by clipping
    progress     called with (block, windows done, windows in all, of all blocks)

    Raises what the module docstring and that of `kv_cache.py` refuse, and UsageError for an unknown method.
    """
    check_method(method, percentile)
    runner = BlockRunner(checkpoint, dtype, device, options)
    sources = _sources(runner, linears)
    visitor = InputRanges([source.name for source in sources.values()], histograms=method != "minmax")
    with observed_cache(runner.model) if cache else nullcontext() as observed:
        states = runner.run(ids, visitor, progress)
    for source in {source.name: source for source in sources.values() if not source.linears[0].reads}.values():
        for x in runner.head_inputs(ids, states):
            visitor.look(source, x)
        visitor.finish(len(runner.architecture.blocks))
    missing = visitor.unseen(sources.values())
    inputs: dict[str, float] = {}
    chosen: dict[tuple[str, ActivationSpec | None], float] = {}
    for linear, source in sources.items():
        key = (source.name, (activations or {}).get(linear))
        if key not in chosen:
            chosen[key] = _range(visitor, source, runner.inputs, method, percentile, key[1])
        inputs[linear] = chosen[key]
    return Ranges(inputs, observed, tuple(missing), _unseen_notes(missing, sources.values()))


def check_method(method: str, percentile: float = PERCENTILE) -> None:
    """UsageError for a method that there is not, or a percentile that is none."""
    if method not in RANGE_METHODS:
        raise UsageError(
            f"there is no method {method!r} for activation ranges", f"choose one of {', '.join(RANGE_METHODS)}"
        )
    if not 50 < percentile <= 100:
        raise UsageError(f"percentile {percentile} is not in (50, 100]", "99.99 clips one value in ten thousand")


def _sources(runner: BlockRunner, linears: Iterable[str]) -> dict[str, BlockInput]:
    """Linear → the input that it reads."""
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
) -> float:  # fmt: skip
    """The range of an input; of an expert that was not reached, the largest of the others of its kind in the block."""
    if method != "minmax" and spec is None:
        raise AssertionError(f"method {method} needs to know how {source.linears[0].name} is quantized")
    if spec is not None and spec.scale_format == "e4m3":
        method = "minmax"
    number, bits = ("e4m3", 8) if spec is None else (spec.number, spec.bits)
    names = [source.name]
    if source.name not in visitor:
        names = [other.name for other in _siblings(source, inputs) if other.name in visitor]
    if not names:
        raise ArchitectureError(
            f"no token of the calibration text reached any expert of block {source.linears[0].block}",
            "give a longer text",
        )
    return max(visitor.range_of(name, method, percentile, number, bits) for name in names)


def _siblings(source: BlockInput, inputs: list[BlockInput]) -> list[BlockInput]:
    """The same input of all experts of a block."""
    first = source.linears[0]
    return [
        other
        for other in inputs
        if other.linears[0].expert is not None
        and (other.linears[0].block, other.linears[0].role) == (first.block, first.role)
    ]


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
