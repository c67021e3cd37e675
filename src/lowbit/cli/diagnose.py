"""`lowbit diagnose`: where the damage of a quantized model is, what caused it, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli.options import AllowPickle, Device, DtypeOption, Revision, TrustRemoteCode

if TYPE_CHECKING:
    from lowbit.diagnosis.result import Diagnosis


def diagnose(
    quantized: Annotated[
        str, typer.Argument(metavar="QUANT", help="Folder, .gguf file or hub id of the quantized model.")
    ],
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The unquantized model. Default: the source its report names.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="T", help="A text file, wikitext, or hub:OWNER/NAME:CONFIG:SPLIT. Default: packaged text."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="How many windows of text.", min=1)] = 8,
    window_tokens: Annotated[int, typer.Option(help="Tokens per window.", min=4)] = 256,
    budget: Annotated[
        float, typer.Option(help="Forward passes of all windows that contributions may cost.", min=1)
    ] = 40.0,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Quantize one group at a time, instead of restoring one.")
    ] = False,
    bos: Annotated[
        bool | None, typer.Option("--bos/--no-bos", help="Open windows with BOS. Default: if the tokenizer adds it.")
    ] = None,
    dtype: Annotated[DtypeOption, typer.Option(help="What the models compute in.")] = DtypeOption.float32,
    device: Device = "cpu",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the diagnosis to this file too, as JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Do not add the diagnosis to the report beside the weights.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    revision: Revision = None,
) -> None:
    """Find where the damage of a quantized model is, what caused it, and what to do about it."""
    import torch

    from lowbit.checkpoint.base import OpenOptions
    from lowbit.cli.console import print_json, print_table, say, window_progress
    from lowbit.diagnosis import diagnose as run
    from lowbit.diagnosis.table import contribution_table, diagnosis_text, flip_table, suggestion_text
    from lowbit.measure import return_freed_memory

    return_freed_memory()
    with window_progress("diagnosis", quiet=as_json) as update:

        def progress(what: str, done: int, total: int) -> None:
            update(done, total)

        diagnosis = run(
            quantized,
            reference,
            text,
            windows=windows,
            window_tokens=window_tokens,
            budget=budget,
            reverse=reverse,
            bos="auto" if bos is None else bos,
            dtype=getattr(torch, dtype.value),
            device=device,
            options=OpenOptions(allow_pickle, trust_remote_code, revision),
            progress=progress,
        )
    if output is not None:
        _write(diagnosis, output)
    if not no_report:
        _add_to_report(Path(quantized), diagnosis, quiet=as_json)
    if as_json:
        print_json(diagnosis.to_dict())
        return
    for note in diagnosis.notes:
        say(f"note: {note}")
    typer.echo(diagnosis_text(diagnosis))
    for table in (contribution_table(diagnosis), flip_table(diagnosis)):
        if table is not None:
            typer.echo("")
            print_table(table)
    typer.echo(suggestion_text(diagnosis))


def _write(diagnosis: Diagnosis, path: Path) -> None:
    import json

    from lowbit.report.schema import write_text

    write_text(json.dumps(diagnosis.to_dict(), indent=2, ensure_ascii=False) + "\n", path)


def _add_to_report(quantized: Path, diagnosis: Diagnosis, quiet: bool) -> None:
    """Put the diagnosis into lowbit-report.json and report.html where quantizing left them."""
    from lowbit.checkpoint.base import HTML_NAME, report_path
    from lowbit.cli.console import say
    from lowbit.diagnosis.report import add_diagnosis

    if not report_path(quantized).is_file():
        return
    add_diagnosis(quantized, diagnosis)
    if not quiet:
        say(f"added to {report_path(quantized, HTML_NAME)}")
