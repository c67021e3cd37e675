"""Adam over the changes of a model's scales, norms and biases, judged on windows of its own.

    g ← ∂KL/∂change over a batch of windows              m, v ← running means of g and g²
    change ← change − rate · m̂ / (√v̂ + ε)                rate: a short warm-up, then a cosine to 0

The held-out windows, evenly spaced over the text, are never trained on. Several times in a run the KL over them is
taken. Where it is the best so far, the changes are kept; where it is worse, the best ones come back, the means start
anew and the rate is halved; after `PATIENCE` such turns in a row the run ends. At its end the best changes count, and
none at all if no evaluation was better than the start: the result is never worse than what came in, by those windows.

Everything follows from the seed and the step, so that a run that goes on from a saved state makes the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lowbit.distillation.divergence import TokenDivergence
from lowbit.distillation.student import Changes, Student
from lowbit.errors import NonFiniteError, UsageError

if TYPE_CHECKING:
    from lowbit.settings import Settings

STEP_TOKENS = 2048  # of the batch of one step
EVALUATIONS = 8  # in a run
PATIENCE = 3
PASSES = 3
RATE = 1e-3
KEEP_EVERY = 60.0  # seconds between two saved states
_WARM_UP = 0.05  # of the steps
_BETAS = (0.9, 0.95)
_EPSILON = 1e-8  # gradients are of the sum over a batch
_LEAST_WINDOWS = 4


@dataclass(frozen=True)
class DistillOptions:
    """
    steps     of one batch each; None: `PASSES` over the training windows
    rate      by which a parameter changes in one step, about: relative to itself, or to a typical entry of its vector
    seed      of the order of windows
    """

    steps: int | None = None
    rate: float = RATE
    seed: int = 0

    @classmethod
    def of(cls, settings: Settings) -> DistillOptions:
        """The user's settings, defaults for the rest."""
        rate = RATE if settings.distill_rate is None else settings.distill_rate
        return cls(settings.distill_steps, rate, settings.seed)


@dataclass(frozen=True)
class Split:
    """Windows to train on, and those that judge; int64 indices in the order of the text."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, windows: int, what: str = "distill") -> Split:
        """One window in eight judges, at least 2 and at most 16; UsageError for too few windows. what: asks for them"""
        if windows < _LEAST_WINDOWS:
            raise UsageError(
                f"{what} needs {_LEAST_WINDOWS} windows of text, some of which only judge; there "
                f"{'is' if windows == 1 else 'are'} {windows}",
                "give more --samples, or a longer text",
            )
        count = min(16, max(2, windows // 8))
        held_out = (torch.arange(count) * windows + windows // 2) // count
        train = torch.ones(windows, dtype=torch.bool)
        train[held_out] = False
        return cls(train.nonzero()[:, 0], held_out)

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """The windows of a step: every one once in a pass, in an order of the pass."""
        number, place = divmod(step, len(self.train) // size)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        order = torch.randperm(len(self.train), generator=generator)
        return self.train[order[place * size : (place + 1) * size]].sort().values


def windows_per_step(windows: int, tokens: int) -> int:
    """Of a run over so many windows of so many tokens."""
    return min(len(Split.of(windows).train), max(1, STEP_TOKENS // tokens))


@dataclass
class State:
    """Everything a run needs to go on.

    changes, best, first, second  of every parameter: now, at the best evaluation, and the running means of g and g²
    step       steps done;  since: steps since the means started
    factor     what halvings made of the rate
    turns      halvings in a row
    start, lowest   KL on the held-out windows, in nats
    lowest_at  step of `best`
    ended      why the run ended before its last step
    finished   True behind the last step
    notes      for the user, on what the student leaves out
    """

    changes: Changes
    best: Changes
    first: Changes
    second: Changes
    step: int = 0
    since: int = 0
    factor: float = 1.0
    turns: int = 0
    start: float = math.nan
    lowest: float = math.nan
    lowest_at: int = 0
    ended: str = ""
    finished: bool = False
    notes: list[str] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under flat names."""
        parts = {"changes": self.changes, "best": self.best, "first": self.first, "second": self.second}
        return {f"{part}|{parameter}|{name}": values for part, changes in parts.items()
                for name, each in changes.items() for parameter, values in each.items()}  # fmt: skip

    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not isinstance(value, dict)}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> State:
        """The inverse of `tensors` and `facts`."""
        parts: dict[str, Changes] = {"changes": {}, "best": {}, "first": {}, "second": {}}
        for flat, values in tensors.items():
            part, parameter, name = flat.split("|", 2)
            parts[part].setdefault(name, {})[parameter] = values
        return cls(**parts, **facts)


class Keeper(Protocol):
    """Where a run keeps its state."""

    def load(self) -> State | None:
        """That of an earlier run with the same settings, to go on from."""
        ...

    def save(self, state: State) -> None: ...


@dataclass(frozen=True)
class Distilled:
    """The outcome.

    changes       the best ones; empty if none was better than the start
    start, end    KL on the held-out windows, nats
    steps         done;  best_step: the one whose changes count
    rate          at the start of the run
    windows       (trained on, held out)
    parameters    numbers learned
    notes         for the user
    """

    changes: Changes
    start: float
    end: float
    steps: int
    best_step: int
    rate: float
    windows: tuple[int, int]
    parameters: int
    notes: tuple[str, ...] = field(default=())


def distill(
    student: Student,
    divergence: TokenDivergence,
    options: DistillOptions,
    keeper: Keeper | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    notes: Sequence[str] = (),
) -> Distilled:
    """Learn the changes of a student's parameters.

    progress  called with (steps done, steps in all, KL of the last batch)
    notes     on what the student leaves out

    UsageError if nothing can be learned or the windows are too few, NonFiniteError if the divergence is not finite at
    the start. A gradient that is not finite later ends the run with the best changes so far, and a note.
    """
    run = _AdamRun(student, divergence, options)
    state = None if keeper is None else keeper.load()
    if state is None:
        state = run.started()
    else:
        student.prepare(state.changes)
    state.notes, kept_at = list(notes), time.monotonic()
    while state.step < run.steps and not state.ended:
        loss = run.one_step(state)
        if progress is not None:
            progress(state.step, run.steps, loss)
        if keeper is not None and time.monotonic() - kept_at > KEEP_EVERY:
            keeper.save(state)
            kept_at = time.monotonic()
    state.finished = True
    if keeper is not None:
        keeper.save(state)
    return outcome(state, len(student.ids), options)


def outcome(state: State, windows: int, options: DistillOptions) -> Distilled:
    """The outcome of a finished run over so many windows."""
    split, better = Split.of(windows), state.lowest < state.start
    parameters = sum(change.numel() for each in state.changes.values() for change in each.values())
    notes = [f"distillation stopped after {state.step} steps: {state.ended}"] if state.ended else []
    if better:
        notes.append(
            f"distillation of {parameters} scales and entries of norms and biases: KL {state.start:.4g} → "
            f"{state.lowest:.4g} on {len(split.held_out)} held-out windows, learned from {len(split.train)}, at step "
            f"{state.lowest_at} of {state.step}; "
            f"errors of single tensors are those before it"
        )
    else:
        notes.append(
            f"distillation: nothing that was learned is kept, since no evaluation was better than the start, KL "
            f"{state.start:.4g} on {len(split.held_out)} held-out windows"
        )
    return Distilled(
        changes=state.best if better else {}, start=state.start, end=state.lowest, steps=state.step,
        best_step=state.lowest_at, rate=options.rate, windows=(len(split.train), len(split.held_out)),
        parameters=parameters, notes=(*notes, *state.notes),
    )  # fmt: skip


class _AdamRun:
    def __init__(self, student: Student, divergence: TokenDivergence, options: DistillOptions):
        self.student, self.divergence, self.options = student, divergence, options
        self.split = Split.of(len(student.ids))
        self.batch = windows_per_step(*student.ids.shape)
        self.steps = options.steps or PASSES * (len(self.split.train) // self.batch)
        self.every = max(1, self.steps // EVALUATIONS)

    def started(self) -> State:
        changes = self.student.start()
        if not changes:
            raise UsageError("nothing can be distilled: no scale, norm or bias of this model is learned",
                             "leave +distill out; tensor scales are shared and stay")  # fmt: skip
        self.student.prepare(changes)
        start = self._judge(changes)
        if not math.isfinite(start):
            raise NonFiniteError(
                "the divergence of the quantized model from the unquantized one is not finite before a step is taken",
                "check the weights and the calibration text, or leave +distill out",
            )
        return State(changes, _copied(changes), _zeros(changes), _zeros(changes), start=start, lowest=start)

    def one_step(self, state: State) -> float:
        """A step, and an evaluation where one is due; returns the KL of the batch."""
        found = _zeros(state.changes)
        loss = self.divergence.gradients(
            self.split.batch(state.step, self.batch, self.options.seed), state.changes, found
        )
        finite = math.isfinite(loss) and all(
            bool(torch.isfinite(gradient).all()) for each in found.values() for gradient in each.values()
        )
        if not finite:
            state.ended = f"the divergence was not finite in step {state.step + 1}"
            return loss
        self._move(state, found)
        state.step += 1
        self.student.prepare(state.changes)
        if state.step % self.every == 0 or state.step == self.steps:
            self._evaluate(state)
        return loss

    def _rate(self, step: int) -> float:
        warm = max(1, round(_WARM_UP * self.steps))
        if step < warm:
            return self.options.rate * (step + 1) / warm
        return self.options.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def _move(self, state: State, found: Changes) -> None:
        """One step of Adam."""
        state.since += 1
        rate = self._rate(state.step) * state.factor
        first_bias, second_bias = (1 - beta**state.since for beta in _BETAS)
        for name, each in found.items():
            for parameter, gradient in each.items():
                first = state.first[name][parameter].lerp_(gradient, 1 - _BETAS[0])
                second = state.second[name][parameter].lerp_(gradient.square(), 1 - _BETAS[1])
                size = (second / second_bias).sqrt_().add_(_EPSILON)
                state.changes[name][parameter].addcdiv_(first, size, value=-rate / first_bias)

    def _evaluate(self, state: State) -> None:
        now = self._judge(state.changes)
        if now < state.lowest:
            state.best, state.lowest, state.lowest_at, state.turns = _copied(state.changes), now, state.step, 0
            return
        state.changes, state.since = _copied(state.best), 0
        state.first, state.second = _zeros(state.changes), _zeros(state.changes)
        state.factor, state.turns = state.factor / 2, state.turns + 1
        self.student.prepare(state.changes)
        if state.turns == PATIENCE and state.step < self.steps:
            state.ended = f"{PATIENCE} evaluations in a row were no better on the held-out windows"

    def _judge(self, changes: Changes) -> float:
        return self.divergence.mean(self.split.held_out, changes, self.batch)


def _copied(changes: Changes) -> Changes:
    return {name: {parameter: values.clone() for parameter, values in each.items()} for name, each in changes.items()}


def _zeros(changes: Changes) -> Changes:
    return {name: {parameter: torch.zeros_like(values) for parameter, values in each.items()}
            for name, each in changes.items()}  # fmt: skip
