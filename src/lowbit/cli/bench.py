"""`lowbit bench OUT`: speed and memory in the real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import Json, NoReport, Threads


def bench(
    model: Annotated[str, typer.Argument(metavar="OUT", help="Folder or .gguf file to measure.")],
    engine: Annotated[
        str | None, typer.Option(help="llama.cpp, vllm or transformers. [default: what loads it and is installed]")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A running server that serves OUT: http://localhost:8000. Starts no engine.")
    ] = None,
    context: Annotated[str, typer.Option(help="Tokens of the prompts, with commas: 512,2048.")] = "512",
    batch: Annotated[str, typer.Option(help="Sequences at once, with commas: 1,8.")] = "1",
    tokens: Annotated[int, typer.Option(help="Tokens generated after each prompt.")] = 64,
    repeats: Annotated[int, typer.Option(help="Counted runs of every pair of context and batch.")] = 3,
    warmups: Annotated[int, typer.Option(help="Runs before them that do not count.")] = 1,
    threads: Threads = None,
    device: Annotated[str, typer.Option(help="transformers: cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="transformers: dtype to compute in.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the prompts, which are random tokens.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the engine run code that the folder brings.")
    ] = False,
    json: Json = False,
    no_report: NoReport = False,
) -> None:
    """Measure prefill and decode speed and peak memory in the engine that will run it."""
    from lowbit.benchmark.result import bench_table
    from lowbit.benchmark.run import bench as run
    from lowbit.checkpoint.base import HTML_NAME, report_path
    from lowbit.cli.console import print_json, print_table, say, window_progress
    from lowbit.measure import human_bytes
    from lowbit.reporting import add_bench

    with window_progress("bench: loads", quiet=json) as progress:
        found = run(
            model, engine=engine, url=url, contexts=numbers("--context", context), batches=numbers("--batch", batch),
            tokens=tokens, repeats=repeats, warmups=warmups, threads=threads, device=device, dtype=dtype, seed=seed,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if not no_report and add_bench(Path(model), found) is not None and not json:
        say(f"added to {report_path(Path(model), HTML_NAME)}")
    if json:
        print_json(found.model_dump(mode="json"))
        return
    for note in found.notes:
        say(f"note: {note}")
    where = f"{found.device}{'' if found.threads is None else f', {found.threads} threads'}"
    echo(f"{found.model} in {found.engine} ({found.through}) on {where}")
    print_table(bench_table(found))
    peak = (
        "" if found.peak_memory_bytes is None else f"; peak memory of the engine {human_bytes(found.peak_memory_bytes)}"
    )
    echo(f"measured here: median of {found.repeats} runs (slowest to quickest), all sequences together; {tokens} "
         f"tokens after each prompt{peak}; files {human_bytes(found.file_bytes)}")  # fmt: skip


def numbers(option: str, text: str) -> list[int]:
    """ "1,8" → [1, 8]; UsageError for anything else."""
    from lowbit.errors import UsageError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers", f"write it as {option} 1,8") from None
