"""A summary of each input on the calibration text, small enough for a report, and the distance of another text from it.

    code[k] = 0                                        if channel k was always 0
            = 1 + rint((log2 m[k] − low) / step)       else, 1 … 255;    m = mean x² of the channel
    low = min log2 m,  step = (max − low) / 254

    distance = √ mean_k (log2 m[k] − log2 m'[k])²      over the channels that are nonzero in both

    effective rank = K² / Σ_jk R_jk²                   R the correlations of H over the K channels that are not always 0

The effective rank is K where channels are independent and 1 where all are one; so many directions does the text show.
The distance counts doublings of the mean square: 0 for the same statistics, 1 if channels are typically twice or half
as strong. A code step is about a tenth of a doubling, which adds an error of a thirtieth. The vocabulary of a text is
one bit per token, least significant first, compressed.

CheckpointError for codes that are not base64 or not of the input's width, and for a vocabulary of more tokens than the
model has (a hostile one is not unpacked beyond that).
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.records import Count, NonNegative, Record
from lowbit.tensors import LayerStats

# Blocks whose inputs are kept, evenly spaced, the first and the last among them.
BLOCKS = 8
# The inverse of a Hessian from n tokens is too large by about n / (n − K): a third with 4 tokens per channel.
TOKENS_PER_CHANNEL = 4
_CODES = 254
_ROWS = 512  # of a Hessian at a time
_OF_EXPERT = re.compile(r"\.experts\.\d+\.")


class InputSummary(Record):
    """The channel strengths of one distinct input on the calibration text.

    low, step   code c of a channel stands for a mean of x² of 2^(low + step · (c − 1)), 0 for a mean of 0
    codes       uint8 [K], base64
    effective_rank  of the input's correlations; None if only the diagonal was measured
    """

    name: str
    block: Count | None
    tokens: Count
    low: float
    step: NonNegative
    codes: str
    effective_rank: NonNegative | None = None

    @property
    def log2_mean_sq(self) -> Tensor:
        """float32 [K]; −inf for channels that are always 0."""
        try:
            codes = np.frombuffer(base64.b64decode(self.codes, validate=True), np.uint8)
        except (binascii.Error, ValueError) as error:
            raise CheckpointError(f"the statistics of {self.name} are not base64: {error}") from None
        values = self.low + self.step * (torch.from_numpy(codes.astype(np.float32)) - 1)
        values[torch.from_numpy(codes == 0)] = -torch.inf
        return values


def is_kept(block: int, blocks: int) -> bool:
    """True for the blocks whose inputs the report keeps: at most BLOCKS, evenly spaced."""
    count = min(BLOCKS, blocks)
    return block in {round(index * (blocks - 1) / max(1, count - 1)) for index in range(count)}


def summarize(name: str, block: int | None, stats: LayerStats) -> InputSummary:
    """The summary of a measured input."""
    mean_sq = stats.mean_sq.detach().to("cpu", torch.float64)
    seen = mean_sq > 0
    logs = torch.log2(mean_sq[seen])
    low, high = (logs.min().item(), logs.max().item()) if len(logs) else (0.0, 0.0)
    step = (high - low) / _CODES
    codes = torch.zeros(len(mean_sq), dtype=torch.uint8)
    codes[seen] = (1 + ((logs - low) / step if step else torch.zeros_like(logs)).round()).to(torch.uint8)
    encoded = base64.b64encode(codes.numpy().tobytes()).decode()
    rank = None if stats.hessian is None else effective_rank(stats.hessian)
    return InputSummary(
        name=name, block=block, tokens=stats.tokens, low=low, step=step, codes=encoded, effective_rank=rank
    )


def effective_rank(hessian: Tensor) -> float:
    """K² / Σ R², R_jk = H_jk / √(H_jj H_kk), over the K live channels of a Hessian [K, K]; 0 if there are none."""
    diagonal = hessian.diagonal()
    live = diagonal > 0
    scale = torch.where(live, diagonal, 1).rsqrt() * live
    squares = sum(
        float((rows * scale * own[:, None]).square().sum())
        for rows, own in zip(hessian.split(_ROWS), scale.split(_ROWS), strict=True)
    )
    return int(live.sum()) ** 2 / squares if squares else 0.0


def coverage_notes(tokens: int, widest: int) -> list[str]:
    """A note where a text has fewer tokens than Hessians of `widest` channels need."""
    needed = TOKENS_PER_CHANNEL * widest
    if tokens >= needed:
        return []
    return [
        f"{tokens:,} tokens of calibration text are few for inputs of {widest:,} channels, whose statistics take "
        f"{needed:,}: give more or longer windows (--samples, --seqlen)"
    ]


def summaries_of(stats: Mapping[str, LayerStats], block: int, blocks: int) -> dict[str, dict[str, Any]]:
    """Input → fields of its summary; empty for blocks that are not kept, without the (many) inputs of experts."""
    if not is_kept(block, blocks):
        return {}
    names = (name for name in stats if not _OF_EXPERT.search(name))
    return {name: summarize(name, block, stats[name]).model_dump() for name in names}


def distance(summary: InputSummary, mean_sq: Tensor) -> float:
    """Distance of a mean of x² [K] from a summary, in doublings; CheckpointError for another width."""
    recorded = summary.log2_mean_sq
    if len(recorded) != len(mean_sq):
        raise CheckpointError(
            f"{summary.name} was recorded with {len(recorded)} channels; this model has {len(mean_sq)}",
            "the report belongs to another model",
        )
    return log_distance(recorded, torch.log2(mean_sq.float().cpu()))


def mismatch(summary: InputSummary, stats: LayerStats) -> float:
    """`distance` to measured statistics."""
    return distance(summary, stats.mean_sq)


def log_distance(one: Tensor, other: Tensor) -> float:
    """Root mean square difference over the channels where both are finite; 0 where there are none."""
    both = torch.isfinite(one) & torch.isfinite(other)
    return float((one[both] - other[both]).square().mean().sqrt()) if both.any() else 0.0


def pack_vocabulary(ids: Tensor) -> str:
    """The set of tokens in `ids` (int64, any shape, none negative)."""
    seen = torch.zeros(int(ids.max()) + 1 if ids.numel() else 0, dtype=torch.bool)
    seen[ids.reshape(-1)] = True
    return base64.b64encode(zlib.compress(np.packbits(seen.numpy(), bitorder="little").tobytes(), 9)).decode()


def unpack_vocabulary(text: str, vocabulary: int) -> Tensor:
    """bool [vocabulary]: True for the packed tokens."""
    largest = -(-vocabulary // 8)
    try:
        raw = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), largest + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise CheckpointError(f"the vocabulary of the calibration text cannot be read: {error}") from None
    if len(raw) > largest:
        raise CheckpointError(
            f"the vocabulary of the calibration text has more than the {vocabulary} tokens of the model",
            "the report belongs to another model",
        )
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little", count=vocabulary)
    return torch.from_numpy(bits.astype(bool))


def unseen_share(ids: Iterable[int] | Tensor, seen: Tensor) -> float:
    """Share of `ids` outside `seen`, bool [vocabulary]; ids beyond the vocabulary count as unseen."""
    ids = torch.as_tensor(ids).reshape(-1)
    known = seen[ids.clamp(max=len(seen) - 1)] & (ids < len(seen))
    return 1.0 - float(known.float().mean()) if len(ids) else 0.0
