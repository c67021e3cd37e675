"""`lowbit compare A B C --reference M`: one page of several quantized models of one source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.evaluate import ProtocolOption
from lowbit.cli.options import AllowPickle, Device, DtypeOption, Revision, TrustRemoteCode

if TYPE_CHECKING:
    from lowbit.report.compared import Comparison


def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="QUANT...", help="Folders, .gguf files or hub ids: two or more.")
    ],
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The unquantized model. Default: the source the first names.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="T", help="A text file, wikitext, or hub:OWNER/NAME:CONFIG:SPLIT. Default: packaged text."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="How many windows of text.", min=1)] = 40,
    window_tokens: Annotated[int, typer.Option(help="Tokens per window.", min=4)] = 512,
    protocol: Annotated[
        ProtocolOption, typer.Option(help="full: score every token but the first; second-half: as llama.cpp.")
    ] = ProtocolOption.full,
    bos: Annotated[
        bool | None, typer.Option("--bos/--no-bos", help="Open windows with BOS. Default: if the tokenizer adds it.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Prompts that every model answers; 0 for none.", min=0, max=6)] = 3,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure all anew, also where a report has the figures.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Page to write, such as compare.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Do not add figures and neighbours to the models' own reports.")
    ] = False,
    dtype: Annotated[DtypeOption, typer.Option(help="What the models compute in.")] = DtypeOption.float32,
    device: Device = "cpu",
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to stay within. Default: most of what is free.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    revision: Revision = None,
) -> None:
    """Compare quantized models of one source: size against divergence, figures, samples, error by block."""
    import torch

    from lowbit.checkpoint.base import OpenOptions
    from lowbit.cli.console import print_json, print_table, say, window_progress
    from lowbit.comparison import add_to_reports
    from lowbit.comparison import compare as run
    from lowbit.measure import return_freed_memory
    from lowbit.report.comparison_page import render_comparison, sizes_differ
    from lowbit.report.schema import write_text
    from lowbit.settings import parse_bytes

    return_freed_memory()
    with window_progress("windows", quiet=as_json) as update:

        def progress(model: str, done: int, total: int) -> None:
            update(done, total)

        comparison = run(
            models,
            reference,
            text,
            windows=windows,
            window_tokens=window_tokens,
            protocol=protocol.value,
            bos="auto" if bos is None else bos,
            samples=samples,
            fresh=fresh,
            dtype=getattr(torch, dtype.value),
            device=device,
            max_memory=None if max_memory is None else parse_bytes(max_memory),
            options=OpenOptions(allow_pickle, trust_remote_code, revision),
            progress=progress,
        )
    if output is not None:
        write_text(render_comparison(comparison), output)
        say(f"page: {output}")
    if not no_report:
        for path in add_to_reports(comparison):
            say(f"added to the report of {path}")
    if as_json:
        print_json(comparison.to_dict())
        return
    run_first = comparison.models[0].headline
    typer.echo(f"reference  {comparison.reference}")
    typer.echo(f"text       {run_first.text.name}: {run_first.windows} windows × {run_first.window_tokens} tokens")
    print_table(_table(comparison))
    typer.echo(sizes_differ(comparison.models).replace("\u00a0", " "))


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
