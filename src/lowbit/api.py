"""The public calls that run several stages: `quantize`, `convert`, `dry_run`, `inspect`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.adapter import adapter_files
from lowbit.checkpoint.base import HTML_NAME, Checkpoint, OpenOptions, report_path
from lowbit.checkpoint.opening import find_gguf
from lowbit.errors import ArchitectureError, UsageError, VerificationError
from lowbit.export.atomic import refuse_existing_files
from lowbit.files.claim import claimed, refuse_claimed
from lowbit.files.system import check_disk, refuse_sources
from lowbit.formats.gguf.raw import RawCheckpoint, open_raw_gguf
from lowbit.knobs import Facts
from lowbit.measure import Meter
from lowbit.methods import parse_method
from lowbit.pipeline import Written, calibrate, write_checkpoint
from lowbit.plan.conversion import prepare_conversion
from lowbit.plan.plan import Prepared, Progress, Request, output_format, prepare
from lowbit.report import schema
from lowbit.reporting import build_report, write_report
from lowbit.settings import RunOptions, Settings, make_settings, refuse_unread
from lowbit.verification import verify

_log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class Quantized:
    """A finished checkpoint, folder or GGUF file (of a split one the first part), and its report."""

    path: Path
    report: schema.Report


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    options: OpenOptions | None = None,
    run: RunOptions | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Quantized:
    """Quantize `model` into `output`, verify what was written and report on it.

    model     a folder, a .gguf file, a Hugging Face id, or demo:smollm2
    output    a folder, or NAME.gguf for llama.cpp
    options   trust in the source, its revision, and an adapter to merge
    settings  the fields of `lowbit.settings.Settings`: scheme, method, group_size, ignore, overrides, range …
    run       device, memory bound and resuming, for methods that run a text through the model
    progress  called with (name, bytes done, bytes in all)

    After a LowbitError `output` does not exist, or is still the earlier one.
    """
    meter, output, chosen = Meter(), Path(output), make_settings(recipe, **settings)
    refuse_unread(chosen, run, Facts(gguf=chosen.writes_gguf(output)))
    refuse_other_name(output, chosen)
    refuse_claimed(output)  # before an importance matrix is measured
    refuse_sources([output], [Path(model)])
    if output_format(chosen, output).suffix is not None:
        beside = [report_path(output), report_path(output, HTML_NAME)]
        beside += [output.with_name("Modelfile")] if chosen.modelfile else []
        refuse_existing_files(output, [output, *beside], overwrite)
    prepared = prepare(Request(model, chosen, options or OpenOptions(), threads, progress), output)
    return _write(prepared, output, overwrite, progress, meter, run)


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
    """Write a quantized model in another format: the same codes where the format holds them, else rounded again.

    format    one of `lowbit.registry.written_formats`; "float" writes the decoded weights
    scheme    for every quantized linear; None keeps its own, or the nearest that the format has

    The report lists which linears were repacked and which were rounded again, with the added error. After a LowbitError
    `output` does not exist.
    """
    meter, output = Meter(), Path(output)
    prepared = dry_convert(model, format=format, scheme=scheme, options=options, threads=threads, preview=False,
                           output=output, **settings)  # fmt: skip
    return _write(prepared, output, overwrite, progress, meter)


def dry_convert(
    model: str | Path,
    *,
    format: str,
    scheme: str | None = None,
    options: OpenOptions | None = None,
    threads: int | None = None,
    preview: bool = True,
    output: Path | None = None,
    **settings: Any,
) -> Prepared:
    """The plan of a conversion: which linears are repacked, which are rounded again, and why."""
    chosen = make_settings(None, format=format, scheme=scheme, **settings)
    request = Request(model, chosen, options or OpenOptions(), threads, preview=preview)
    if output_format(chosen).suffix is None:
        return prepare_conversion(request, scheme_given=scheme is not None)
    refuse_unread(chosen)
    if scheme is None and not chosen.mmproj:
        raise UsageError("a GGUF file needs a type", "name one: --scheme Q8_0, Q4_K_M, BF16 …")
    if output is not None:
        refuse_other_name(output, chosen)
    return prepare(request)


def _write(
    prepared: Prepared,
    output: Path,
    overwrite: bool,
    progress: Progress | None,
    meter: Meter,
    run: RunOptions | None = None,
) -> Quantized:
    """Calibrate, write, verify, report; the output has a hidden name until it is complete."""
    plan = prepared.plan
    refuse_sources(plan.places(output), _sources(prepared))
    reports: list[schema.Report] = []

    def finish(work: Path, written: Written) -> None:
        # Weights that transforms rewrote cannot be compared with the source.
        rewritten = parse_method(plan.settings.method).transforms
        verification = verify(
            plan.model_in(work, output),
            source=None if rewritten else prepared.checkpoint,
            engine=plan.format.engine,
            options=prepared.options,
            nearest=not plan.settings.is_blockwise and plan.settings.method == "rtn" and plan.format.name != "float",
        )
        # Limits of the engine are reported and the output stays; broken files are an error.
        inherited = plan.inherited_rules(prepared.checkpoint)
        for failed in (check for check in verification.broken if check.rule not in inherited):
            raise VerificationError(
                f"{output}: the output breaks the rule {failed.rule!r}: {failed.detail}",
                "this is a bug of lowbit, or a damaged disk; please report it. The output was removed",
            )
        report = build_report(prepared, written, plan.opened_at(output), verification, meter)
        write_report(report, plan.report_at(work, output))
        reports.append(report)

    with claimed(output) as claim:
        plan.refuse_existing(output, overwrite)
        check_disk(output, plan.settings.copies_on_disk * plan.file_bytes, plan.largest_file)
        try:
            prepared = calibrate(prepared, output, run, progress)
            write_checkpoint(prepared, output, progress, overwrite, finish, claim)
        except BaseException:
            blocks = len(list(claim.folder.glob("block-*.safetensors")))
            if blocks:
                _log.warning("%d finished blocks are kept in %s; the same command with --resume goes on from them",
                             blocks, claim.folder)  # fmt: skip
            raise
        if prepared.calibrated is not None:
            prepared.calibrated.store.remove()
    return Quantized(plan.opened_at(output), reports[0])


def dry_run(
    model: str | Path,
    *,
    output: str | Path | None = None,
    recipe: str | Path | None = None,
    options: OpenOptions | None = None,
    run: RunOptions | None = None,
    threads: int | None = None,
    **settings: Any,
) -> Prepared:
    """The plan of a run, without reading a weight: every tensor, exact bytes, predicted peak memory.

    output  nothing is written there; its name tells a GGUF file from a folder
    """
    chosen, output = make_settings(recipe, **settings), None if output is None else Path(output)
    refuse_unread(chosen, run, Facts(gguf=chosen.writes_gguf(output)))
    return prepare(Request(model, chosen, options or OpenOptions(), threads, preview=True), output)


def _sources(prepared: Prepared) -> list[Path]:
    """Every file and folder that the run reads."""
    settings, checkpoint = prepared.plan.settings, prepared.checkpoint
    named = [prepared.source, *(text for text in (settings.imatrix, settings.calib, settings.tensor_type_file) if text)]
    files = {info.file for info in checkpoint.tensors.values()}
    return [*map(Path, named), *files, *adapter_files(prepared.options)]


def refuse_other_name(output: Path, settings: Settings) -> None:
    """UsageError where the name of a single-file output lacks the suffix of its format."""
    suffix = output_format(settings, output).suffix
    if suffix is not None and output.suffix != suffix:
        raise UsageError(
            f"{output}: {settings.scheme} is written as one {suffix[1:].upper()} file", f"name it -o {output}{suffix}"
        )


def inspect(path: str | Path, options: OpenOptions | None = None) -> Checkpoint:
    """Open any supported checkpoint: tensors, types, metadata and config, without reading a weight.

    A GGUF file whose architecture has no Hugging Face names here (an image model, say) appears under its own names.
    """
    try:
        return open_checkpoint(path, options)
    except ArchitectureError as error:
        file = find_gguf(path, options)
        if file is None:
            raise
        raw = RawCheckpoint(open_raw_gguf(file), str(path))
        raw.notes.append(f"under the file's own names, since {error}")
        return raw
