"""`lowbit diagnose`: where a quantized model is damaged, what caused it, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import Json, NoReport, Overwrite, of_judging


def diagnose(
    quantized: Annotated[
        str, typer.Argument(metavar="QUANT", help="Folder, .gguf file or hub id of the quantized model.")
    ],
    how: Annotated[dict[str, Any], of_judging(windows=8, window_tokens=256, scores=False)],
    budget: Annotated[
        float, typer.Option(help="Limit on forward passes (over all windows) for measuring contributions.", min=1)
    ] = 40.0,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Quantize one group at a time instead of restoring one.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the diagnosis to this file, as JSON.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    no_report: NoReport = False,
) -> None:
    """Find where a quantized model is damaged, what caused it, and what to do about it."""
    from json import dumps

    from lowbit.cli.console import add_to_report, print_json, print_table, say, window_progress
    from lowbit.diagnosis import diagnose as run
    from lowbit.diagnosis.table import contribution_table, diagnosis_text, flip_table, suggestion_text
    from lowbit.export.atomic import DIAGNOSIS_MARK, refuse_existing_document
    from lowbit.measure import return_freed_memory
    from lowbit.report.schema import write_text

    if output is not None:
        refuse_existing_document(output, overwrite, DIAGNOSIS_MARK)
    return_freed_memory()
    with window_progress(f"diagnose {quantized}", quiet=json) as update:
        diagnosis = run(quantized, budget=budget, reverse=reverse, **how,
                        progress=lambda what, done, total: update(done, total))  # fmt: skip
    document = diagnosis.model_dump(mode="json")
    if output is not None:
        write_text(dumps(document, indent=2, ensure_ascii=False) + "\n", output, replaces=overwrite)
    if not no_report:
        add_to_report(Path(quantized), json, diagnosis=diagnosis)
    if json:
        print_json(document)
        return
    for note in diagnosis.notes:
        say(f"note: {note}")
    echo(diagnosis_text(diagnosis))
    for table in (contribution_table(diagnosis), flip_table(diagnosis)):
        if table is not None:
            echo("")
            print_table(table)
    echo(suggestion_text(diagnosis))
