"""`lowbit convert IN -o OUT --format F`: a quantized model in another format, bit for bit where possible."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.options import Json, Opening, Overwrite, Threads, of_table
from lowbit.knobs import MAKE
from lowbit.registry import written_formats
from lowbit.settings import Settings

if TYPE_CHECKING:
    from lowbit.plan.plan import Prepared
    from lowbit.report.schema import Report

# Settings of `lowbit quantize` that apply to a conversion.
_READ = ("group_size", "range", "percentile", "double_quant", "positive_scales", "outliers", "kv_cache", "calib",
         "samples", "seqlen", "shard_size", "modelfile", "pre_tokenizer", "no_tokenizer",
         "mmproj")  # fmt: skip


def convert(
    model: Annotated[
        str,
        typer.Argument(
            help="Quantized folder or Hugging Face id, in any format that lowbit reads; or a LoRA adapter (to gguf)."
        ),
    ],
    format: Annotated[
        str,
        typer.Option(help=f"{', '.join(written_formats())}.", rich_help_panel=MAKE),
    ],
    settings: Annotated[dict[str, Any], of_table(Settings, _READ)],
    options: Opening,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Folder or NAME.gguf to write.", rich_help_panel=MAKE),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(help="Scheme for every quantized linear. [default: unchanged]", rich_help_panel=MAKE),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="MODEL is a LoRA adapter of this model. [default: what the adapter names]",
            metavar="BASE",
            rich_help_panel=MAKE,
        ),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be repacked; write nothing.", rich_help_panel=MAKE)
    ] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Convert a quantized model to another format; report what was repacked exactly and what was requantized."""
    from lowbit import api
    from lowbit.checkpoint.adapter import is_adapter
    from lowbit.cli.console import byte_progress, print_json, print_table, say_how_to_serve
    from lowbit.cli.quantize import plan_as_json, plan_table
    from lowbit.errors import UsageError

    if base is not None and Path(model).exists() and not is_adapter(model):
        raise UsageError(f"{model} is no LoRA adapter, and --base is the model of one", "leave --base out")
    if base is not None or is_adapter(model):
        unread = settings if threads is None else settings | {"threads": threads}
        _convert_adapter(model, output, format, scheme, base, unread, options, overwrite, dry_run, json)
        return
    given: dict[str, Any] = {"format": format, "scheme": scheme, "options": options, "threads": threads, **settings}
    if dry_run:
        from lowbit.estimation.run_memory import Process, peak_memory

        process = Process.now()
        prepared = api.dry_convert(model, output=output, **given)
        peak = sum(peak_memory(prepared, process.program(prepared)).values())
        if json:
            print_json(plan_as_json(prepared, peak) | {"repacked": _repacked(prepared)})
        else:
            print_table(plan_table(prepared, peak))
        return
    if output is None:
        raise UsageError("no output folder was given", "add -o OUT, or --dry-run to see what would be repacked")
    with byte_progress(f"{model} → {output}", quiet=json) as progress:
        done = api.convert(model, output, overwrite=overwrite, progress=progress, **given)
    if json:
        print_json(done.report.model_dump(mode="json", by_alias=True))
        return
    print_table(_summary(done.report, done.path))
    say_how_to_serve(done.report)


def _convert_adapter(
    model: str, output: Path | None, format: str, scheme: str | None, base: str | None, unread: dict[str, Any],
    options: Any, overwrite: bool, dry_run: bool, json: bool,
) -> None:  # fmt: skip
    from dataclasses import asdict

    from lowbit.cli.console import print_json, print_table, say
    from lowbit.errors import UsageError
    from lowbit.formats.gguf.adapter import convert_adapter
    from lowbit.measure import human_bytes

    if format != "gguf":
        raise UsageError(f"a LoRA adapter is converted to gguf only, not to {format}",
                         f"lowbit quantize MODEL -o OUT --adapter {model} merges it")  # fmt: skip
    if unread:
        raise UsageError(f"--{next(iter(unread)).replace('_', '-')} is not read for a LoRA adapter", "leave it out")
    if output is None and not dry_run:
        raise UsageError("no output file was given", "add -o NAME.gguf")
    done = convert_adapter(model, output or Path("adapter.gguf"), base=base, scheme=scheme, options=options,
                           overwrite=overwrite, write=not dry_run)  # fmt: skip
    if json:
        print_json(asdict(done) | {"path": str(done.path)})
        return
    from rich.table import Table

    table = Table(title=f"{model} → {done.path}", title_justify="left", show_header=False)
    table.add_row("adapter", f"{done.arch}, {done.pairs} tensors, alpha {done.alpha:g}")
    table.add_row("size", human_bytes(done.bytes))
    if done.notes:
        table.add_row("notes", "; ".join(done.notes))
    print_table(table)
    say("nothing was written" if dry_run else f"\nuse it: llama-server -m BASE.gguf --lora {done.path}")


def _repacked(prepared: Prepared) -> list[str]:
    from lowbit.plan.plan import Making

    return [tensor.name for tensor in prepared.plan.tensors if tensor.making is Making.repacked]


def _summary(report: Report, path: Path) -> Any:
    from rich.table import Table

    from lowbit.checkpoint.base import HTML_NAME, report_path
    from lowbit.measure import human_bytes
    from lowbit.verification.result import verdict

    table = Table(title=f"{report.source.model} → {path}", title_justify="left", show_header=False)
    table.add_row("format", f"{report.source.kind} → {report.output.format}")
    for what, detail in outcome(report).items():
        table.add_row(what, detail)
    totals = report.totals
    table.add_row("size", f"{human_bytes(totals.bytes_in)} → {human_bytes(totals.bytes_out)}")
    bits = f"{totals.decoder_bits_per_weight:.3f} decoder, {totals.file_bits_per_weight:.3f} file"
    table.add_row("bits per weight", bits)
    if report.source.notes:
        table.add_row("notes", "; ".join(report.source.notes))
    table.add_row("verified", verdict(report.verification, details=True))
    table.add_row("time, memory", f"{totals.seconds:.1f} s, peak {human_bytes(totals.peak_memory_bytes or 0)}")
    table.add_row("report", str(report_path(path, HTML_NAME)))
    return table


def outcome(report: Report) -> dict[str, str]:
    """What happened to the codes, in words: row title → sentence."""
    from collections import Counter

    from lowbit.rounding.extremes import tells_of_extremes

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
        to = report.settings.scheme if report.output.format == "gguf" else report.output.dtype
        rows["decoded"] = f"{len(report.tensors)} tensors, to {to}"
    reasons = Counter(note for tensor in quantized for note in tensor.notes if not tells_of_extremes(note))
    for note, count in reasons.most_common():
        rows.setdefault("because", "")
        rows["because"] += f"{'; ' if rows['because'] else ''}{note} ({count} linears)"
    return rows
