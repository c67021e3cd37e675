"""`finetune`: train the weights of a model under fake quantization on a text, and export what was trained.

    QAT   MODEL in 16 bits, loss of the next token
    QAF   MODEL a quantized folder or GGUF file: training starts from its decoded weights
    QAD   distill=True: KL(float model ‖ trained model) of every position; the float model is `reference`, or MODEL

Trained are the linears that the scheme quantizes, their scales, and the norms between them; embeddings and the output
layer stay. AdamW without weight decay, the rate rising over the first tenth of the steps and falling to zero, gradients
clipped to norm 1. Windows of text are cut as for calibration and drawn in an order of the seed; the last of them are
held out, and the loss on these is measured before and after. If it rose, the output says so.

A loss or a gradient that is not finite ends the training before the step that it would spoil; at the first step it is
an error. Computes in float32, writes in the dtype of the model. Memory: 20 bytes per weight, 24 with a distillation.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.api import Quantized, refuse_other_name
from lowbit.architecture import model_dtype
from lowbit.architecture.inspection import embedding_rows
from lowbit.architecture.loading import Loader, load_model, load_tokenizer
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions, report_path
from lowbit.checkpoint.quantized import KINDS
from lowbit.errors import CheckpointError, NonFiniteError, UsageError
from lowbit.export.atomic import refuse_existing, refuse_existing_files
from lowbit.files.claim import refuse_claimed
from lowbit.files.system import refuse_sources
from lowbit.measure import Meter, available_memory
from lowbit.plan.plan import CalibrationText
from lowbit.settings import make_settings
from lowbit.text import CalibrationWindows, GivenText, calibration_windows, context_length
from lowbit.train.exporting import export_trained
from lowbit.train.preparing import prepare, training_of

_log = logging.getLogger("lowbit")
# One in so many windows is held out, at most MOST_HELD_OUT.
_HELD_OUT, _MOST_HELD_OUT = 8, 16
# θ is a relative change of a scale; weights are a few hundredths, so that this moves both alike.
SCALE_RATE = 30.0
_WARMUP = 0.1
_BLOCK = re.compile(r"(.+?\.\d+)\.")  # the name of a parameter begins with that of its decoder block
_BYTES_PER_WEIGHT = 20  # weight, gradient, two moments, rounded weight


@dataclass(frozen=True)
class Course:
    """How a model is trained.

    steps          optimizer steps; 0: once through the windows
    batch          windows per step
    learning_rate  of weights and norms; scales have `SCALE_RATE` times it
    """

    steps: int = 0
    batch: int = 4
    learning_rate: float = 1e-5
    seed: int = 0

    def __post_init__(self):
        if self.batch < 1 or self.steps < 0 or not 0 < self.learning_rate < 1:
            raise UsageError(f"{self.steps} steps of {self.batch} windows at rate {self.learning_rate}",
                             "take at least one window, and a rate such as 1e-5")  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """steps done; losses on the held-out windows before and after; why it ended early, if it did"""

    steps: int
    before: float
    after: float
    stopped: str | None = None

    def sentence(self, what: str) -> str:
        ended = f"; stopped: {self.stopped}" if self.stopped else ""
        rose = self.after > self.before
        worse = "; the held-out loss rose: lower the learning rate, or give more text" if rose else ""
        return f"trained {self.steps} steps, held-out {what} {self.before:.4g} → {self.after:.4g}{worse}{ended}"


def finetune(
    model: str | Path,
    output: str | Path,
    *,
    scheme: str = "W4A16",
    data: Any = None,
    windows: int = 128,
    window_tokens: int = 512,
    steps: int = 0,
    batch: int = 4,
    learning_rate: float = 1e-5,
    distill: bool = False,
    reference: str | Path | None = None,
    learn_scales: bool = True,
    seed: int = 0,
    device: str = "cpu",
    options: OpenOptions | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Quantized:
    """Train a model under fake quantization, and write it with the codes of its forward pass.

    model      in 16 bits, or quantized (then it starts from the decoded weights)
    output     a folder, or NAME.gguf for a ggml type
    data       text as of `calib`, in files or in memory; None: the packaged calibration text
    windows    of `window_tokens` tokens, some of which are held out
    steps, batch, learning_rate, seed   see `Course`
    distill    towards the next-token distribution of `reference`, or of `model`; else the loss of the next token
    settings   that shape the output: format, group_size, ignore, overrides …
    progress   called with (windows done, windows in all)

    After a LowbitError `output` does not exist, or is still the earlier one.
    """
    meter, output, options = Meter(), Path(output), options or OpenOptions()
    course = Course(steps, batch, learning_rate, seed)
    if reference is not None and not distill:
        raise UsageError("--reference is read only with --distill", "add --distill, or leave it out")
    chosen = make_settings(None, scheme=scheme, **settings)
    refuse_other_name(output, chosen)
    refuse_claimed(output)
    refuse_sources([output], [Path(str(path)) for path in (model, reference, data) if isinstance(path, str | Path)])
    if chosen.writes_gguf(output):
        refuse_existing_files(output, [output, report_path(output)], overwrite)
    else:
        refuse_existing(output, overwrite)
    checkpoint = open_checkpoint(model, options)
    try:
        tokenizer = load_tokenizer(checkpoint, options)
        text = _windows(data, tokenizer, checkpoint, windows, window_tokens, seed)
        _refuse_too_large(checkpoint, distill)
        if distill and reference is None and checkpoint.kind in KINDS:
            raise UsageError(f"{model} is quantized already: it cannot be its own reference",
                             "name the float model with --reference")  # fmt: skip
        loader = Loader(checkpoint, torch.float32, device, options)
        loader.fill(lambda name: True)
        student = loader.model
        source, dtype = checkpoint.source, model_dtype(checkpoint)
        taken = [*loader.notes, *_left_out(loader.beside)]
    finally:
        checkpoint.close()
    teacher = None
    if distill:
        teacher = _teacher(reference or model, device, options)
        _refuse_other_vocabulary(student, teacher)
    student.config.name_or_path = ""
    prepare(student.requires_grad_(True), scheme, learn_scales=learn_scales, dtype=dtype, options=options, **settings)
    _freeze_outside(student)
    found = train(student, text.ids, course, teacher, progress)
    what = "KL divergence to the float model" if distill else "loss"
    note = found.sentence(what)
    if found.stopped or found.after > found.before:
        _log.warning(note)
    return export_trained(
        student, output, tokenizer, threads, overwrite, None, meter, source=source, text=CalibrationText.of(text),
        notes=(*taken, note),
    )  # fmt: skip


def _left_out(names: list[str]) -> list[str]:
    """A note on stored tensors that the trained model has no parameter for, and its output therefore lacks."""
    if not names:
        return []
    shown = f"{', '.join(names[:2])}{' …' if len(names) > 2 else ''}"
    return [f"left out ({len(names)} tensors): transformers builds no place for {shown}"]


def train(
    model: nn.Module, ids: Tensor, course: Course, teacher: nn.Module | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:  # fmt: skip
    """Run the course on windows of token ids, int64 [windows, T]; the model is left in evaluation mode.

    NonFiniteError where the first loss is not finite, CheckpointError for fewer than two windows.
    """
    if len(ids) < 2:
        raise CheckpointError(f"{len(ids)} windows of text: one is held out, and nothing is left to learn from",
                              "give more text, or shorter windows")  # fmt: skip
    held = max(1, min(_MOST_HELD_OUT, len(ids) // _HELD_OUT))
    shown, judged = ids[:-held], ids[-held:]
    steps = course.steps or math.ceil(len(shown) / course.batch)
    optimizer = _optimizer(model, course)
    before = _held_out(model, judged, course.batch, teacher)
    if not math.isfinite(before):
        raise NonFiniteError("the loss is not finite before the first step",
                             "look for damage with `lowbit evaluate`, or give another text")  # fmt: skip
    run = _TrainingSteps(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps)))
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(course.seed)  # of dropout, where a model has it
        for batch in _batches(len(shown), course, steps):
            if not run.step(_loss(model, shown[batch], teacher)):
                break
            if progress is not None:
                progress(run.done * course.batch, steps * course.batch)
    model.eval()
    return Trained(run.done, before, _held_out(model, judged, course.batch, teacher), run.stopped)


@dataclass
class _TrainingSteps:
    """Steps of an optimizer, up to the first whose loss or gradient is not finite."""

    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    done: int = 0
    stopped: str | None = None

    def step(self, loss: Tensor) -> bool:
        """False, and nothing is changed, where it would spoil the weights; NonFiniteError if it is the first."""
        loss.backward()
        size = nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        finite = bool(torch.isfinite(loss) and torch.isfinite(size))
        if finite:
            self.optimizer.step()
            self.schedule.step()
            self.done += 1
        else:
            what = "gradient" if torch.isfinite(loss) else "loss"
            self.stopped = f"the {what} of step {self.done + 1} is not finite"
            if self.done == 0:
                raise NonFiniteError(self.stopped, "lower the learning rate, or look for damage with `lowbit evaluate`")
        self.optimizer.zero_grad()
        return finite


def _loss(model: nn.Module, ids: Tensor, teacher: nn.Module | None) -> Tensor:
    """Mean over positions: cross entropy of the next token, or KL(teacher ‖ model) in nats."""
    ids = ids.to(next(model.parameters()).device)
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    if teacher is None:
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    with torch.no_grad():
        wanted = F.log_softmax(teacher(ids, use_cache=False).logits[:, :-1].float(), dim=-1)
    return F.kl_div(F.log_softmax(logits, dim=-1).flatten(0, 1), wanted.flatten(0, 1), log_target=True,
                    reduction="batchmean")  # fmt: skip


@torch.no_grad()
def _held_out(model: nn.Module, ids: Tensor, batch: int, teacher: nn.Module | None) -> float:
    model.eval()
    parts = [_loss(model, part, teacher).item() * len(part) for part in ids.split(batch)]
    return sum(parts) / len(ids)


def _optimizer(model: nn.Module, course: Course) -> torch.optim.Optimizer:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = [parameter for name, parameter in trained if ".changes." in name]
    others = [parameter for name, parameter in trained if ".changes." not in name]
    groups = [{"params": others, "lr": course.learning_rate}]
    groups += [{"params": scales, "lr": SCALE_RATE * course.learning_rate}] if scales else []
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


def _freeze_outside(model: Any) -> None:
    """Leave trainable: the linears that are rounded with their scales and biases, and the vectors of their blocks."""
    linears = {parameter.rpartition(".")[0] for parameter in training_of(model).linears.values()}
    blocks = {found[1] for linear in linears if (found := _BLOCK.match(linear))}
    for name, parameter in model.named_parameters():
        owner = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        block = _BLOCK.match(name)
        in_block = block is not None and block[1] in blocks
        parameter.requires_grad_(owner in linears or (in_block and parameter.dim() == 1))


def _windows(
    data: Any, tokenizer: Any, checkpoint: Any, windows: int, window_tokens: int, seed: int
) -> CalibrationWindows:
    longest = context_length(checkpoint.config())
    if data is None or isinstance(data, str | Path):
        return calibration_windows(data, tokenizer, windows, window_tokens, seed=seed, longest=longest)
    return GivenText(data).windows(tokenizer, windows, window_tokens, longest=longest,
                                   vocabulary=embedding_rows(checkpoint.tensors))  # fmt: skip


def _teacher(path: str | Path, device: str, options: OpenOptions) -> nn.Module:
    checkpoint = open_checkpoint(path, options)
    try:
        return load_model(checkpoint, torch.float32, device, options)
    finally:
        checkpoint.close()


def _refuse_other_vocabulary(student: Any, teacher: Any) -> None:
    ours, theirs = (model.get_output_embeddings().weight.shape[0] for model in (student, teacher))
    if ours != theirs:
        raise UsageError(f"the reference has a vocabulary of {theirs} tokens, the model one of {ours}",
                         "the reference must be the float model that it was made of")  # fmt: skip


def _refuse_too_large(checkpoint: Any, distill: bool) -> None:
    """UsageError where the training cannot fit the free memory."""
    weights = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    needed, free = weights * (_BYTES_PER_WEIGHT + 4 * distill), available_memory()
    if free is not None and needed > free:
        raise UsageError(f"training {weights / 1e9:.2f}e9 weights takes {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are "
                         f"free", "take a smaller model, or lowbit.train with an optimizer that shards")  # fmt: skip
