"""`lowbit finetune MODEL -o OUT`: train under fake quantization, and write the codes of the forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import Json, Overwrite, Threads, of_table, of_trust
from lowbit.knobs import CALIBRATION, MAKE, RUNNING
from lowbit.settings import Settings

# What shapes an output that is trained; training takes the place of methods and their text.
SHAPING = (
    "scheme", "format", "group_size", "overrides", "ignore", "range", "percentile", "double_quant", "shard_size",
    "pure", "output_type", "token_embedding_type", "pre_tokenizer",
)  # fmt: skip


def finetune(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, Hugging Face id, or demo:smollm2.")],
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder or NAME.gguf to write.", rich_help_panel=MAKE)
    ],
    settings: Annotated[dict[str, Any], of_table(Settings, SHAPING)],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text to train on: a file, a folder, c4, hub:OWNER/NAME:CONFIG:SPLIT. [default: the packaged text]",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option(help="Windows of text; one in eight is held out.", min=2, rich_help_panel=CALIBRATION)
    ] = 128,
    window_tokens: Annotated[int, typer.Option(help="Tokens per window.", min=4, rich_help_panel=CALIBRATION)] = 512,
    distill: Annotated[
        bool,
        typer.Option(
            "--distill",
            help="Train towards the next-token distribution of the float model.",
            rich_help_panel=CALIBRATION,
        ),
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The float model of --distill. [default: MODEL]", rich_help_panel=CALIBRATION
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Optimizer steps; 0: once through the windows.", min=0, rich_help_panel=CALIBRATION)
    ] = 0,
    batch: Annotated[int, typer.Option(help="Windows per step.", min=1, rich_help_panel=CALIBRATION)] = 4,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of weights.", rich_help_panel=CALIBRATION)] = 1e-5,
    fit_scales: Annotated[
        bool,
        typer.Option(
            "--fit-scales",
            help="Fit scales to the weights at every step instead of learning them.",
            rich_help_panel=CALIBRATION,
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order of windows.", rich_help_panel=CALIBRATION)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …", rich_help_panel=RUNNING)] = "cpu",
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: Json = False,
    options: Annotated[Any, of_trust()],
) -> None:
    """Train a model under fake quantization, and write it with the codes that it computes with."""
    import lowbit
    from lowbit.cli.console import print_json, print_table, say, window_progress
    from lowbit.cli.quantize import summary

    with window_progress(f"{model} → {output}", quiet=json) as update:
        done = lowbit.finetune(
            model, output, data=data, windows=windows, window_tokens=window_tokens, steps=steps, batch=batch,
            learning_rate=learning_rate, distill=distill, reference=reference, learn_scales=not fit_scales, seed=seed,
            device=device, options=options, threads=threads, overwrite=overwrite, progress=update, **settings,
        )  # fmt: skip
    if json:
        print_json(done.report.model_dump(mode="json", by_alias=True))
        return
    print_table(summary(done.report, done.path))
    say(f"\nserve it:     {done.report.serve[0].command}")
    say(f"what it cost: lowbit evaluate {done.path} --reference {reference or model}")
