"""`lowbit evaluate`: how far a quantized model is from its source."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import Json, NoReport, of_judging
from lowbit.errors import UsageError

_SAMPLES, _WINDOW = 3, 512


class ActivationsOption(StrEnum):
    auto = "auto"
    none = "none"
    simulated = "simulated"


def evaluate(
    quantized: Annotated[
        str, typer.Argument(metavar="QUANT", help="Folder, .gguf file or hub id of the model to evaluate.")
    ],
    how: Annotated[dict[str, Any], of_judging(windows=40, window_tokens=_WINDOW)],
    activations: Annotated[
        ActivationsOption,
        typer.Option(help="auto: weights only, then a second row with activations quantized as at run time."),
    ] = ActivationsOption.auto,
    samples: Annotated[
        int | None,
        typer.Option(help="Prompts for both models to answer, for the report; 0 for none. [default: 3]", min=0, max=6),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Measure KV cache types instead, against the 16-bit cache: q8_0, q8_0/q4_0, fp8_e4m3, kivi2 …, or all "
            "types of an engine: vllm, llama.cpp.",
            metavar="TYPE,…",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Context lengths of --kv-cache: 512,2k,8k. [default: --window-tokens]", metavar="TOKENS,…"),
    ] = None,
    by_layer: Annotated[
        bool,
        typer.Option("--by-layer", help="With --kv-cache, also quantize the cache of each layer alone."),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Run tasks instead: all, some of arithmetic,facts,format,code,languages; humaneval; or lm-eval's: "
            "mmlu,my.yaml …"
        ),
    ] = None,
    task_items: Annotated[int | None, typer.Option(help="Items of each task. [default: all]", min=1)] = None,
    task_seed: Annotated[int, typer.Option(help="Seed of the packaged items.")] = 0,
    url: Annotated[
        str | None, typer.Option(help="With --tasks: a running server that serves QUANT, asked instead of loading it.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask lm-eval's tasks through the model's chat template.")
    ] = False,
    json: Json = False,
    no_report: NoReport = False,
) -> None:
    """Measure perplexity, KL divergence from the unquantized model and top-1 agreement; or, with --tasks, accuracy."""
    if kv_cache is not None and tasks is not None:
        raise UsageError("--kv-cache and --tasks are two measurements", "give one of them")
    if kv_cache is not None:
        _refuse_with_cache(how, activations, samples, context)
        _evaluate_cache(quantized, kv_cache, context, by_layer, activations, how, json, no_report)
        return
    _refuse_without_cache(context, by_layer)
    from lowbit.checkpoint.base import report_path
    from lowbit.cli.console import add_to_report, print_json, print_table, say, window_progress
    from lowbit.evaluation import evaluate as run
    from lowbit.evaluation import evaluation_table, heading, sentence
    from lowbit.measure import return_freed_memory

    return_freed_memory()
    if tasks is not None:
        asked = {"limit": task_items, "seed": task_seed, "url": url, "chat_template": chat_template}
        _run_tasks(quantized, how | asked, tasks.split(","), activations.value, json, no_report)
        return
    _refuse_task_options(task_items, task_seed, url, chat_template)
    reported = not no_report and report_path(Path(quantized)).is_file()
    with window_progress(f"evaluate {quantized}: windows", quiet=json) as progress:
        evaluations = run(
            quantized, activations=activations.value, samples=_SAMPLES if samples is None else samples,
            progress=progress, **how,
        )  # fmt: skip
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


def _evaluate_cache(
    model: str, types: str, context: str | None, by_layer: bool, activations: ActivationsOption, how: dict[str, Any],
    json: bool, no_report: bool,
) -> None:  # fmt: skip
    from lowbit.checkpoint.base import HTML_NAME, report_path
    from lowbit.cli.console import print_json, print_table, say, window_progress
    from lowbit.evaluation.cache_result import cache_heading, cache_sentence, cache_table, layer_lines
    from lowbit.evaluation.kv_cache import evaluate_kv_cache, parse_contexts
    from lowbit.measure import return_freed_memory
    from lowbit.reporting import add_caches

    return_freed_memory()
    window, _ = how.pop("window_tokens"), how.pop("reference")
    contexts = (window,) if context is None else parse_contexts(context)
    rounded = "auto" if activations is ActivationsOption.auto else "none"
    with window_progress(f"evaluate {model}: windows", quiet=json) as progress:
        rows = evaluate_kv_cache(
            model, types, contexts=contexts, by_layer=by_layer, activations=rounded, progress=progress, **how
        )
    if not no_report and add_caches(Path(model), rows) is not None and not json:
        say(f"added to {report_path(Path(model), HTML_NAME)}")
    if json:
        print_json([row.model_dump(mode="json") for row in rows])
        return
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        say(f"note: {note}")
    echo(cache_heading(rows))
    print_table(cache_table(rows))
    for line in layer_lines(rows) if by_layer else ():
        echo(line)
    echo(cache_sentence(rows))


def _refuse_with_cache(
    how: dict[str, Any], activations: ActivationsOption, samples: int | None, context: str | None
) -> None:
    """UsageError for an option that measuring a cache would not read."""
    if how["reference"] is not None:
        raise UsageError("--kv-cache compares the model with itself, with its cache in 16 bits",
                         "leave --reference out")  # fmt: skip
    if samples:
        raise UsageError("--kv-cache lets no model answer prompts", "leave --samples out")
    if activations is ActivationsOption.simulated:
        raise UsageError("with --kv-cache activations are simulated on both sides", "choose auto or none")
    if context is not None and how["window_tokens"] != _WINDOW:
        raise UsageError("--context and --window-tokens say the same", "leave --window-tokens out")


def _refuse_without_cache(context: str | None, by_layer: bool) -> None:
    for given, flag in ((context, "--context"), (by_layer, "--by-layer")):
        if given:
            raise UsageError(f"{flag} is read with --kv-cache alone", "add --kv-cache TYPE, or leave it out")


# What is read of a text, with its default; tasks read none.
_OF_A_TEXT = {"text": None, "windows": 40, "window_tokens": 512, "protocol": "full", "bos": "auto"}


def _run_tasks(
    quantized: str, how: dict[str, Any], names: list[str], activations: str, json: bool, no_report: bool
) -> None:
    from lowbit.checkpoint.base import HTML_NAME, report_path
    from lowbit.cli.console import print_json, print_table, say, window_progress
    from lowbit.reporting import add_tasks
    from lowbit.tasks.result import task_sentence, task_table
    from lowbit.tasks.run import evaluate_tasks

    unread = [name for name, default in _OF_A_TEXT.items() if how.pop(name) != default]
    if unread:
        flag = "--" + unread[0].replace("_", "-")
        raise UsageError(f"{flag} is of a text, and --tasks reads none", f"leave {flag} or --tasks out")
    with window_progress(f"evaluate {quantized}: items", quiet=json) as progress:
        found = evaluate_tasks(quantized, tasks=names, activations=activations, progress=progress, **how)  # type: ignore[arg-type]
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


def _refuse_task_options(limit: int | None, seed: int, url: str | None, chat_template: bool) -> None:
    given = {"--task-items": limit is not None, "--task-seed": bool(seed), "--url": url is not None,
             "--chat-template": chat_template}  # fmt: skip
    for flag in (flag for flag, is_given in given.items() if is_given):
        raise UsageError(f"{flag} is of tasks, but --tasks was not given", "add --tasks all")
