"""Inputs of the linears: outlier channels, static ranges that are too small, and calibration mismatch.

    outlier channel   max |x| ≥ 6 over the text, and ≥ 20 times the median over channels of max |x|
                      (the first is the rule of LLM.int8(), arXiv 2208.07339; the second excludes inputs that are large
                      in all channels)
    static range      reach = input scale · largest code; clipped where max |x| > 2 · reach
    mismatch          distance of the text's mean x² to the recorded one (`calibrate.summary`), in doublings, the median
                      over inputs; compared with the distance between the two halves of the diagnosis text, which is
                      what two stretches of one text differ by

Statistics are measured in the reference and in the quantized model; the recorded ones come from a partly rounded
stream, which lies between, so the nearer of the two counts.

A mismatch is reported if the median distance exceeds MISMATCH_LEAST doublings and MISMATCH_RATIO times that of the
halves, and the calibration text lacks more than UNSEEN of this text's tokens; MISMATCH_ALONE doublings if the report
does not record its tokens; whatever the distance, if it lacks nearly all of them (UNSEEN_ALONE). (demo:smollm2, windows
of 256: two English texts are 0.4 apart, English and code 0.7, English and German, Russian or Chinese 0.9 to 1.2; the
packaged calibration text is 0.5 to 0.8 from any of them, and has their tokens.) Fewer than two windows have no halves,
and distances are not judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.calibrate.block_modules import BlockInput, observed
from lowbit.calibrate.blocks import BlockRunner, batches_of
from lowbit.calibrate.summary import InputSummary, distance, log_distance

if TYPE_CHECKING:
    from lowbit.schemes import Scheme

OUTLIER_ABSMAX = 6.0
OUTLIER_RATIO = 20.0
CLIPPED_RATIO = 2.0
MISMATCH_RATIO = 1.6
MISMATCH_LEAST = 0.6
MISMATCH_ALONE = 0.9
UNSEEN = 0.2
UNSEEN_ALONE = 0.9


@dataclass(frozen=True)
class InputStats:
    """One distinct input on the diagnosis text. Float32 [K]: absmax, mean_sq, and mean x² of either half of it."""

    name: str
    block: int | None
    linears: tuple[str, ...]
    absmax: Tensor
    mean_sq: Tensor
    halves: tuple[Tensor, ...]


class _InputSums:
    """A `BlockVisitor`: Σ x² and max |x| of every channel, and tokens."""

    def __init__(self):
        self.found: dict[str, tuple[int, Tensor, Tensor]] = {}
        self.sources: dict[str, BlockInput] = {}

    def look(self, source: BlockInput, x: Tensor) -> None:
        if not len(x):
            return
        x = x.float()
        tokens, squares, absmax = self.found.get(source.name, (0, torch.zeros(()), torch.zeros(())))
        self.sources[source.name] = source
        self.found[source.name] = (
            tokens + len(x), squares + x.square().sum(0).cpu(), torch.maximum(absmax, x.abs().amax(0).cpu())
        )  # fmt: skip

    def finish(self, block: int) -> None:
        pass


@torch.inference_mode()
def observe(runner: BlockRunner, ids: Tensor) -> tuple[Tensor, dict[str, InputStats]]:
    """(head inputs [windows, T, H], name of an input → its statistics) of a model on some windows."""
    states = runner.embed(ids)
    middle = len(ids) // 2
    halves = [half for half in (slice(0, middle), slice(middle, len(ids))) if half.stop > half.start]
    stats: dict[str, InputStats] = {}
    for index, block in enumerate(runner.blocks):
        runner.load(index)
        seen = [_InputSums() for _ in halves]
        for half, sums in zip(halves, seen, strict=True):
            part = states.values[half]
            with observed(block, block.module, sums):
                for batch in batches_of(part):
                    part[batch] = runner.forward(index, part[batch])
        runner.drop(index)
        stats |= _joined(index, seen)
    return runner.through_last_norm(ids, states).values, stats


def _joined(block: int, parts: list[_InputSums]) -> dict[str, InputStats]:
    stats = {}
    for name in dict.fromkeys(name for part in parts for name in part.found):
        found = [part.found[name] for part in parts if name in part.found]
        source = next(part.sources[name] for part in parts if name in part.sources)
        tokens = sum(each[0] for each in found)
        mean_sq = torch.stack([each[1] for each in found]).sum(0) / tokens
        absmax = torch.stack([each[2] for each in found]).amax(0)
        halves = tuple(each[1] / each[0] for each in found)
        stats[name] = InputStats(name, block, tuple(each.name for each in source.linears), absmax, mean_sq, halves)
    return stats


@dataclass(frozen=True)
class OutlierInput:
    """channels  ascending; largest: max |x| over them; ratio: over the median channel's"""

    name: str
    linears: tuple[str, ...]
    channels: tuple[int, ...]
    largest: float
    ratio: float


def outlier_inputs(stats: Iterable[InputStats]) -> list[OutlierInput]:
    """Inputs with outlier channels by the rule of the module, worst first."""
    found = []
    for each in stats:
        middle = each.absmax.median().item()
        limit = max(OUTLIER_ABSMAX, OUTLIER_RATIO * middle)
        channels = (each.absmax >= limit).nonzero()[:, 0].tolist()
        if channels:
            largest = each.absmax.max().item()
            ratio = largest / middle if middle > 0 else float("inf")
            found.append(OutlierInput(each.name, each.linears, tuple(channels), largest, min(ratio, 1e9)))
    return sorted(found, key=lambda each: -each.ratio)


@dataclass(frozen=True)
class ClippedInput:
    """A stored activation scale that reaches only `reach`, where the text has values up to `largest`."""

    tensor: str
    reach: float
    largest: float


_LARGEST_CODE = {"int": 127.0, "e4m3": 448.0, "e2m1": 6.0 * 448.0}


def clipped_inputs(
    stats: Iterable[InputStats], schemes: Mapping[str, Scheme], input_scales: Mapping[str, float],
    zero_points: Mapping[str, int] | None = None,
) -> list[ClippedInput]:  # fmt: skip
    """Static activation scales that this text exceeds by far, worst first."""
    found = []
    for each in stats:
        for linear in each.linears:
            name = f"{linear}.weight"
            scheme = schemes.get(name)
            if name not in input_scales or scheme is None or scheme.activation is None:
                continue
            # Of an asymmetric range the farther end: |x| does not say on which side a value lies.
            beyond = abs((zero_points or {}).get(name, 0))
            reach = input_scales[name] * (_LARGEST_CODE[scheme.activation.number] + beyond)
            largest = each.absmax.max().item()
            if largest > CLIPPED_RATIO * reach:
                found.append(ClippedInput(name, reach, largest))
    return sorted(found, key=lambda each: each.reach / each.largest)


@dataclass(frozen=True)
class Mismatch:
    """How far the calibration text is from this one.

    distance  median over inputs, in doublings; halves: the same between the halves of this text
    worst     the input that differs most
    inputs    how many were compared
    """

    distance: float
    halves: float
    worst: str
    inputs: int


def is_mismatch(found: Mismatch | None, unseen: float | None) -> bool:
    """By the rule of the module; unseen: share of the text's tokens that the calibration text lacks, if known."""
    if unseen is not None and unseen > UNSEEN_ALONE:
        return True
    if found is None or (unseen is not None and unseen <= UNSEEN):
        return False
    least = MISMATCH_ALONE if unseen is None else MISMATCH_LEAST
    return found.distance > least and found.distance > MISMATCH_RATIO * found.halves


def calibration_mismatch(
    recorded: Iterable[InputSummary], streams: Iterable[Mapping[str, InputStats]]
) -> Mismatch | None:
    """The nearer of the streams; None if nothing that was recorded was seen here, or there are no halves."""
    recorded = list(recorded)
    found = [each for each in (_against(recorded, stats) for stats in streams) if each is not None]
    return min(found, key=lambda each: each.distance, default=None)


def _against(recorded: list[InputSummary], stats: Mapping[str, InputStats]) -> Mismatch | None:
    distances, halves = {}, []
    for summary in recorded:
        each = stats.get(summary.name)
        if each is None or len(each.halves) < 2:
            continue
        distances[summary.name] = distance(summary, each.mean_sq)
        halves.append(log_distance(*(torch.log2(half) for half in each.halves)))
    if not distances:
        return None
    worst = max(distances, key=lambda name: distances[name])
    return Mismatch(median(distances.values()), median(halves), worst, len(distances))
