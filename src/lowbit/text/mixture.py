"""Several calibration texts in stated shares: `--calib web.txt:3,code.txt:1`.

    SOURCE[:SHARE],SOURCE[:SHARE]…    a source as of `calibration_windows`, "packaged", or packaged/DOMAIN for one of
                                      its domains; a share is 1 unless given
    windows of a source = samples · share / Σ shares, rounded so that they add up (largest remainders)

The windows alternate, so that any first part of them (`--correction-samples`) is the same mixture. A name that exists
as it is typed is one source, commas or not. Every window counts alike, so what a source lacks in windows it lacks in
weight: a note says so.

Importance matrices take the same sources (`stream_windows`); one running text is cut for them as llama-imatrix cuts it.

Refused: shares that are not above 0, a source given twice, `self` in a mixture, and fewer windows than sources.

The packaged calibration text by domains, and windows that hold them in stated shares.

    prose 4 : technical 2 : code 2 : languages 2 : dialogue 2          of the windows, so of the tokens

The file alternates between domains passage by passage (`data/README.md`), but its beginning is a tenth code; the fewer
the bits, the more a Hessian gives away where it saw little. So windows are given out by these shares. What a domain
lacks, the others give in their shares; within a domain the windows are spread evenly over its passages.

Windows so long that some domain has none are cut from the whole text, as from any running text.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, UsageError
from lowbit.text.calibration import (
    CalibrationWindows,
    calibration_windows,
    check_context,
    refuse_running,
    too_few,
    windows_of_text,
)
from lowbit.text.hub import DATASETS, is_dataset
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


_ALL = 1 << 30  # windows: more than there are
SHARES = {"prose": 4, "technical": 2, "code": 2, "languages": 2, "dialogue": 2}

# (domain, bytes) of each passage, in the order of the file; a line break lies between two. The table of data/README.md
# has the passages themselves, and tests/test_data.py holds these against it.
PASSAGES = (
    ("prose", 24162), ("dialogue", 1940), ("prose", 13883), ("technical", 2009), ("technical", 21626),
    ("languages", 1557), ("technical", 14088), ("code", 1884), ("dialogue", 18003), ("technical", 2913),
    ("prose", 25460), ("languages", 1332), ("languages", 13189), ("dialogue", 2456), ("code", 8969), ("code", 3033),
    ("dialogue", 20139), ("languages", 1160), ("technical", 14095), ("code", 2129), ("prose", 18563),
    ("languages", 1148), ("prose", 11967), ("languages", 5138), ("code", 7248), ("code", 3550), ("languages", 13419),
    ("languages", 1514), ("prose", 21442), ("languages", 4282), ("technical", 11097), ("languages", 1079),
    ("prose", 9897), ("languages", 2106), ("prose", 13885), ("languages", 1002), ("code", 8805), ("languages", 3219),
    ("languages", 12229), ("languages", 2574), ("prose", 20068), ("languages", 2783), ("technical", 12027),
    ("languages", 4359), ("code", 7836), ("technical", 16152), ("languages", 9756),
)  # fmt: skip


@cache
def packaged_domains() -> dict[str, Text]:
    """Domain → its passages, in the order of the file."""
    data = read_text(None, "calibration").content.encode()
    parts: dict[str, list[str]] = {domain: [] for domain in SHARES}
    position = 0
    for domain, size in PASSAGES:
        parts[domain].append(data[position : position + size].decode())
        position += size + 1
    return {domain: Text(f"packaged/{domain}", "\n".join(texts)) for domain, texts in parts.items()}


def packaged_windows(
    tokenizer: PreTrainedTokenizerBase, windows: int, window_tokens: int, domain: str | None = None
) -> CalibrationWindows:
    """`windows` windows of the packaged text in the shares of its domains, or of one domain; or as many as it has."""
    if domain is not None:
        if domain not in SHARES:
            raise UsageError(f"the packaged text has no domain {domain!r}", f"domains: {', '.join(SHARES)}")
        return windows_of_text(packaged_domains()[domain], tokenizer, windows, window_tokens)
    text = read_text(None, "calibration")
    try:
        cut = [cut_windows(part, tokenizer, _ALL, window_tokens) for part in packaged_domains().values()]
    except CheckpointError:  # a domain has not one window
        return windows_of_text(text, tokenizer, windows, window_tokens)
    counts = filled(windows, list(SHARES.values()), [len(each.ids) for each in cut])
    if sum(counts) < windows:  # all of it: without what is left over at the end of each domain
        return windows_of_text(text, tokenizer, windows, window_tokens)
    ids = alternating([_spread(each.ids, count) for each, count in zip(cut, counts, strict=True)])
    return CalibrationWindows(ids, text.name, text.sha256, sum(each.text_tokens for each in cut), windows, ())


def _spread(ids: Tensor, count: int) -> Tensor:
    """`count` of the windows, evenly spaced."""
    return ids[(torch.arange(count, dtype=torch.float64).add(0.5).mul(len(ids) / max(1, count))).long()]


def alternating(parts: list[Tensor]) -> Tensor:
    """Windows of several texts in one order: of a text with n windows the i-th lies at (i + ½) / n."""
    places = torch.cat([(torch.arange(len(ids), dtype=torch.float64) + 0.5) / max(1, len(ids)) for ids in parts])
    return torch.cat(parts)[places.argsort(stable=True)]


def apportioned(total: int, shares: list[float]) -> list[int]:
    """Whole numbers in proportion to the shares that add up to `total`: the largest remainders are rounded up."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(each) for each in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def filled(total: int, shares: list[float], most: list[int]) -> list[int]:
    """`apportioned`, with at most `most` of each; what one cannot give is asked of the others, in their shares."""
    counts = [0] * len(shares)
    while (left := min(total, sum(most)) - sum(counts)) > 0:
        open_shares = [share if count < limit else 0.0
                       for share, count, limit in zip(shares, counts, most, strict=True)]  # fmt: skip
        for index, more in enumerate(apportioned(left, open_shares)):
            counts[index] = min(counts[index] + more, most[index])
    return counts
