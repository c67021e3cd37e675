"""The score that ranks schemes: the gain over 16 bits, less a penalty for the loss of quality.

    score = gain − (loss / tolerance)² − GUESSED where the loss is scaled from another scheme's

    gain       decode · ln(tokens/s ÷ those of 16 bits) + prefill · ln(the same of prompts), weights by workload;
               for goal memory, and for fine-tuning: ln(bytes of 16 bits ÷ bytes of the scheme)
    loss       in percent, `quality.expected`, and what an FP8 cache adds
    tolerance  in percent, by goal: the loss that cancels a speed-up by e = 2.7

GUESSED breaks ties in favour of measured figures. By the square, small losses hardly count and speed cannot compensate
large ones. 16 bits scores 0. Schemes that fit the device come first, by score; then the others, smallest first. The
tolerances were chosen so that the ranking agrees with the field's common advice (tests/advice/test_field_advice.py);
they are not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowbit.errors import UsageError

GUESSED = 0.01


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
        Goal("balanced", 6.2, False, "speed and quality"),
        Goal("quality", 3.6, False, "speed, as far as quality hardly suffers"),
        Goal("speed", 14.0, False, "speed first"),
        Goal("memory", 14.0, True, "the least memory that still makes sense"),
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
        Workload("serve", 0.65, 0.35, "answers of several users: two thirds decoding, one third prompts"),
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
    """Against 16 bits: how many times quicker, and how many times fewer bytes."""

    decode: float
    prefill: float
    memory: float


def score(ratios: Ratios, loss: float, goal: Goal, workload: Workload, guessed: bool = False) -> float:
    """See the module; loss in percent."""
    if goal.by_memory or workload.by_memory:
        gain = math.log(ratios.memory)
    else:
        gain = workload.decode * math.log(ratios.decode) + workload.prefill * math.log(ratios.prefill)
    return gain - (loss / goal.tolerance) ** 2 - GUESSED * guessed
