"""`lowbit estimate MODEL`: size, memory, what fits, and the cost of the run, before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.options import Json, Opening, Recipe, Threads, of_table
from lowbit.knobs import RUNNING
from lowbit.settings import RunOptions, Settings

if TYPE_CHECKING:
    from lowbit.estimation import Estimate


def estimate(
    model: Annotated[
        str, typer.Argument(help="Folder (config.json is enough), .gguf file, Hugging Face id, or demo:smollm2.")
    ],
    settings: Annotated[dict[str, Any], of_table(Settings, without=("kv_cache",))],
    run: Annotated[dict[str, Any], of_table(RunOptions, ("max_memory",))],
    options: Opening,
    context: Annotated[
        int | None,
        typer.Option(help="Context length in tokens. [default: 8192, or the model's maximum if less]", min=1),
    ] = None,
    batch: Annotated[int, typer.Option(help="Concurrent sequences.", min=1)] = 1,
    engine: Annotated[
        str | None,
        typer.Option(
            help="vllm, sglang, tensorrt-llm, lmdeploy, tgi, transformers, llama.cpp. [default: the format's own]"
        ),
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option(help="Type of the KV cache: auto (16 bits), fp8; with llama.cpp q8_0, q4_0 …")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="Device to fit: h100, rtx4090, m3-max …, or this.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory to fit, instead of the device's: 24GiB.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Nothing is written; NAME.gguf selects GGUF.")
    ] = None,
    recipe: Recipe = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure this machine for two seconds to predict times.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Estimate what a quantized model costs, from config and headers only: no weight is read or downloaded."""
    import lowbit
    from lowbit.cli.console import print_json, print_table
    from lowbit.knobs import parse_bytes

    found = lowbit.estimate(
        model, output=output, context=context, batch=batch, engine=engine, kv_cache=kv_cache, hardware=hardware,
        memory=None if memory is None else parse_bytes(memory), measure=measure,
        max_memory=RunOptions(**run).max_memory, recipe=recipe, options=options, threads=threads, **settings,
    )  # fmt: skip
    if json:
        print_json(found.to_dict())
    else:
        print_table(estimate_table(found))


def estimate_table(found: Estimate) -> Any:
    """An estimate as a rich table: verdict, sizes, then every assumption on a line of its own."""
    from rich.table import Table

    table = Table(
        title=f"{found.model} in {found.files.scheme}, {found.files.format}", title_justify="left", show_header=False,
        caption_justify="left", padding=(0, 1, 0, 0), box=None,
    )  # fmt: skip
    table.add_column("what", no_wrap=True, style="bold")
    table.add_column("how much", overflow="fold")
    for name, value in (*_file_rows(found), *_serving_rows(found), *_run_rows(found)):
        table.add_row(name, value)
    lines = [f"note: {note}" for note in found.notes] + [f"assumed: {line}" for line in found.assumptions]
    table.caption = "\n" + "\n".join(lines)
    return table


def _file_rows(found: Estimate) -> list[tuple[str, str]]:
    from lowbit.measure import human_bytes

    files = found.files
    exact = f"{files.bytes:,} bytes exactly" if files.exact else "from shapes alone"
    return [
        ("files", f"{human_bytes(files.bytes)} ({exact}), from {human_bytes(files.source_bytes)}"),
        ("bits per weight", f"{files.decoder_bits_per_weight:.3f} decoder, {files.file_bits_per_weight:.3f} file"),
    ]


def _serving_rows(found: Estimate) -> list[tuple[str, str]]:
    from lowbit.measure import human_bytes

    cache, serving, fit = found.cache, found.serving, found.fit
    if cache is None or serving is None:
        return []
    bounded = f"; {cache.bounded_layers} of {cache.layers} layers keep a window only" if cache.bounded_layers else ""
    sequences = f"{serving.batch} sequence{'s' * (serving.batch != 1)} of {serving.context} tokens"
    rows = [
        ("", ""),
        (f"serving, {serving.engine}", sequences),
        ("  weights", human_bytes(serving.weights)),
        ("  KV cache", f"{human_bytes(serving.kv_cache)}, {cache.bytes_per_token:,.0f} bytes per token in "
                       f"{cache.type}{bounded}"),
        ("  activations", human_bytes(serving.activations)),
        ("  framework", human_bytes(serving.framework)),
        ("  total", human_bytes(serving.total)),
    ]  # fmt: skip
    if fit is not None:
        rows.append((f"on {fit.device}", fit.verdict))
        if fit.hint:
            rows.append(("", fit.hint))
    return rows


def _run_rows(found: Estimate) -> list[tuple[str, str]]:
    from lowbit.measure import human_bytes

    run = found.run
    parts = ", ".join(f"{what} {human_bytes(size)}" for what, size in run.memory.items())
    work = ", ".join(f"{what} {human_seconds(seconds)}" for what, seconds in run.work.items() if seconds >= 0.05)
    return [
        ("", ""),
        ("quantizing", f"{found.files.method}, {run.threads} thread{'s' * (run.threads != 1)} on this machine"),
        ("  disk", human_bytes(run.disk)),
        ("  peak memory", f"{human_bytes(run.peak_memory)}: {parts}"),
        ("  time", f"{human_seconds(run.seconds[0])} to {human_seconds(run.seconds[1])}; mid: {work}"),
    ]


def human_seconds(seconds: float) -> str:
    """42.3 → "42 s", 4000 → "1 h 7 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
