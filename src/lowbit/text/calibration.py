"""Calibration windows from any source: the packaged text, a file, a folder, a dataset of the hub.

Running text (the packaged one, a plain file) is cut by `cut_windows` ("full") into consecutive windows, each opened
with BOS if the tokenizer adds one. Documents (files of a folder, articles, rows) and conversations are packed
(`packing.py`).

Rows of datasets and of files come in an order drawn with the seed, files of a folder by name. Only as much is read as
the windows need.

Refused: windows longer than the model's context, a source without text, less text than one window. The notes report
fewer windows than requested, everything skipped, and a split that is used for evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, UsageError
from lowbit.text.answers import AnswerMarker, Marking
from lowbit.text.hub import DATASETS, HubDataset, find_dataset, is_dataset, stream_rows
from lowbit.text.packing import Packer, Renderer, counted, spaced
from lowbit.text.rows import ROW_SUFFIXES, ROWS_OF_ONE_KIND, Document, articles, document_of, file_rows, shuffled
from lowbit.text.windows import Text, cut_windows, degenerate_notes, read_plain, read_text, refuse_degenerate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_BUFFER = 10_000  # rows of a file that are shuffled at a time
HOPELESS_ROWS = 10_000  # rows without text after which a source is given up: datasets may be endless
# Running text is read up to this many characters per token of the windows, but at least WHOLE_CHARACTERS.
CHARACTERS_PER_TOKEN = 32
WHOLE_CHARACTERS = 4_000_000
_JUDGED = 20_000  # characters of the packaged evaluation text, with whose tokens a text is compared
_TOO_FEW = 256  # tokens, which lack most of any other text
_FOREIGN = 0.8  # share of them that a text lacks, above which a note says so
_NO_ANSWERS = "give conversations (messages, or prompt and completion), or leave --loss-on out"


@dataclass(frozen=True)
class CalibrationWindows:
    """
    ids          int64 [windows, window_tokens]
    name         as typed by the user, or "packaged calibration text"
    sha256       of the UTF-8 bytes of the tokenized text, with a blank line between documents; for text that the model
                 wrote, of the little-endian bytes of `ids`
    text_tokens  tokens in the text that was read
    asked        windows requested
    notes        for the user: fewer windows than requested, skipped parts, the order of rows
    counted      bool [windows, window_tokens]: the tokens that count in a loss; None: all
    """

    ids: Tensor
    name: str
    sha256: str
    text_tokens: int
    asked: int
    notes: tuple[str, ...]
    counted: Tensor | None = None

    def first(self, count: int) -> CalibrationWindows:
        """The first `count` windows."""
        counted = None if self.counted is None else self.counted[:count]
        return replace(self, ids=self.ids[:count], asked=min(count, self.asked), counted=counted)


def calibration_windows(
    source: str | Path | None, tokenizer: PreTrainedTokenizerBase, windows: int, window_tokens: int, *, seed: int = 0,
    longest: int | None = None, marking: Marking | None = None,
) -> CalibrationWindows:  # fmt: skip
    """The first `windows` windows of a source, or as many as it has; the packaged text for None.

    marking  which tokens count in a loss (`answers.py`); None: not asked
    source   a short name of `hub.DATASETS`, hub:OWNER/NAME[:CONFIG[:SPLIT]], a file, or a folder
    seed     of the order of rows
    longest  the model's context in tokens; None: unknown

    UsageError and CheckpointError for what the module refuses, DependencyError if a package is missing.
    """
    check_context(windows, window_tokens, longest)
    characters = max(WHOLE_CHARACTERS, CHARACTERS_PER_TOKEN * windows * window_tokens)
    if source is None:
        refuse_running(marking, "the packaged text")
        return windows_of_text(read_text(None, "calibration"), tokenizer, windows, window_tokens)
    name, path = str(source), Path(source)
    reading = Reading(name, seed, characters)
    if is_dataset(name):
        documents = _of_dataset(find_dataset(name, "train"), reading)
    elif path.is_dir():
        documents = _of_folder(path, reading)
    elif not path.is_file():
        raise UsageError(
            f"there is no calibration text {name!r}: no such file or folder",
            f"give a file, a folder, one of {', '.join(DATASETS)}, or hub:OWNER/NAME:CONFIG:SPLIT",
        )
    elif path.suffix.lower() in ROW_SUFFIXES:
        documents = _of_rows(file_rows(path), reading, name, FILE_BUFFER)
    else:
        refuse_running(marking, name)
        content = read_plain(path, characters)
        if len(content) == characters:
            reading.notes.append(f"only the first {spaced(characters)} characters of {name} were needed")
        return windows_of_text(Text(name, content), tokenizer, windows, window_tokens, reading.notes)
    return packed_windows(documents, reading, tokenizer, windows, window_tokens, marking)


def refuse_running(marking: Marking | None, name: str) -> None:
    if marking == "answers":
        raise UsageError(f"{name} is running text: there are no answers in it", _NO_ANSWERS)


def check_context(windows: int, window_tokens: int, longest: int | None, option: str = "--seqlen") -> None:
    """UsageError for windows of under 4 tokens, or longer than the model's context; `option` sets their length."""
    if windows < 1 or window_tokens < 4:
        raise UsageError(f"{windows} windows of {window_tokens} tokens say nothing", "use at least 1 of 4 tokens")
    if longest is not None and window_tokens > longest:
        raise UsageError(
            f"windows of {window_tokens} tokens ({option}) are longer than the model's context of {longest} tokens",
            f"use {option} {longest} or less",
        )


def context_length(config: dict[str, Any]) -> int | None:
    """The context in tokens from config.json; None if it is not there."""
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(place.get(key), int):
                return place[key]
    return None


def windows_of_text(
    text: Text, tokenizer: PreTrainedTokenizerBase, windows: int, window_tokens: int, notes: Sequence[str] = ()
) -> CalibrationWindows:
    """The first windows of one running text. notes: on how it was read"""
    if not text.content.strip():
        raise CheckpointError(f"the text {text.name!r} is empty", "give another")
    cut = cut_windows(text, tokenizer, windows, window_tokens)
    notes = [*notes, *too_few(text.name, cut.text_tokens, len(cut.ids), window_tokens, windows)]
    notes += text_notes(cut.ids, tokenizer, text.name)
    return CalibrationWindows(cut.ids, text.name, text.sha256, cut.text_tokens, windows, tuple(notes))


def text_notes(ids: Tensor, tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Notes on a text that says nothing (`windows.py`), or that lacks the tokens of the packaged evaluation text."""
    notes = degenerate_notes(ids, tokenizer, name)
    if ids.numel() < _TOO_FEW:
        return notes
    judged = torch.tensor(tokenizer(read_text(None).content[:_JUDGED], add_special_tokens=False).input_ids)
    unseen = 1.0 - torch.isin(judged, ids).double().mean().item() if len(judged) else 0.0
    if unseen > _FOREIGN:
        notes.append(
            f"{unseen:.0%} of the tokens of the packaged evaluation text do not occur in {name!r}: figures of that "
            f"text say little of a model calibrated on this one"
        )
    return notes


def too_few(name: str, tokens: int, found: int, window_tokens: int, asked: int) -> list[str]:
    if found == asked:
        return []
    return [
        f"the text {name!r} has {counted(tokens, 'token')}: {counted(found, 'window')} of {window_tokens}, not the "
        f"{asked} asked for"
    ]


@dataclass
class Reading:
    """One pass over a source of documents, with its counts and notes.

    characters  limit per document
    empty       rows without text
    unusable    what is wrong with each row that cannot be used
    skipped     other skipped parts, with reasons
    """

    name: str
    seed: int
    characters: int
    rows: int = 0
    empty: int = 0
    unusable: list[CheckpointError | UsageError] = field(default_factory=list)
    documents: int = 0
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def counted(self, document: Document) -> bool:
        """True for a document that is not empty; counts both kinds."""
        self.rows += 1
        self.empty += not document
        self.documents += bool(document)
        if not self.documents and self.rows >= HOPELESS_ROWS:
            raise self.nothing_found()
        return bool(document)

    def document(self, row: Any, source: str) -> Document:
        """The document of a row; "" or [] for one that is passed over, and counted. The error of the first row where
        none of the first rows, or of all, can be used."""
        try:
            document = document_of(row, source)
        except (CheckpointError, UsageError) as error:
            self.rows += 1
            self.unusable.append(error)
            if len(self.unusable) == self.rows >= ROWS_OF_ONE_KIND:
                raise self.unusable[0] from None
            return ""
        return document if self.counted(document) else ""

    def nothing_found(self) -> CheckpointError | UsageError:
        if self.unusable and len(self.unusable) == self.rows:
            return self.unusable[0]
        rows = f"{counted(self.rows, 'row')}, none with text" if self.rows else "no text in it"
        rows += f"; {self._unusable_rows()}" if self.unusable else ""
        reasons = f"; passed over: {some(self.skipped)}" if self.skipped else ""
        return CheckpointError(f"{self.name}: {rows}{reasons}", "give another text")

    def _unusable_rows(self) -> str:
        first = self.unusable[0].args[0]
        return f"{spaced(len(self.unusable))} of {spaced(self.rows)} rows passed over, which cannot be used: {first}"

    def all_notes(self) -> list[str]:
        notes = list(self.notes)
        if self.empty:
            notes.append(f"{spaced(self.empty)} of {spaced(self.rows)} rows passed over: they hold no text")
        if self.unusable:
            notes.append(self._unusable_rows())
        if self.skipped:
            notes.append(f"passed over: {some(self.skipped)}")
        return notes


def _of_dataset(dataset: HubDataset, reading: Reading) -> Iterator[Document]:
    if dataset.split.startswith("test"):
        reading.notes.append(
            f"calibrated on the split {dataset.split} of {dataset.repository}: figures measured on the same split "
            f"look better than the model is"
        )
    rows = stream_rows(dataset)
    if not dataset.running:
        return _of_rows(rows, reading, dataset.name, dataset.buffer)
    return _of_rows(articles(rows, dataset.name), reading, dataset.name, dataset.buffer, "articles")


def _of_rows(rows: Iterable[Any], reading: Reading, source: str, buffer: int, what: str = "rows") -> Iterator[Document]:
    reading.notes.append(f"{what} of {source} in an order drawn with seed {reading.seed}, {spaced(buffer)} at a time")
    rows_before, unusable_before = reading.rows, len(reading.unusable)
    for row in shuffled(rows, reading.seed, buffer):
        if document := reading.document(row, source):
            yield document
    read, unusable = reading.rows - rows_before, len(reading.unusable) - unusable_before
    if 0 < read == unusable:  # of a folder, a file of another kind
        why = reading.unusable[unusable_before]
        del reading.unusable[unusable_before:]
        reading.rows = rows_before
        raise why


def _of_folder(folder: Path, reading: Reading) -> Iterator[Document]:
    """Documents of every text-like file below a folder, by name, without hidden files."""
    relative = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    for index, name in enumerate(relative):
        path = folder / name
        try:
            if path.suffix.lower() in ROW_SUFFIXES:
                yield from _of_rows(file_rows(path), reading, name, FILE_BUFFER)
            else:
                document = _file_document(path, reading)
                if reading.counted(document):
                    yield document
        except (CheckpointError, UsageError) as error:
            reading.skipped.append(f"{name} ({error})")
        except GeneratorExit:  # the windows are full
            reading.notes.append(f"the first {index + 1} of {len(relative)} files were enough")
            raise


def _file_document(path: Path, reading: Reading) -> str:
    text = read_plain(path, reading.characters)
    if "\0" in text:
        raise UsageError(f"{path} is not text: it holds zero bytes")
    return text if text.strip() else ""


def packed_windows(
    documents: Iterator[Document], reading: Reading, tokenizer: PreTrainedTokenizerBase, windows: int,
    window_tokens: int, marking: Marking | None = None,
) -> CalibrationWindows:  # fmt: skip
    """Documents of a source, packed into windows; no more of them are taken than the windows need."""
    marker = None if marking is None else AnswerMarker(tokenizer, reading.characters, marking)
    render = marker or Renderer(tokenizer, reading.characters)
    packer = Packer(tokenizer, windows, window_tokens)
    digest = hashlib.sha256()
    for document in documents:
        text, ids, counted = (*render(document), None) if marker is None else marker.marked(document)
        if not ids:
            if render.refused >= HOPELESS_ROWS and not packer.stream:
                break
            continue
        digest.update((b"\n\n" if packer.stream else b"") + text.encode("utf-8"))
        packer.add(ids, counted)
        if len(packer.cut) == windows:
            break
    documents.close()  # type: ignore[attr-defined]
    if not packer.stream and render.refused:
        raise CheckpointError(f"{reading.name}: {render.notes()[0]}", "give plain text")
    if not packer.stream:
        raise reading.nothing_found()
    if not packer.cut:
        raise CheckpointError(
            f"the text {reading.name!r} has {len(packer.stream)} tokens; one window needs {packer.step}",
            "give a longer text, or smaller windows (--seqlen; of finetune --window-tokens)",
        )
    tokens = len(packer.stream)
    notes = reading.all_notes() + render.notes()
    notes += too_few(reading.name, tokens, len(packer.cut), window_tokens, windows)
    ids = torch.tensor(packer.cut, dtype=torch.long)
    refuse_degenerate(ids, tokenizer, reading.name)
    notes += text_notes(ids, tokenizer, reading.name)
    if marking == "answers" and marker is not None and not marker.split:
        raise UsageError(f"{reading.name}: there are no answers in it that can be told from the rest", _NO_ANSWERS)
    counted = torch.tensor(packer.counts) if marker is not None and marker.split else None
    return CalibrationWindows(ids, reading.name, digest.hexdigest(), tokens, windows, tuple(notes), counted)


def some(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
