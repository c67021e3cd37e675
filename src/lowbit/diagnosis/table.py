"""A `Diagnosis` in words and tables, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.report.diagnosis import Diagnosis

if TYPE_CHECKING:
    from rich.table import Table

LARGEST = 12


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """The verdict, what was judged, and the findings."""
    kld = "not finite" if diagnosis.kld is None else f"{diagnosis.kld:.5f} ± {diagnosis.kld_se:.5f} nats per token"
    same = "" if diagnosis.same_top1 is None else f", same top-1 {100 * diagnosis.same_top1:.1f} %"
    lines = [
        diagnosis.verdict,
        "",
        f"model      {diagnosis.model}",
        f"reference  {diagnosis.reference}",
        f"text       {diagnosis.text.name}: {diagnosis.windows} windows × {diagnosis.window_tokens} tokens",
        f"KLD        {kld}{same}",
        f"cost       {diagnosis.forward_passes:.1f} forward passes, {diagnosis.seconds:.0f} s",
        "",
    ]
    for finding in diagnosis.findings:
        lines.append(f"{finding.severity + ':':<9}{finding.title}")
        if finding.detail:
            lines.append(f"{'':9}{finding.detail}")
    return "\n".join(lines)


def contribution_table(diagnosis: Diagnosis) -> Table | None:
    """The groups that cost most, largest first; None if none was measured."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    if not diagnosis.contributions:
        return None
    table = Table(title="What restoring a group takes off the KLD", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("group", no_wrap=True)
    for column in ("KLD", "of all", "bytes", ""):
        table.add_column(column, justify="right" if column else "left")
    shown = sorted(diagnosis.contributions, key=lambda each: -each.kld)[:LARGEST]
    for each in shown:
        share = f"{100 * each.kld / diagnosis.kld:.1f} %" if diagnosis.kld else ""
        noise = "" if each.significant else "within noise"
        name = f"{each.name} in all blocks" if each.level == "everywhere" else each.name
        table.add_row(name, f"{each.kld:.5f} ± {each.se:.5f}", share, f"{each.bytes:,}", noise)
    left = len(diagnosis.contributions) - len(shown)
    if left:
        table.caption = f"and {left} smaller ones (--json has all)"
    return table


def flip_table(diagnosis: Diagnosis) -> Table | None:
    """The worst tokens whose most probable successor changed."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    if not diagnosis.flips:
        return None
    table = Table(title="Tokens that flipped, worst first", title_justify="left", box=SIMPLE_HEAD)
    for column in ("after", "reference", "quantized", "KLD"):
        table.add_column(column, justify="right" if column in ("after", "KLD") else "left")
    for flip in diagnosis.flips:
        after = flip.context.replace("\n", "⏎")[-48:]
        table.add_row(
            escape(f"…{after}"), escape(f"{flip.reference!r} {100 * flip.reference_p:.0f} %"),
            escape(f"{flip.quantized!r} {100 * flip.quantized_p:.0f} %"), f"{flip.kld:.2f}",
        )  # fmt: skip
    return table


def suggestion_text(diagnosis: Diagnosis) -> str:
    """What to do, with commands to paste."""
    if not diagnosis.suggestions:
        return ""
    lines = ["what to do:"]
    for each in diagnosis.suggestions:
        error = "" if each.gain_se is None else f" ± {each.gain_se:.5f}"
        gain = [] if each.gain is None else [f"KLD −{each.gain:.5f}{error}"]
        worth = ", ".join(gain + ([f"{each.bytes:+,} bytes"] if each.bytes else []))
        lines += ["", f"# {each.text}{': ' if worth else ''}{worth}", each.command]
    return "\n".join(lines)
