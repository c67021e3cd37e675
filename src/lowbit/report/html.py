"""`render_html`: a report as one self-contained page.

No network, no framework, no template language: Python builds the body (escaped by construction, see markup.py), the
stylesheet and script are files beside this one and go in as they are. A Content-Security-Policy names the script by its
hash, so even markup that slipped through could neither run nor fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from string import Template

from lowbit.report import quality, sections, summary, tables
from lowbit.report.damage import damage
from lowbit.report.markup import Html, escape, join
from lowbit.report.plot import marker_definitions
from lowbit.report.samples import samples_section
from lowbit.report.schema import Report

_HERE = Path(__file__).parent


def render_html(report: Report) -> str:
    """The whole page, from doctype to `</html>`."""
    title = f"{report.source.model} in {report.settings.scheme} – lowbit report"
    return page(title, _body(report), "report.js", "copy.js")


def page(title: str, body: Html, *scripts: str) -> str:
    """A page around a body, with scripts that lie beside this file."""
    script = "\n".join(_asset(name) for name in scripts)
    return Template(_asset("report.html")).substitute(
        title=escape(title), policy=_policy(script), style=_asset("report.css"), script=script, body=body
    )


def _body(report: Report) -> Html:
    return join(
        marker_definitions(),
        summary.masthead(report),
        summary.cards(report),
        quality.size_and_quality(report),
        _samples(report),
        damage(report),
        sections.errors(report),
        sections.evaluation(report),
        sections.serve(report),
        tables.breakdown(report),
        sections.left_alone(report),
        sections.notes(report),
        sections.verification(report),
        tables.tensor_table(report),
        sections.provenance(report),
    )


def _samples(report: Report) -> Html | None:
    evaluation = summary.headline_evaluation(report)
    return None if evaluation is None else samples_section([(evaluation.label, evaluation.samples)])


def _policy(script: str) -> str:
    """Only our own script runs; nothing is fetched. Style stays open for the widths of bars."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
