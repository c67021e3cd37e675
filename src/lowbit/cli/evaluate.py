"""`lowbit evaluate`: how far a quantized model is from its source."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import Json, NoReport, of_judging

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
    json: Json = False,
    no_report: NoReport = False,
) -> None:
    """Measure perplexity, KL divergence from the unquantized model and top-1 agreement."""
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
    reported = not no_report and report_path(Path(quantized)).is_file()
    with window_progress("windows", quiet=json) as progress:
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
    from lowbit.checkpoint.base import report_path
    from lowbit.cli.console import add_to_report, print_json, print_table, say, window_progress
    from lowbit.evaluation.cache_result import cache_heading, cache_sentence, cache_table, layer_lines
    from lowbit.evaluation.kv_cache import evaluate_kv_cache, parse_contexts
    from lowbit.measure import return_freed_memory

    return_freed_memory()
    window, _ = how.pop("window_tokens"), how.pop("reference")
    contexts = (window,) if context is None else parse_contexts(context)
    rounded = "auto" if activations is ActivationsOption.auto else "none"
    with window_progress("windows", quiet=json) as progress:
        rows = evaluate_kv_cache(
            model, types, contexts=contexts, by_layer=by_layer, activations=rounded, progress=progress, **how
        )
    if not no_report and report_path(Path(model)).is_file():
        add_to_report(Path(model), json, kv_cache=tuple(rows))
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
    from lowbit.errors import UsageError

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
    from lowbit.errors import UsageError

    for given, flag in ((context, "--context"), (by_layer, "--by-layer")):
        if given:
            raise UsageError(f"{flag} is read with --kv-cache alone", "add --kv-cache TYPE, or leave it out")
