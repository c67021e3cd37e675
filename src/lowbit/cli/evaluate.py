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
    tasks: Annotated[
        str | None,
        typer.Option(help="Run tasks instead: all, some of arithmetic,facts,format,code; or lm-eval's: mmlu,gsm8k …"),
    ] = None,
    task_items: Annotated[int | None, typer.Option(help="Items of each task. [default: all]", min=1)] = None,
    task_seed: Annotated[int, typer.Option(help="Seed of the packaged items.")] = 0,
    url: Annotated[
        str | None, typer.Option(help="With --tasks: a running server that serves QUANT, asked instead of loading it.")
    ] = None,
    json: Json = False,
    no_report: NoReport = False,
) -> None:
    """Measure perplexity, KL divergence from the unquantized model and top-1 agreement; or, with --tasks, accuracy."""
    from lowbit.checkpoint.base import report_path
    from lowbit.cli.console import add_to_report, print_json, print_table, say, window_progress
    from lowbit.evaluation import evaluate as run
    from lowbit.evaluation import evaluation_table, heading, sentence
    from lowbit.measure import return_freed_memory

    return_freed_memory()
    if tasks is not None:
        _run_tasks(quantized, how, tasks.split(","), task_items, task_seed, url, activations.value, json, no_report)
        return
    _refuse_task_options(task_items, task_seed, url)
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


# What is read of a text, with its default; tasks read none.
_OF_A_TEXT = {"text": None, "windows": 40, "window_tokens": 512, "protocol": "full", "bos": "auto"}


def _run_tasks(
    quantized: str, how: dict[str, Any], names: list[str], limit: int | None, seed: int, url: str | None,
    activations: str, json: bool, no_report: bool,
) -> None:  # fmt: skip
    from lowbit.checkpoint.base import HTML_NAME, report_path
    from lowbit.cli.console import print_json, print_table, say, window_progress
    from lowbit.errors import UsageError
    from lowbit.reporting import add_tasks
    from lowbit.tasks.result import task_sentence, task_table
    from lowbit.tasks.run import evaluate_tasks

    unread = [name for name, default in _OF_A_TEXT.items() if how.pop(name) != default]
    if unread:
        flag = "--" + unread[0].replace("_", "-")
        raise UsageError(f"{flag} is of a text, and --tasks reads none", f"leave {flag} or --tasks out")
    with window_progress("items", quiet=json) as progress:
        found = evaluate_tasks(quantized, tasks=names, url=url, limit=limit, seed=seed, activations=activations,  # type: ignore[arg-type]
                               progress=progress, **how)  # fmt: skip
    if not no_report and found.reference is not None and add_tasks(Path(quantized), found) is not None and not json:
        say(f"added to {report_path(Path(quantized), HTML_NAME)}")
    if json:
        from lowbit.tasks.result import as_json

        print_json(as_json(found))
        return
    for note in found.notes:
        say(f"note: {note}")
    echo(f"model      {found.model}\nreference  {found.reference or 'none'}\ntasks      {found.suite}")
    print_table(task_table(found))
    echo(f"{Path(quantized).name} {task_sentence(found)}")


def _refuse_task_options(limit: int | None, seed: int, url: str | None) -> None:
    from lowbit.errors import UsageError

    if limit is not None or seed or url is not None:
        flag = "--task-items" if limit is not None else "--task-seed" if seed else "--url"
        raise UsageError(f"{flag} is of tasks, but --tasks was not given", "add --tasks all")
