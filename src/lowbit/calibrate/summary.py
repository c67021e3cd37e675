"""What an input looked like on the calibration text, small enough for a report, and how far another text is from that.

    code[k] = 0                                        where channel k was never anything but 0
            = 1 + rint((log2 m[k] − low) / step)       else, 1 … 255;    m = mean x² of the channel
    low = min log2 m,  step = (max − low) / 254

    distance = √ mean_k (log2 m[k] − log2 m'[k])²      over the channels that neither text leaves at 0

in doublings of the mean square: 0 for the same statistics, 1 where channels are typically twice or half as strong. Both
sides are rounded to codes of about a tenth of a doubling, an error of a thirtieth.

The tokens that a text has are kept as a bit for each of the vocabulary, least significant first, compressed.

Refused, as CheckpointError: codes that are not base64 or not of the input's width, a vocabulary of more tokens than the
model has (a hostile one is not unpacked beyond that).
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.tensors import LayerStats

# Blocks whose inputs are kept, evenly spaced, the first and the last among them.
BLOCKS = 8
_CODES = 254
_OF_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class InputSummary:
    """name, block  of the distinct input; tokens it was measured on; see the module for low, step and codes [K]"""

    name: str
    block: int | None
    tokens: int
    low: float
    step: float
    codes: str

    @property
    def log2_mean_sq(self) -> Tensor:
        """float32 [K]; −inf for channels that were always 0."""
        try:
            codes = np.frombuffer(base64.b64decode(self.codes, validate=True), np.uint8)
        except (binascii.Error, ValueError) as error:
            raise CheckpointError(f"the statistics of {self.name} are not base64: {error}") from None
        values = self.low + self.step * (torch.from_numpy(codes.astype(np.float32)) - 1)
        values[torch.from_numpy(codes == 0)] = -torch.inf
        return values


def is_kept(block: int, blocks: int) -> bool:
    """True for the blocks whose inputs go into the report: at most BLOCKS of them, evenly spaced."""
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
    return InputSummary(name, block, stats.tokens, low, step, encoded)


def summaries_of(stats: Mapping[str, LayerStats], block: int, blocks: int) -> dict[str, dict[str, Any]]:
    """Name of an input → the fields of its summary as plain values; empty for a block that is not kept.

    Inputs of single experts are left out: there may be hundreds, and what the router sees stands for them.
    """
    if not is_kept(block, blocks):
        return {}
    return {name: asdict(summarize(name, block, each)) for name, each in stats.items() if not _OF_EXPERT.search(name)}


def distance(summary: InputSummary, mean_sq: Tensor) -> float:
    """How far a mean of x² [K] is from a summary, in doublings; CheckpointError for another width."""
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
    """Which tokens there are among `ids` (int64, any shape, none negative)."""
    seen = torch.zeros(int(ids.max()) + 1 if ids.numel() else 0, dtype=torch.bool)
    seen[ids.reshape(-1)] = True
    return base64.b64encode(zlib.compress(np.packbits(seen.numpy(), bitorder="little").tobytes(), 9)).decode()


def unpack_vocabulary(text: str, vocabulary: int) -> Tensor:
    """bool [vocabulary]: the tokens that there were."""
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
    """Share of these tokens that are not among those seen; ids beyond the vocabulary count as unseen."""
    ids = torch.as_tensor(ids).reshape(-1)
    known = seen[ids.clamp(max=len(seen) - 1)] & (ids < len(seen))
    return 1.0 - float(known.float().mean()) if len(ids) else 0.0
