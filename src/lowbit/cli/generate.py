"""`lowbit generate`: load a model in any supported format and generate text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import of_running


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or hub id.")],
    how: Annotated[dict[str, Any], of_running(adapter=True)],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Prompt.")],
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0: always the most probable token.", min=0)
    ] = 0.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    kv_cache: Annotated[
        str | None,
        typer.Option(help="Quantize the KV cache: int8, int4, int2, or one of these with _hadamard.", metavar="TYPE"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of streaming.")] = False,
) -> None:
    """Load a quantized model and stream its answer."""
    from lowbit.cli.console import print_json
    from lowbit.evaluation import generate as run
    from lowbit.measure import return_freed_memory

    return_freed_memory()
    show = None if json else lambda text: echo(text, end="")
    answer = run(model, prompt, max_tokens, temperature, chat="raw" if raw else "auto", seed=seed, kv_cache=kv_cache,
                 on_text=show, **how)  # fmt: skip
    if json:
        print_json({"model": model, "prompt": prompt, "text": answer, "seed": seed})
    else:
        echo()
