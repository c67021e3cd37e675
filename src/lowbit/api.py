"""The public calls that run several stages: `quantize`, `convert`, `dry_run`, `inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.blockwise.folders import calibrate
from lowbit.blockwise.results import TensorResult
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint, OpenOptions, report_path
from lowbit.errors import UsageError, VerificationError
from lowbit.export.atomic import refuse_existing, refuse_existing_file
from lowbit.measure import Meter
from lowbit.methods import parse_method
from lowbit.pipeline import Prepared, Progress, prepare, write_checkpoint
from lowbit.report import schema
from lowbit.reporting import build_report, write_report
from lowbit.rounding.histogram import WeightHistogram
from lowbit.settings import RunOptions, Settings, make_settings
from lowbit.verification import Verification, verify

if TYPE_CHECKING:
    from lowbit.gguf_pipeline import PreparedGGUF


@dataclass(frozen=True)
class Quantized:
    """A finished checkpoint, folder or GGUF file (of a split one the first part), and its report."""

    path: Path
    report: schema.Report


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: Path | None = None,
    options: OpenOptions | None = None,
    run: RunOptions | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Quantized:
    """Quantize `model` into `output`, verify what was written and report on it.

    output    a folder, or NAME.gguf for llama.cpp

    model     a folder, a .gguf file, a Hugging Face id, or demo:smollm2
    settings  the fields of `lowbit.settings.Settings`: scheme, method, group_size, ignore, overrides, range …
    run       device, memory bound and resuming, of methods that run a text through the model
    progress  called with (what, bytes done, bytes in all)

    Raises LowbitError; then nothing exists under `output` (or the earlier output is still there).
    """
    meter = Meter()
    made, output = make_settings(recipe, **settings), Path(output)
    if not made.writes_gguf(output):
        prepared = prepare(model, made, options, threads)
        return _write(prepared, output, options, overwrite, progress, meter, run)
    from lowbit.gguf_pipeline import prepare_gguf

    refuse_other_name(output, made)
    refuse_existing_file(output, report_path(output), overwrite)
    prepared_gguf = prepare_gguf(model, made, options, threads, progress)
    return _write_gguf(prepared_gguf, output, overwrite, progress, meter, run)


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
    if format == "gguf":
        if scheme is None:
            raise UsageError("a GGUF file needs a type", "give one: --scheme Q8_0, Q4_K_M, BF16 …")
        return quantize(model, output, format=format, scheme=scheme, options=options, threads=threads,
                        overwrite=overwrite, progress=progress, **settings)  # fmt: skip
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
    if format == "gguf":
        raise UsageError("a GGUF file is planned as a quantization", "lowbit quantize MODEL --scheme TYPE --dry-run")
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
    run: RunOptions | None = None,
) -> Quantized:
    """Calibrate where that is needed, write, verify, report; all under a hidden name until it is complete."""
    refuse_existing(output, overwrite)
    prepared = calibrate(prepared, output, run, progress)
    method = prepared.plan.settings.method
    made: list[schema.Report] = []

    def finish(work: Path, results: dict[str, TensorResult], histograms: dict[str, WeightHistogram]) -> None:
        nearest = method == "rtn" and prepared.decided is None and prepared.plan.exporter.FORMAT != "float"
        engine = prepared.plan.exporter.ENGINE
        source: Checkpoint | None = prepared.checkpoint if prepared.decided is None else prepared.decided.checkpoint
        if parse_method(method).transforms:  # what they rewrote has no counterpart in the source
            source = None
        verification = verify(work, source=source, engine=engine, options=options, nearest=nearest)
        _refuse_broken(verification, output)
        files = list(work.glob("*.safetensors"))
        report = build_report(prepared, results, histograms, files, output, verification, meter)
        write_report(report, work)
        made.append(report)

    write_checkpoint(prepared, output, progress, overwrite, finish)
    if prepared.decided is not None:
        prepared.decided.store.remove()
    return Quantized(output, made[0])


def _write_gguf(
    prepared: PreparedGGUF,
    output: Path,
    overwrite: bool,
    progress: Progress | None,
    meter: Meter,
    run: RunOptions | None = None,
) -> Quantized:
    """Calibrate where that is asked for, write, verify, report; all under hidden names until it is complete."""
    from lowbit.gguf_pipeline import calibrate_gguf, write_gguf
    from lowbit.verification.gguf import INHERITED

    prepared = calibrate_gguf(prepared, output, run, progress)
    made: list[schema.Report] = []
    files: list[str] = []

    def finish(
        work: Path, written: list[Path], results: dict[str, TensorResult], histograms: dict[str, WeightHistogram]
    ) -> None:
        rewritten = parse_method(prepared.plan.settings.method).transforms
        verification = verify(written[0], source=None if rewritten else prepared.checkpoint, engine="llama.cpp")
        _refuse_broken(verification, output, INHERITED if prepared.source_kind == "gguf" else ())
        files.append(written[0].name)
        named = output.with_name(files[0])
        report = build_report(prepared, results, histograms, written, named, verification, meter)
        write_report(report, work / output.name)
        made.append(report)

    write_gguf(prepared, output, progress, overwrite, finish)
    if prepared.decided is not None:
        prepared.decided.store.remove()
    return Quantized(output.with_name(files[0]), made[0])


def _refuse_broken(verification: Verification, output: Path, inherited: tuple[str, ...] = ()) -> None:
    """What the engine has no kernel or loader for stays, and the report and the command say so; damage does not.

    inherited  rules whose failure comes from the source, and is reported likewise
    """
    broken = [check for check in verification.broken if check.rule not in inherited]
    if broken:
        failed = broken[0]
        raise VerificationError(
            f"{output}: what was written breaks the rule {failed.rule!r}: {failed.detail}",
            "this is a bug of lowbit, or a damaged disk; please report it. Nothing was left under that name",
        )


def dry_run(
    model: str | Path,
    *,
    output: Path | None = None,
    recipe: Path | None = None,
    options: OpenOptions | None = None,
    threads: int | None = None,
    **settings: Any,
) -> Prepared | PreparedGGUF:
    """The plan of a run, without reading a weight: every tensor, exact bytes, predicted peak memory.

    output  is not written; its name tells a GGUF file from a folder
    """
    made = make_settings(recipe, **settings)
    if not made.writes_gguf(output):
        return prepare(model, made, options, threads)
    from lowbit.gguf_pipeline import prepare_gguf

    return prepare_gguf(model, made, options, threads)


def refuse_other_name(output: Path, settings: Settings) -> None:
    """UsageError where a GGUF file would get another ending."""
    if output.suffix != ".gguf":
        raise UsageError(f"{output}: {settings.scheme} is written as one GGUF file", f"name it -o {output}.gguf")


def inspect(path: str | Path, options: OpenOptions | None = None) -> Checkpoint:
    """Open any supported checkpoint; tensors, types, metadata and config without reading a weight."""
    return open_checkpoint(path, options)


def add_evaluation(output: Path, evaluations: list[Any]) -> schema.Report:
    """Put evaluations into a report and its page, in place of earlier ones; `evaluations` have `to_dict`."""
    report = schema.load(report_path(output))
    rows = tuple(schema.Evaluation.model_validate(evaluation.to_dict()) for evaluation in evaluations)
    report = report.model_copy(update={"evaluation": rows})
    write_report(report, output)
    return report
