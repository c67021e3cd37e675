"""`lowbit convert IN -o OUT --format F`: a quantized model in another format, bit for bit where that is possible."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.options import AllowPickle, Revision, TrustRemoteCode

if TYPE_CHECKING:
    from lowbit.pipeline import Prepared
    from lowbit.report.schema import Report


def convert(
    model: Annotated[str, typer.Argument(help="Quantized folder or Hugging Face id, of any format that lowbit reads.")],
    format: Annotated[
        str,
        typer.Option(help="compressed-tensors, gptq, gptq_v2, awq, bitsandbytes, modelopt, mxfp4, float or gguf."),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; must not exist.")] = None,
    scheme: Annotated[str | None, typer.Option(help="For every quantized linear. [default: keep each one's]")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="With --scheme: columns per scale; -1 for one per row.")
    ] = None,
    range: Annotated[str | None, typer.Option(help="For what is rounded anew: absmax, mse, wmse, auto.")] = None,
    shard_size: Annotated[str | None, typer.Option(help="Largest weight file. [default: 5GB]")] = None,
    threads: Annotated[int | None, typer.Option(help="Worker threads. [default: one per core]", min=1)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of lowbit.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be repacked, write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report (or the plan) as JSON.")] = False,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Convert a quantized model to another format; say what was repacked exactly and what was rounded anew."""
    from lowbit import api
    from lowbit.checkpoint.base import OpenOptions
    from lowbit.cli.console import byte_progress, print_json, print_table, say
    from lowbit.cli.quantize import plan_as_json, plan_table
    from lowbit.errors import UsageError
    from lowbit.settings import parse_bytes

    given: dict[str, Any] = {"format": format, "scheme": scheme, "group_size": group_size, "range": range}
    given["shard_size"] = parse_bytes(shard_size) if shard_size else None
    given["options"] = OpenOptions(allow_pickle, trust_remote_code, revision)
    if dry_run:
        prepared = api.dry_convert(model, threads=threads, **given)
        if json:
            print_json(plan_as_json(prepared) | {"repacked": _repacked(prepared)})
        else:
            print_table(plan_table(prepared))
        return
    if output is None:
        raise UsageError("no output folder was given", "add -o OUT, or --dry-run to see what would be repacked")
    with byte_progress(f"{model} → {output}", quiet=json) as progress:
        done = api.convert(model, output, threads=threads, overwrite=overwrite, progress=progress, **given)
    if json:
        print_json(done.report.model_dump(mode="json", by_alias=True))
        return
    print_table(_summary(done.report, done.path))
    say(f"\nserve it: {done.report.serve[0].command}")


def _repacked(prepared: Prepared) -> list[str]:
    return [tensor.name for tensor in prepared.plan.tensors if tensor.repack]


def _summary(report: Report, folder: Path) -> Any:
    from rich.table import Table

    from lowbit.cli.console import human_bytes
    from lowbit.cli.quantize import verified

    table = Table(title=f"{report.source.model} → {folder}", title_justify="left", show_header=False)
    table.add_row("format", f"{report.source.kind} → {report.output.format}")
    for what, detail in outcome(report).items():
        table.add_row(what, detail)
    totals = report.totals
    table.add_row("size", f"{human_bytes(totals.bytes_in)} → {human_bytes(totals.bytes_out)}")
    bits = f"{totals.decoder_bits_per_weight:.3f} decoder, {totals.file_bits_per_weight:.3f} file"
    table.add_row("bits per weight", bits)
    table.add_row("verified", verified(report.verification))
    table.add_row("time, memory", f"{totals.seconds:.1f} s, peak {human_bytes(totals.peak_memory_bytes or 0)}")
    table.add_row("report", str(folder / "report.html"))
    return table


def outcome(report: Report) -> dict[str, str]:
    """What happened to the codes, in words: row title → sentence."""
    from collections import Counter

    quantized = [tensor for tensor in report.tensors if tensor.scheme is not None]
    exact = [tensor for tensor in quantized if tensor.repacked and not tensor.relative_error]
    rest = [tensor for tensor in quantized if tensor not in exact]
    rows = {}
    if exact:
        rows["repacked"] = f"{len(exact)} of {len(quantized)} linears bit for bit: every weight decodes to the same"
    if rest:
        worst = max(rest, key=lambda tensor: tensor.relative_error or 0.0)
        what = "decoded" if report.output.format == "float" else "rounded anew"
        rows[what] = (
            f"{len(rest)} of {len(quantized)} linears; largest added error {100 * (worst.relative_error or 0):.3g} % "
            f"of the source's squared weights, in {worst.name}"
        )
    if not quantized:
        rows["decoded"] = f"{len(report.tensors)} tensors, to {report.output.dtype}"
    for note, count in Counter(note for tensor in quantized for note in tensor.notes).most_common():
        rows.setdefault("because", "")
        rows["because"] += f"{'; ' if rows['because'] else ''}{note} ({count} linears)"
    return rows
