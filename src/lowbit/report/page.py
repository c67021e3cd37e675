"""`render_html`, `render_comparison`: a report, or several models of one source, as one self-contained page.

Python prepares plain values (the modules beside this one); the templates make markup of them. What a template prints is
escaped by construction: autoescape is on, and everything passes `_visible` first, which shows characters that do not
print (control characters, text-direction overrides, lone surrogates) as their escape, so that a name looks like what it
is. Everything in a report is somebody else's text, tensor names included.

The stylesheet and the scripts are files that go in as they are. A Content-Security-Policy names the script by its hash,
so even markup that slipped through could neither run nor fetch anything. Jinja is imported when a page is written.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.report import chart, compared, details, heatmap, plot, summary, units
from lowbit.report.caches import cache_rows
from lowbit.report.compared import Comparison
from lowbit.report.schema import Report

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
# str.isprintable() is false for every space but the ASCII one; these two are the page's own, between number and unit.
SPACES = frozenset("\u00a0\u202f")


def render_html(report: Report) -> str:
    """The whole page of a report, from doctype to `</html>`."""
    evaluation, calibration = summary.headline_evaluation(report), report.settings.calibration
    return render_page(
        "report.html.j2",
        ("report.js", "page.js"),
        report=report,
        evaluation=evaluation,
        marks=chart.report_marks(report),
        samples=details.prompts([] if evaluation is None else [(summary.run_name(evaluation), evaluation.samples)]),
        maps=heatmap.error_maps(report.tensors),
        weights=plot.weights_figure(report.tensors, heatmap.recorded_inputs(report)),
        strips=None if calibration is None else heatmap.activation_strips(calibration.inputs),
        plot_view=plot.error_plot(report.tensors),
    )


def render_comparison(comparison: Comparison) -> str:
    """The whole page of several models: in words, size against quality, figures, samples, error by block, origins."""
    models = comparison.models
    return render_page(
        "comparison.html.j2",
        ("page.js",),
        comparison=comparison,
        marks=[model.mark(f"#model-{index}") for index, model in enumerate(models)],
        samples=details.prompts([(model.label, model.headline.samples) for model in models]),
        caches=cache_rows(models),
        curves=plot.error_curves({model.label: model.report.tensors for model in models if model.report is not None}),
    )


def render_page(template: str, scripts: tuple[str, ...], **values: object) -> str:
    from markupsafe import Markup

    script = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only our own script runs; nothing is fetched. Style stays open for the widths of bars.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment().get_template(template).render(values, policy=policy, style=style, script=Markup(script))


@cache
def environment() -> Environment:
    """The templates, with the units of units.py as filters and the functions that prepare sections as globals."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, finalize=_visible, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= {
        "breakable": _breakable,
        "lines": _lines,
        "places": lambda value, digits=2: f"{value:.{digits}f}",
        "engine": summary.engine_name,
        "run_name": summary.run_name,
        "histogram_data": plot.histogram_data,
        "plus_minus": units.plus_minus,
        "number": units.number,
        "size": units.size,
        "percent": units.percent,
        "plural": units.plural,
        "quoted": shlex.quote,
        "shape": units.shape_text,
        "significant": units.significant,
    }
    templates.globals |= {
        "summary": summary, "details": details, "chart": chart, "compared": compared, "heatmap": heatmap, "plot": plot,
        "BINS": plot.BINS,
    }  # fmt: skip
    return templates


def _visible(value: object) -> object:
    """What a template prints: markup of the templates as it is, text with its unprintable characters shown, no None."""
    from markupsafe import Markup

    if value is None:
        return ""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(c if c.isprintable() or c in SPACES else f"\\u{ord(c):04x}" for c in value)


def _breakable(name: str) -> Markup:
    """A dotted name that may wrap after its dots; the text stays the same."""
    from markupsafe import Markup, escape

    return Markup(str(escape(_visible(name))).replace(".", ".<wbr/>"))


def _lines(text: str) -> Markup:
    """Escaped, with the text's own line breaks and tabs kept."""
    from markupsafe import Markup

    pieces = text.replace("\t", "    ").replace("\r\n", "\n").split("\n")
    return Markup("\n").join(_visible(piece) for piece in pieces)  # type: ignore[arg-type]
