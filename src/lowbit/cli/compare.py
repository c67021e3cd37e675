"""`lowbit compare A B C --reference M`: several quantized models of one source on one page.

`lowbit compare A B --blind`: the answers of two models, compared by people or a judge who do not know whose is whose.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import Json, NoReport, Overwrite, of_judging
from lowbit.errors import UsageError

if TYPE_CHECKING:
    from lowbit.blind.result import BlindTest
    from lowbit.report.caches import CacheRow
    from lowbit.report.compared import Comparison


_SAMPLES = 3
_BLIND_PAGE = Path("blind.html")


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="QUANT...", help="Folders, .gguf files or hub ids: two or more. With --blind two, or servers."
        ),
    ],
    how: Annotated[dict[str, Any], of_judging(windows=40, window_tokens=512)],
    samples: Annotated[
        int, typer.Option(help="Prompts for every model to answer; 0 for none.", min=0, max=6)
    ] = _SAMPLES,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure everything again, even if a report has the figures.")
    ] = False,
    blind: Annotated[
        bool, typer.Option("--blind", help="Write a page to vote on: two models' answers, which is which hidden.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="With --blind: a file with a prompt on each line, or .jsonl. [default: 24 packaged]", metavar="FILE"
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="With --blind: longest answer, in tokens. [default: 256]", min=1)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="With --blind: of sampling. [default: 0, always the most probable token]", min=0),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="With --blind: of the order of sides and of sampling. [default: order drawn anew, 0]", min=0),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="With --blind: a server whose model judges each pair twice, sides swapped.", metavar="URL"),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="The judge's name at its server. [default: the first]", metavar="NAME")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Page to write, such as compare.html. [default of --blind without --judge: blind.html]",
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    no_report: NoReport = False,
) -> None:
    """Compare quantized models of one source: size against divergence, metrics, samples, error by block. With --blind,
    compare the answers of any two."""
    of_blind = {"prompts": prompts, "max_tokens": max_tokens, "temperature": temperature, "seed": seed, "judge": judge,
                "judge_model": judge_model}  # fmt: skip
    given = {name: value for name, value in of_blind.items() if value is not None}
    if blind:
        _refuse_unread(how, samples, fresh, no_report)
        _blind(models, how, given, output, overwrite, json)
        return
    if given:
        flag = "--" + next(iter(given)).replace("_", "-")
        raise UsageError(f"{flag} is of a blind comparison, but --blind was not given", "add --blind, or leave it out")
    from lowbit.cli.console import print_json, print_table, say, window_progress
    from lowbit.comparison import add_to_reports
    from lowbit.comparison import compare as run
    from lowbit.export.atomic import PAGE_MARK, refuse_existing_document
    from lowbit.measure import return_freed_memory
    from lowbit.report.caches import cache_rows
    from lowbit.report.compared import sizes_differ
    from lowbit.report.page import render_comparison
    from lowbit.report.schema import write_text

    if output is not None:
        refuse_existing_document(output, overwrite, PAGE_MARK)
    return_freed_memory()
    with window_progress("compare: windows", quiet=json) as update:
        comparison = run(models, samples=samples, fresh=fresh, **how,
                         progress=lambda model, done, total: update(done, total))  # fmt: skip
    if output is not None:
        write_text(render_comparison(comparison), output, replaces=overwrite)
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


# What a blind comparison does not read, with its default.
_OF_A_TEXT = {
    "reference": None, "text": None, "windows": 40, "window_tokens": 512, "protocol": "full", "bos": "auto",
    "max_memory": None,
}  # fmt: skip


def _refuse_unread(how: dict[str, Any], samples: int, fresh: bool, no_report: bool) -> None:
    """UsageError for an option that a blind comparison would not read; takes them out of `how`."""
    unread = [name for name, default in _OF_A_TEXT.items() if how.pop(name) != default]
    unread += [
        name for name, is_given in (("samples", samples != _SAMPLES), ("fresh", fresh), ("no_report", no_report))
        if is_given
    ]  # fmt: skip
    if unread:
        flag = "--" + unread[0].replace("_", "-")
        raise UsageError(f"{flag} is not read with --blind", f"leave {flag} or --blind out")


def _blind(
    models: list[str], how: dict[str, Any], given: dict[str, Any], output: Path | None, overwrite: bool, json: bool
) -> None:
    from lowbit.blind.page import render_blind
    from lowbit.blind.run import compare_blind
    from lowbit.cli.console import print_json, say, window_progress
    from lowbit.export.atomic import PAGE_MARK, refuse_existing_document
    from lowbit.measure import return_freed_memory
    from lowbit.report.schema import write_text

    if len(models) != 2:
        raise UsageError(f"--blind compares two models, not {len(models)}", "name two")
    first, second = models
    output = _BLIND_PAGE if output is None and "judge" not in given else output
    if output is not None:
        refuse_existing_document(output, overwrite, PAGE_MARK)
    return_freed_memory()
    with window_progress("compare: answers", quiet=json) as progress:
        found = compare_blind(first, second, **given, progress=progress, **how)
    if output is not None:
        write_text(render_blind(found), output, replaces=overwrite)
        say(f"page: {output}")
    if json:
        print_json(found.to_dict())
        return
    for note in found.notes:
        say(f"note: {note}")
    _say_blind(found, output)


def _say_blind(found: BlindTest, output: Path | None) -> None:
    from lowbit.blind.result import judge_sentence

    echo(f"A        {found.a}\nB        {found.b}")
    echo(f"prompts  {len(found.pairs)}: {len(found.pairs) - found.same} to vote on, {found.same} with the same answer")
    if found.judged is not None:
        judged = found.judged
        echo(f"judge    {judged.model} at {judged.url}: {judge_sentence(judged, 'A', 'B')}")
        if count := judged.count("unreadable"):
            echo(f"         {count} pairs are not counted: the judge did not answer in the form it was asked for")
    if output is not None:
        echo(f"vote in {output}; which side is whose stands there, sealed until the votes are opened")


def _table(comparison: Comparison) -> Any:
    from rich.table import Table

    from lowbit.measure import human_bytes
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
