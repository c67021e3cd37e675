"""`lowbit evaluate`: how far a quantized model is from its source."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import AllowPickle, Device, DtypeOption, Revision, TrustRemoteCode


class ProtocolOption(StrEnum):
    full = "full"
    second_half = "second-half"


class ActivationsOption(StrEnum):
    auto = "auto"
    none = "none"
    simulated = "simulated"


def evaluate(
    quantized: Annotated[
        str, typer.Argument(metavar="QUANT", help="Folder, .gguf file or hub id of the model to judge.")
    ],
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The unquantized model. Default: the source its report names.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="T", help="A text file, wikitext, or hub:OWNER/NAME:CONFIG:SPLIT. Default: packaged text."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="How many windows of text.", min=1)] = 40,
    window_tokens: Annotated[int, typer.Option(help="Tokens per window.", min=4)] = 512,
    protocol: Annotated[
        ProtocolOption, typer.Option(help="full: score every token but the first; second-half: as llama.cpp.")
    ] = ProtocolOption.full,
    activations: Annotated[
        ActivationsOption,
        typer.Option(help="auto: weights alone, and a second row with activations quantized as at run time."),
    ] = ActivationsOption.auto,
    bos: Annotated[
        bool | None, typer.Option("--bos/--no-bos", help="Open windows with BOS. Default: if the tokenizer adds it.")
    ] = None,
    dtype: Annotated[DtypeOption, typer.Option(help="What the models compute in.")] = DtypeOption.float32,
    device: Device = "cpu",
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory to stay within; models that do not fit are run block by block. Default: most of what is free.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Prompts that both models answer, for the report; 0 for none.", min=0, max=6)
    ] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Do not add the figures to the report beside the weights.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    revision: Revision = None,
) -> None:
    """Measure perplexity, KL divergence from the unquantized model and agreement on the most probable token."""
    import torch

    from lowbit.checkpoint.base import OpenOptions, report_path
    from lowbit.cli.console import print_json, print_table, say, window_progress
    from lowbit.evaluation import evaluate as run
    from lowbit.evaluation import evaluation_table, heading, sentence
    from lowbit.measure import return_freed_memory
    from lowbit.settings import parse_bytes

    return_freed_memory()
    reported = not no_report and report_path(Path(quantized)).is_file()
    with window_progress("windows", quiet=as_json) as progress:
        evaluations = run(
            quantized,
            reference,
            text,
            windows=windows,
            window_tokens=window_tokens,
            protocol=protocol.value,
            activations=activations.value,
            bos="auto" if bos is None else bos,
            dtype=getattr(torch, dtype.value),
            device=device,
            max_memory=None if max_memory is None else parse_bytes(max_memory),
            samples=samples if reported else 0,
            options=OpenOptions(allow_pickle, trust_remote_code, revision),
            progress=progress,
        )
    if reported:
        _add_to_report(Path(quantized), evaluations, quiet=as_json)
    if as_json:
        print_json([evaluation.to_dict() for evaluation in evaluations])
        return
    for note in evaluations[0].notes:
        say(f"note: {note}")
    typer.echo(heading(evaluations))
    print_table(evaluation_table(evaluations))
    for evaluation in evaluations:
        typer.echo(sentence(evaluation))


def _add_to_report(folder: Path, evaluations: list[Any], quiet: bool) -> None:
    """Put the figures into lowbit-report.json and report.html where quantizing left them."""
    from lowbit.api import add_evaluation
    from lowbit.checkpoint.base import HTML_NAME, report_path
    from lowbit.cli.console import say

    if evaluations[0].reference is None:
        return
    add_evaluation(folder, evaluations)
    if not quiet:
        say(f"added to {report_path(folder, HTML_NAME)}")
