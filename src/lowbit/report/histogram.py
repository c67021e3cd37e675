"""The weights of one tensor before and after rounding, as two histograms on one axis; report.js shows any tensor's.

What the page holds of each tensor is what the report holds, 2 · 63 counts in base64, in the attribute `data-h` of its
row in the tensor table: "reach values rows source decoded". The tensor of largest error is drawn here, so that the
picture is there without JavaScript, too. Heights are square roots of counts, so that tails can be seen.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence

from lowbit.report.markup import Html, join, tag
from lowbit.report.schema import BINS, Histogram, TensorEntry
from lowbit.report.units import DASH, decibel_text, number, percent, shape_text, significant

HEIGHT = 180  # CSS pixels
NOT_RECORDED = "not recorded"


def histogram_data(histogram: Histogram | None) -> str | None:
    """The attribute `data-h` of a table row."""
    if histogram is None:
        return None
    parts = (
        f"{histogram.reach:.6g}",
        str(histogram.values),
        str(histogram.rows),
        histogram.source,
        histogram.decoded or "",
    )
    return " ".join(parts)


def weights_figure(tensors: Sequence[TensorEntry], recorded: frozenset[str] = frozenset()) -> Html | None:
    """Picker, picture and facts; None where no tensor has a histogram.

    recorded  names of the inputs of which there are activations below
    """
    shown = [row for row, tensor in enumerate(tensors) if tensor.histogram is not None]
    if not shown:
        return None
    row = max(shown, key=lambda row: tensors[row].relative_error or -1.0)
    tensor = tensors[row]
    picker = tag(
        "div",
        tag("label", "Tensor", for_="pick"),
        tag("button", "‹", type="button", id="pick-before", aria_label="Previous tensor"),
        tag("select", id="pick"),
        tag("button", "›", type="button", id="pick-next", aria_label="Next tensor"),
        class_="toolbar scripted picker",
    )
    name = tag("p", tensor.name, class_="picked", id="picked")
    drawn = tag("div", _picture(tensor), _key(), class_="histogram-frame")
    return tag(
        "div",
        tag("h3", "Weights before and after"),
        picker,
        name,
        tag("div", drawn, _facts(tensor, recorded), class_="histogram-row"),
        id="weights",
        data_row=row,
    )


def bins_of(counts: str) -> tuple[float, ...]:
    """Shares of the largest count, BINS of them."""
    return tuple(count / 65535 for count in struct.unpack(f"<{BINS}H", base64.b64decode(counts)))


def outline(counts: str) -> str:
    """SVG path of the steps, in a box of BINS by 100: y is 100 less the square root of the share."""
    path = "M0 100"
    for column, share in enumerate(bins_of(counts)):
        path += f"V{100 - 96 * share**0.5:.1f}H{column + 1}"
    return path + "V100"


def _picture(tensor: TensorEntry) -> Html:
    histogram = tensor.histogram
    assert histogram is not None
    paths = (
        tag("path", d=outline(histogram.source), class_="source", id="h-source"),
        tag("path", d=outline(histogram.decoded) if histogram.decoded else "M0 0", class_="decoded", id="h-decoded"),
    )
    drawing = tag(
        "svg",
        *paths,
        viewBox=f"0 0 {BINS} 100",
        preserveAspectRatio="none",
        width="100%",
        height=HEIGHT,
        role="img",
        aria_label=_described(tensor, histogram),
        id="h-picture",
        class_="histogram",
    )
    ticks = (tag("span", text) for text in _ticks(histogram.reach))
    return join(drawing, tag("p", *ticks, class_="h-axis", id="h-axis"))


def _ticks(reach: float) -> tuple[str, ...]:
    outer, half = significant(reach), significant(reach / 2)
    return (f"\u2212{outer}", f"\u2212{half}", "0", half, outer)


def _described(tensor: TensorEntry, histogram: Histogram) -> str:
    both = "before and after rounding" if histogram.decoded else "as stored"
    return (
        f"Histogram of the weights of {tensor.name}, {both}, from \u2212{histogram.reach:.3g} to {histogram.reach:.3g}"
    )


def _key() -> Html:
    source = tag("span", tag("i", class_="source"), "source")
    decoded = tag("span", tag("i", class_="decoded"), "as stored, decoded")
    words = "height: square root of the count; the outermost bins hold what lies beyond"
    return tag("p", source, decoded, tag("span", words, class_="soft"), class_="key")


def _facts(tensor: TensorEntry, recorded: frozenset[str]) -> Html:
    """In the order in which report.js fills them anew."""
    histogram = tensor.histogram
    assert histogram is not None
    error = tensor.relative_error
    pairs = [
        ("Error", DASH if error is None else f"{decibel_text(error)} dB" if error else "exact"),
        ("Scheme", tensor.scheme or "not quantized"),
        ("Bits per weight", number(tensor.bits_per_weight, 2)),
        ("Shape", shape_text(tensor.shape)),
        ("Sample", _sample(tensor, histogram)),
    ]
    if recorded:
        pairs.append(("Input", tensor.reads if tensor.reads in recorded and tensor.reads else NOT_RECORDED))
    items = (tag("div", tag("dt", term), tag("dd", value)) for term, value in pairs)
    return tag("dl", *items, id="h-facts")


def _sample(tensor: TensorEntry, histogram: Histogram) -> str:
    count = 1
    for side in tensor.shape:
        count *= side
    return f"{histogram.values:,} weights in {histogram.rows:,} rows, {percent(histogram.values / max(count, 1))}"
