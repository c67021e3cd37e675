"""The loop of `lowbit finetune`: steps of AdamW on windows of text, some of which are held out.

    loss    mean over counted tokens: cross entropy of the next token, or KL(teacher ‖ model) in nats
    rate    rises over the first tenth of the steps, falls to zero; gradients are clipped to norm 1, no weight decay
    order   every pass over the windows in a new order, drawn with the seed

Which tokens count is said by a mask (answers only, `lowbit.text.answers`); all others are context. The mean is over the
counted tokens of a step, so that a step of short answers weighs as much as any other. Held-out losses are means over
all counted tokens that were held out.

A loss or gradient that is not finite ends the training before the step that it would spoil; at the first step it is an
error. A state that was saved (`States`) holds all that the next step depends on: the same bytes come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.errors import CheckpointError, NonFiniteError
from lowbit.train.options import Course

# One in so many windows is held out, at most MOST_HELD_OUT.
_HELD_OUT, _MOST_HELD_OUT = 8, 16
# θ is a relative change of a scale; weights are a few hundredths, so that this moves both alike.
SCALE_RATE = 30.0
_WARMUP = 0.1
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for each parameter


@dataclass(frozen=True)
class Lesson:
    """What is learned from.

    ids      int64 [windows, T]
    counted  bool [windows, T]: tokens that count in the loss; None: all
    """

    ids: Tensor
    counted: Tensor | None = None

    @property
    def share(self) -> float | None:
        """Share of the tokens that count; None where all do."""
        return None if self.counted is None else self.counted[:, 1:].float().mean().item()

    def with_counted_tokens(self) -> Lesson:
        """The windows in which a token counts."""
        if self.counted is None:
            return self
        kept = self.counted[:, 1:].any(dim=1)
        return Lesson(self.ids[kept], self.counted[kept])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Lesson:
        return Lesson(self.ids[index], None if self.counted is None else self.counted[index])

    def split(self) -> tuple[Lesson, Lesson]:
        """(what is shown, what is held out); CheckpointError for fewer than two windows."""
        if len(self) < 2:
            raise CheckpointError(f"{len(self)} windows of text: one is held out, and nothing is left to learn from",
                                  "give more text, or shorter windows")  # fmt: skip
        held = max(1, min(_MOST_HELD_OUT, len(self) // _HELD_OUT))
        return self[:-held], self[-held:]


@dataclass(frozen=True)
class Trained:
    """steps done; losses on the held-out windows before and after; why it ended early, if it did"""

    steps: int
    before: float
    after: float
    stopped: str | None = None

    @property
    def went_wrong(self) -> bool:
        return self.stopped is not None or self.after > self.before

    def sentence(self, what: str, share: float | None = None) -> str:
        """What a summary says of it; `share` of the tokens that counted, None: all."""
        ended = f"; stopped: {self.stopped}" if self.stopped else ""
        rose = self.after > self.before
        worse = "; the held-out loss rose: lower the learning rate, or give more text" if rose else ""
        on = "" if share is None else f" on answers ({share:.0%} of the tokens)"
        return f"trained {self.steps} steps{on}, held-out {what} {self.before:.4g} → {self.after:.4g}{worse}{ended}"


class States(Protocol):
    """Where states of a training are kept (`lowbit.train.states`)."""

    every: int

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None: ...

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None: ...


def train(
    model: nn.Module, lesson: Lesson, course: Course, teacher: nn.Module | None = None,
    progress: Callable[[int, int], None] | None = None, states: States | None = None,
) -> Trained:  # fmt: skip
    """Run the course; the model is left in evaluation mode.

    states  go on from what is kept there, and keep a state every `states.every` steps

    NonFiniteError where the first loss is not finite, CheckpointError for fewer than two windows.
    """
    shown, judged = lesson.split()
    steps = course.steps or math.ceil(len(shown) / course.batch)
    run = _TrainingSteps(model, course, steps)
    kept = None if states is None else states.load()
    if kept is None:
        before = held_out_loss(model, judged, course.batch, teacher)
        if not math.isfinite(before):
            raise NonFiniteError("the loss is not finite before the first step",
                                 "look for damage with `lowbit evaluate`, or give another text")  # fmt: skip
    else:
        before = kept[1]["before"]
    model.train()
    with torch.random.fork_rng(_cuda_devices(run.parameters)):
        torch.manual_seed(course.seed)  # of dropout, where a model has it
        if kept is not None:
            run.restore(*kept)
        for batch in _batches(len(shown), course, steps)[run.done :]:
            if not run.step(batch_loss(model, shown[batch], teacher)):
                break
            if states is not None and states.every and run.done % states.every == 0:
                states.save(run.tensors(), {"done": run.done, "before": before})
            if progress is not None:
                progress(run.done * course.batch, steps * course.batch)
    model.eval()
    return Trained(run.done, before, held_out_loss(model, judged, course.batch, teacher), run.stopped)


class _TrainingSteps:
    """Steps of an optimizer, up to the first whose loss or gradient is not finite."""

    def __init__(self, model: nn.Module, course: Course, steps: int):
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.optimizer = _optimizer(self.parameters, course.rate)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps, self.done = steps, 0
        self.stopped: str | None = None

    def step(self, loss: Tensor) -> bool:
        """False, and nothing is changed, where it would spoil the weights; NonFiniteError if it is the first."""
        loss.backward()
        size = nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        finite = bool(torch.isfinite(loss) and torch.isfinite(size))
        if finite:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * _rate(self.done, self.steps)
            self.optimizer.step()
            self.done += 1
        else:
            what = "gradient" if torch.isfinite(loss) else "loss"
            self.stopped = f"the {what} of step {self.done + 1} is not finite"
            if self.done == 0:
                raise NonFiniteError(self.stopped, "lower the learning rate, or look for damage with `lowbit evaluate`")
        self.optimizer.zero_grad()
        return finite

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on but the text: parameters, moments, states of random numbers."""
        found = {f"parameter|{name}": each.detach().cpu() for name, each in self.parameters.items()}
        for name, each in self.parameters.items():
            moments = self.optimizer.state[each]
            found |= {f"{kind}|{name}": moments[kind].cpu() for kind in _MOMENTS if kind in moments}
        found["random|cpu"] = torch.get_rng_state()
        for device in _cuda_devices(self.parameters):
            found[f"random|{device}"] = torch.cuda.get_rng_state(device)
        return {name: each.contiguous().clone() for name, each in found.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go back to a state of `tensors`."""
        for name, each in self.parameters.items():
            each.copy_(tensors[f"parameter|{name}"])
            moments = {kind: tensors[f"{kind}|{name}"] for kind in _MOMENTS if f"{kind}|{name}" in tensors}
            if moments:
                on_device = {kind: moments[kind].to(each.device) for kind in _MOMENTS[1:]}
                self.optimizer.state[each] = {"step": moments["step"].clone(), **on_device}
        torch.set_rng_state(tensors["random|cpu"])
        for device in _cuda_devices(self.parameters):
            torch.cuda.set_rng_state(tensors[f"random|{device}"], device)
        self.done = facts["done"]


def _cuda_devices(parameters: dict[str, nn.Parameter]) -> list[str]:
    return sorted({str(each.device) for each in parameters.values() if each.device.type == "cuda"})


def batch_loss(model: nn.Module, lesson: Lesson, teacher: nn.Module | None) -> Tensor:
    """Mean over counted positions: cross entropy of the next token, or KL(teacher ‖ model) in nats."""
    ids = lesson.ids.to(next(model.parameters()).device)
    counted = None if lesson.counted is None else lesson.counted[:, 1:].to(ids.device)
    logits = _counted(model(ids, use_cache=False).logits, counted)
    if teacher is None:
        wanted_ids = ids[:, 1:].flatten() if counted is None else ids[:, 1:][counted]
        return F.cross_entropy(logits, wanted_ids)
    with torch.no_grad():
        wanted = F.log_softmax(_counted(teacher(ids, use_cache=False).logits, counted), dim=-1)
    return F.kl_div(F.log_softmax(logits, dim=-1), wanted, log_target=True, reduction="batchmean")


def _counted(logits: Tensor, counted: Tensor | None) -> Tensor:
    """float32 [positions, vocabulary] of the positions that predict a counted token."""
    logits = logits[:, :-1]
    return (logits.flatten(0, 1) if counted is None else logits[counted]).float()


@torch.no_grad()
def held_out_loss(model: nn.Module, lesson: Lesson, batch: int, teacher: nn.Module | None) -> float:
    """The mean over all counted tokens; the model is left in evaluation mode."""
    model.eval()
    total = tokens = 0
    for start in range(0, len(lesson), batch):
        part = lesson[start : start + batch]
        size = len(part) if part.counted is None else int(part.counted[:, 1:].sum())
        total, tokens = total + batch_loss(model, part, teacher).item() * size, tokens + size
    return total / tokens


def _optimizer(trained: dict[str, nn.Parameter], rate: float) -> torch.optim.Optimizer:
    scales = [parameter for name, parameter in trained.items() if ".changes." in name]
    others = [parameter for name, parameter in trained.items() if ".changes." not in name]
    groups = [{"params": others, "lr": rate}]
    groups += [{"params": scales, "lr": SCALE_RATE * rate}] if scales else []
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: up over the first tenth, then down to zero."""
    rising = max(1, round(_WARMUP * steps))
    return (step + 1) / rising if step < rising else max(0.0, (steps - step) / max(1, steps - rising))


def _batches(windows: int, course: Course, steps: int) -> list[Tensor]:
    """Indices of the windows of each step; every pass over them in a new order."""
    generator = torch.Generator().manual_seed(course.seed)
    passes = math.ceil(steps * course.batch / windows)
    order = torch.cat([torch.randperm(windows, generator=generator) for _ in range(passes)])
    return list(order.split(course.batch))[:steps]
