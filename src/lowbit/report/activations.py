"""How strong the channels of recorded inputs were on the calibration text: one histogram per input, as a strip.

    across   log2 of the root mean square of a channel, one bin per quarter of a doubling
    shade    number of channels, by square root

A channel far to the right of the others is an outlier: rounding activations, and the columns of the weight behind it,
cost most there. Channels that were never anything but 0 are counted beside the strip.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections import Counter
from collections.abc import Sequence

from lowbit.report.heatmap import STEPS
from lowbit.report.markup import Html, tag
from lowbit.report.schema import InputRecord, Report
from lowbit.report.units import plural, significant

ROW = 15  # CSS pixels
PER_DOUBLING = 4
MOST_BINS = 160


def activation_strips(inputs: Sequence[InputRecord]) -> Html | None:
    """The strips, those of one role together; None where nothing was recorded."""
    ordered = sorted(inputs, key=lambda record: (record.name.rpartition(".")[2], record.block or 0))
    counted = [(record, bins) for record in ordered if (bins := channel_bins(record))]
    if not counted:
        return None
    used = [position for _, bins in counted for position in bins]
    first, last = min(used), max(used)
    first = max(first, last - MOST_BINS + 1)  # what is weaker than that goes into the first bin
    columns = last - first + 1
    rects, names = [], []
    for line, (record, bins) in enumerate(counted):
        short = record.name.removeprefix("model.layers.")
        names.append(tag("span", short, title=record.name, data_input=record.name))
        inside = Counter[int]()
        for position, count in bins.items():
            inside[max(position, first)] += count
        most = max(inside.values())
        for position, count in sorted(inside.items()):
            step = min(STEPS - 1, int((count / most) ** 0.5 * STEPS))
            words = f"{record.name}: {plural(count, 'channel')} at {significant(2.0 ** (position / PER_DOUBLING))}"
            rects.append(
                tag(
                    "rect",
                    tag("title", words),
                    x=f"{100 * (position - first) / columns:.2f}%",
                    y=line * ROW,
                    width=f"{100 / columns:.2f}%",
                    height=ROW - 3,
                    class_=f"h{step}",
                )
            )
    height = ROW * len(counted)
    every = next(step for step in (4, 8, 16, 32) if columns / step <= 12)
    ticks = (
        tag(
            "text",
            significant(2.0 ** (position / PER_DOUBLING), 2),
            x=f"{100 * (position - first + 0.5) / columns:.2f}%",
            y=height,
            dy="1.2em",
        )
        for position in range(first, last + 1)
        if position % every == 0
    )
    tokens = max(record.tokens for record, _ in counted)
    picture = tag(
        "svg",
        tag("g", *rects),
        tag("g", *ticks, class_="ticks", aria_hidden="true"),
        width="100%",
        height=height + 22,
        role="img",
        style=f"--columns:{columns}",
        class_="heat strips",
        aria_label=f"Strength of the channels of {plural(len(counted), 'input')}, as histograms",
    )
    frame = tag(
        "div",
        tag("div", *names, class_="heat-roles strips", aria_hidden="true"),
        tag("div", picture, class_="heat-scroll"),
        class_="heat-frame",
    )
    caption = (
        f"Inputs of linears on {tokens:,} calibration tokens: root mean square of each channel, logarithmic; "
        "the more colour, the more channels. Lone cells far to the right are outliers. A few evenly spaced blocks are "
        "recorded."
    )
    return tag("div", tag("h3", "Activations"), tag("p", caption, class_="caption"), frame, id="activations")


def recorded_inputs(report: Report) -> frozenset[str]:
    """Names of the inputs that have a strip."""
    calibration = report.settings.calibration
    return frozenset() if calibration is None else frozenset(record.name for record in calibration.inputs)


def channel_bins(record: InputRecord) -> Counter[int]:
    """Bin of log2 rms, in quarters of a doubling → channels; empty where the codes are not what they should be."""
    try:
        codes = base64.b64decode(record.codes, validate=True)
    except (binascii.Error, ValueError):
        return Counter()
    counts = Counter(codes)
    bins = Counter[int]()
    for code, count in counts.items():
        level = (record.low + record.step * (code - 1)) / 2 * PER_DOUBLING
        if code and math.isfinite(level) and abs(level) < 2000:
            bins[math.floor(level)] += count
    return bins
