"""What `lowbit diagnose` found: verdict, findings, where restoring weights helps, flipped tokens, what to do."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.report.diagnosis import Contribution, Diagnosis, Finding, Flip, Suggestion
from lowbit.report.elements import column_heads, command_line, number_cell, scrolling, section
from lowbit.report.heatmap import Cell, heat_map
from lowbit.report.markup import Html, tag
from lowbit.report.schema import Report
from lowbit.report.units import DASH, NBSP, number, percent, plural, significant, size, with_error

FLIPS_SHOWN = 12
GROUPS_SHOWN = 8
_SIGNS = {"fault": ("✗", "fault: ", "bad"), "warning": ("!", "warning: ", "open"), "note": ("i", "note: ", "open")}


def damage(report: Report) -> Html | None:
    """The section; None where nothing was diagnosed."""
    found = report.diagnosis
    if found is None:
        return None
    return section(
        "damage",
        "What hurts",
        tag("p", found.verdict, class_="lead"),
        tag("p", _conditions(found), class_="caption"),
        tag("ul", *(_finding(each) for each in found.findings), class_="checks") if found.findings else None,
        sensitivity(found.contributions, report),
        _groups(found),
        _flips(found.flips),
        _suggestions(found.suggestions),
    )


def sensitivity(contributions: Sequence[Contribution], report: Report) -> Html | None:
    """KLD that restoring takes off, by block and set of linears; what is within the noise has the colour of 0."""
    row_of = {tensor.name: row for row, tensor in enumerate(report.tensors)}
    cells = [
        Cell(
            each.block,
            "whole block" if each.level == "block" else each.role,
            each.kld if each.significant else 0.0,
            row_of.get(each.tensor or ""),
        )
        for each in contributions
        if each.block is not None and each.level in ("block", "set", "tensor")
    ]
    return heat_map(
        "heat-sensitivity",
        "Sensitivity: KLD that giving back the source's weights takes off",
        cells,
        _nats,
        logarithmic=False,
    )


def _nats(kld: float) -> str:
    return f"{'0' if kld <= 0 else significant(kld, 2)}{NBSP}nats"


def _conditions(found: Diagnosis) -> str:
    text = f"{found.text.name}, {found.windows:,} windows of {found.window_tokens:,} tokens"
    if found.kld is None:
        return f"On {text}; the divergence is not finite."
    value, error = with_error(found.kld, found.kld_se)
    return f"On {text}: mean KLD {value}{f' ±{NBSP}{error}' if error else ''}, weights alone."


def _finding(finding: Finding) -> Html:
    sign, words, kind = _SIGNS[finding.severity]
    cost = [] if finding.kld is None else [f"{significant(finding.kld, 2)}{NBSP}nats"]
    cost += [] if finding.share is None else [f"{percent(finding.share, 0)} of all"]
    detail = " · ".join(filter(None, (finding.detail, ", ".join(cost))))
    return tag(
        "li",
        tag("span", sign, class_="sign", aria_hidden="true"),
        tag("span", tag("span", words, class_="outcome" if kind == "bad" else "unseen"), finding.title),
        tag("span", detail, class_="detail") if detail else None,
        class_=kind,
    )


def _groups(found: Diagnosis) -> Html | None:
    """The groups that cost most."""
    largest = sorted(found.contributions, key=lambda each: -each.kld)[:GROUPS_SHOWN]
    if not largest:
        return None
    rows = []
    for each in largest:
        value, error = with_error(each.kld, each.se)
        share = percent(each.kld / found.kld) if found.kld else DASH
        where = f"{each.name} in all blocks" if each.level == "everywhere" else each.name
        noise = "" if each.significant else "within the noise"
        rows.append(
            tag(
                "tr",
                tag("th", where, scope="row"),
                number_cell(f"{value} ±{NBSP}{error}" if error else value),
                number_cell(share),
                number_cell(size(each.bytes)),
                tag("td", noise, class_="soft"),
            )
        )
    head = column_heads("Given back", "KLD less", "Of all", "Bytes", "")
    table = tag("table", head, tag("tbody", *rows), class_="groups")
    return tag("div", tag("h3", "What giving back the source's weights would gain"), scrolling(table, "Groups"))


def _flips(flips: Sequence[Flip]) -> Html | None:
    if not flips:
        return None
    rows = (
        tag(
            "tr",
            tag("td", tag("q", f"…{flip.context}")),
            tag(
                "td", tag("q", flip.reference), " ", tag("span", percent(min(flip.reference_p, 1.0), 0), class_="soft")
            ),
            tag(
                "td", tag("q", flip.quantized), " ", tag("span", percent(min(flip.quantized_p, 1.0), 0), class_="soft")
            ),
            number_cell(number(flip.kld, 2)),
        )
        for flip in flips[:FLIPS_SHOWN]
    )
    head = column_heads("After", "Source", "Quantized", "KLD")
    shown = f"The worst {min(FLIPS_SHOWN, len(flips))} of {plural(len(flips), 'flipped token')}"
    table = tag("table", head, tag("tbody", *rows), class_="flips")
    return tag(
        "div",
        tag("h3", shown if len(flips) > FLIPS_SHOWN else "Tokens that flipped, worst first"),
        scrolling(table, "Flipped tokens"),
    )


def _suggestions(suggestions: Sequence[Suggestion]) -> Html | None:
    if not suggestions:
        return None
    parts = []
    for each in suggestions:
        gain = None if each.gain is None else f"about {significant(each.gain, 2)}{NBSP}nats less"
        cost = None if each.bytes is None else f"{'' if each.bytes >= 0 else chr(0x2212)}{size(abs(each.bytes))} more"
        words = ", ".join(filter(None, (gain, cost)))
        parts.append(
            tag("li", each.text, tag("span", f" {words}", class_="soft") if words else None, command_line(each.command))
        )
    return tag("div", tag("h3", "What to do"), tag("ol", *parts, class_="suggestions"))
