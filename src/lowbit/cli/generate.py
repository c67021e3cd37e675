"""`lowbit generate`: load a model of any readable format and let it answer."""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli.options import AllowPickle, Device, DtypeOption, Revision, TrustRemoteCode


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or hub id.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to say to it.")],
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the most probable token.", min=0)] = 0.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[DtypeOption, typer.Option(help="What the model computes in.")] = DtypeOption.float32,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of streaming.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    revision: Revision = None,
) -> None:
    """Load a quantized model and print what it answers, as it comes."""
    import torch

    from lowbit.checkpoint.base import OpenOptions
    from lowbit.cli.console import print_json
    from lowbit.evaluation import generate as run
    from lowbit.measure import return_freed_memory

    return_freed_memory()
    answer = run(
        model,
        prompt,
        max_tokens,
        temperature,
        chat="raw" if raw else "auto",
        seed=seed,
        dtype=getattr(torch, dtype.value),
        device=device,
        options=OpenOptions(allow_pickle, trust_remote_code, revision),
        on_text=None if as_json else _show,
    )
    if as_json:
        print_json({"model": model, "prompt": prompt, "text": answer, "seed": seed})
    else:
        typer.echo()


def _show(text: str) -> None:
    typer.echo(text, nl=False)
