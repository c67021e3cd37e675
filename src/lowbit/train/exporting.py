"""`export`: what a trained model computes with, in the files of its scheme.

Codes and scales come from the fake quantization itself, by the function that its forward pass calls; nothing is rounded
again. They go through the store of calibrated blocks into the one pipeline, so that the output is verified and reported
as any other. Norms, embeddings, biases and what is not quantized are written as the training left them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parametrize

from lowbit.api import Quantized, refuse_other_name, write_prepared
from lowbit.architecture.in_memory import model_in_memory, unwrapped
from lowbit.calibrate.linear import linear_result
from lowbit.calibrate.loop import Calibrated
from lowbit.calibrate.store import BlockRecord, BlockStore
from lowbit.errors import CheckpointError
from lowbit.files.claim import refuse_claimed
from lowbit.measure import Meter
from lowbit.plan.plan import CalibrationText, Plan, Progress, Request, prepare
from lowbit.rounding.target import Rounded, ScaledBlocks, Stored
from lowbit.tensors import QuantizedTensor
from lowbit.text import CalibrationWindows
from lowbit.train.fake_quantize import FakeQuantize
from lowbit.train.preparing import Training, training_of

METHOD = "qat"  # of linears and of the run, in the report


def export(
    model: Any,
    output: str | Path,
    *,
    tokenizer: Any = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Write a model that `lowbit.train.prepare` prepared, with the codes and scales of its forward pass.

    output  a folder, or NAME.gguf for a ggml type

    Static activation scales and those of a KV cache are measured now, on the calibration text of the settings. Raises
    CheckpointError where a trainer replaced modules, NonFiniteError for weights that are not finite; after a
    LowbitError `output` does not exist.
    """
    return export_trained(model, Path(output), tokenizer, threads, overwrite, progress, Meter())


def export_trained(
    model: Any,
    output: Path,
    tokenizer: Any,
    threads: int | None,
    overwrite: bool,
    progress: Progress | None,
    meter: Meter,
    source: str = "",
    text: CalibrationWindows | None = None,
    notes: tuple[str, ...] = (),
) -> Quantized:
    """`export`, with what is known of a training.

    source  what the user named, where the model was loaded of it
    text    that it was trained on; static scales are measured on its windows, unless the settings name another
    notes   on the training
    """
    model = unwrapped(model)
    training = training_of(model)
    refuse_other_name(output, training.settings)
    refuse_claimed(output)
    fakes = _fakes(model, training)
    opened = model_in_memory(model, tokenizer, training.options, trained=True, dtype=training.dtype)
    folder = Path(tempfile.mkdtemp(prefix="lowbit-codes-"))
    try:
        request = Request(opened, training.planned, training.options, threads, progress)
        prepared = prepare(request, output)
        store = BlockStore(folder, {}, resume=False)
        _fill(store, prepared.plan, fakes)
        windows = text if "calib" not in training.settings.given else None
        windows = windows or CalibrationWindows(torch.empty(0, 0, dtype=torch.long), "", "", 0, 0, ())
        prepared = replace(
            prepared,
            plan=replace(prepared.plan, settings=training.settings, notes=(*prepared.plan.notes, *notes)),
            source=source or prepared.source,
            calibration=None if text is None else CalibrationText.of(text),
            calibrated=Calibrated(prepared.checkpoint, store, windows, windows.ids),
            made_by=METHOD,
        )
        return write_prepared(prepared, output, overwrite, progress, meter)
    finally:
        opened.remove()
        shutil.rmtree(folder, ignore_errors=True)


def _fakes(model: Any, training: Training) -> dict[str, tuple[FakeQuantize, int, torch.Tensor]]:
    """Linear → (its fake quantization, its number there, the parameter as trained)."""
    found = {}
    for linear, parameter in training.linears.items():
        owner_name, _, leaf = parameter.rpartition(".")
        try:
            owner = model.get_submodule(owner_name)
        except AttributeError:
            owner = None
        parametrized = owner is not None and parametrize.is_parametrized(owner, leaf)
        steps: Any = owner.parametrizations[leaf] if parametrized else []  # type: ignore[union-attr,index]
        if owner is None or len(steps) != 1 or not isinstance(steps[0], FakeQuantize):
            kind = "gone" if owner is None else f"a {type(owner).__name__} without fake quantization"
            raise CheckpointError(
                f"{owner_name} is {kind}: something replaced it after lowbit.train.prepare",
                "prepare the model after everything that replaces modules (adapters, other quantizers)",
            )
        index = next(index for index, part in enumerate(steps[0].parts) if part.linear == linear)
        found[linear] = (steps[0], index, steps.original)
    return found


def _fill(store: BlockStore, plan: Plan, fakes: dict[str, tuple[FakeQuantize, int, torch.Tensor]]) -> None:
    """Put the codes of every linear that the plan quantizes into the store, block by block."""
    assert plan.architecture is not None
    differ = plan.targets.keys() ^ fakes.keys()
    if differ:
        raise CheckpointError(f"{min(differ)} is quantized in the model or in the output, and not in both: its config "
                              f"was changed after lowbit.train.prepare", "prepare the model again")  # fmt: skip
    blocks: dict[int, list[str]] = defaultdict(list)
    for linear in plan.targets:
        blocks[plan.architecture.linears[linear].block or 0].append(linear)
    for number, block in enumerate(sorted(blocks)):
        stored, results = {}, {}
        for linear in blocks[block]:
            fake, index, parameter = fakes[linear]
            kept, decoded = fake.rounded(index, parameter)
            weight = fake.parts[index].of(parameter.detach()).float().contiguous()
            rounded = Rounded(_on_cpu(kept), decoded.cpu())
            stored[linear] = rounded.stored
            results[linear] = linear_result(
                weight.cpu(), rounded, fake.parts[index].target, METHOD, (None, None), 0, ()
            )
        store.save(number, stored, {}, BlockRecord(results))


def _on_cpu(stored: Stored) -> Stored:
    if isinstance(stored, ScaledBlocks):
        return replace(stored, blocks=stored.blocks.cpu())
    if isinstance(stored, QuantizedTensor) and stored.nested is not None:
        nested = replace(stored.nested, codes=stored.nested.codes.cpu(), absmax=stored.nested.absmax.cpu())
        stored = replace(stored, nested=nested)
    return stored.to("cpu")
