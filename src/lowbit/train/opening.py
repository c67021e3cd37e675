"""What a training needs in memory: a model, its tokenizer, windows of text, a teacher; refused where it is too much.

The windows are those of calibration, with the tokens that count in the loss (`lowbit.text.answers`); windows in which
none does are left out, and said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.architecture import model_dtype
from lowbit.architecture.inspection import embedding_rows
from lowbit.architecture.loading import Loader, load_model, load_tokenizer
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.checkpoint.quantized import KINDS
from lowbit.errors import CheckpointError, UsageError
from lowbit.measure import available_memory, human_bytes
from lowbit.rounding.rtn import Fitted
from lowbit.settings import Settings
from lowbit.text import CalibrationWindows, GivenText, context_length, mixed_windows
from lowbit.text.answers import parse_loss_on
from lowbit.text.calibration import check_context
from lowbit.train.loop import Lesson
from lowbit.train.options import Course
from lowbit.train.states import training_depends_on

BYTES_PER_WEIGHT = 20  # weight, gradient, two moments, rounded weight
BYTES_UNDER_ADAPTERS = 6  # decoded weight, code; the weight beside them has the dtype of the files


@dataclass(frozen=True)
class TrainingTask:
    """What is trained, on what.

    settings  that shape the output
    given     those of them that were set, with `scheme`
    adapters  are trained, beside frozen codes
    more      that weights depend on, for `resume`: of adapters
    """

    model: str | Path
    data: Any
    course: Course
    settings: Settings
    given: dict[str, Any]
    reference: str | Path | None
    device: str
    options: OpenOptions
    adapters: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def named_files(self) -> list[Path]:
        """What is read, as far as it is named."""
        return [Path(str(path)) for path in (self.model, self.reference, self.data) if isinstance(path, str | Path)]


@dataclass(frozen=True)
class OpenedTraining:
    """A model that is going to be trained.

    student     float32, in evaluation mode
    linears     linear of a decoder block → name of the parameter that holds it
    scales      of these, where MODEL is a folder of codes: linear → its scales there
    quantized   MODEL has codes already
    dtype       of its floats
    teacher     of a distillation
    depends_on  what the trained weights depend on
    notes       what was not taken of the files, or otherwise than they say
    """

    student: Any
    tokenizer: Any
    text: CalibrationWindows
    lesson: Lesson
    linears: dict[str, str]
    scales: dict[str, Fitted]
    source: str
    quantized: bool
    dtype: torch.dtype
    teacher: nn.Module | None
    depends_on: dict[str, Any]
    notes: tuple[str, ...]


def is_quantized(checkpoint: Checkpoint) -> bool:
    """True for a folder with codes, and for a GGUF file."""
    return checkpoint.kind in KINDS or checkpoint.kind == "gguf"


def open_training(asked: TrainingTask, checkpoint: Checkpoint, keeps_states: bool) -> OpenedTraining:
    """Read everything; UsageError and CheckpointError before the weights are, for what can be told without them."""
    course, options = asked.course, asked.options
    if course.distill and asked.reference is None and checkpoint.kind in KINDS:
        raise UsageError(f"{asked.model} is quantized already: it cannot be its own reference",
                         "name the float model with --reference")  # fmt: skip
    tokenizer = load_tokenizer(checkpoint, options)
    text = _windows(asked, tokenizer, checkpoint)
    lesson = Lesson(text.ids, text.counted).with_counted_tokens()
    if len(lesson) < len(text.ids):
        said = f"{len(text.ids) - len(lesson)} of {len(text.ids)} windows passed over: no answer lies in them"
        if len(lesson) < 2:
            raise CheckpointError(f"{text.name}: {said}", "give longer windows, or --loss-on all")
        text = replace(text, notes=(*text.notes, said))
    _refuse_too_large(checkpoint, asked)
    depends_on = {}
    if keeps_states:
        with _maybe_open(asked.reference, options) as reference:
            depends_on = training_depends_on(checkpoint, reference, asked.settings, course, lesson, options,
                                             asked.device, asked.more)  # fmt: skip
    loader = Loader(checkpoint, torch.float32, asked.device, options, split_experts=True)
    loader.fill()
    student: Any = loader.model
    known = loader.architecture.linears
    linears = {
        linear: parameter
        for parameter, placement in loader.layout.items()
        for linear in (stored.removesuffix(".weight") for stored, _, _ in placement.pieces())
        if linear in known and known[linear].block is not None
    }
    scales = _scales(loader.checkpoint, linears)
    teacher = _teacher(asked) if course.distill else None
    if teacher is not None:
        _refuse_other_vocabulary(student, teacher)
    student.config.name_or_path = ""
    return OpenedTraining(
        student, tokenizer, text, lesson, linears, scales, checkpoint.source, is_quantized(checkpoint),
        model_dtype(checkpoint), teacher, depends_on, (*loader.notes, *_left_out(loader.beside)),
    )  # fmt: skip


def _windows(asked: TrainingTask, tokenizer: Any, checkpoint: Checkpoint) -> CalibrationWindows:
    course, data = asked.course, asked.data
    loss_on = parse_loss_on(course.loss_on)
    longest, marking = context_length(checkpoint.config()), None if loss_on == "all" else loss_on
    check_context(course.windows, course.window_tokens, longest, "--window-tokens")
    if data is None or isinstance(data, str | Path):
        return mixed_windows(data, tokenizer, course.windows, course.window_tokens, seed=course.seed,
                             longest=longest, marking=marking)  # fmt: skip
    return GivenText(data).windows(tokenizer, course.windows, course.window_tokens, longest=longest,
                                   vocabulary=embedding_rows(checkpoint.tensors), marking=marking)  # fmt: skip


def _scales(checkpoint: Checkpoint, linears: Iterable[str]) -> dict[str, Fitted]:
    """Linear → the scales that a folder of codes holds of it, where its groups are of consecutive columns."""
    found = {}
    for linear in linears:
        if f"{linear}.weight" in checkpoint.schemes:
            stored = checkpoint.read_quantized(f"{linear}.weight")
            if stored.g_idx is None:
                found[linear] = Fitted.of(stored)
    return found


def _left_out(names: list[str]) -> list[str]:
    """A note on stored tensors that the trained model has no parameter for, and its output therefore lacks."""
    if not names:
        return []
    shown = f"{', '.join(names[:2])}{' …' if len(names) > 2 else ''}"
    return [f"left out ({len(names)} tensors): transformers builds no place for {shown}"]


@contextmanager
def _maybe_open(path: str | Path | None, options: OpenOptions) -> Iterator[Checkpoint | None]:
    checkpoint = None if path is None else open_checkpoint(path, options)
    try:
        yield checkpoint
    finally:
        if checkpoint is not None:
            checkpoint.close()


def _teacher(asked: TrainingTask) -> nn.Module:
    with _maybe_open(asked.reference or asked.model, asked.options) as checkpoint:
        assert checkpoint is not None
        return load_model(checkpoint, torch.float32, asked.device, asked.options)


def _refuse_other_vocabulary(student: Any, teacher: Any) -> None:
    ours, theirs = (model.get_output_embeddings().weight.shape[0] for model in (student, teacher))
    if ours != theirs:
        raise UsageError(f"the reference has a vocabulary of {theirs} tokens, the model one of {ours}",
                         "the reference must be the float model that it was made of")  # fmt: skip


def _refuse_too_large(checkpoint: Checkpoint, asked: TrainingTask) -> None:
    """UsageError where the training cannot fit the free memory."""
    weights = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    each = BYTES_UNDER_ADAPTERS + model_dtype(checkpoint).itemsize if asked.adapters else BYTES_PER_WEIGHT
    needed, free = weights * (each + 4 * asked.course.distill), available_memory()
    if free is not None and needed > free:
        raise UsageError(
            f"training {weights / 1e9:.2f}e9 weights takes {human_bytes(needed)}; {human_bytes(free)} are free",
            "take a smaller model, or lowbit.train with an optimizer that shards",
        )
