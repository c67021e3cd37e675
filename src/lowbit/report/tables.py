"""The two tables over all tensors: bytes by role, and the tensors themselves."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from lowbit.report.activations import recorded_inputs
from lowbit.report.elements import column_heads, number_cell, scrolling, search_box, section
from lowbit.report.histogram import histogram_data
from lowbit.report.markup import Html, breakable, join, tag
from lowbit.report.plot import marker_symbol, order_roles
from lowbit.report.schema import Report, TensorEntry
from lowbit.report.units import DASH, decibel, decibel_text, number, percent, shape_text, significant, size

COLUMNS = ("Tensor", "Role", "Block", "Error, dB", "Max error", "Scheme", "Bits", "Bytes", "Shape", "Notes")
KINDS = (("all", "all tensors"), ("quantized", "quantized"), ("alone", "left alone"), ("noted", "with notes"))
# What unmeasured and exact tensors sort as: unmeasured first, then exact, then by decibels.
UNMEASURED, EXACT = -1e9, -1e6


def breakdown(report: Report) -> Html:
    """Where the bytes are: one bar for the model, one row per role."""
    by_role: dict[str, list[TensorEntry]] = defaultdict(list)
    for tensor in report.tensors:
        by_role[tensor.role].append(tensor)
    roles = sorted(by_role, key=lambda role: -sum(tensor.bytes for tensor in by_role[role]))
    largest = max((sum(tensor.bytes for tensor in members) for members in by_role.values()), default=0)
    total = sum(tensor.bytes for tensor in report.tensors)
    head = column_heads("Role", "", "Bytes", "Share", "Bits / weight", "Tensors", "Mean error, dB")
    rows = [_role_row(role, by_role[role], largest, total) for role in roles]
    table = tag("table", head, tag("tbody", *rows), class_="roles")
    return section("bytes", "Where the bytes are", _whole_bar(report.tensors, total), scrolling(table, "By role"))


def _whole_bar(tensors: Sequence[TensorEntry], total: int) -> Html:
    quantized = sum(tensor.bytes for tensor in tensors if tensor.scheme)
    parts, key = [], []
    for kind, words, count in (("quantized", "quantized", quantized), ("alone", "left alone", total - quantized)):
        share = count / total if total else 0.0
        parts.append(tag("div", class_=kind, style=f"flex-grow:{share:.4f}"))
        key.append(tag("span", tag("i", class_=kind), f"{size(count)} {words}, {percent(share)}"))
    return join(tag("div", *parts, class_="whole-bar", aria_hidden="true"), tag("p", *key, class_="key"))


def _role_row(role: str, members: Sequence[TensorEntry], largest: int, total: int) -> Html:
    stored = sum(tensor.bytes for tensor in members)
    quantized = sum(tensor.bytes for tensor in members if tensor.scheme)
    weights = sum(math.prod(tensor.shape) for tensor in members)
    bars = (
        tag("i", class_=kind, style=f"width:{100 * count / largest if largest else 0:.2f}%")
        for kind, count in (("quantized", quantized), ("alone", stored - quantized))
        if count
    )
    measured = [tensor.relative_error for tensor in members if tensor.relative_error is not None]
    mean_error = decibel_text(sum(measured) / len(measured)) if measured else DASH
    numbers = (
        size(stored),
        percent(stored / total if total else 0.0),
        number(8 * stored / max(weights, 1), 2),
        f"{len(members):,}",
        mean_error,
    )
    return tag("tr", tag("th", role, scope="row"), tag("td", *bars, class_="bar"), *(number_cell(n) for n in numbers))


def tensor_table(report: Report) -> Html:
    """Every tensor, in file order; report.js sorts and filters."""
    heads = (tag("th", tag("button", label, type="button"), scope="col", aria_sort="none") for label in COLUMNS)
    roles = order_roles(tensor.role for tensor in report.tensors if tensor.relative_error is not None)
    position = {role: i for i, role in enumerate(roles)}
    recorded = recorded_inputs(report)
    rows = (_tensor_row(i, tensor, position.get(tensor.role), recorded) for i, tensor in enumerate(report.tensors))
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows), id="tensors-table")
    kinds = tag("select", *(tag("option", words, value=value) for value, words in KINDS), id="kind")
    show = tag("div", tag("label", "Show", for_="kind"), kinds, class_="toolbar scripted")
    tools = tag("div", search_box("find-table"), show, class_="tools")
    return section("tensors", "All tensors", tools, scrolling(table, "All tensors", "tall"))


def _tensor_row(row: int, tensor: TensorEntry, position: int | None, recorded: frozenset[str]) -> Html:
    symbol = None if position is None or tensor.relative_error is None else marker_symbol(position)
    notes = " · ".join(([tensor.reason] if tensor.reason else []) + list(tensor.notes))
    return tag(
        "tr",
        tag("th", breakable(tensor.name), scope="row"),
        tag("td", symbol, tensor.role),
        number_cell("" if tensor.block is None else str(tensor.block)),
        _error_cell(tensor.relative_error),
        _max_error_cell(tensor.max_error),
        tag("td", tensor.scheme or DASH),
        number_cell(number(tensor.bits_per_weight, 2)),
        number_cell(f"{tensor.bytes:,}", tensor.bytes),
        number_cell(shape_text(tensor.shape), math.prod(tensor.shape)),
        tag("td", notes or None),
        id=f"t{row}",
        data_kind="quantized" if tensor.scheme else "alone",
        data_noted=bool(tensor.notes),
        data_h=histogram_data(tensor.histogram),
        data_input=tensor.reads if tensor.reads in recorded else None,
    )


def _error_cell(error: float | None) -> Html:
    if error is None:
        return number_cell(DASH, UNMEASURED)
    return number_cell(decibel_text(error), decibel(error) if error > 0 else EXACT)


def _max_error_cell(error: float | None) -> Html:
    return number_cell(DASH, UNMEASURED) if error is None else number_cell(significant(error), error)
