"""Measuring an importance matrix: Σ x² of every input of every linear in the decoder blocks, by GGUF name.

    sums[e, k] += Σ x[k]²,  counts[e] += tokens      over the tokens that the tensor (expert e of it) multiplies

The text is cut as llama-imatrix cuts it: consecutive windows of one stream of tokens, the first token of each replaced
by BOS where the tokenizer adds one. Squares are summed in float32 over a batch of at most `blocks.BATCH_TOKENS` tokens,
batches in float64. One block is in memory at a time (`blocks.py`).

What llama-imatrix calls output.weight is measured only when asked for. Where the model ties its head to the embeddings
the same is also given under the name of the embeddings, the only one of the two that a GGUF file then has.

Refused: NaN and inf in an input, a model type that GGUF has no names for, a text shorter than one window.

`lowbit.imatrix` measures, merges and converts importance matrices.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.architecture.loading import load_tokenizer
from lowbit.architecture.structure import Linear
from lowbit.calibrate.blocks import MAX_MEMORY, BlockInput, BlockRunner, Progress
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import NonFiniteError, OutputError, UsageError
from lowbit.export.atomic import atomic_files, refuse_existing_file
from lowbit.files.system import refuse_sources
from lowbit.formats.gguf.imatrix_file import FORMS, Form, is_imatrix, read_imatrix, write_imatrix
from lowbit.formats.gguf.importance import HEAD_NAMES, ImportanceEntry, ImportanceMatrix, merge, unseen_notes
from lowbit.formats.gguf.layout import Lookup, RowLayout
from lowbit.formats.gguf.row import GGUFArchitecture
from lowbit.formats.gguf.table import look_up, row_of_model
from lowbit.text import CalibrationWindows, Text, context_length, parse_mixture, stream_windows

# Rows whose squares are added to sums of their own, which are added up at the end.
_LANES = 64


@dataclass(frozen=True)
class Measured:
    """notes  for the user: what is not taken of the files, fewer windows than requested"""

    matrix: ImportanceMatrix
    tokens: int
    notes: tuple[str, ...]


def measure_importance(
    checkpoint: Checkpoint,
    text: CalibrationWindows,
    *,
    process_output: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_memory: int = MAX_MEMORY,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Run windows of a text through a model.

    max_memory  bytes of hidden states that stay in memory; more go to a temporary file
    progress    called with (block, windows done, windows in all), the windows of all blocks
    """
    row = row_of_model(checkpoint.config(), checkpoint.source)
    get = look_up(checkpoint.config(), checkpoint.source)
    ids = text.ids
    runner = BlockRunner(checkpoint, dtype, device, options, max_memory)
    linears = [linear for source in runner.inputs for linear in source.linears]
    visitor = SquaredSums()
    states = runner.run(ids, visitor, progress)
    entries = _entries(linears, row, get, visitor)
    if process_output:
        head = BlockInput("the output head", ())
        for x in runner.head_inputs(ids, states):
            visitor.look(head, x)
        visitor.finish(len(runner.architecture.blocks))
        measured = _entry([visitor.sums[head.name]], [visitor.counts[head.name]])
        entries |= dict.fromkeys(HEAD_NAMES if runner.architecture.tied else HEAD_NAMES[:1], measured)
    matrix = ImportanceMatrix(dict(sorted(entries.items())), (text.name,), len(ids), ids.shape[1])
    return Measured(matrix, ids.numel(), (*runner.notes, *text.notes))


def text_of(
    checkpoint: Checkpoint, calib: str | Path | Text | None, samples: int, seqlen: int,
    options: OpenOptions | None = None, seed: int = 0,
) -> CalibrationWindows:  # fmt: skip
    """The windows of a text for this model; calib  as `lowbit quantize --calib` takes it, but for "self" """
    return stream_windows(calib, load_tokenizer(checkpoint, options), samples, seqlen, seed=seed,
                          longest=context_length(checkpoint.config()))  # fmt: skip


class SquaredSums:
    """A `BlockVisitor`: sums float64 [K] and counts of every input, by its name."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._of_block: list[str] = []

    def look(self, source: BlockInput, x: Tensor) -> None:
        # Σ x² of every column in float32, a few rows at a time, so that no array of squares goes through memory
        lanes = torch.zeros(min(len(x), _LANES), x.shape[1], device=x.device)
        for rows in x.float().split(_LANES):
            lanes[: len(rows)].addcmul_(rows, rows)
        sums = lanes.sum(dim=0).double().cpu()
        if source.name not in self.sums:
            self.sums[source.name] = torch.zeros_like(sums)
            self.counts[source.name] = 0
            self._of_block.append(source.name)
        self.sums[source.name] += sums
        self.counts[source.name] += len(x)

    def finish(self, block: int) -> None:
        for name in self._of_block:
            wrong = ~torch.isfinite(self.sums[name])
            if wrong.any():
                raise NonFiniteError(
                    f"{name} is not finite in {int(wrong.sum())} of {len(wrong)} channels for some token of the text "
                    f"(the first is channel {int(wrong.nonzero()[0])})",
                    "run it with --dtype float32, or look for damage with `lowbit evaluate`",
                )
        self._of_block.clear()


def _entries(
    linears: Iterable[Linear], row: GGUFArchitecture, get: Lookup, visitor: SquaredSums
) -> dict[str, ImportanceEntry]:
    """GGUF name → entry; the experts of a tensor stacked in their order, zeros for one that no token reached.

    A tensor whose columns are not inputs of the linear (the absorbed keys of latent attention) gets none.
    """
    members: dict[str, tuple[RowLayout, list[Linear]]] = {}
    for linear in linears:
        for target in row.find(f"{linear.name}.weight"):
            if target.place.layout.heads is None:
                members.setdefault(target.name, (target.place.layout, []))[1].append(linear)
    entries = {}
    for gguf_name, (layout, group) in members.items():
        inputs = [str(linear.reads) for linear in sorted(group, key=lambda linear: linear.expert or 0)]
        width = group[0].shape[1]
        sums = [visitor.sums.get(name, torch.zeros(width, dtype=torch.float64)) for name in inputs]
        if layout.columns is not None:
            order = torch.from_numpy(layout.columns(get, width))
            sums = [each[order] for each in sums]
        counts = [visitor.counts.get(name, 0) for name in inputs]
        stored = layout.arranged(get, group[0].shape).stored
        matrices = stored[0] if len(stored) == 3 else 1  # one for each head, which all read the same input
        entries[gguf_name] = _entry(sums * matrices, counts * matrices)
    return entries


def _entry(sums: list[Tensor], counts: list[int]) -> ImportanceEntry:
    return ImportanceEntry.of_sums(torch.stack(sums), torch.tensor(counts))


@dataclass(frozen=True)
class Imatrix:
    """A finished file.

    tokens  run through the model now; 0 where files were merged or converted only
    notes   for the user: experts that no token reached, a text that was too short for all windows
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
    """Measure the importance matrix of a model and write it in a form that llama.cpp and lowbit read.

    model           any that `lowbit.inspect` opens; or an imatrix file, which is then merged or converted only
    calib           a text, or several in shares, as `lowbit quantize --calib` takes them; None: the packaged text
    samples, seqlen windows of text, tokens in each
    process_output  measure the output head too
    merge_with      imatrix files of the same model, added to the measurement
    dtype           the model's compute dtype; float32 for None
    max_memory      bytes of hidden states that stay in memory; more go to a temporary file

    After a LowbitError `output` is unchanged.
    """
    began, output = time.perf_counter(), Path(output)
    if form not in FORMS:
        raise UsageError(f"there is no form {form!r} of imatrix", f"choose one of {', '.join(FORMS)}")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; an imatrix is one file", "name a file with -o")
    texts = [part.source for part in parse_mixture(calib) if part.source is not None]
    refuse_sources([output], [Path(each) for each in (model, *texts, *merge_with)])
    refuse_existing_file(output, overwrite, is_imatrix, "imatrix")
    others = [read_imatrix(path) for path in merge_with]
    names = [str(model), *map(str, merge_with)]
    tokens, notes = 0, ()
    if is_imatrix(model):
        matrix = read_imatrix(model)
    else:
        checkpoint = open_checkpoint(model, options)
        try:
            measured = measure_importance(
                checkpoint, text_of(checkpoint, calib, samples, seqlen, options), process_output=process_output,
                dtype=dtype or torch.float32, device=device, max_memory=max_memory, options=options, progress=progress,
            )  # fmt: skip
        finally:
            checkpoint.close()
        matrix, tokens, notes = measured.matrix, measured.tokens, (*checkpoint.notes, *measured.notes)
    if others:
        matrix = merge([matrix, *others], names)
    notes = (*notes, *unseen_notes(matrix, output.name))
    with atomic_files(output, overwrite) as work:
        write_imatrix(matrix, work / output.name, form)
    return Imatrix(output, matrix, tokens, time.perf_counter() - began, notes)
