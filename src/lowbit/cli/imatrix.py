"""`lowbit imatrix MODEL -o FILE`: the importance of each input channel, in a file that llama.cpp reads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import Json, of_running, of_table
from lowbit.settings import Settings, make_settings

if TYPE_CHECKING:
    from lowbit.formats.gguf.imatrix import Imatrix
    from lowbit.formats.gguf.importance import ImportanceMatrix


class FormOption(StrEnum):
    gguf = "gguf"
    dat = "dat"


def imatrix(
    model: Annotated[
        str, typer.Argument(help="Folder, .gguf file, Hugging Face id, demo:smollm2; or an imatrix to show or merge.")
    ],
    settings: Annotated[dict[str, Any], of_table(Settings, ("calib", "samples", "seqlen"))],
    how: Annotated[dict[str, Any], of_running(adapter=True)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.")] = None,
    process_output: Annotated[bool, typer.Option("--process-output", help="Also measure the output head.")] = False,
    merge: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Add the tokens of another imatrix. Repeatable.")
    ] = None,
    format: Annotated[FormOption, typer.Option(help="gguf, or dat for older versions of llama.cpp.")] = FormOption.gguf,
    max_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for hidden states; the rest goes to a temporary file.")
    ] = "1GiB",
    show: Annotated[bool, typer.Option("--show", help="Print statistics of an imatrix; nothing is measured.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier imatrix.")] = False,
    json: Json = False,
) -> None:
    """Measure the importance of each input channel for GGUF quantization; merge, convert and show imatrix files."""
    from lowbit.errors import UsageError

    if show:
        if output is not None or merge:
            raise UsageError("--show writes nothing", "leave -o and --merge out")
        _show(Path(model), json)
        return
    if output is None:
        raise UsageError("no output file was given", "add -o FILE, or --show to print an imatrix")
    import lowbit
    from lowbit.cli.console import print_json, say, window_progress
    from lowbit.knobs import parse_bytes
    from lowbit.measure import return_freed_memory

    make_settings(None, **settings)  # refuses invalid numbers of windows and tokens
    return_freed_memory()
    with window_progress(f"imatrix of {model}: windows × blocks", quiet=json) as update:
        done = lowbit.imatrix(
            model, output, **settings, process_output=process_output, merge_with=merge or (),
            form=format.value, max_memory=parse_bytes(max_memory), overwrite=overwrite, **how,
            progress=lambda what, windows, total: update(windows, total),
        )  # fmt: skip
    if json:
        print_json(_as_json(done))
        return
    for note in done.notes:
        say(f"note: {note}")
    echo(_sentence(done))
    say(f"\nuse it:  lowbit quantize MODEL -o OUT.gguf --scheme Q4_K_M --imatrix {done.file}")


def _sentence(done: Imatrix) -> str:
    from lowbit.report.units import plural

    matrix = done.matrix
    measured = f"{done.tokens:,} tokens in {done.seconds:.1f} s" if done.tokens else "nothing was measured"
    return f"{done.file}: {len(matrix.entries)} tensors, {plural(matrix.chunks, 'chunk')}, {measured}"


def _as_json(done: Imatrix) -> dict[str, Any]:
    return {
        "file": str(done.file),
        "bytes": done.file.stat().st_size,
        "tokens": done.tokens,
        "seconds": done.seconds,
        "notes": list(done.notes),
        **_described(done.matrix),
    }


def _described(matrix: ImportanceMatrix) -> dict[str, Any]:
    return {
        "tensors": len(matrix.entries),
        "datasets": list(matrix.datasets),
        "chunks": matrix.chunks,
        "chunk_tokens": matrix.chunk_tokens,
        "unseen_experts": {name: list(experts) for name, experts in matrix.unseen_experts.items()},
    }


def _show(path: Path, json: bool) -> None:
    from dataclasses import asdict

    from lowbit.cli.console import print_json, print_table
    from lowbit.formats.gguf.imatrix_file import read_imatrix
    from lowbit.formats.gguf.importance import statistics, unseen_notes

    matrix = read_imatrix(path)
    rows = statistics(matrix)
    if json:
        print_json({"file": str(path), **_described(matrix), "statistics": [asdict(row) for row in rows]})
        return
    print_table(_table(path, matrix, rows))
    for note in unseen_notes(matrix, path.name):
        echo(f"note: {note}")


def _table(path: Path, matrix: ImportanceMatrix, rows: list[Any]) -> Any:
    from lowbit.cli.console import name_table

    columns = ("tokens", "total x²", "mean", "min", "max", "top 1 %", "entropy", "experts")
    table = name_table(f"{path}: {len(rows)} tensors, {matrix.chunks} chunks", (), columns)
    for row in rows:
        figures = (f"{value:.3g}" for value in (row.total, row.mean, row.smallest, row.largest))
        experts = f"{row.experts - len(row.unseen)} of {row.experts}" if row.experts > 1 else ""
        table.add_row(
            row.name, f"{row.tokens:,}", *figures, f"{100 * row.top_share:.1f} %", f"{row.entropy:.3f}", experts
        )
    if matrix.datasets:
        table.caption = f"text: {', '.join(matrix.datasets)}"
    return table
