"""Calibration data that is in memory: texts, conversations, rows of a dataset, token ids.

    item                                                      taken as
    text; {"text": …}; {"messages": …} and other layouts      a document (`rows.py`), packed as documents of a file are
    a list of texts; {"text": [text, …]}                      a document each: a batch of a DataLoader
    a list of {role, content}                                 a conversation
    {"input_ids": …, "attention_mask": …, "labels": …}        token ids, one row or a padded batch (DataLoader)
    a tensor or list of integers, [T] or [rows, T]            token ids

Everything comes in the order given; no more is taken than the windows need, so that an iterable may be endless. What
has no iterator, but a length, is asked for its items by number (torch's datasets).

Rows of token ids of one length without masked tokens are the windows, as they are, unless a number of tokens per window
is asked for. All others are one stream, cut into windows as documents are, masked tokens left out: padding is in no
statistic. Without a mask, a run of pad tokens at either end of a row is padding, where the pad token is neither BOS nor
EOS.

In a loss, tokens whose label is −100 count for nothing, as transformers has it.

Refused: items of two kinds or of none of these, ids that are no integers or that the model has no row for, tensors
without values, a mask of another shape or of other numbers than 0 and 1, batches of several tensors that do not say
which is which, a mapping of splits, data without a token to learn from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, LowbitError, UsageError
from lowbit.text.answers import Marking
from lowbit.text.calibration import (
    HOPELESS_ROWS,
    CalibrationWindows,
    Reading,
    check_context,
    packed_windows,
    text_notes,
    too_few,
)
from lowbit.text.packing import Packer, counted, spaced
from lowbit.text.rows import Document
from lowbit.text.windows import refuse_degenerate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_MEMORY = " in memory"  # ends the names of such data
_TAKEN = "give texts, rows of a dataset with a known column, or token ids (input_ids with their attention_mask)"
_CHARACTERS = 4_000_000  # of one document
_NOTHING = object()  # None is an item that somebody gave
_UNLABELLED = -100  # label of a token that counts for nothing


@dataclass
class GivenText:
    """Calibration data in memory. `windows` reads it once, however often it is asked.

    data  an iterable of the items above, or one batch of token ids
    """

    data: Any
    _cut: dict[tuple[Any, ...], CalibrationWindows] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """ "Dataset in memory": for messages and reports."""
        return f"{type(self.data).__name__}{OF_MEMORY}"

    def windows(
        self, tokenizer: PreTrainedTokenizerBase | None, windows: int, window_tokens: int | None, *, default: int = 512,
        longest: int | None = None, vocabulary: int | None = None, marking: Marking | None = None,
        refused: LowbitError | None = None,
    ) -> CalibrationWindows:  # fmt: skip
        """The first `windows` windows, or as many as there are.

        tokenizer      needed for texts; None will do for token ids
        window_tokens  None: the rows of token ids are the windows where they can be, else windows of `default`
        longest        the model's context in tokens; None: unknown
        vocabulary     rows of the embedding; None: unknown
        marking        which tokens count in a loss (`answers.py`); None: not asked
        refused        why there is no tokenizer, raised for texts; None: the folder has none
        """
        key = (windows, window_tokens, marking)
        if key not in self._cut:
            check_context(windows, window_tokens or default, longest if window_tokens else None)
            items = self._items()
            first = next(items, _NOTHING)
            if first is _NOTHING:
                raise CheckpointError(f"{self.name}: it is empty", _TAKEN)
            items = chain([first], items)
            usual = min(default, longest or default)
            if _ids_of(first, self.name) is None:
                if tokenizer is None:
                    raise refused or UsageError(f"{self.name} holds texts, and there is no tokenizer",
                                                "give tokenizer=")  # fmt: skip
                cut = self._of_documents(items, tokenizer, windows, window_tokens or usual, marking)
            else:
                cut = self._of_ids(items, tokenizer, windows, window_tokens, usual, marking, vocabulary)
            _check_ids(cut.ids, self.name, longest, vocabulary)
            if not window_tokens and cut.ids.shape[1] == usual < default:
                note = f"windows of {usual} tokens, the model's context, and not of {default}"
                cut = replace(cut, notes=(*cut.notes, note))
            self._cut[key] = cut
        return self._cut[key]

    def _items(self) -> Iterator[Any]:
        data = self.data
        if isinstance(data, Mapping):
            if "input_ids" in data or not data:
                return iter([data] if data else [])
            keys = [str(key)[:60] for key in list(data)[:5]]
            raise UsageError(
                f"{self.name} has the keys {', '.join(keys)}", f"give one of them: calib=data[{keys[0]!r}]"
            )
        if isinstance(data, Tensor) or (isinstance(data, list | tuple) and data and type(data[0]) is int):
            return iter([data])
        if isinstance(data, bytes | bytearray | memoryview):
            raise UsageError(f"calib is {type(data).__name__}", "give texts: calib=[data.decode()]")
        if not isinstance(data, Iterable) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            return (data[index] for index in range(len(data)))
        if not isinstance(data, Iterable):
            raise UsageError(f"calib is {str(data)[:60]} ({type(data).__name__}), which cannot be read", _TAKEN)
        return iter(data)

    def _of_documents(
        self, items: Iterator[Any], tokenizer: PreTrainedTokenizerBase, windows: int, window_tokens: int,
        marking: Marking | None,
    ) -> CalibrationWindows:  # fmt: skip
        reading = Reading(self.name, 0, _CHARACTERS, notes=[f"rows of {self.name} in the order given"])

        def documents() -> Iterator[Document]:
            for item in chain.from_iterable(map(_texts_of_batch, items)):
                if document := reading.document(_row(item, self.name), self.name):
                    yield document

        return packed_windows(documents(), reading, tokenizer, windows, window_tokens, marking)

    def _of_ids(
        self, items: Iterator[Any], tokenizer: PreTrainedTokenizerBase | None, windows: int, asked: int | None,
        default: int, marking: Marking | None, vocabulary: int | None,
    ) -> CalibrationWindows:  # fmt: skip
        rows = _IdRows(self.name, tokenizer)
        read = rows.read(items)
        taken: list[tuple[Tensor, Tensor]] = []
        for row in read:
            taken.append(row)
            if len(taken) == windows:
                break
        if not taken:
            raise rows.nothing_found()
        lengths = {len(row) for row, _ in taken}
        notes = [f"rows of {self.name} in the order given"]
        if asked is None and len(lengths) == 1 and not rows.masked and len(taken[0][0]) >= 4:
            ids, counted = (torch.stack(parts) for parts in zip(*taken, strict=True))
            tokens = ids.numel()
            if next(read, None) is not None:
                notes.append(f"the first {windows} of them were needed")
        else:
            step = asked or default
            packer = _Stream(step) if tokenizer is None else Packer(tokenizer, windows, step)
            for row, labelled in chain(taken, read):
                packer.add(row.tolist(), labelled.tolist())
                if len(packer.cut) >= windows:
                    break
            tokens = len(packer.stream)
            if not packer.cut:
                raise CheckpointError(f"{self.name} has {tokens} tokens; one window needs {packer.step}",
                                      "give more, or smaller windows (seqlen)")  # fmt: skip
            ids, counted = torch.tensor(packer.cut[:windows], dtype=torch.long), torch.tensor(packer.counts[:windows])
            notes.append("joined to one stream and cut into windows")
        read.close()
        _check_ids(ids, self.name, None, vocabulary)  # before a tokenizer is asked for their text
        if tokenizer is not None:
            refuse_degenerate(ids, tokenizer, self.name)
            notes += text_notes(ids, tokenizer, self.name)
        notes += rows.notes() + too_few(self.name, tokens, len(ids), ids.shape[1], windows)
        digest = hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
        if marking == "answers" and not rows.labelled:
            raise UsageError(f"{self.name} holds token ids without labels: nothing tells which of them are answers",
                             "give labels, −100 for what counts for nothing, or conversations")  # fmt: skip
        counts = counted if marking is not None and rows.labelled else None
        return CalibrationWindows(ids, self.name, digest, tokens, windows, tuple(notes), counts)


class _Stream:
    """`Packer` without a tokenizer: the windows of one stream, with nothing put before them."""

    def __init__(self, window_tokens: int):
        self.step, self.stream, self.cut = window_tokens, list[int](), list[list[int]]()
        self.counts, self._counted = list[list[bool]](), list[bool]()

    def add(self, ids: list[int], counted: list[bool]) -> None:
        self.stream += ids
        self._counted += counted
        while len(self.stream) >= (len(self.cut) + 1) * self.step:
            start = len(self.cut) * self.step
            self.cut.append(self.stream[start : start + self.step])
            self.counts.append(self._counted[start : start + self.step])


class _IdRows:
    """Rows of token ids, int64 [T], masked tokens left out; counts what was left out.

    labelled  rows with labels
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase | None):
        self._name = name
        pad, bos, eos = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos"))
        self._pad = pad if pad not in (None, bos, eos) else None
        self.rows = self.empty = self.masked = self.padded = self.tokens = self.labelled = 0

    def read(self, items: Iterator[Any]) -> Generator[tuple[Tensor, Tensor], None, None]:
        """(ids, whether each has a label, bool) of every row; without labels all have."""
        for item in items:
            found = _ids_of(item, self._name)
            if found is None:
                raise UsageError(f"{self._name} mixes token ids with a {type(item).__name__}", _TAKEN)
            ids, mask, labels = found
            for index, row in enumerate(ids):
                places = self._unpadded(row) if mask is None else mask[index].nonzero()[:, 0]
                kept = row[places]
                counted = torch.ones_like(kept, dtype=torch.bool) if labels is None else labels[index][places]
                self.labelled += labels is not None
                self.rows += 1
                self.tokens += len(row)
                self.masked += len(row) - len(kept)
                self.padded += 0 if mask is not None else len(row) - len(kept)
                self.empty += not len(kept)
                if len(kept):
                    yield kept, counted
                elif self.empty == self.rows >= HOPELESS_ROWS:
                    raise self.nothing_found()

    def _unpadded(self, row: Tensor) -> Tensor:
        """Indices of the tokens between runs of pad tokens."""
        every = torch.arange(len(row))
        if self._pad is None:
            return every
        places = (row != self._pad).nonzero()
        return every[int(places[0]) : int(places[-1]) + 1] if len(places) else every[:0]

    def nothing_found(self) -> CheckpointError:
        return CheckpointError(
            f"{self._name}: {counted(self.rows, 'row')} of token ids, in which every token is masked" if self.tokens
            else f"{self._name}: it is empty",
            "look at what it yields: attention_mask is 1 for tokens and 0 for padding",
        )  # fmt: skip

    def notes(self) -> list[str]:
        notes = []
        if self.masked:
            notes.append(f"{spaced(self.masked)} of {spaced(self.tokens)} tokens left out: masked")
        if self.padded:
            notes.append(f"{spaced(self.padded)} of these are pad tokens at the ends of rows without a mask")
        if self.empty:
            notes.append(f"{spaced(self.empty)} of {spaced(self.rows)} rows passed over: all tokens are masked")
        return notes


def _ids_of(item: Any, name: str) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """(token ids int64 [rows, T], mask and labels as bool [rows, T] or None) of an item; None for a document."""
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            return None
        found = _ids_of(item["input_ids"], name)
        if found is None:
            kind = type(item["input_ids"]).__name__
            raise UsageError(f"{name}: input_ids is a {kind} that holds no token ids", "token ids are integers")
        return _with(found[0], item.get("attention_mask"), item.get("labels"), name)
    if isinstance(item, list | tuple) and item and all(isinstance(each, Tensor) for each in item):
        if len(item) > 1:
            raise UsageError(
                f"{name} yields {len(item)} tensors at once, and nothing says which one holds the token ids",
                "let it yield {'input_ids': …, 'attention_mask': …}",
            )
        item = next(iter(item))
    if isinstance(item, str) or not isinstance(item, Tensor | list | tuple):
        if hasattr(item, "__array__") and not isinstance(item, str):
            return _as_rows(_rectangular(item, name), name), None, None
        return None
    if isinstance(item, list | tuple):
        first = next(iter(item), None)
        flat = first if isinstance(first, list | tuple) else item
        if flat and not all(type(each) is int for each in flat):
            return None
        item = _rectangular(item, name) if item else torch.zeros(0, dtype=torch.long)
    return _as_rows(item, name), None, None


def _rectangular(item: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(item)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        several = isinstance(item, list | tuple) and isinstance(item[0], list | tuple)
        said = "a batch of rows of several lengths" if several else "numbers that are no token ids"
        raise UsageError(f"{name} holds {said}", "give the rows one by one" if several else _TAKEN) from error


def _as_rows(ids: Tensor, name: str) -> Tensor:
    """Token ids as int64 [rows, T] on the CPU."""
    if ids.device.type == "meta" or ids.layout is not torch.strided:
        kind = "a tensor on the meta device, without values" if ids.device.type == "meta" else "a sparse tensor"
        raise UsageError(f"{name} holds {kind}", _TAKEN)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype is torch.bool or ids.dim() not in (1, 2):
        kind = str(ids.dtype).removeprefix("torch.")
        raise UsageError(f"{name} holds a {kind} tensor {list(ids.shape)}; token ids are integers [T] or [rows, T]",
                         _TAKEN)  # fmt: skip
    ids = ids.detach().cpu().to(torch.long)
    return ids if ids.dim() == 2 else ids[None]


def _with(rows: Tensor, mask: Any, labels: Any, name: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(ids, mask, labels) of rows with what lies beside them, [rows, T], or [T] of one row."""
    shapes = (rows.shape, rows.shape[1:]) if len(rows) == 1 else (rows.shape,)
    asked, mask, labels = mask is not None, _beside(mask), _beside(labels)
    if asked and (mask is None or mask.shape not in shapes):
        found = "is no tensor of numbers" if mask is None else f"has shape {list(mask.shape)}"
        raise UsageError(f"{name}: attention_mask {found}, input_ids {list(rows.shape)}",
                         "both are [rows, T]; a mask of four dimensions is no padding mask")  # fmt: skip
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        other = float(mask[(mask != 0) & (mask != 1)][0])
        raise UsageError(
            f"{name}: attention_mask holds {other:g}",
            "it is 1 for tokens and 0 for padding; what is added to scores is no padding mask",
        )
    if labels is not None and labels.shape not in shapes:
        labels = None  # they are of whole rows
    mask, labels = (each if each is None else each.reshape(rows.shape) for each in (mask, labels))
    return rows, None if mask is None else mask.bool(), None if labels is None else labels != _UNLABELLED


def _beside(values: Any) -> Tensor | None:
    """What goes with token ids, as a tensor on the CPU; None for what is no tensor of numbers."""
    try:
        return None if values is None else torch.as_tensor(values).cpu()
    except (ValueError, TypeError, RuntimeError):
        return None


def _texts_of_batch(item: Any) -> list[Any]:
    """The items of a batch of texts; any other item alone."""
    texts = item.get("text") if isinstance(item, Mapping) else item
    batch = isinstance(texts, list | tuple) and bool(texts) and all(isinstance(text, str) for text in texts)
    return list(texts) if batch else [item]  # type: ignore[arg-type]


def _row(item: Any, name: str) -> Any:
    """The row that an item is; a list of turns is a conversation."""
    if isinstance(item, list) and item and all(isinstance(turn, dict) for turn in item):
        item = {"messages": item}
    if not isinstance(item, str | Mapping):
        raise UsageError(f"{name} holds a {type(item).__name__}, which is neither a text nor token ids", _TAKEN)
    return dict(item) if isinstance(item, Mapping) else item


def _check_ids(ids: Tensor, name: str, longest: int | None, vocabulary: int | None) -> None:
    if longest is not None and ids.shape[1] > longest:
        raise UsageError(f"{name}: rows of {ids.shape[1]} tokens are longer than the model's context of {longest}",
                         f"give shorter rows, or seqlen={longest}, which cuts them")  # fmt: skip
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        known = "" if vocabulary is None else f"; the model's embedding has {vocabulary} rows"
        raise UsageError(f"{name} has token {low if low < 0 else high}{known}",
                         "tokenize with the tokenizer of this model")  # fmt: skip
