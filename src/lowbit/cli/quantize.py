"""`lowbit quantize MODEL -o OUT`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.options import FORMATS_HELP, AllowPickle, Revision, TrustRemoteCode

if TYPE_CHECKING:
    from lowbit.gguf_pipeline import PreparedGGUF
    from lowbit.pipeline import Prepared


def quantize(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, Hugging Face id, or demo:smollm2.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder or NAME.gguf to write.")] = None,
    scheme: Annotated[
        str | None, typer.Option(help="W4A16, FP8_DYNAMIC, NVFP4A16 …, or of GGUF: Q4_K_M, IQ4_XS … [default: W4A16]")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="rtn, hqq, gptq, awq, smoothquant, sign-sgd … joined by +: awq+gptq. [default: rtn]"),
    ] = None,
    method_override: Annotated[
        list[str] | None, typer.Option(help="REGEX=METHOD for some linears (rtn, hqq, gptq). Repeatable.")
    ] = None,
    format: Annotated[str | None, typer.Option(help=FORMATS_HELP)] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns per scale; -1 for one per row.")] = None,
    range: Annotated[str | None, typer.Option(help="absmax, mse, wmse, percentile, or auto. [default: auto]")] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="NF4, FP4: quantize scales too.")] = False,
    percentile: Annotated[float | None, typer.Option(help="What --range percentile keeps. [default: 99.9]")] = None,
    calib: Annotated[
        str | None,
        typer.Option(help="Calibration text: file, folder, hub dataset, or 'self'. [default: the packaged text]"),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Windows of it. [default: 128]")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a window. [default: 512]")] = None,
    kv_cache: Annotated[
        str | None, typer.Option(help="Scales for an FP8 cache: fp8 (per tensor) or fp8_per_head.")
    ] = None,
    activation_range: Annotated[
        str | None, typer.Option(help="Static activation scales: minmax, percentile or mse. [default: minmax]")
    ] = None,
    damping: Annotated[float | None, typer.Option(help="GPTQ: share of mean(diag H) added to it.")] = None,
    correction: Annotated[
        float | None, typer.Option(help="GPTQ: share of the rounded prefix's error to make up for, 0 to 1.")
    ] = None,
    refine: Annotated[int | None, typer.Option(help="GPTQ: sweeps over the codes afterwards.")] = None,
    iterations: Annotated[int | None, typer.Option(help="sign-sgd: steps per block. [default: 200]")] = None,
    expert_tokens: Annotated[
        int | None, typer.Option(help="Experts that fewer tokens reach are rounded to nearest. [default: 128]")
    ] = None,
    all_experts: Annotated[bool, typer.Option("--all-experts", help="Measure every expert on every token.")] = False,
    bias_correction: Annotated[
        bool, typer.Option("--bias-correction", help="Move the mean error of outputs into biases.")
    ] = False,
    compute: Annotated[
        str | None, typer.Option(help="Forward passes: auto, float32, bfloat16, float16. [default: auto]")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Regex of linears to leave in 16 bits. Repeatable.")] = None,
    override: Annotated[list[str] | None, typer.Option(help="REGEX=SCHEME for some linears. Repeatable.")] = None,
    imatrix: Annotated[
        str | None, typer.Option(help="GGUF: importance matrix, a file or 'measure' (on --calib, --samples, --seqlen).")
    ] = None,
    pure: Annotated[bool, typer.Option("--pure", help="GGUF: every matrix in the same type, no mix.")] = False,
    output_type: Annotated[str | None, typer.Option(help="GGUF: ggml type of the output matrix.")] = None,
    token_embedding_type: Annotated[str | None, typer.Option(help="GGUF: ggml type of the embedding.")] = None,
    pre_tokenizer: Annotated[
        str | None, typer.Option(help="GGUF: llama.cpp's name of the pre-tokenizer, where it cannot be told.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with these settings; flags win over it.")] = None,
    shard_size: Annotated[str | None, typer.Option(help="Largest weight file. [default: 5GB; one GGUF file]")] = None,
    device: Annotated[str, typer.Option(help="Of forward passes and rounding: cpu, cuda.")] = "cpu",
    max_memory: Annotated[
        str | None, typer.Option(help="What calibration may take: 8GiB. [default: 80 % of what is free]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    threads: Annotated[int | None, typer.Option(help="Worker threads. [default: one per core]", min=1)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of lowbit.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report (or the plan) as JSON.")] = False,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantize a model, verify what was written, and report what it cost."""
    from lowbit.cli.console import byte_progress, print_json, print_table, say
    from lowbit.errors import UsageError

    settings = given_settings(locals())
    options = _options(allow_pickle, trust_remote_code, revision)
    run = run_options(device, max_memory, resume)
    if dry_run:
        import lowbit

        prepared = lowbit.dry_run(model, output=output, recipe=recipe, options=options, threads=threads, **settings)
        if json:
            print_json(plan_as_json(prepared))
        else:
            print_table(plan_table(prepared))
        return
    if output is None:
        raise UsageError("no output folder was given", "add -o OUT, or --dry-run to see the plan only")
    import lowbit

    with byte_progress(f"{model} → {output}", quiet=json) as progress:
        done = lowbit.quantize(
            model, output, recipe=recipe, options=options, run=run, threads=threads, overwrite=overwrite,
            progress=progress, **settings,
        )  # fmt: skip
    if json:
        print_json(done.report.model_dump(mode="json", by_alias=True))
        return
    print_table(_summary(done.report, done.path))
    say(f"\nserve it:     {done.report.serve[0].command}\nwhat it cost: lowbit evaluate {done.path}")


def given_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that are settings and were given, under their names in `Settings`."""
    from lowbit.errors import UsageError
    from lowbit.settings import parse_bytes

    names = (
        "scheme", "method", "format", "group_size", "range", "percentile", "calib", "samples", "seqlen", "imatrix",
        "output_type", "token_embedding_type", "pre_tokenizer", "kv_cache", "activation_range", "damping", "correction",
        "refine", "iterations", "expert_tokens", "compute",
    )  # fmt: skip
    given = {name: flags[name] for name in names}
    given |= {name: True for name in ("double_quant", "pure", "all_experts", "bias_correction") if flags[name]}
    if flags["ignore"]:
        given["ignore"] = tuple(flags["ignore"])
    if flags["shard_size"]:
        given["shard_size"] = parse_bytes(flags["shard_size"])
    for text in flags["override"] or []:
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"--override {text!r} is not REGEX=SCHEME", "for example --override 'down_proj$=W8A16'")
        given.setdefault("overrides", {})[pattern] = name
    for text in flags["method_override"] or []:
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"--method-override {text!r} is not REGEX=METHOD", "for example 'down_proj$=rtn'")
        given.setdefault("method_overrides", {})[pattern] = name
    return {name: value for name, value in given.items() if value is not None}


def run_options(device: str, max_memory: str | None, resume: bool) -> Any:
    """The flags that say how a run is made."""
    from lowbit.settings import RunOptions, parse_bytes

    return RunOptions(device, None if max_memory is None else parse_bytes(max_memory), resume)


def _options(allow_pickle: bool, trust_remote_code: bool, revision: str | None) -> Any:
    from lowbit.checkpoint.base import OpenOptions

    return OpenOptions(allow_pickle, trust_remote_code, revision)


def plan_as_json(prepared: Prepared | PreparedGGUF) -> dict[str, Any]:
    """The plan of a dry run as plain JSON values."""
    plan = prepared.plan
    return {
        "model": prepared.source,
        "file_bytes": plan.file_bytes,
        "decoder_bits_per_weight": plan.bits_per_weight(decoder_only=True),
        "peak_memory_bytes": prepared.peak_memory(),
        "notes": list(plan.warnings),
        "tensors": [
            {
                "name": tensor.name,
                "role": tensor.role,
                "shape": list(tensor.shape),
                "scheme": None if tensor.scheme is None else tensor.scheme.name,
                "bytes": tensor.stored_bytes,
                "reason": tensor.reason,
                "notes": list(tensor.notes),
            }
            for tensor in plan.tensors
        ],
    }


def plan_table(prepared: Prepared | PreparedGGUF) -> Any:
    """The plan of a dry run as a rich table; why a tensor is left alone or adapted is a numbered note below it."""
    from rich.table import Table

    from lowbit.cli.console import human_bytes, name_table

    plan = prepared.plan
    notes: dict[str, int] = {}
    table: Table = name_table(f"Plan for {prepared.source}", ("shape", "scheme"), ("bytes", "note"))
    for tensor in plan.tensors:
        scheme = tensor.stored_as if tensor.scheme is None else tensor.scheme.name
        why = tensor.reason or "; ".join(tensor.notes)
        note = str(notes.setdefault(why, len(notes) + 1)) if why else ""
        table.add_row(tensor.name, "×".join(map(str, tensor.shape)), scheme, f"{tensor.stored_bytes:,}", note)
    lines = [f"{number:>2}  {why}" for why, number in notes.items()]
    lines.append(
        f"{human_bytes(plan.file_bytes)} in all, {plan.bits_per_weight(True):.3f} bits per weight of the decoder; "
        f"peak memory about {human_bytes(prepared.peak_memory())}; nothing was written"
    )
    lines += [f"note: {note}" for note in plan.warnings]
    table.caption = "\n".join(lines)
    return table


def _summary(report: Any, path: Path) -> Any:
    from rich.table import Table

    from lowbit.checkpoint.base import HTML_NAME, report_path
    from lowbit.cli.console import human_bytes

    table = Table(title=f"{report.source.model} → {path}", title_justify="left", show_header=False)
    totals = report.totals
    left_alone = [tensor for tensor in report.tensors if tensor.scheme is None and len(tensor.shape) == 2]
    quantized = [tensor for tensor in report.tensors if tensor.scheme is not None]
    worst = max(quantized, key=lambda tensor: tensor.relative_error or 0.0, default=None)
    what = "matrices" if report.output.format == "gguf" else "linears"
    in_worst = f"; worst error {100 * (worst.relative_error or 0):.2f} % in {worst.name}" if worst else ""
    rows = {
        "scheme": f"{report.settings.scheme}, {report.settings.method}, range {report.settings.range}",
        "imatrix": report.settings.imatrix,
        "calibrated on": _calibrated(report.settings.calibration),
        "output error": _output_error(quantized),
        "size": f"{human_bytes(totals.bytes_in)} → {human_bytes(totals.bytes_out)}",
        "bits per weight": f"{totals.decoder_bits_per_weight:.3f} decoder, {totals.file_bits_per_weight:.3f} file",
        "quantized": f"{len(quantized)} {what}{in_worst}",
        "left in 16 bits": ", ".join(t.name for t in left_alone[:4]) + (" …" if len(left_alone) > 4 else "") or "none",
        "adapted": _adapted(quantized, what),
        "notes": "; ".join(report.source.notes),
        "verified": verified(report.verification),
        "time, memory": f"{totals.seconds:.1f} s, peak {human_bytes(totals.peak_memory_bytes)}",
        "report": str(report_path(path, HTML_NAME)),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


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


def verified(verification: Any) -> str:
    """The verdict of the rules in one line."""
    if verification.ok:
        return f"{len(verification.checks)} rules of {verification.engine} hold"
    failed = "; ".join(check.detail for check in verification.checks if not check.passed)
    return f"{verification.engine} will NOT load it: {failed}"


def _adapted(quantized: list[Any], what: str) -> str:
    """What the plan changed, each once with how many tensors it concerns."""
    from collections import Counter

    notes = Counter(note for tensor in quantized for note in tensor.notes)
    return "; ".join(f"{note} ({count} {what})" for note, count in notes.items())
