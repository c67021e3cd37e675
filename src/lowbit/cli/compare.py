"""`lowbit compare A B C --reference M`: several quantized models of one source on one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import Json, NoReport, Overwrite, of_judging

if TYPE_CHECKING:
    from lowbit.report.caches import CacheRow
    from lowbit.report.compared import Comparison


def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="QUANT...", help="Folders, .gguf files or hub ids: two or more.")
    ],
    how: Annotated[dict[str, Any], of_judging(windows=40, window_tokens=512)],
    samples: Annotated[int, typer.Option(help="Prompts for every model to answer; 0 for none.", min=0, max=6)] = 3,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure everything again, even if a report has the figures.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Page to write, such as compare.html.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    no_report: NoReport = False,
) -> None:
    """Compare quantized models of one source: size against divergence, metrics, samples, error by block."""
    from lowbit.cli.console import print_json, print_table, say, window_progress
    from lowbit.comparison import add_to_reports
    from lowbit.comparison import compare as run
    from lowbit.export.atomic import refuse_existing_document
    from lowbit.measure import return_freed_memory
    from lowbit.report.caches import cache_rows
    from lowbit.report.compared import sizes_differ
    from lowbit.report.page import render_comparison
    from lowbit.report.schema import write_text

    if output is not None:
        refuse_existing_document(output, overwrite)
    return_freed_memory()
    with window_progress("windows", quiet=json) as update:
        comparison = run(models, samples=samples, fresh=fresh, **how,
                         progress=lambda model, done, total: update(done, total))  # fmt: skip
    if output is not None:
        write_text(render_comparison(comparison), output)
        say(f"page: {output}")
    if not no_report:
        for path in add_to_reports(comparison):
            say(f"added to the report of {path}")
    if json:
        print_json(comparison.to_dict())
        return
    run_first = comparison.models[0].headline
    echo(f"reference  {comparison.reference}")
    echo(f"text       {run_first.text.name}: {run_first.windows} windows × {run_first.window_tokens} tokens")
    print_table(_table(comparison))
    if rows := cache_rows(comparison.models):
        print_table(_cache_table(rows, [model.label for model in comparison.models]))
    echo(sizes_differ(comparison.models).replace("\u00a0", " "))


def _table(comparison: Comparison) -> Any:
    from rich.table import Table

    from lowbit.cli.console import human_bytes
    from lowbit.report.chart import on_front

    marks = [model.mark() for model in comparison.models]
    table = Table(caption="front: no other is as small and as close; ± is one standard error", caption_justify="left")
    table.add_column("model")
    for column in ("size", "bits/weight", "mean KLD (nats)", "PPL ratio", "same top-1"):
        table.add_column(column, justify="right")
    table.add_column("front")
    table.add_column("figures")
    for model, mark in zip(comparison.models, marks, strict=True):
        run = model.headline
        table.add_row(
            f"{model.label}, activations simulated" if run.activations == "simulated" else model.label,
            human_bytes(run.file_bytes),
            f"{run.bits_per_weight:.3f}",
            f"{run.kld_mean:.5f} ± {run.kld_se:.5f}",
            f"{run.ppl_ratio:.4f} ± {run.ppl_ratio_se:.4f}",
            f"{100 * (run.same_top1 or 0):.2f} %",
            "yes" if on_front(mark, marks) else "no",
            "from its report" if model.origin == "report" else "measured now",
        )
    return table


def _cache_table(rows: list[CacheRow], labels: list[str]) -> Any:
    """A row per cache type and context, a column of KLD ± its error per model, as the reports have them."""
    from rich.table import Table

    texts = dict.fromkeys(row.how for row in rows)
    caption = "KLD of each model from itself with its cache in 16 bits, as the reports have it; – was not measured"
    table = Table(caption=caption, caption_justify="left")
    table.add_column("KV cache")
    for label in ("bits", *labels):
        table.add_column(label, justify="right")
    if len(texts) > 1:
        table.add_column("measured on")
    for row in rows:
        how = (row.how,) if len(texts) > 1 else ()
        table.add_row(row.name, f"{row.first.bits_per_value:.2f}", *row.cells, *how)
    return table
