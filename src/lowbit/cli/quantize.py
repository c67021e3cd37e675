"""`lowbit quantize MODEL -o OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.options import Given, Json, Merging, Overwrite, Recipe, Run, Threads
from lowbit.knobs import MAKE

if TYPE_CHECKING:
    from lowbit.plan.plan import Prepared


def quantize(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, Hugging Face id, or demo:smollm2.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Folder or NAME.gguf to write.", rich_help_panel=MAKE),
    ] = None,
    settings: Given,
    recipe: Recipe = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; write nothing.", rich_help_panel=MAKE)
    ] = False,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Choose the scheme of most bits whose files fit: 100MB, 4GiB.", rich_help_panel=MAKE
        ),
    ] = None,
    run: Run,
    threads: Threads = None,
    json: Json = False,
    options: Merging,
) -> None:
    """Quantize a model, verify what was written, and report what it cost."""
    import lowbit
    from lowbit.cli.console import byte_progress, print_json, print_table, say, say_how_to_serve
    from lowbit.errors import UsageError
    from lowbit.settings import RunOptions

    how = RunOptions(**run)
    if target_size is not None:
        settings = _within(target_size, model, output, recipe, options, settings)
    if dry_run:
        from lowbit.estimation.run_memory import Process, peak_memory

        process = Process.now()
        prepared = lowbit.dry_run(
            model, output=output, recipe=recipe, options=options, run=how, threads=threads, **settings
        )
        peak = sum(peak_memory(prepared, process.program(prepared), how.max_memory).values())
        if json:
            print_json(plan_as_json(prepared, peak))
        else:
            print_table(plan_table(prepared, peak))
        return
    if output is None:
        raise UsageError("no output folder was given", "add -o OUT, or --dry-run to see the plan only")
    with byte_progress(f"{model} → {output}", quiet=json) as progress:
        done = lowbit.quantize(
            model, output, recipe=recipe, options=options, run=how, threads=threads, overwrite=overwrite,
            progress=progress, **settings,
        )  # fmt: skip
    if json:
        print_json(done.report.model_dump(mode="json", by_alias=True))
        return
    print_table(summary(done.report, done.path))
    say_how_to_serve(done.report, "serve it:    ")
    if any(line.engine == "lowbit" for line in done.report.serve):  # not a vision tower by itself
        say(f"what it cost: lowbit evaluate {done.path}")
    for step in done.report.next_steps:
        if step.command.startswith("lowbit quantize"):
            say(f"lose less:    {step.command}")


def _within(
    size: str, model: str, output: Path | None, recipe: Path | None, options: Any, settings: dict[str, Any]
) -> dict[str, Any]:
    """The settings with the scheme that --target-size chooses."""
    from lowbit.cli.console import say
    from lowbit.errors import UsageError
    from lowbit.estimation.target_size import scheme_within
    from lowbit.knobs import parse_bytes
    from lowbit.settings import make_settings

    if recipe is not None:
        raise UsageError("a recipe names its scheme, which --target-size would choose", "give one of the two")
    gguf = make_settings(None, **settings).writes_gguf(output)
    fitting = scheme_within(model, parse_bytes(size), gguf, options, **settings)
    say(f"--target-size {size}: {fitting}")
    return {**settings, "scheme": fitting.scheme}


def plan_as_json(prepared: Prepared, peak_memory: int) -> dict[str, Any]:
    """The plan of a dry run as plain JSON values. peak_memory  bytes, as `lowbit estimate` predicts them."""
    plan = prepared.plan
    return {
        "model": prepared.source,
        "file_bytes": plan.file_bytes,
        "decoder_bits_per_weight": plan.bits_per_weight(decoder_only=True),
        "peak_memory_bytes": peak_memory,
        "notes": list(plan.notes),
        "tensors": [
            {
                "name": tensor.name,
                "role": tensor.role,
                "shape": list(tensor.shape),
                "scheme": tensor.stored_as if tensor.is_quantized else None,
                "bytes": tensor.stored_bytes,
                "reason": tensor.reason,
                "notes": list(tensor.notes),
            }
            for tensor in plan.tensors
        ],
    }


def plan_table(prepared: Prepared, peak_memory: int) -> Any:
    """The plan of a dry run as a rich table; why a tensor is left alone or adapted is a numbered note below it."""
    from rich.table import Table

    from lowbit.cli.console import name_table
    from lowbit.measure import human_bytes

    plan = prepared.plan
    notes: dict[str, int] = {}
    table: Table = name_table(f"Plan for {prepared.source}", ("shape", "scheme"), ("bytes", "note"))
    for tensor in plan.tensors:
        why = tensor.reason or "; ".join(tensor.notes)
        note = str(notes.setdefault(why, len(notes) + 1)) if why else ""
        table.add_row(tensor.name, "×".join(map(str, tensor.shape)), tensor.stored_as, f"{tensor.stored_bytes:,}", note)
    lines = [f"{number:>2}  {why}" for why, number in notes.items()]
    lines.append(
        "; ".join(
            f"{human_bytes(sum(tensor.source_bytes for tensor in tensors))} {what} ({len(tensors)} tensors)"
            for what, tensors in plan.accounts.items()
            if tensors
        )
    )
    lines.append(
        f"{human_bytes(plan.file_bytes)} in all, {plan.bits_per_weight(True):.3f} bits per weight of the decoder; "
        f"peak memory about {human_bytes(peak_memory)}; nothing was written"
    )
    lines += [f"note: {note}" for note in (*plan.notes, *filter(None, [plan.shortfall]))]
    table.caption = "\n".join(lines)
    return table


def summary(report: Any, path: Path) -> Any:
    """The table at the end of a run."""
    from rich.table import Table

    from lowbit.checkpoint.base import HTML_NAME, report_path
    from lowbit.measure import human_bytes
    from lowbit.verification.result import verdict

    table = Table(title=f"{report.source.model} → {path}", title_justify="left", show_header=False)
    totals = report.totals
    left_alone = [tensor for tensor in report.tensors if tensor.scheme is None and len(tensor.shape) == 2]
    quantized = [tensor for tensor in report.tensors if tensor.scheme is not None]
    worst = max(quantized, key=lambda tensor: tensor.relative_error or 0.0, default=None)
    what = "matrices" if report.output.format == "gguf" else "linears"
    searched = "" if report.settings.range == "none" else f", range {report.settings.range}"
    said = report.settings.calibration.notes if report.settings.calibration else ()
    in_worst = f"; worst error {100 * (worst.relative_error or 0):.2f} % in {worst.name}" if worst else ""
    rows = {
        "scheme": f"{report.settings.scheme}, {report.settings.method}{searched}",
        "except": _exceptions(report.settings.given),
        "imatrix": report.settings.given.get("imatrix"),
        "calibrated on": _calibrated(report.settings.calibration),
        "output error": _output_error(quantized),
        "size": f"{human_bytes(totals.bytes_in)} → {human_bytes(totals.bytes_out)}",
        "bits per weight": f"{totals.decoder_bits_per_weight:.3f} decoder, {totals.file_bits_per_weight:.3f} file",
        "bytes": _accounts(totals.accounts),
        "quantized": f"{len(quantized)} {what}{in_worst}",
        "left in 16 bits": ", ".join(t.name for t in left_alone[:4]) + (" …" if len(left_alone) > 4 else "") or "none",
        "adapted": _adapted(quantized, what),
        "notes": "; ".join(note for note in report.source.notes if note not in said),
        "verified": verdict(report.verification, details=True),
        "time, memory": f"{totals.seconds:.1f} s, peak {human_bytes(totals.peak_memory_bytes)}",
        "report": str(report_path(path, HTML_NAME)),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def _exceptions(given: dict[str, Any]) -> str:
    """Linears with another scheme or method than the rest, as they were asked for."""
    pairs = [pair for name in ("overrides", "method_overrides") for pair in (given.get(name) or {}).items()]
    return "; ".join(f"{pattern}: {value}" for pattern, value in pairs)


def _accounts(accounts: Any) -> str:
    """Every byte of the source, by what became of it."""
    from lowbit.measure import human_bytes

    return "; ".join(
        f"{human_bytes(each.bytes_in)} {each.what} ({each.tensors} tensors, {human_bytes(each.bytes_out)} now)"
        for each in accounts
        if each.tensors
    )


def _calibrated(calibration: Any) -> str:
    if calibration is None:
        return ""
    shown = f"{calibration.name}, {calibration.samples} windows of {calibration.sequence_length} tokens"
    return "; ".join((shown, *calibration.notes))


def _output_error(quantized: list[Any]) -> str:
    """Mean over linears of the relative error of what they put out, beside that of round to nearest."""
    measured = [tensor for tensor in quantized if tensor.layer_error is not None and tensor.nearest_error is not None]
    if not measured:
        return ""
    chosen, nearest = (sum(getattr(tensor, name) for tensor in measured) / len(measured)
                       for name in ("layer_error", "nearest_error"))  # fmt: skip
    return f"{100 * chosen:.3f} % of a linear's output on average; round to nearest {100 * nearest:.3f} %"


def _adapted(quantized: list[Any], what: str) -> str:
    """What the plan changed, each once with how many tensors it concerns."""
    from collections import Counter

    from lowbit.rounding.extremes import tells_of_extremes

    notes = Counter(note for tensor in quantized for note in tensor.notes if not tells_of_extremes(note))
    return "; ".join(f"{note} ({count} {what})" for note, count in notes.items())
