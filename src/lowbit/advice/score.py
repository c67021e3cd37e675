"""The score that ranks schemes: the gain over 16 bits, less a penalty for the loss of quality.

    score = gain − (loss / tolerance)³ − (loss of an FP8 cache / tolerance)³ − GUESSED − SECOND

    gain       decode · ln(tokens/s ÷ those of 16 bits) + prefill · ln(the same of prompts), weights by workload;
               for goal memory, and for fine-tuning: ln(bytes of weights and cache in 16 bits ÷ those of the scheme)
    loss       in percent, `quality.expected`
    tolerance  in percent, by goal: the loss that cancels a speed-up by e = 2.7
    GUESSED    where the loss is scaled from another scheme's: a measured figure wins a tie
    SECOND     with an FP8 cache: one more thing to calibrate and to go wrong, so it must be worth something

Where memory is the gain, what loses no more than the tolerance is not penalized: the smallest of those wins, however
little smaller it is.

By the cube, small losses hardly count and speed cannot compensate large ones. The weights and the cache are judged
apart: their errors add up, so the second is no worse for the first. 16 bits scores 0. Schemes that fit the device come
first, by score; then the others, smallest first. Shares and tolerances were chosen so that the ranking agrees with the
field's common advice (tests/advice/test_advice_matrix.py); they are not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowbit.errors import UsageError

GUESSED, SECOND = 0.03, 0.08
POWER = 3


@dataclass(frozen=True)
class Goal:
    """tolerance  in percent of loss; by_memory  True if bytes are the gain, not speed."""

    name: str
    tolerance: float
    by_memory: bool
    summary: str


GOALS: dict[str, Goal] = {
    goal.name: goal
    for goal in (
        Goal("balanced", 5.2, False, "speed and quality"),
        Goal("quality", 3.0, False, "speed, as far as quality hardly suffers"),
        Goal("speed", 11.0, False, "speed first"),
        Goal("memory", 5.0, True, "the least memory that still makes sense"),
    )
}


@dataclass(frozen=True)
class Workload:
    """Shares of decoding and prefill in the waiting time; by_memory: memory is the limit."""

    name: str
    decode: float
    prefill: float
    summary: str
    by_memory: bool = False


WORKLOADS: dict[str, Workload] = {
    load.name: load
    for load in (
        Workload("chat", 1.0, 0.0, "one reader waits for each token: decoding"),
        Workload("serve", 0.63, 0.37, "answers of several users: five parts decoding, three parts prompts"),
        Workload("decode", 1.0, 0.0, "long outputs: decoding"),
        Workload("prefill", 0.0, 1.0, "long prompts, short answers: the throughput of prompts"),
        Workload("finetune", 1.0, 0.0, "QLoRA: adapters are trained on frozen weights", by_memory=True),
    )
}


def find_goal(name: str | None) -> Goal:
    found = GOALS.get((name or "balanced").lower())
    if found is None:
        raise UsageError(f"there is no goal {name!r}", f"choose one of {', '.join(GOALS)}")
    return found


def find_workload(name: str) -> Workload:
    found = WORKLOADS.get(name.lower())
    if found is None:
        raise UsageError(f"there is no workload {name!r}", f"choose one of {', '.join(WORKLOADS)}")
    return found


@dataclass(frozen=True)
class Ratios:
    """Against 16 bits: how many times quicker, and how many times fewer bytes of weights and cache."""

    decode: float
    prefill: float
    memory: float


def score(
    ratios: Ratios, loss: float, goal: Goal, workload: Workload, guessed: bool = False, cache_loss: float = 0.0,
    second: bool = False,
) -> float:  # fmt: skip
    """See the module. loss, cache_loss: percent; second: the cache is quantized too."""
    marks = GUESSED * guessed + SECOND * second
    if goal.by_memory or workload.by_memory:
        whole = loss + cache_loss
        penalty = 0.0 if whole <= goal.tolerance else (whole / goal.tolerance) ** POWER
        return math.log(ratios.memory) - penalty - marks / 100  # of equal bytes, the measured and the simpler one
    speed = workload.decode * math.log(ratios.decode) + workload.prefill * math.log(ratios.prefill)
    penalty = (loss / goal.tolerance) ** POWER + (cache_loss / goal.tolerance) ** POWER
    return speed - penalty - marks
