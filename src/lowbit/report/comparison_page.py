"""`render_comparison`: several models of one source on one page.

In order: what was found in words, size against quality, the figures, error by block, samples side by side, and how each
was made. Self-contained like the report's page, and escaped in the same way.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from lowbit.report import verdict
from lowbit.report.chart import on_front, quality_chart, quality_table
from lowbit.report.compared import Compared, Comparison
from lowbit.report.elements import column_heads, command_line, number_cell, scrolling, section
from lowbit.report.html import page
from lowbit.report.markup import Html, join, tag
from lowbit.report.plot import MARKERS, marker_definitions, marker_symbol
from lowbit.report.samples import samples_section
from lowbit.report.schema import Evaluation, TensorEntry
from lowbit.report.units import (
    DASH,
    NBSP,
    decibel,
    number,
    percent,
    plural,
    significant,
    size,
    with_error,
)

_CURVE_HEIGHT = 240  # CSS pixels
_SAME_SIZE = 0.02  # files that differ by less are called equally large


def render_comparison(comparison: Comparison) -> str:
    """The whole page, from doctype to `</html>`."""
    body = join(
        marker_definitions(),
        _masthead(comparison),
        _size_and_quality(comparison),
        _figures(comparison),
        samples_section([(model.label, model.headline.samples) for model in comparison.models]),
        error_curves(comparison.models),
        _made(comparison),
    )
    return page(f"{comparison.reference} in {len(comparison.models)} versions – lowbit comparison", body, "copy.js")


def _masthead(comparison: Comparison) -> Html:
    run = comparison.models[0].headline
    text = f"{run.windows:,} windows of {run.window_tokens:,} tokens of {run.text.name}"
    return tag(
        "header",
        tag("p", "lowbit comparison", class_="kicker"),
        tag("h1", comparison.reference, tag("span", f" in {plural(len(comparison.models), 'version')}")),
        tag("p", f"{text} · {run.protocol} · sha256 {run.text.sha256[:12]}", class_="meta"),
        tag("p", findings(comparison.models), class_="verdict"),
        verdict.explained(),
    )


def findings(models: Sequence[Compared]) -> str:
    """Which is closest, which is smallest, and which are beaten in both; ties within the error are called so."""
    closest = min(models, key=lambda model: model.headline.kld_mean or 0.0)
    smallest = min(models, key=lambda model: model.headline.file_bytes)
    said = [
        f"Closest to the source is {closest.label}, {_divergence(closest.headline)}, {verdict.words(closest.headline)}"
    ]
    if smallest is closest:
        said[0] += ", and it is the smallest"
    else:
        said.append(
            f"Smallest is {smallest.label}, {size(smallest.headline.file_bytes)}, "
            f"{_divergence(smallest.headline)}, {verdict.words(smallest.headline)}"
        )
    said += [sentence for model in models if (sentence := _beaten(model, models)) is not None]
    return ". ".join(said) + "."


def _divergence(run: Evaluation) -> str:
    value, error = with_error(run.kld_mean or 0.0, run.kld_se)
    return f"KLD {value}" + (f" ±{NBSP}{error}" if error else "")


def _beaten(model: Compared, models: Sequence[Compared]) -> str | None:
    """By whom, where one is at most as large and closer by more than two standard errors of the difference."""
    own = model.headline
    for other in models:
        run = other.headline
        gap = (own.kld_mean or 0.0) - (run.kld_mean or 0.0)
        error = math.hypot(own.kld_se or 0.0, run.kld_se or 0.0)
        if other is not model and run.file_bytes <= own.file_bytes * (1 + _SAME_SIZE / 4) and gap > 2 * error:
            return f"{other.label} beats {model.label}: no larger and closer"
    return None


def _size_and_quality(comparison: Comparison) -> Html:
    marks = [model.mark(f"#model-{index}") for index, model in enumerate(comparison.models)]
    caption = (
        "Mean KL divergence from the source against the size of the weight files; ± is one standard error. The line "
        "joins the models that none other beats in both. " + sizes_differ(comparison.models)
    )
    return section(
        "quality", "Size and quality", tag("p", caption, class_="caption"), quality_chart(marks), quality_table(marks)
    )


def sizes_differ(models: Sequence[Compared]) -> str:
    """That files of different size are compared, and by how much they differ."""
    ordered = sorted(models, key=lambda model: model.headline.file_bytes)
    least, most = ordered[0], ordered[-1]
    ratio = most.headline.file_bytes / max(least.headline.file_bytes, 1) - 1
    if ratio <= _SAME_SIZE:
        return "The files are of equal size, within 2 %."
    return (
        f"The files are not of equal size: {most.label} takes {percent(ratio, 0)} more than {least.label}, so a lower "
        "divergence of a larger file is no merit of its method."
    )


def _figures(comparison: Comparison) -> Html:
    """One row per model and variant."""
    heads = column_heads(
        "Model", "Size", "Bits / weight", "KL divergence", "KLD, 99 %", "Perplexity ratio", "Same next token", "Figures"
    )
    rows = [_figures_row(model, run) for model in comparison.models for run in reversed(model.evaluations)]
    table = scrolling(tag("table", heads, tag("tbody", *rows), class_="compared"), "Figures")
    left = [model.label for model in comparison.models if model.leaves_activations]
    note = (
        f"Activations were not rounded in the evaluation of {', '.join(left)}, although the scheme does."
        if left
        else None
    )
    return section("figures", "Figures", table, tag("p", note, class_="caption after") if note else None)


def _figures_row(model: Compared, run: Evaluation) -> Html:
    first = run is model.headline
    name = model.label if first else "weights alone"
    if first and run.activations == "simulated":
        name = join(model.label, " ", tag("span", "activations rounded", class_="soft"))
    values = (
        size(run.file_bytes) if first else "",
        number(run.bits_per_weight, 2) if first else "",
        _both(run.kld_mean, run.kld_se),
        DASH if run.kld_p99 is None else significant(run.kld_p99),
        _both(run.ppl_ratio, run.ppl_ratio_se),
        _both(run.same_top1, run.same_top1_se, 100) + f"{NBSP}%",
    )
    origin = {"report": "from its report", "measured": "measured now"}[model.origin]
    return tag(
        "tr",
        tag("th", name, scope="row"),
        *(number_cell(value) for value in values),
        tag("td", origin if first else "", class_="soft"),
        class_=None if first else "second",
    )


def _both(value: float | None, error: float | None, scale: float = 1) -> str:
    if value is None:
        return DASH
    shown, uncertainty = with_error(value, error, scale)
    return f"{shown} ±{NBSP}{uncertainty}" if uncertainty else shown


def error_curves(models: Sequence[Compared]) -> Html | None:
    """Mean relative error of the weights of each block, in decibels, one line per model; None without reports."""
    curves = [(model.label, block_errors(model.report.tensors)) for model in models if model.report is not None]
    curves = [(label, errors) for label, errors in curves if errors]
    if not curves:
        return None
    values = [decibel(error) for _, errors in curves for error in errors.values() if error > 0]
    if not values:
        return None
    low, high = math.floor(min(values) - 0.5), math.ceil(max(values) + 0.5)
    step = next(step for step in (1, 2, 5, 10, 20, 50) if (high - low) / step <= 7)
    low, high = step * math.floor(low / step), step * math.ceil(high / step)
    ticks = range(low, high + 1, step)
    blocks = sorted({block for _, errors in curves for block in errors})

    def y(value: float) -> float:
        return 100 * (high - max(value, low)) / (high - low)

    def x(block: int) -> float:
        return 100 * (blocks.index(block) + 0.5) / len(blocks)

    lines = [tag("line", x1="0", x2="100%", y1=f"{y(tick):.1f}%", y2=f"{y(tick):.1f}%") for tick in ticks]
    every = next(each for each in (1, 2, 5, 10, 20, 50, 10**9) if each * 16 >= len(blocks))
    names = [
        tag("text", str(block), x=f"{x(block):.2f}%", y="100%", dy="1.7em")
        for i, block in enumerate(blocks)
        if i % every == 0
    ]
    drawn, points = [], []
    for index, (label, errors) in enumerate(curves):
        at = [(x(block), y(decibel(error) if error > 0 else low)) for block, error in sorted(errors.items())]
        drawn.append(tag("polyline", points=" ".join(f"{a:.2f},{b:.2f}" for a, b in at), class_=f"c{index % 8}"))
        for (a, b), block in zip(at, sorted(errors), strict=True):
            title = tag("title", f"{label}, block {block}: {number(decibel(errors[block]), 1)} dB")
            shape = tag("path", d=MARKERS[index % len(MARKERS)], class_=f"c{index % 8}")
            points.append(tag("svg", tag("g", shape, title), x=f"{a:.2f}%", y=f"{b:.2f}%", class_="spot"))
    stretched = tag(
        "svg", *drawn, class_="lines strong", viewBox="0 0 100 100", preserveAspectRatio="none", aria_hidden="true"
    )
    said = "; ".join(
        f"{label} {number(min(map(decibel, errors.values())), 1)} to {number(max(map(decibel, errors.values())), 1)} dB"
        for label, errors in curves
    )
    picture = tag(
        "svg",
        tag("g", *lines, *names, class_="grid", aria_hidden="true"),
        stretched,
        *points,
        width="100%",
        height=_CURVE_HEIGHT,
        role="img",
        aria_label=f"Mean relative error of the weights by block: {said}",
        class_="curves",
    )
    axis = (tag("text", f"{number(tick, 0)} dB", x="100%", y=f"{y(tick):.1f}%", dy="0.32em") for tick in ticks)
    side = tag("svg", *axis, class_="plot-axis", height=_CURVE_HEIGHT, aria_hidden="true")
    frame = tag(
        "div", side, tag("div", picture, class_="plot-scroll", style=f"--columns:{len(blocks)}"), class_="plot-frame"
    )
    key = (tag("span", marker_symbol(index), label) for index, (label, _) in enumerate(curves))
    caption = (
        "Relative error ‖W − Ŵ‖² ∕ ‖W‖² over all quantized weights of a transformer block, against what each file was "
        "made from. Methods that calibrate may accept a larger error of the weights for a smaller one of the outputs."
    )
    return section("errors", "Error by block", tag("p", caption, class_="caption"), tag("p", *key, class_="key"), frame)


def block_errors(tensors: Sequence[TensorEntry]) -> dict[int, float]:
    """Block → mean relative error of its quantized tensors, by number of weights."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for tensor in tensors:
        if tensor.block is not None and tensor.relative_error is not None:
            weights = math.prod(tensor.shape)
            sums[tensor.block][0] += weights * tensor.relative_error
            sums[tensor.block][1] += weights
    return {block: error / weights for block, (error, weights) in sums.items() if weights}


def _made(comparison: Comparison) -> Html:
    """Of each model: where it lies, how it was made, whether it would load."""
    marks = [model.mark() for model in comparison.models]
    parts = (
        _made_one(index, model, on_front(mark, marks))
        for index, (model, mark) in enumerate(zip(comparison.models, marks, strict=True))
    )
    return section("made", "How they were made", *parts)


def _made_one(index: int, model: Compared, front: bool) -> Html:
    report, run = model.report, model.headline
    facts = [("Path", model.path), ("On the front", "yes" if front else "no")]
    if report is not None:
        settings = report.settings
        facts += [("Scheme", settings.scheme), ("Method", settings.method), ("Format", report.output.format)]
        if settings.calibration is not None:
            text = settings.calibration
            facts.append(("Calibration", f"{text.name}, {text.tokens:,} tokens, sha256 {(text.sha256 or DASH)[:12]}"))
        if report.verification is not None:
            checks = report.verification.checks
            failed = sum(not check.passed for check in checks)
            facts.append(
                ("Verified", f"{report.verification.engine}: {len(checks) - failed} of {len(checks)} rules hold")
            )
        facts.append(("Made by", f"lowbit {report.lowbit}, {report.created:%Y-%m-%d}"))
    else:
        facts.append(("Scheme", model.scheme))
        facts.append(("Report", "none: lowbit did not make it, so its errors are not known tensor by tensor"))
    facts += [("Reference", run.reference or DASH), ("Computed in", run.dtype)]
    facts += [("Notes", "; ".join(run.notes))] if run.notes else []
    items = (tag("div", tag("dt", term), tag("dd", value)) for term, value in facts)
    again = None if report is None or report.command is None else command_line(report.command)
    return tag("article", tag("h3", model.label), again, tag("dl", *items), id=f"model-{index}", class_="made")
