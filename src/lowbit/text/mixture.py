"""Several calibration texts in stated shares: `--calib web.txt:3,code.txt:1`.

    SOURCE[:SHARE],SOURCE[:SHARE]…    a source as of `calibration_windows`, "packaged", or packaged/DOMAIN for one of
                                      its domains (`packaged.py`); a share is 1 unless given
    windows of a source = samples · share / Σ shares, rounded so that they add up (largest remainders)

The windows alternate, so that any first part of them (`--correction-samples`) is the same mixture. A name that exists
as it is typed is one source, commas or not. Every window counts alike, so what a source lacks in windows it lacks in
weight: a note says so.

Importance matrices take the same sources (`stream_windows`); one running text is cut for them as llama-imatrix cuts it.

Refused: shares that are not above 0, a source given twice, `self` in a mixture, and fewer windows than sources.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowbit.errors import UsageError
from lowbit.text.calibration import CalibrationWindows, calibration_windows, check_context, refuse_running, too_few
from lowbit.text.hub import DATASETS, is_dataset
from lowbit.text.packaged import alternating, apportioned, packaged_windows
from lowbit.text.rows import ROW_SUFFIXES
from lowbit.text.windows import PACKAGED, Text, cut_windows, read_text, refuse_no_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowbit.text.answers import Marking

_SHARE = re.compile(r"(?P<source>.+):(?P<share>-?\d+(?:\.\d+)?)$", re.DOTALL)


@dataclass(frozen=True)
class MixedText:
    """One text of a mixture. source: None is the packaged text; share: > 0, of the sum of all shares."""

    source: str | None
    share: float = 1.0

    @property
    def name(self) -> str:
        return self.source or PACKAGED


def parse_mixture(calib: str | Path | None) -> tuple[MixedText, ...]:
    """The texts that `--calib` names: one, unless it lists several. UsageError for what the module refuses."""
    if calib is None:
        return (MixedText(None),)
    text = str(calib)
    if not text.strip():  # which is the folder that one is in
        raise UsageError(
            "--calib is empty", "give a file, a folder or a short name; for the packaged text leave it out"
        )
    there = os.path.exists(text)  # False, where Path.exists fails for names that are too long
    if there or ("," not in text and (is_dataset(text) or not _SHARE.match(text))):
        return (_named(text, 1.0),)
    parts = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        found = None if os.path.exists(word) else _SHARE.match(word)
        share = float(found["share"]) if found else 1.0
        if share <= 0:
            raise UsageError(f"--calib {word}: a share is above 0", "leave the text out, or give it a share such as 1")
        parts.append(_named(found["source"] if found else word, share))
    names = [part.name for part in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--calib names {twice} twice", "give it once, with the sum of both shares")
    if len(parts) > 1 and "self" in names:
        raise UsageError("--calib self cannot be mixed with other texts", "save its text to a file, or leave it out")
    if not parts:
        raise UsageError(f"--calib {text!r} names no text", "give a file, or FILE:SHARE,FILE:SHARE")
    return tuple(parts)


def _named(source: str, share: float) -> MixedText:
    refuse_no_name(source)
    return MixedText(None if source == PACKAGED and not os.path.exists(source) else source, share)


def mixed_windows(
    calib: str | Path | None, tokenizer: PreTrainedTokenizerBase, windows: int, window_tokens: int, *, seed: int = 0,
    longest: int | None = None, marking: Marking | None = None,
) -> CalibrationWindows:  # fmt: skip
    """`windows` windows of one text, or of several in their shares; parameters as in `calibration_windows`."""
    parts = parse_mixture(calib)

    def windows_of(source: str | None, count: int) -> CalibrationWindows:
        if source is None or (source.startswith(f"{PACKAGED}/") and not Path(source).exists()):
            check_context(count, window_tokens, longest)
            refuse_running(marking, "the packaged text")
            return packaged_windows(tokenizer, count, window_tokens, source and source.removeprefix(f"{PACKAGED}/"))
        return calibration_windows(source, tokenizer, count, window_tokens, seed=seed, longest=longest,
                                   marking=marking)  # fmt: skip

    if len(parts) == 1:
        return windows_of(parts[0].source, windows)
    check_context(windows, window_tokens, longest)
    counts = apportioned(windows, [part.share for part in parts])
    if 0 in counts:
        raise UsageError(
            f"{windows} windows leave none for {parts[counts.index(0)].name} with its share of --calib",
            "give more windows (--samples), or larger shares",
        )
    cut = [windows_of(part.source, count) for part, count in zip(parts, counts, strict=True)]
    ids = alternating([each.ids for each in cut])
    counted = None
    if any(each.counted is not None for each in cut):  # every token of a text without conversations counts
        counted = alternating([torch.ones_like(each.ids, dtype=torch.bool) if each.counted is None else each.counted
                               for each in cut])  # fmt: skip
    notes = tuple(note for each in cut for note in each.notes)
    mixed = ", ".join(f"{len(each.ids)} of {part.name}" for part, each in zip(parts, cut, strict=True))
    digests = "".join(each.sha256 for each in cut)
    return CalibrationWindows(
        ids, str(calib), hashlib.sha256(digests.encode()).hexdigest(), sum(each.text_tokens for each in cut), windows,
        (f"windows of each text: {mixed}", *notes), counted,
    )  # fmt: skip


def stream_text(calib: str | Path | None) -> Text | None:
    """The one running text that `--calib` names; None where it names rows, documents or several texts.

    UsageError for what the module refuses, for "self", and for a text that is not there.
    """
    parts = parse_mixture(calib)
    for part in parts:
        if part.source == "self" and not Path("self").exists():
            raise UsageError("--calib self is not for importance matrices: they are measured on a text that is there",
                             "give a file, FILE:SHARE,FILE:SHARE, or packaged")  # fmt: skip
        packaged = part.source is None or part.source.startswith(f"{PACKAGED}/")
        if not (packaged or is_dataset(str(part.source)) or Path(str(part.source)).exists()):
            raise UsageError(
                f"there is no text {part.source!r}: no such file or folder",
                f"give a text file, a folder, one of {', '.join(DATASETS)}, hub:OWNER/NAME:CONFIG:SPLIT, or several as "
                f"FILE:SHARE,FILE:SHARE",
            )
    source = parts[0].source
    path = None if source is None else Path(source)
    if len(parts) > 1 or (path is not None and (path.is_dir() or path.suffix.lower() in ROW_SUFFIXES)):
        return None
    if path is not None and not path.exists() and source != "wikitext" and not str(source).startswith("hub:"):
        return None
    return read_text(source, packaged="calibration")


def stream_windows(
    calib: str | Path | Text | None, tokenizer: PreTrainedTokenizerBase, windows: int, window_tokens: int, *,
    seed: int = 0, longest: int | None = None,
) -> CalibrationWindows:  # fmt: skip
    """Windows for an importance matrix: of one running text those of llama-imatrix (consecutive, the first token of
    each replaced by BOS), of anything else those of `mixed_windows`."""
    text = calib if isinstance(calib, Text) else stream_text(calib)
    if text is None:
        return mixed_windows(str(calib), tokenizer, windows, window_tokens, seed=seed, longest=longest)
    cut = cut_windows(text, tokenizer, windows, window_tokens, "second-half")
    notes = tuple(too_few(text.name, cut.text_tokens, len(cut.ids), window_tokens, windows))
    return CalibrationWindows(cut.ids, text.name, text.sha256, cut.text_tokens, windows, notes)
