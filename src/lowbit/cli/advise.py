"""`lowbit advise [MODEL] --hardware H --engine E`: which scheme, and why."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import of_trust
from lowbit.registry import ENGINES

if TYPE_CHECKING:
    from lowbit.advice import Advice, Option

_SHOWN = 6  # options in the table, unless --all
_LABEL = 11  # columns of "quality:   "
_EXPLAINED = 3  # of those, with the reason in words


def advise(
    options: Annotated[Any, of_trust("trust_remote_code")],
    model: Annotated[
        str | None,
        typer.Argument(help="Folder, .gguf file, Hugging Face id (headers only), demo:smollm2. [default: 8B, Llama]"),
    ] = None,
    hardware: Annotated[
        str,
        typer.Option(
            help="A100-40GB, H100, RTX-4090, M2-Max …; 2xA100: several cards; A100,2xA100: compare; this: this machine."
        ),
    ] = "this",
    engine: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(ENGINES)}. [default: by the hardware]"),
    ] = None,
    goal: Annotated[str | None, typer.Option(help="quality, speed or memory. [default: balanced]")] = None,
    workload: Annotated[
        str | None,
        typer.Option(help="chat, serve, decode, prefill, finetune. [default: serve on servers, else chat]"),
    ] = None,
    context: Annotated[int, typer.Option(help="Context length in tokens.")] = 2048,
    batch: Annotated[int | None, typer.Option(help="Concurrent sequences. [default: 8 on servers, else 1]")] = None,
    kv_cache: Annotated[str, typer.Option(help="Dtype of the KV cache: auto, fp8 or bf16.")] = "auto",
    memory: Annotated[str | None, typer.Option(help="Memory of one card, if it differs from the table: 16GiB.")] = None,
    price: Annotated[
        float | None, typer.Option(help="Dollars per hour of one card. [default: the table's, where it has one]")
    ] = None,
    all_options: Annotated[bool, typer.Option("--all", help="List every scheme, not only the first six.")] = False,
    run: Annotated[
        bool, typer.Option("--run", help="Quantize MODEL to the best scheme that lowbit can write.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where --run writes.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Rank schemes for a model, a device and an engine: memory, speed, expected quality, cost, and why."""
    from lowbit.advice import advise as ask
    from lowbit.cli.console import print_json
    from lowbit.knobs import parse_bytes

    places = [place.strip() for place in hardware.split(",")]
    _check(run, model, output, places)
    answers = [
        ask(
            model, hardware=place, engine=engine, goal=goal, workload=workload, context=context, batch=batch,
            kv_cache=kv_cache, memory=None if memory is None else parse_bytes(memory), price=price, options=options,
        ) for place in places
    ]  # fmt: skip
    if len(answers) > 1:
        print_json([_as_json(each) for each in answers]) if json else _print_compared(answers)
        return
    answer = answers[0]
    if json:
        print_json(_as_json(answer))
    else:
        _print(answer, len(answer.options) if all_options else _SHOWN)
    if run and model is not None:
        _run(answer, model, output, json, options)


def _check(run: bool, model: str | None, output: Path | None, places: list[str]) -> None:
    from lowbit.errors import UsageError

    if not all(places):
        raise UsageError("--hardware has an empty entry", "give names with a comma between them: A100,2xA100")
    if len(places) > 1 and run:
        raise UsageError("--run takes the best scheme for one machine, but several were given", "give one --hardware")
    if run and model is None:
        raise UsageError("--run quantizes a model, but none was given", "give MODEL")
    if output is not None and not run:
        raise UsageError("-o sets where --run writes, but --run was not given", "add --run")


def _run(answer: Advice, model: str, output: Path | None, json: bool, options: Any) -> None:
    import lowbit
    from lowbit.cli.console import byte_progress, say
    from lowbit.errors import UsageError

    chosen = next((each for each in answer.options if each.settings is not None and each.memory.fits), None)
    if chosen is None or chosen.settings is None or chosen.output is None:
        raise UsageError(
            "nothing that lowbit can write fits", f"the least is {answer.options[-1].label}; see --all and --memory"
        )
    target = output or Path(chosen.output)
    with byte_progress(f"quantize to {chosen.scheme}", quiet=json) as progress:
        made = lowbit.quantize(model, target, options=options, progress=progress, **chosen.settings)
    say(f"wrote {made.path} ({chosen.label})")


def _print(answer: Advice, count: int) -> None:
    from lowbit.cli.console import print_table, say

    shown = answer.options[:count]
    load = answer.load
    echo(f"{_first_line(answer)}\n")
    echo(f"{answer.engine} on {answer.device.label}, goal {answer.goal.name}, workload {answer.workload.name}: "
               f"{load.batch} × {load.context} tokens")  # fmt: skip
    print_table(_table(shown))
    more = len(answer.options) - count
    _echo(
        "",
        f"memory: weights, cache and overhead; decode: of one sequence; both speeds are upper bounds; loss: published "
        f"at 8 billion weights, ~ scaled from another scheme by our own figures{_costs_note(answer)}"
        + (f"; {more} more schemes: --all" if more > 0 else ""),
    )
    echo("")
    for place, option in enumerate(shown[:_EXPLAINED], 1):
        _echo(f"{place}  {option.label}: ", option.reason)
    _print_lines(answer)
    for note in answer.notes:
        say(f"note: {note}")


def _print_lines(answer: Advice) -> None:
    best = answer.best
    for each in answer.measured:
        row = each.row
        load, speeds = f"{row.batch} × {row.context} tokens", f"decode {rough(row.decode)} tok/s, prefill "
        speeds += f"{rough(row.prefill)} tok/s"
        _echo("measured here: ", f"{each.scheme} in {each.bench.through}: {speeds}, {load} ({each.path})")
    if best.expectation.source:
        echo("")
        _echo("quality:   ", f"{best.expectation.says} ({best.expectation.model}; {best.expectation.source})")
    if best.instead is not None:
        echo(f"make it with the engine's own tools:\n           {best.instead}")
        writable = next((each for each in answer.options if each.quantize is not None and each.memory.fits), None)
        if writable is None:
            _echo("           ", f"lowbit writes nothing quantized that {answer.engine} runs on this device; --engine "
                                 f"vllm lists what it writes for that")  # fmt: skip
        else:
            echo(f"\nthe best that lowbit writes for {answer.engine} is {writable.label}:")
            best = writable
    if best.quantize is not None:
        echo(f"make it:   {best.quantize}")
    if best.serve is not None:
        echo(f"{'load it:   ' if answer.workload.name == 'finetune' else 'serve it:  '}{best.serve}")


def _costs_note(answer: Advice) -> str:
    priced = answer.best.cost_output is not None
    return f"; $/M: of a million tokens, at {answer.price:g} $ an hour and card" if priced else ""


def _print_compared(answers: list[Advice]) -> None:
    """For each machine the model in 16 bits, and the best scheme: memory, speed and cost beside each other."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from lowbit.cli.console import print_table, say
    from lowbit.engines.engine import SIXTEEN

    first = answers[0]
    load = first.load
    echo(f"{_first_line(first)}\n")
    echo(f"goal {first.goal.name}, workload {first.workload.name}: {load.batch} × {load.context} tokens")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("hardware", "scheme"):
        table.add_column(column, no_wrap=column == "scheme")
    for column in ("memory", "fits", "decode", "all", "loss", "$/M out"):
        table.add_column(column, justify="right", no_wrap=True)
    for answer in answers:
        whole = answer.option(SIXTEEN)
        for option in [answer.best] if whole in (None, answer.best) else [whole, answer.best]:
            table.add_row(answer.device.label, option.label, _gigabytes(option.memory.total),
                          "yes" if option.memory.fits else "no", f"{_rate(option.speed.decode)} tok/s",
                          f"{_rate(option.speed.decode_all)} tok/s", _loss(option), _dollars(option))  # fmt: skip
    print_table(table)
    _echo("", "decode: of one sequence; all: of all together; both are upper bounds; $/M out: of a million tokens, at "
              "the price of all cards")  # fmt: skip
    for line in dict.fromkeys(line for answer in answers for line in answer.assumptions if "dollars an hour" in line):
        _echo("", line)
    for note in dict.fromkeys(note for answer in answers for note in answer.notes):
        say(f"note: {note}")


def _echo(label: str, text: str) -> None:
    """Prose, folded at the width of the terminal and indented below its label; commands are never folded."""
    import shutil
    import textwrap

    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    indent = " " * (_LABEL if label.endswith("   ") else 3 * bool(label))
    echo(textwrap.fill(label + text, width, subsequent_indent=indent, break_on_hyphens=False,
                             break_long_words=False))  # fmt: skip


def _first_line(answer: Advice) -> str:
    active = "" if answer.active_billions > 0.8 * answer.billions else f", {answer.active_billions:.3g} active"
    return f"{answer.model}: {answer.billions:.3g} billion weights{active}"


def _table(options: tuple[Option, ...]) -> Any:
    """At most 100 columns wide."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    priced = any(option.cost_output is not None for option in options)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", justify="right")
    table.add_column("scheme", no_wrap=True)
    for column in ("memory", "fits", "decode", "prefill", "loss", *(("$/M out", "$/M in") if priced else ())):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for place, option in enumerate(options, 1):
        costs = (_dollars(option), rough(option.cost_input)) if priced else ()
        table.add_row(
            str(place), option.label, _gigabytes(option.memory.total), "yes" if option.memory.fits else "no",
            f"{_rate(option.speed.decode)} tok/s", f"{_rate(option.speed.prefill)} tok/s", _loss(option),
            *costs, "" if option.writable else "not by lowbit",
        )  # fmt: skip
    return table


def _gigabytes(count: int) -> str:
    """Bytes, as rough as assumptions about an engine are: "10 GB", "1.7 GB"."""
    return f"{rough(count / 1e9)} GB"


def _rate(tokens: float) -> str:
    return rough(tokens)


def _loss(option: Option) -> str:
    return f"{'~' if option.expectation.scaled_from else ''}{rough(option.loss)} %"


def _dollars(option: Option) -> str:
    return "" if option.cost_output is None else rough(option.cost_output)


def rough(value: float | None) -> str:
    """Two significant digits: all that an upper bound, or a figure of another model, is good for."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    digits = 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:.{max(0, min(digits, 4))}f}"


def _as_json(answer: Advice) -> dict[str, Any]:
    device = answer.device
    return {
        "model": answer.model,
        "billions": answer.billions,
        "active_billions": answer.active_billions,
        "device": {
            "name": device.name, "label": device.label, "kind": device.kind, "memory_bytes": device.memory_bytes,
            "count": device.count, "bandwidth": device.bandwidth, "peak": dict(device.peak), "source": device.source,
            "note": device.note,
        },
        "engine": answer.engine,
        "goal": answer.goal.name,
        "workload": answer.workload.name,
        "dollars_per_card_hour": answer.price,
        "batch": answer.load.batch,
        "context": answer.load.context,
        "options": [_option_as_json(option) for option in answer.options],
        "measured_here": [
            {"scheme": each.scheme, "path": each.path, "through": each.bench.through, **each.row.model_dump()}
            for each in answer.measured
        ],
        "left_out": answer.left_out,
        "assumptions": list(answer.assumptions),
        "notes": list(answer.notes),
    }  # fmt: skip


def _option_as_json(option: Option) -> dict[str, Any]:
    memory, how = option.memory, option.how
    return {
        "scheme": option.scheme,
        "fp8_cache": option.fp8_cache,
        "score": option.score,
        "fits": memory.fits,
        "memory": {
            "weights": memory.weights, "cache": memory.cache, "overhead": memory.overhead, "total": memory.total,
            "usable": memory.usable,
        },
        "decode_tokens_per_second": option.speed.decode,
        "decode_tokens_per_second_all": option.speed.decode_all,
        "prefill_tokens_per_second": option.speed.prefill,
        "decode_bound_by": option.speed.bound,
        "speeds_are": "upper bound",
        "expected_loss_percent": option.loss,
        "quality": {
            "says": option.expectation.says, "model": option.expectation.model, "source": option.expectation.source,
            "scaled_from": option.expectation.scaled_from, "is": option.expectation.basis,
        },
        "compute": None if how is None else how.compute,
        "fallback": how is not None and how.fallback,
        "kernel_source": None if how is None else how.source,
        "dollars_per_million_output_tokens": option.cost_output,
        "dollars_per_million_input_tokens": option.cost_input,
        "reason": option.reason,
        "quantize": option.quantize,
        "serve": option.serve,
        "instead": option.instead,
    }  # fmt: skip
