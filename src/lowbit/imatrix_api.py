"""`lowbit.imatrix`: measure how much each input channel counts, merge measurements, write what llama.cpp reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.calibrate.blocks import MAX_MEMORY, Progress
from lowbit.calibrate.imatrix import measure_importance
from lowbit.calibrate.imatrix_file import FORMS, Form, is_imatrix, read_imatrix, write_imatrix
from lowbit.calibrate.importance import ImportanceMatrix, merge, unseen_notes
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import OutputError, UsageError
from lowbit.export.atomic import translated_os_errors
from lowbit.text import read_text

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Imatrix:
    """A finished file.

    tokens  run through the model now; 0 where files were merged or converted only
    notes   what the user should know: experts that no token reached, a text that was too short for all windows
    """

    file: Path
    matrix: ImportanceMatrix
    tokens: int
    seconds: float
    notes: tuple[str, ...]


def imatrix(
    model: str | Path,
    output: str | Path,
    *,
    calib: str | Path | None = None,
    samples: int = 128,
    seqlen: int = 512,
    process_output: bool = False,
    merge_with: Sequence[str | Path] = (),
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    form: Form = "gguf",
    max_memory: int = MAX_MEMORY,
    options: OpenOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Imatrix:
    """Measure the importance matrix of a model and write it where llama.cpp and lowbit can read it.

    model           any that `lowbit.inspect` opens; or an imatrix file, which is then merged or converted only
    calib           a text as `lowbit.text.read_text` takes it; the packaged calibration text for None
    samples, seqlen windows of text, tokens in each
    process_output  measure the output head too
    merge_with      imatrix files of the same model whose tokens are added
    dtype           that the model computes in; float32 for None
    max_memory      bytes of hidden states that stay in memory; more go to a temporary file

    Raises LowbitError; then there is nothing new under `output`.
    """
    import torch

    began, output = time.perf_counter(), Path(output)
    if form not in FORMS:
        raise UsageError(f"there is no form {form!r} of imatrix", f"choose one of {', '.join(FORMS)}")
    _refuse_existing(output, overwrite)
    others = [read_imatrix(path) for path in merge_with]
    names = [str(model), *map(str, merge_with)]
    tokens, notes = 0, ()
    if is_imatrix(model):
        matrix = read_imatrix(model)
    else:
        checkpoint = open_checkpoint(model, options)
        try:
            measured = measure_importance(
                checkpoint, read_text(calib, packaged="calibration"), samples, seqlen, process_output=process_output,
                dtype=dtype or torch.float32, device=device, max_memory=max_memory, options=options, progress=progress,
            )  # fmt: skip
        finally:
            checkpoint.close()
        matrix, tokens, notes = measured.matrix, measured.tokens, measured.notes
    if others:
        matrix = merge([matrix, *others], names)
    notes = (*notes, *unseen_notes(matrix, output.name))
    with translated_os_errors(output):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_imatrix(matrix, output, form)
    return Imatrix(output, matrix, tokens, time.perf_counter() - began, notes)


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise OutputError(f"{output} is a folder; an imatrix is one file", "name a file with -o")
    if (output.exists() or output.is_symlink()) and not overwrite:
        raise OutputError(f"{output} exists already", "choose another name with -o, or replace it with --overwrite")
