"""`finetune`: train a model under fake quantization on a text, or adapters beside it, and export what was trained.

    QAT    MODEL in 16 bits, loss of the next token
    QAF    MODEL a quantized folder or GGUF file: training starts from its decoded weights, and its scales
    QAD    distill: KL(float model ‖ trained model) of every position; the float model is `reference`, or MODEL
    LoRA   the codes stay; low-rank matrices beside them are trained (`lora_training.py`)

Trained are the linears that the scheme quantizes, their scales, and the norms between them; embeddings and the output
layer stay. The loop is `loop.py`, what it keeps for `resume` is `states.py`. Computes in float32, writes in the dtype
of the model. Memory: 20 bytes per weight, 24 with a distillation; of adapters of a 16-bit model 8 and 12.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lowbit.api import Quantized, refuse_other_name
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions, report_path
from lowbit.errors import UsageError
from lowbit.export.atomic import refuse_existing, refuse_existing_files
from lowbit.files.claim import Claim, claimed, refuse_claimed
from lowbit.files.system import refuse_sources
from lowbit.measure import Meter
from lowbit.registry import load
from lowbit.settings import make_settings
from lowbit.text.answers import parse_loss_on
from lowbit.train.exporting import export_trained
from lowbit.train.loop import train
from lowbit.train.lora_training import Adapted, base_of, refuse_unread, train_adapters
from lowbit.train.opening import OpenedTraining, TrainingTask, is_quantized, open_training
from lowbit.train.options import Course, LoRA
from lowbit.train.preparing import prepare, training_of
from lowbit.train.states import STATE, TrainingStates

_log = logging.getLogger("lowbit")
SAVE_EVERY = 100  # steps
_BLOCK = re.compile(r"(.+?\.\d+)\.")  # the name of a parameter begins with that of its decoder block


def finetune(
    model: str | Path,
    output: str | Path,
    *,
    data: Any = None,
    course: Course | None = None,
    lora: LoRA | None = None,
    reference: str | Path | None = None,
    resume: bool = False,
    save_every: int = SAVE_EVERY,
    device: str = "cpu",
    options: OpenOptions | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Quantized | Adapted:
    """Train a model under fake quantization, and write it with the codes of its forward pass; or train adapters.

    model       in 16 bits, or quantized (then it starts from the decoded weights)
    output      a folder, or NAME.gguf for a ggml type; of adapters their folder, and OUTPUT-base for their base
    data        text as of `calib`, in files or in memory; None: the packaged calibration text
    course      steps, windows, learning rate, what the loss is taken on …
    lora        train adapters instead of weights. A quantized `model` is their base as it is
    reference   the float model of a distillation; None: `model`
    resume      go on from the last state of a training that was stopped, to the same bytes
    save_every  steps from one state to the next, in a hidden folder beside the output; 0: none is kept
    settings    that shape the output: scheme, format, group_size, ignore, overrides …
    progress    called with (windows done, windows in all)

    After a LowbitError `output` does not exist, or is still the earlier one.
    """
    meter, output, options, course = Meter(), Path(output), options or OpenOptions(), course or Course()
    parse_loss_on(course.loss_on)
    if reference is not None and not course.distill:
        raise UsageError("--reference is read only with --distill", "add --distill, or leave it out")
    if save_every < 0:
        raise UsageError(f"a state every {save_every} steps cannot be kept", "give 100, or 0 for none")
    if lora is not None and course.fit_scales:
        raise UsageError("scales are not learned beside adapters", "leave --fit-scales out")
    chosen = make_settings(None, **settings)
    asked = TrainingTask(model, data, course, chosen, settings, reference, device, options)
    if lora is not None:
        course = replace(course, learning_rate=2e-4 if course.learning_rate is None else course.learning_rate)
        asked = replace(asked, course=course, adapters=True)
    chosen_adapters = dict.fromkeys(LoRA.rows()) if lora is None else asdict(lora)
    asked = replace(asked, more={f"lora {name}": value for name, value in chosen_adapters.items()})
    _refuse_outputs(output, asked, lora, overwrite)
    checkpoint = open_checkpoint(model, options)
    try:
        if lora is not None:
            refuse_unread(lora, is_quantized(checkpoint), settings, chosen)
            if not lora.merge and not is_quantized(checkpoint):
                _refuse_place(base_of(output), asked, overwrite)
        opened = open_training(asked, checkpoint, keeps_states=bool(save_every or resume))
    finally:
        checkpoint.close()
    with _claimed(output) as claim:
        states = TrainingStates(claim.folder, opened.depends_on, resume, save_every) if opened.depends_on else None
        if lora is not None:
            adapters = train_adapters(asked, opened, lora, states, progress)
        else:
            note = _train_weights(asked, opened, states, progress)
    if lora is not None:
        done = adapters.write(output, threads, overwrite, meter)
    else:
        done = export_trained(
            opened.student, output, opened.tokenizer, threads, overwrite, None, meter, source=opened.source,
            text=opened.text, notes=(*opened.notes, note),
        )  # fmt: skip
    if states is not None:
        states.remove()
    return done


def _train_weights(
    asked: TrainingTask,
    opened: OpenedTraining,
    states: TrainingStates | None,
    progress: Callable[[int, int], None] | None,
) -> str:
    """Train all that is rounded; returns what the summary says of it."""
    student, course = opened.student, asked.course
    prepare(student.requires_grad_(True), learn_scales=not course.fit_scales, dtype=opened.dtype, options=asked.options,
            scales=opened.scales, **asked.given)  # fmt: skip
    _freeze_outside(student)
    found = train(student, opened.lesson, course, opened.teacher, progress, states)
    note = found.sentence("KL divergence to the float model" if course.distill else "loss", opened.lesson.share)
    if found.went_wrong:
        _log.warning(note)
    return note


def _freeze_outside(model: Any) -> None:
    """Leave trainable: the linears that are rounded with their scales and biases, and the vectors of their blocks."""
    linears = {parameter.rpartition(".")[0] for parameter in training_of(model).linears.values()}
    blocks = {found[1] for linear in linears if (found := _BLOCK.match(linear))}
    for name, parameter in model.named_parameters():
        owner = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        block = _BLOCK.match(name)
        in_block = block is not None and block[1] in blocks
        parameter.requires_grad_(owner in linears or (in_block and parameter.dim() == 1))


@contextmanager
def _claimed(output: Path) -> Iterator[Claim]:
    """The claim on an output; after an error it says where the state of the training is."""
    with claimed(output) as claim:
        try:
            yield claim
        except BaseException as error:
            if (claim.folder / STATE).exists() and not isinstance(error, UsageError):
                _log.warning("the last state of the training is kept in %s; the same command with --resume goes on "
                             "from it", claim.folder)  # fmt: skip
            raise


def _refuse_outputs(output: Path, asked: TrainingTask, lora: LoRA | None, overwrite: bool) -> None:
    """What can be refused of the output's name before anything is read."""
    apart = lora is not None and not lora.merge
    if not apart:
        refuse_other_name(output, asked.settings)
    if not apart and asked.settings.writes_gguf(output):
        load("lowbit.formats.gguf.mix:find_file_type")(asked.settings.scheme)  # which training itself does not ask for
        refuse_claimed(output)
        refuse_sources([output], asked.named_files)
        refuse_existing_files(output, [output, report_path(output)], overwrite)
    else:
        _refuse_place(output, asked, overwrite)


def _refuse_place(folder: Path, asked: TrainingTask, overwrite: bool) -> None:
    refuse_claimed(folder)
    refuse_sources([folder], asked.named_files)
    refuse_existing(folder, overwrite)
