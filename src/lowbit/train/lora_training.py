"""`lowbit finetune --lora`: adapters on frozen codes, kept apart or merged and rounded again.

    MODEL in 16 bits    rounded to the scheme first; OUT has the adapter, OUT-base the quantized base
    MODEL quantized     it is the base, and stays where it is; OUT has the adapter
    merge               OUT is one checkpoint: W + s·B·A of the 16-bit weights (decoded ones of a quantized MODEL),
                        rounded to the scheme. With LoftQ the part of s·B·A that it began with is taken out again
    QA-LoRA             OUT is one GGUF file: the codes and scales of the rounded MODEL, and shifted minima

Losses on the held-out windows are said of each stage: the quantized model with the adapter as it begins, with the
adapter as it was trained, and merged.

Write adapters as PEFT reads them: adapter_config.json and adapter_model.safetensors, and lowbit's report.

    base_model.model.MODULE.lora_A.weight   float32 [r, K]
    base_model.model.MODULE.lora_B.weight   float32 [N, r]

MODULE is the name that transformers gives it, which need not be that of the base's files. `target_modules` are the last
parts of these names where they name no other linear, else the whole names. The report tells `--adapter` of lowbit
whether the base was changed (LoftQ); PEFT itself would start LoftQ again if its config said so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbit.api import Quantized
from lowbit.checkpoint.base import REPORT_NAME
from lowbit.checkpoint.companions import ADAPTER, ADAPTER_WEIGHTS
from lowbit.errors import UsageError
from lowbit.export.atomic import atomic_folder
from lowbit.measure import Meter
from lowbit.numerics.ggml import TYPES
from lowbit.report import schema
from lowbit.rounding.target import GgmlTarget
from lowbit.schemes import find_scheme, is_gguf_name
from lowbit.settings import Settings
from lowbit.train.adapters import Adapters, attach
from lowbit.train.exporting import export_trained
from lowbit.train.loop import Trained, held_out_loss, train
from lowbit.train.opening import OpenedTraining, TrainingTask
from lowbit.train.options import LoRA
from lowbit.train.preparing import prepare, training_of
from lowbit.train.states import TrainingStates
from lowbit.version import __version__

_log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class Adapted:
    """A finished adapter.

    path    its folder, as PEFT reads it
    base    what it was trained on: OUT-base, or the quantized model that was given
    report  of a base that was written; None for one that was given
    notes   on the training, with its losses
    """

    path: Path
    base: str
    report: schema.Report | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TrainedAdapters:
    """Adapters after their training.

    merged  held-out loss of the merged model, rounded again; None where they stay apart
    """

    asked: TrainingTask
    opened: OpenedTraining
    adapters: Adapters
    found: Trained
    merged: float | None

    @property
    def notes(self) -> tuple[str, ...]:
        distill = self.asked.course.distill
        said = self.found.sentence("KL divergence to the float model" if distill else "loss", self.opened.lesson.share)
        if self.merged is not None:
            said += f"; merged{'' if self.adapters.lora.qa else ' and rounded again'} {self.merged:.4g}"
        return self.adapters.note(), said

    def write(self, output: Path, threads: int | None, overwrite: bool, meter: Meter) -> Quantized | Adapted:
        """The merged checkpoint, or the base and then its adapter."""
        if self.found.went_wrong or (self.merged is not None and self.merged > self.found.before):
            _log.warning(self.notes[1])
        if self.merged is not None:
            return self._export(output, threads, overwrite, meter, self.notes)
        self.adapters.detach()
        opened, base, report = self.opened, str(self.asked.model), None
        if not opened.quantized:
            started = "; its codes make up a model with the adapter only (LoftQ)"
            note = f"base of the adapter in {output}{started if self.adapters.lora.init == 'loftq' else ''}"
            done = self._export(base_of(output), threads, overwrite, meter, (note,))
            base, report = str(done.path), done.report
        losses = {"before": self.found.before, "after": self.found.after}
        scheme = None if opened.quantized else self.asked.settings.scheme
        text = {"name": opened.text.name, "sha256": opened.text.sha256, "notes": list(opened.text.notes)}
        described = Described(base, str(self.asked.model), scheme, text, losses, self.notes)
        write_adapter(self.adapters, output, described, opened.tokenizer, overwrite)
        return Adapted(output, base, report, self.notes)

    def _export(
        self, output: Path, threads: int | None, overwrite: bool, meter: Meter, notes: tuple[str, ...]
    ) -> Quantized:
        opened = self.opened
        return export_trained(
            opened.student, output, opened.tokenizer, threads, overwrite, None, meter, source=opened.source,
            text=opened.text, notes=(*opened.notes, *notes),
        )  # fmt: skip


def base_of(output: Path) -> Path:
    """The folder of the quantized base, beside that of its adapter."""
    return output.with_name(f"{output.name}-base")


def refuse_unread(lora: LoRA, quantized: bool, given: dict[str, Any], settings: Settings) -> None:
    """UsageError for what adapters on this model would not read, or cannot be.

    given  settings that were set
    """
    if quantized and not lora.merge and given:
        raise UsageError(f"{', '.join(given)} would not be read: the base is quantized already, and stays as it is",
                         "leave it out, give the 16-bit model, or add --merge")  # fmt: skip
    if quantized and lora.init == "loftq":
        raise UsageError("LoftQ looks for what rounding lost, and a quantized model does not have it",
                         "give the 16-bit model, or --lora-init zero")  # fmt: skip
    if lora.qa and not any(_has_float_minima(name) for name in (settings.scheme, *settings.overrides.values())):
        types = " or ".join(_FLOAT_MINIMA)
        raise UsageError(f"QA-LoRA shifts the minima of groups, and {_without_minima(settings.scheme)}",
                         f"take --scheme {types} and -o NAME.gguf, whose minima are floats; without --qa-lora the "
                         f"merged weights are rounded again")  # fmt: skip
    if not quantized and settings.writes_gguf() and not lora.merge:
        raise UsageError("adapters are trained beside a folder, whose files PEFT can load",
                         "quantize to the GGUF file first and give that as MODEL, choose a scheme of folders, or add "
                         "--merge")  # fmt: skip


# ggml types whose minima are floats; files of these types hold their linears in them.
_FLOAT_MINIMA = tuple(name for name in TYPES if GgmlTarget(name).columns_per_minimum is not None)


def _has_float_minima(scheme: str) -> bool:
    return scheme.upper() in _FLOAT_MINIMA


def _without_minima(scheme: str) -> str:
    """Why a scheme cannot take a shift exactly."""
    if is_gguf_name(scheme):
        return f"the types of {scheme.upper()} have integer codes for these, or none"
    spec = find_scheme(scheme).weight
    if spec.number == "int" and not spec.symmetric:
        return f"the zero points of {scheme} are integers"
    return f"{scheme} stores none"


def train_adapters(
    asked: TrainingTask,
    opened: OpenedTraining,
    lora: LoRA,
    states: TrainingStates | None,
    progress: Callable[[int, int], None] | None,
) -> TrainedAdapters:
    """Round the model where it is not yet, put adapters on it, train them, and merge them if that is asked for."""
    student, course = opened.student, asked.course

    def quantize() -> None:
        # scales that a folder has are kept; else they are fitted to the weights
        prepare(student.requires_grad_(True), learn_scales=bool(opened.scales), dtype=opened.dtype,
                options=asked.options, scales=opened.scales, **asked.given)  # fmt: skip

    rounds_first = lora.qa or not opened.quantized
    if rounds_first:
        quantize()
    linears = training_of(student).linears if rounds_first else opened.linears
    adapters = attach(student, lora, linears, course.seed, opened.dtype)
    found = train(student, opened.lesson, course, opened.teacher, progress, states)
    merged = None
    if lora.merge:
        adapters.merge()
        if not rounds_first:
            quantize()
        merged = held_out_loss(student, opened.lesson.split()[1], course.batch, opened.teacher)
    return TrainedAdapters(asked, opened, adapters, found, merged)


_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Described:
    """What the report of an adapter says.

    base   folder, file or id of the quantized base
    model  what the user named
    text   name and SHA-256 of the text
    notes  sentences on the training
    """

    base: str
    model: str
    scheme: str | None
    text: dict[str, Any]
    losses: dict[str, float]
    notes: tuple[str, ...]


def write_adapter(adapters: Adapters, output: Path, described: Described, tokenizer: Any, overwrite: bool) -> None:
    """A folder that appears complete or not at all."""
    with atomic_folder(output, overwrite) as work:
        tensors = {}
        for name, update in adapters.updates.items():
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = update.A.detach().cpu().contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = update.B.detach().cpu().contiguous()
        save_file(tensors, work / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        _write_json(work / ADAPTER, _config(adapters, described.base))
        tokenizer.save_pretrained(work)
        beside = sorted(path for path in work.rglob("*") if path.is_file())
        files = [{"name": path.relative_to(work).as_posix(), "bytes": path.stat().st_size} for path in beside]
        lora = adapters.lora
        report = {
            "lowbit_version": __version__, "kind": "adapter", "base": described.base, "model": described.model,
            "scheme": described.scheme, "text": described.text, "held_out": described.losses,
            "lora": {"rank": lora.rank, "alpha": lora.effective_alpha, "init": lora.init,
                     "changed_base": lora.init == "loftq"},
            "notes": list(described.notes), "output": {"files": files, "beside": []},
        }  # fmt: skip
        _write_json(work / REPORT_NAME, report)


def _config(adapters: Adapters, base: str) -> dict[str, Any]:
    lora, model = adapters.lora, adapters.model
    turned = [isinstance(model.get_submodule(name), Conv1D) for name in adapters.updates]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.effective_alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": _targets(adapters), "fan_in_fan_out": all(turned), "init_lora_weights": True,
        "use_rslora": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip


def _targets(adapters: Adapters) -> list[str]:
    """Last parts of names where they name these modules alone, else whole names."""
    leaves = {name.rpartition(".")[2] for name in adapters.updates}
    linears = {name for name, module in adapters.model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    named = {name for name in linears if name.rpartition(".")[2] in leaves}
    return sorted(leaves if named == adapters.updates.keys() else adapters.updates)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
