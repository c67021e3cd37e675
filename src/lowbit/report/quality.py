"""The section of size against quality of one report, and the heat maps of where its error is."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from lowbit.report.chart import Mark, quality_chart, quality_table
from lowbit.report.elements import command_line, section
from lowbit.report.heatmap import Cell, heat_map
from lowbit.report.markup import Html, join, tag
from lowbit.report.schema import Report, TensorEntry
from lowbit.report.summary import headline_evaluation
from lowbit.report.units import decibel_text


def size_and_quality(report: Report) -> Html | None:
    """This model among its neighbours; the chart once two of them were measured on the same text."""
    marks = report_marks(report)
    if len(marks) < 2:
        return None
    measured, planned = (sum((mark.kld is None) == missing for mark in marks) for missing in (False, True))
    caption = []
    if measured > 1:
        caption.append(
            "Mean KL divergence from the source against the size of the weight files, on the same text. "
            "The line joins the models that none other beats in both."
        )
    if planned:
        caption.append(
            "Planned: what the same source would weigh in other schemes, to the byte; it was not made, so "
            "nothing is known of its quality."
        )
    content = [tag("p", " ".join(caption), class_="caption"), quality_chart(marks), quality_table(marks)]
    if measured < 2:
        hint = tag("p", "To place others on the scale of quality, make them and compare:", class_="caption after")
        content += [hint, command_line(f"lowbit compare OUT OTHER --reference {shlex.quote(report.source.model)}")]
    return section("quality", "Size and quality", *content)


def report_marks(report: Report) -> list[Mark]:
    """The model of a report and its neighbours."""
    evaluation = headline_evaluation(report)
    scheme, method = report.settings.scheme, report.settings.method
    label = f"{scheme} {method}" if scheme in {each.scheme for each in report.neighbours} else scheme
    own = Mark(label, report.totals.bytes_out, report.totals.decoder_bits_per_weight, own=True)
    if evaluation is not None and evaluation.kld_mean is not None:
        measured = {"kld": evaluation.kld_mean, "kld_se": evaluation.kld_se, "same_top1": evaluation.same_top1}
        own = replace(own, **measured)
    others = [
        Mark(each.label, each.bytes, each.bits_per_weight, each.kld_mean, each.kld_se, each.same_top1)
        for each in report.neighbours
    ]
    return [own, *others]


def heat_maps(tensors: Sequence[TensorEntry]) -> Html | None:
    """Error of the weights, and of the outputs where a text was run; by block and role."""
    maps = (
        heat_map("heat-weights", "Weights: ‖W − Ŵ‖² ∕ ‖W‖²", _cells(tensors, "relative_error"), _decibels),
        heat_map(
            "heat-outputs",
            "Outputs, on the calibration text: tr(ΔW H ΔWᵀ) ∕ tr(W H Wᵀ)",
            _cells(tensors, "layer_error"),
            _decibels,
        ),
    )
    return join(*maps) if any(maps) else None


def _cells(tensors: Sequence[TensorEntry], field: str) -> list[Cell]:
    return [
        Cell(tensor.block, tensor.role, value, row)
        for row, tensor in enumerate(tensors)
        if tensor.block is not None and (value := getattr(tensor, field)) is not None
    ]


def _decibels(error: float) -> str:
    return "exact" if error == 0 else f"{decibel_text(error)}\u00a0dB"
