"""The packaged calibration text by domains, and windows that hold them in stated shares.

    prose 4 : technical 2 : code 2 : languages 2 : dialogue 2          of the windows, so of the tokens

The file alternates between domains passage by passage (`data/README.md`), but its beginning is a tenth code; the fewer
the bits, the more a Hessian gives away where it saw little. So windows are given out by these shares. What a domain
lacks, the others give in their shares; within a domain the windows are spread evenly over its passages.

Windows so long that some domain has none are cut from the whole text, as from any running text.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, UsageError
from lowbit.text.calibration import CalibrationWindows, windows_of_text
from lowbit.text.windows import Text, cut_windows, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
