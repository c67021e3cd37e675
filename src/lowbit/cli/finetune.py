"""`lowbit finetune MODEL -o OUT`: train under fake quantization, or adapters beside frozen codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import Json, Overwrite, Threads, of_table, of_trust
from lowbit.knobs import CALIBRATION, MAKE, RUNNING
from lowbit.settings import RunOptions, Settings
from lowbit.train.options import Course, LoRA

# What shapes an output that is trained; training takes the place of methods and their text.
SHAPING = (
    "scheme", "format", "group_size", "overrides", "ignore", "range", "percentile", "double_quant",
    "positive_scales", "shard_size", "pure", "output_type", "token_embedding_type", "pre_tokenizer", "no_tokenizer",
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
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The float model of --distill. [default: MODEL]", rich_help_panel=CALIBRATION
        ),
    ] = None,
    course: Annotated[dict[str, Any], of_table(Course)],
    adapters: Annotated[dict[str, Any], of_table(LoRA)],
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
    from lowbit.cli.console import print_json, print_table, say, say_how_to_serve, window_progress
    from lowbit.cli.quantize import summary
    from lowbit.errors import UsageError
    from lowbit.train import Adapted

    if adapters and "rank" not in adapters:
        flag = LoRA.rows()[next(iter(adapters))].flag
        raise UsageError(f"{flag} is read only with --lora", "add --lora 16, or leave it out")
    with window_progress(f"{model} → {output}", quiet=json) as update:
        done = lowbit.finetune(
            model, output, data=data, course=Course(**course), lora=LoRA(**adapters) if adapters else None,
            reference=reference, save_every=save_every,
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
        say_how_to_serve(done.report, "serve it:    ")
        say(f"what it cost: lowbit evaluate {done.path} --reference {reference or model}")
