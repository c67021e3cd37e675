"""`lowbit evaluate`: how far a quantized model is from its source."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import Json, NoReport, of_judging


class ActivationsOption(StrEnum):
    auto = "auto"
    none = "none"
    simulated = "simulated"


def evaluate(
    quantized: Annotated[
        str, typer.Argument(metavar="QUANT", help="Folder, .gguf file or hub id of the model to evaluate.")
    ],
    how: Annotated[dict[str, Any], of_judging(windows=40, window_tokens=512)],
    activations: Annotated[
        ActivationsOption,
        typer.Option(help="auto: weights only, then a second row with activations quantized as at run time."),
    ] = ActivationsOption.auto,
    samples: Annotated[
        int, typer.Option(help="Prompts for both models to answer, for the report; 0 for none.", min=0, max=6)
    ] = 3,
    json: Json = False,
    no_report: NoReport = False,
) -> None:
    """Measure perplexity, KL divergence from the unquantized model and top-1 agreement."""
    from lowbit.checkpoint.base import report_path
    from lowbit.cli.console import add_to_report, print_json, print_table, say, window_progress
    from lowbit.evaluation import evaluate as run
    from lowbit.evaluation import evaluation_table, heading, sentence
    from lowbit.measure import return_freed_memory

    return_freed_memory()
    reported = not no_report and report_path(Path(quantized)).is_file()
    with window_progress("windows", quiet=json) as progress:
        evaluations = run(
            quantized, activations=activations.value, samples=samples if reported else 0, progress=progress, **how
        )
    if reported and evaluations[0].reference is not None:
        add_to_report(Path(quantized), json, evaluation=tuple(evaluations))
    if json:
        print_json([evaluation.model_dump(mode="json") for evaluation in evaluations])
        return
    for note in evaluations[0].notes:
        say(f"note: {note}")
    echo(heading(evaluations))
    print_table(evaluation_table(evaluations))
    for evaluation in evaluations:
        echo(sentence(evaluation))
