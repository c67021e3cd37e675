"""The weights of one tensor before and after rounding, as two histograms on one axis; report.js shows any tensor's.

What the page holds of each tensor is what the report holds, 2 · 63 counts in base64, in the attribute `data-h` of its
row in the tensor table: "reach values rows source decoded". The tensor of largest error is drawn here, so that the
picture is there without JavaScript, too. Heights are square roots of counts, so that tails can be seen.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.report.schema import TensorEntry
from lowbit.report.units import DASH, MINUS, decibel_text, number, percent, shape_text, significant
from lowbit.rounding.histogram import BINS, WeightHistogram

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class WeightsFigure:
    """The tensor that is drawn first: its table row, paths in a box of BINS by 100, ticks, facts as report.js has them.

    decoded  None if the tensor was left alone
    """

    row: int
    name: str
    words: str
    source: str
    decoded: str | None
    ticks: tuple[str, ...]
    facts: list[tuple[str, str]]


def histogram_data(histogram: WeightHistogram) -> str:
    """The attribute `data-h` of a table row."""
    return f"{histogram.reach:.6g} {histogram.values} {histogram.rows} {histogram.source} {histogram.decoded or ''}"


def weights_figure(tensors: Sequence[TensorEntry], recorded: frozenset[str] = frozenset()) -> WeightsFigure | None:
    """None if no tensor has a histogram.

    recorded  names of the inputs of which there are activations below
    """
    shown = [(row, tensor, tensor.histogram) for row, tensor in enumerate(tensors) if tensor.histogram is not None]
    if not shown:
        return None
    row, tensor, histogram = max(shown, key=lambda entry: entry[1].relative_error or -1.0)
    error, reach = tensor.relative_error, histogram.reach
    share = percent(histogram.values / max(math.prod(tensor.shape), 1))
    facts = [
        ("Error", DASH if error is None else f"{decibel_text(error)} dB" if error else "exact"),
        ("Scheme", tensor.scheme or "not quantized"),
        ("Bits per weight", number(tensor.bits_per_weight, 2)),
        ("Shape", shape_text(tensor.shape)),
        ("Sample", f"{histogram.values:,} weights in {histogram.rows:,} rows, {share}"),
    ]
    if recorded:
        facts.append(("Input", tensor.reads if tensor.reads in recorded and tensor.reads else NOT_RECORDED))
    both = "before and after rounding" if histogram.decoded else "as stored"
    words = f"Histogram of the weights of {tensor.name}, {both}, from {MINUS}{reach:.3g} to {reach:.3g}"
    outer, half = significant(reach), significant(reach / 2)
    decoded = outline(histogram.decoded) if histogram.decoded else None
    ticks = (f"{MINUS}{outer}", f"{MINUS}{half}", "0", half, outer)
    return WeightsFigure(row, tensor.name, words, outline(histogram.source), decoded, ticks, facts)


def bins_of(counts: str) -> tuple[float, ...]:
    """Shares of the largest count, BINS of them."""
    return tuple(count / 65535 for count in struct.unpack(f"<{BINS}H", base64.b64decode(counts)))


def outline(counts: str) -> str:
    """SVG path of the steps, in a box of BINS by 100: y is 100 less the square root of the share."""
    steps = (f"V{100 - 96 * share**0.5:.1f}H{column + 1}" for column, share in enumerate(bins_of(counts)))
    return "M0 100" + "".join(steps) + "V100"
