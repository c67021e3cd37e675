"""The public calls that run several stages: `quantize`, `convert`, `dry_run`, `inspect`."""

from __future__ import annotations

import datetime
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lowbit import __version__
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import VerificationError
from lowbit.export.atomic import refuse_existing
from lowbit.measure import Meter
from lowbit.pipeline import Prepared, Progress, TensorResult, calibrate, prepare, write_checkpoint
from lowbit.plan import PlannedTensor
from lowbit.report import schema
from lowbit.report.html import render_html
from lowbit.settings import make_settings
from lowbit.verification import Verification, verify

HTML_NAME = "report.html"


@dataclass(frozen=True)
class Quantized:
    """A finished checkpoint and its report."""

    folder: Path
    report: schema.Report


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: Path | None = None,
    options: OpenOptions | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Quantized:
    """Quantize `model` into the folder `output`, verify what was written and report on it.

    model     a folder, a .gguf file, a Hugging Face id, or demo:smollm2
    settings  the fields of `lowbit.settings.Settings`: scheme, group_size, ignore, overrides, range …
    progress  called with (what, bytes done, bytes in all)

    Raises LowbitError; then nothing exists under `output` (or the earlier output is still there).
    """
    meter = Meter()
    prepared = prepare(model, make_settings(recipe, **settings), options, threads)
    return _write(prepared, Path(output), options, overwrite, progress, meter)


def convert(
    model: str | Path,
    output: str | Path,
    *,
    format: str,
    scheme: str | None = None,
    options: OpenOptions | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Quantized:
    """Write a quantized model in another format: bit for bit where the format allows, rounded anew where it does not.

    format    one of `lowbit.export.FORMATS`; "float" writes the decoded weights
    scheme    for every quantized linear; None keeps each one's own, or the nearest that the format has

    Which linears were repacked and which rounded anew, with the added error, is in the report. Raises LowbitError; then
    nothing exists under `output`.
    """
    meter = Meter()
    prepared = dry_convert(model, format=format, scheme=scheme, options=options, threads=threads, **settings)
    return _write(prepared, Path(output), options, overwrite, progress, meter)


def dry_convert(
    model: str | Path,
    *,
    format: str,
    scheme: str | None = None,
    options: OpenOptions | None = None,
    threads: int | None = None,
    **settings: Any,
) -> Prepared:
    """The plan of a conversion: for every linear, whether it is repacked or rounded anew, and why."""
    from lowbit.conversion import prepare_conversion

    made = make_settings(None, format=format, scheme=scheme, **settings)
    return prepare_conversion(model, made, options, threads, scheme_given=scheme is not None)


def _write(
    prepared: Prepared,
    output: Path,
    options: OpenOptions | None,
    overwrite: bool,
    progress: Progress | None,
    meter: Meter,
) -> Quantized:
    """Calibrate where that is needed, write, verify, report; all under a hidden name until it is complete."""
    refuse_existing(output, overwrite)
    prepared = calibrate(prepared, progress)
    made: list[schema.Report] = []

    def finish(work: Path, results: dict[str, TensorResult]) -> None:
        nearest = prepared.plan.settings.method == "rtn" and prepared.plan.exporter.FORMAT != "float"
        engine = prepared.plan.exporter.ENGINE
        verification = verify(work, source=prepared.checkpoint, engine=engine, options=options, nearest=nearest)
        # what the engine has no kernel or loader for stays, and the report and the command say so
        if verification.broken:
            failed = verification.broken[0]
            raise VerificationError(
                f"{output}: what was written breaks the rule {failed.rule!r}: {failed.detail}",
                "this is a bug of lowbit, or a damaged disk; please report it. Nothing was left under that name",
            )
        report = build_report(prepared, results, work, output, verification, meter)
        write_report(report, work)
        made.append(report)

    write_checkpoint(prepared, output, progress, overwrite, finish)
    return Quantized(output, made[0])


def dry_run(
    model: str | Path,
    *,
    recipe: Path | None = None,
    options: OpenOptions | None = None,
    threads: int | None = None,
    **settings: Any,
) -> Prepared:
    """The plan of a run, without reading a weight: every tensor, exact bytes, predicted peak memory."""
    return prepare(model, make_settings(recipe, **settings), options, threads)


def inspect(path: str | Path, options: OpenOptions | None = None) -> Checkpoint:
    """Open any supported checkpoint; tensors, types, metadata and config without reading a weight."""
    return open_checkpoint(path, options)


def build_report(prepared: Prepared, results: dict[str, TensorResult], work: Path, output: Path,
                 verification: Verification, meter: Meter) -> schema.Report:  # fmt: skip
    """The report of a finished run; `work` holds the files, `output` is their name to be."""
    plan, checkpoint = prepared.plan, prepared.checkpoint
    files = tuple(
        schema.OutputFile(name=path.name, bytes=path.stat().st_size) for path in sorted(work.glob("*.safetensors"))
    )
    weights = sum(tensor.weights for tensor in plan.tensors)
    written = sum(file.bytes for file in files)
    return schema.Report(
        schema=schema.SCHEMA,
        lowbit=__version__,
        created=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        source=schema.Source(
            model=checkpoint.source,
            kind=checkpoint.kind,  # type: ignore[arg-type]
            architecture=plan.architecture.class_name,
            notes=tuple(checkpoint.notes),
            bytes=sum(tensor.source.nbytes for tensor in plan.tensors),
        ),
        output=schema.Output(
            format=plan.exporter.FORMAT, files=files, bytes=written, dtype=str(plan.dtype).removeprefix("torch.")
        ),
        settings=schema.Settings(
            scheme=plan.settings.base_scheme().name,
            method=plan.settings.method,
            range=plan.settings.range_search(plan.settings.base_scheme().weight).method,
            group_size=plan.settings.group_size,
            percentile=plan.settings.percentile if plan.settings.range == "percentile" else None,
            shard_size=plan.settings.shard_size,
            ignore=plan.settings.ignore,
            overrides=tuple(f"{pattern}={name}" for pattern, name in plan.settings.overrides.items()),
            seed=plan.settings.seed,
            calibration=_calibration(prepared),
        ),
        versions=versions(),
        totals=schema.Totals(
            weights=weights,
            quantized_weights=sum(tensor.weights for tensor in plan.quantized),
            decoder_bits_per_weight=plan.bits_per_weight(decoder_only=True),
            file_bits_per_weight=8 * written / weights,
            bytes_in=sum(tensor.source.nbytes for tensor in plan.tensors),
            bytes_out=written,
            seconds=meter.seconds,
            peak_memory_bytes=meter.peak_bytes,
        ),
        tensors=tuple(_entry(tensor, results.get(tensor.name)) for tensor in plan.tensors),
        verification=schema.Verification(
            ok=verification.ok,
            engine=verification.engine,
            checks=tuple(schema.Check(rule=c.rule, passed=c.passed, detail=c.detail) for c in verification.checks),
        ),
        serve=_serve_lines(verification, output),
    )


def write_report(report: schema.Report, folder: Path) -> None:
    """lowbit-report.json and report.html beside the weights."""
    schema.dump(report, folder / schema.REPORT_NAME)
    schema.write_text(render_html(report), folder / HTML_NAME)


def add_evaluation(folder: Path, evaluations: list[Any]) -> schema.Report:
    """Put evaluations into a folder's report and page, in place of earlier ones; `evaluations` have `to_dict`."""
    report = schema.load(folder)
    rows = tuple(schema.Evaluation.model_validate(evaluation.to_dict()) for evaluation in evaluations)
    report = report.model_copy(update={"evaluation": rows})
    write_report(report, folder)
    return report


def versions() -> dict[str, str]:
    """What a figure depends on beside the settings."""
    import torch

    from lowbit import kernels

    return {
        "lowbit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "kernels": kernels.isa(),
    }


def _calibration(prepared: Prepared) -> schema.Calibration | None:
    text = prepared.calibration
    if text is None:
        return None
    return schema.Calibration(
        name=text.name, sha256=text.sha256, samples=text.windows, sequence_length=text.window_tokens,
        tokens=text.windows * text.window_tokens,
    )  # fmt: skip


def _serve_lines(verification: Verification, output: Path) -> tuple[schema.ServeLine, ...]:
    """How to run it: vLLM where its rules hold, and in any case our own command."""
    ours = schema.ServeLine(engine="lowbit", command=f'lowbit generate {output.absolute()} -p "…"')
    if not verification.ok or verification.engine != "vllm":
        return (ours,)
    return (schema.ServeLine(engine="vllm", command=f"vllm serve {output.absolute()}"), ours)


def _entry(tensor: PlannedTensor, result: TensorResult | None) -> schema.TensorEntry:
    return schema.TensorEntry(
        name=tensor.name,
        role=tensor.role,
        block=tensor.block,
        shape=tensor.shape,
        scheme=None if tensor.scheme is None else tensor.scheme.name,
        bits_per_weight=8 * tensor.stored_bytes / tensor.weights if tensor.weights else 0.0,
        bytes=tensor.stored_bytes,
        relative_error=None if result is None else result.relative_error,
        max_error=None if result is None else result.max_error,
        repacked=tensor.repack,
        reason=tensor.reason,
        notes=tensor.notes,
    )
