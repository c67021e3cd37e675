"""`lowbit finetune MODEL -o OUT`: train under fake quantization, or adapters beside frozen codes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import Json, Overwrite, Threads, of_table, of_trust
from lowbit.knobs import CALIBRATION, MAKE, METHODS, RUNNING
from lowbit.settings import RunOptions, Settings

# What shapes an output that is trained; training takes the place of methods and their text.
SHAPING = (
    "scheme", "format", "group_size", "overrides", "ignore", "range", "percentile", "double_quant", "shard_size",
    "pure", "output_type", "token_embedding_type", "pre_tokenizer",
)  # fmt: skip


class LossOn(StrEnum):
    answers = "answers"
    all = "all"


class Init(StrEnum):
    zero = "zero"
    loftq = "loftq"


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
    loss_on: Annotated[
        LossOn | None,
        typer.Option(
            help="Tokens that the loss is taken on: answers, all. [default: answers, where there are conversations]",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
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
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Learning rate. [default: 1e-5, of adapters 2e-4]", rich_help_panel=CALIBRATION),
    ] = None,
    fit_scales: Annotated[
        bool,
        typer.Option(
            "--fit-scales",
            help="Fit scales to the weights at every step instead of learning them.",
            rich_help_panel=CALIBRATION,
        ),
    ] = False,
    lora: Annotated[
        int | None,
        typer.Option(metavar="R", help="Train adapters of rank R; the codes stay.", min=1, rich_help_panel=METHODS),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(metavar="A", help="Scale of adapters: A / R. [default: 2 R]", rich_help_panel=METHODS),
    ] = None,
    lora_init: Annotated[
        Init | None,
        typer.Option(help="How adapters begin: zero, loftq. [default: zero]", rich_help_panel=METHODS),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Merge adapters into the 16-bit weights, and round these again.", rich_help_panel=METHODS
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order of windows.", rich_help_panel=CALIBRATION)] = 0,
    save_every: Annotated[
        int, typer.Option(help="Steps between saved states; 0: none.", min=0, rich_help_panel=RUNNING)
    ] = 100,
    run: Annotated[dict[str, Any], of_table(RunOptions, ("resume",))],
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
    from lowbit.errors import UsageError
    from lowbit.train import Adapted, Course, LoRA

    alone = {"--lora-alpha": lora_alpha, "--lora-init": lora_init, "--merge": merge or None}
    unread = [flag for flag, value in alone.items() if value is not None]
    if lora is None and unread:
        raise UsageError(f"{unread[0]} is read only with --lora", "add --lora 16, or leave it out")
    course = Course(steps, batch, learning_rate, seed, windows, window_tokens, distill, not fit_scales,
                    None if loss_on is None else loss_on.value)  # fmt: skip
    adapters = None if lora is None else LoRA(lora, lora_alpha, (lora_init or Init.zero).value, merge)
    with window_progress(f"{model} → {output}", quiet=json) as update:
        done = lowbit.finetune(
            model, output, data=data, course=course, lora=adapters, reference=reference, save_every=save_every,
            device=device, options=options, threads=threads, overwrite=overwrite, progress=update, **run, **settings,
        )  # fmt: skip
    report = None if done.report is None else done.report.model_dump(mode="json", by_alias=True)
    if isinstance(done, Adapted):
        if json:
            print_json({"adapter": str(done.path), "base": done.base, "notes": list(done.notes), "base_report": report})
            return
        if done.report is not None:
            print_table(summary(done.report, Path(done.base)))
        for line in (*done.notes, "", f"adapter:      {done.path}", f"its base:     {done.base}"):
            say(line)
    elif json:
        print_json(report)
    else:
        print_table(summary(done.report, done.path))
        say(f"\nserve it:     {done.report.serve[0].command}")
        say(f"what it cost: lowbit evaluate {done.path} --reference {reference or model}")
