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

from lowbit.report import sections, summary, tables
from lowbit.report.markup import Html, escape, join
from lowbit.report.plot import marker_definitions
from lowbit.report.schema import Report

_HERE = Path(__file__).parent


def render_html(report: Report) -> str:
    """The whole page, from doctype to `</html>`."""
    style, script = _asset("report.css"), _asset("report.js")
    return Template(_asset("report.html")).substitute(
        title=escape(f"{report.source.model} in {report.settings.scheme} – lowbit report"),
        policy=_policy(script),
        style=style,
        script=script,
        body=_body(report),
    )


def _body(report: Report) -> Html:
    return join(
        marker_definitions(),
        summary.masthead(report),
        summary.cards(report),
        sections.serve(report),
        sections.evaluation(report),
        sections.errors(report),
        tables.breakdown(report),
        sections.left_alone(report),
        sections.notes(report),
        sections.verification(report),
        tables.tensor_table(report),
        sections.provenance(report),
    )


def _policy(script: str) -> str:
    """Only our own script runs; nothing is fetched. Style stays open for the widths of bars."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
