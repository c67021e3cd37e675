"""`lowbit allocate MODEL -o FILE`: the type of each tensor of an output, by what it costs this model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import Json, Overwrite, of_running, of_table
from lowbit.knobs import CALIBRATION
from lowbit.settings import Settings, make_settings

if TYPE_CHECKING:
    from lowbit.allocation import Allocation


def allocate(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, Hugging Face id or demo:smollm2.")],
    settings: Annotated[
        dict[str, Any], of_table(Settings, ("method", "quality", "group_size", "calib", "seqlen", "seed"))
    ],
    how: Annotated[dict[str, Any], of_running(adapter=True)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File of rules, or recipe, to write.")] = None,
    like: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="File type or scheme whose bytes to stay within. [default: Q4_K_M]"),
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes to stay within, such as 4.5GB; instead of --like.")
    ] = None,
    types: Annotated[
        str | None,
        typer.Option(
            metavar="TYPES", help="Types to choose from, or schemes. [default: Q2_K,Q3_K,IQ4_XS,Q4_K,Q5_K,Q6_K,Q8_0]"
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Number of calibration windows.", metavar="N", min=1, rich_help_panel=CALIBRATION)
    ] = 8,
    max_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for hidden states; the rest goes to a temporary file.")
    ] = "1GiB",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Choose the type of every tensor by what it costs this model, within the bytes of a file type or a size."""
    import lowbit
    from lowbit.cli.console import print_json, print_table, say, window_progress
    from lowbit.errors import UsageError
    from lowbit.knobs import parse_bytes
    from lowbit.measure import return_freed_memory

    if output is None:
        raise UsageError("no output file was given", "add -o FILE, such as -o MODEL.types")
    make_settings(None, samples=samples, **settings)  # refuses invalid numbers of windows and tokens
    chosen = {} if types is None else {"types": [name for name in types.replace(",", " ").split() if name]}
    return_freed_memory()
    with window_progress(f"allocate for {model}: windows × blocks", quiet=json) as update:
        done = lowbit.allocate(
            model, output, like=like, target_size=None if target_size is None else parse_bytes(target_size), **chosen,
            samples=samples, **settings, **how, max_memory=parse_bytes(max_memory), overwrite=overwrite,
            progress=update,
        )  # fmt: skip
    if json:
        print_json(_as_json(done))
        return
    for note in done.notes:
        say(f"note: {note}")
    print_table(_table(done))
    echo(_sentence(done))
    say(f"\nuse it:  {done.command}")


def _table(done: Allocation) -> Any:
    """Type → tensors, weights and the kinds of tensors that got it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    table.add_column("type")
    for title in ("tensors", "weights"):
        table.add_column(title, justify="right")
    table.add_column("most of them")
    total = sum(done.sizes.values())
    for kind in sorted(set(done.types.values())):
        names = [name for name, its in done.types.items() if its == kind]
        weights = sum(done.sizes[name] for name in names)
        table.add_row(kind, str(len(names)), f"{weights / total:.1%}", _most(names))
    return table


def _most(names: list[str]) -> str:
    """The parts of names that stand in most of them: "ffn_up (12), attn_q (7)"."""
    from collections import Counter

    parts = Counter(name.removesuffix(".weight").rpartition(".")[2] for name in names)
    return ", ".join(f"{part} ({count})" for part, count in parts.most_common(3))


def _sentence(done: Allocation) -> str:
    from lowbit.measure import human_bytes

    said = f"{done.path}: {human_bytes(done.file_bytes)} of {human_bytes(done.budget)}; made by {done.made_by}, "
    said += f"about {done.cost:.4f} nats per token"
    return said if done.before is None else f"{said}, with {done.scheme}'s own types {done.before:.4f}"


def _as_json(done: Allocation) -> dict[str, Any]:
    return {
        "file": str(done.path),
        "scheme": done.scheme,
        "file_bytes": done.file_bytes,
        "budget": done.budget,
        "types": done.types,
        "made_by": done.made_by,
        "predicted_nats": done.cost,
        "predicted_nats_of_scheme": done.before,
        "tokens": done.tokens,
        "seconds": done.seconds,
        "notes": list(done.notes),
        "command": done.command,
    }
