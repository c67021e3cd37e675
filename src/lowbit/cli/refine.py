"""`lowbit refine FILE --reference MODEL -o OUT`: a quantized file, nearer to its reference at the same size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.options import Json, Opening, Overwrite, Run, of_table
from lowbit.knobs import CALIBRATION, MAKE, METHODS
from lowbit.settings import READ_BY_REFINE, Settings

if TYPE_CHECKING:
    from lowbit.plan.plan import Prepared
    from lowbit.refinement import Refined


def refine(
    file: Annotated[str, typer.Argument(help="Quantized .gguf file or folder, in any format that lowbit writes.")],
    reference: Annotated[
        str, typer.Option(help="The 16-bit model that FILE was made of.", metavar="MODEL", rich_help_panel=MAKE)
    ],
    settings: Annotated[dict[str, Any], of_table(Settings, READ_BY_REFINE)],
    run: Run,
    options: Opening,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Folder or NAME.gguf to write.", rich_help_panel=MAKE),
    ] = None,
    distill: Annotated[
        bool,
        typer.Option(
            "--distill",
            help="Then learn scales, norms and biases from the reference, end to end.",
            rich_help_panel=METHODS,
        ),
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="Held-out text that decides whether OUT is better: a file, wikitext, or "
            "hub:OWNER/NAME:CONFIG:SPLIT. [default: packaged text]",
            metavar="T",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="Number of held-out windows.", min=1, rich_help_panel=CALIBRATION)] = 24,
    window_tokens: Annotated[
        int, typer.Option(help="Tokens per held-out window.", min=4, rich_help_panel=CALIBRATION)
    ] = 512,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be refined; write nothing.", rich_help_panel=MAKE)
    ] = False,
    json: Json = False,
) -> None:
    """Improve the codes and scales of a quantized file: same format, types and size, nearer to its reference."""
    from lowbit.cli.console import byte_progress, print_json, print_table, say_how_to_serve
    from lowbit.errors import UsageError
    from lowbit.measure import return_freed_memory
    from lowbit.refinement import dry_refine
    from lowbit.refinement import refine as run_refinement
    from lowbit.settings import RunOptions

    how: dict[str, Any] = {"reference": reference, "distill": distill, "text": text, "windows": windows,
                           "window_tokens": window_tokens, "options": options, "run": RunOptions(**run),
                           **settings}  # fmt: skip
    if dry_run:
        prepared = dry_refine(file, **how)
        if json:
            print_json(plan_as_json(prepared))
        else:
            print_table(_plan_table(prepared))
        return
    if output is None:
        raise UsageError("no output was given", "add -o OUT, or --dry-run to see what would be refined")
    return_freed_memory()
    with byte_progress(f"{file} → {output}", quiet=json) as progress:
        done = run_refinement(file, output, overwrite=overwrite, progress=progress, **how)
    if json:
        print_json(done.report.model_dump(mode="json", by_alias=True))
        return
    print_table(_summary(done))
    say_how_to_serve(done.report)


def plan_as_json(prepared: Prepared) -> dict[str, Any]:
    """The plan of a dry run as plain JSON values; `refined` is False where a tensor keeps its bytes."""
    from lowbit.plan.plan import Making

    plan = prepared.plan
    return {
        "file": prepared.start,
        "reference": prepared.source,
        "file_bytes": plan.file_bytes,
        "notes": list(plan.notes),
        "tensors": [
            {
                "name": tensor.name,
                "role": tensor.role,
                "shape": list(tensor.shape),
                "scheme": tensor.stored_as,
                "bytes": tensor.stored_bytes,
                "refined": tensor.making is Making.calibrated,
                "reason": tensor.reason or "; ".join(tensor.notes) or None,
            }
            for tensor in plan.tensors
        ],
    }


def _plan_table(prepared: Prepared) -> Any:
    """The plan of a dry run as a rich table; why a tensor keeps its bytes is a numbered note below it."""
    from rich.table import Table

    from lowbit.cli.console import name_table
    from lowbit.measure import human_bytes

    found, whys = plan_as_json(prepared), dict[str, int]()
    table: Table = name_table(f"Refinement of {prepared.start}", ("shape", "scheme"), ("bytes", "note"))
    for tensor in found["tensors"]:
        why = None if tensor["refined"] else tensor["reason"] or "copied"
        note = "refined" if why is None else str(whys.setdefault(why, len(whys) + 1))
        shape = "×".join(map(str, tensor["shape"]))
        table.add_row(tensor["name"], shape, tensor["scheme"], f"{tensor['bytes']:,}", note)
    refined = [tensor for tensor in found["tensors"] if tensor["refined"]]
    lines = [f"{number:>2}  {why}" for why, number in whys.items()]
    held = human_bytes(sum(tensor["bytes"] for tensor in refined))
    lines.append(
        f"{len(refined)} of {len(found['tensors'])} tensors are refined, {held}; the file keeps its "
        f"{human_bytes(found['file_bytes'])}; nothing was written"
    )
    table.caption = "\n".join([*lines, *(f"note: {note}" for note in found["notes"])])
    return table


def _summary(done: Refined) -> Any:
    from rich.table import Table

    from lowbit.checkpoint.base import HTML_NAME, report_path
    from lowbit.measure import human_bytes
    from lowbit.verification.result import verdict

    report, before, after = done.report, done.before, done.after
    assert report.refinement is not None
    table = Table(title=f"{report.refinement.file} → {done.path}", title_justify="left", show_header=False)
    refined = [tensor for tensor in report.tensors if (tensor.method or "").startswith("refine")]
    kept = [tensor for tensor in report.tensors if tensor.scheme is not None and tensor not in refined]
    totals = report.totals
    rows = {
        "held-out text": f"{before.text.name}, {before.windows} windows of {before.window_tokens} tokens",
        "divergence": f"{_kld(before)} → {_kld(after)} nats per token ({gain(before, after)})",
        "perplexity": f"{before.ppl:.3f} → {after.ppl:.3f}",
        "refined": f"{len(refined)} tensors; {_errors(refined)}",
        "kept": f"{len(kept)} quantized tensors: {_whys(kept)}" if kept else "",
        "size": f"{human_bytes(totals.bytes_out)}, as it was",
        "notes": "; ".join(report.source.notes),
        "verified": verdict(report.verification, details=True),
        "time, memory": f"{totals.seconds:.1f} s, peak {human_bytes(totals.peak_memory_bytes or 0)}",
        "report": str(report_path(done.path, HTML_NAME)),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def _kld(evaluation: Any) -> str:
    return f"{evaluation.kld_mean:.5f} ± {evaluation.kld_se or 0:.5f}"


def gain(before: Any, after: Any) -> str:
    """By how much the divergence changed, in words."""
    return f"{100 * (after.kld_mean / before.kld_mean - 1):+.1f} %" if before.kld_mean else "from nothing"


def _errors(refined: list[Any]) -> str:
    known = [tensor for tensor in refined if tensor.layer_error is not None and tensor.start_error is not None]
    if not known:
        return "no error was measured"
    was, now = (sum(getattr(tensor, name) for tensor in known) / len(known) for name in ("start_error", "layer_error"))
    return f"error of a linear's output {100 * was:.3f} % → {100 * now:.3f} % on average"


def _whys(kept: list[Any]) -> str:
    from collections import Counter

    whys = Counter("; ".join(tensor.notes) or "copied" for tensor in kept)
    return "; ".join(f"{why} ({count})" for why, count in whys.items())
