"""From a finished run to its report: lowbit-report.json and the page beside the weights."""

from __future__ import annotations

import datetime
import platform
import shlex
from collections import Counter
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit import __version__
from lowbit.calibrate.summary import pack_vocabulary
from lowbit.checkpoint.base import HTML_NAME, report_path
from lowbit.measure import Meter
from lowbit.neighbours import planned_neighbours
from lowbit.report import schema
from lowbit.report.html import render_html
from lowbit.verification import Verification

if TYPE_CHECKING:
    from lowbit.blockwise.results import TensorResult
    from lowbit.gguf_pipeline import PreparedGGUF
    from lowbit.gguf_plan import PlannedBlocks
    from lowbit.pipeline import Prepared
    from lowbit.plan import PlannedTensor
    from lowbit.rounding.histogram import WeightHistogram
    from lowbit.settings import Settings


# Of `Settings`: what methods that run a text can be told.
_OPTIONS = (
    "damping", "correction", "correction_samples", "refine", "iterations", "expert_tokens", "all_experts",
    "bias_correction",
    "activation_range", "activation_percentile", "compute",
)  # fmt: skip


# Settings that the command line has, in the order in which a person would write them.
_FLAGS = (
    "scheme", "method", "format", "group_size", "range", "percentile", "double_quant", "method_overrides", "overrides",
    "ignore", "calib", "samples", "seqlen", "imatrix", "pure", "output_type", "token_embedding_type", "pre_tokenizer",
    "kv_cache", "activation_range", "damping", "correction", "refine", "iterations", "expert_tokens", "all_experts",
    "bias_correction", "compute", "shard_size",
)  # fmt: skip
# Histograms of more tensors than this would make a report of many megabytes; those of largest error are kept.
_HISTOGRAMS = 2000


def build_report(
    prepared: Prepared | PreparedGGUF,
    results: dict[str, TensorResult],
    histograms: dict[str, WeightHistogram],
    written: list[Path],
    output: Path,
    verification: Verification,
    meter: Meter,
) -> schema.Report:
    """The report of a finished run.

    results, histograms  by the names of the plan's tensors
    written              the weight files; `output` is the name to be
    """
    plan = prepared.plan
    files = tuple(schema.OutputFile(name=path.name, bytes=path.stat().st_size) for path in sorted(written))
    weights = sum(tensor.weights for tensor in plan.tensors)
    shown = _kept_histograms(histograms, results)
    bytes_in, bytes_out = sum(tensor.source_bytes for tensor in plan.tensors), sum(file.bytes for file in files)
    return schema.Report(
        schema=schema.SCHEMA,
        lowbit=__version__,
        created=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        source=schema.Source(
            model=prepared.source,
            kind=prepared.source_kind,
            architecture=plan.model_class,
            notes=(*prepared.source_notes, *plan.warnings, *_decided_notes(prepared)),
            bytes=bytes_in,
        ),
        output=schema.Output(
            format=plan.format, files=files, bytes=bytes_out, dtype=str(plan.dtype).removeprefix("torch.")
        ),
        settings=_settings(prepared),
        versions=versions(),
        totals=schema.Totals(
            weights=weights,
            quantized_weights=sum(tensor.weights for tensor in plan.quantized),
            decoder_bits_per_weight=plan.bits_per_weight(decoder_only=True),
            file_bits_per_weight=8 * bytes_out / weights,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            seconds=meter.seconds,
            peak_memory_bytes=meter.peak_bytes,
            seconds_by_work={} if prepared.decided is None else prepared.decided.seconds,
        ),
        transforms=_transforms(prepared),
        tensors=tuple(_entry(tensor, results.get(tensor.name), shown.get(tensor.name)) for tensor in plan.tensors),
        verification=schema.Verification(
            ok=verification.ok,
            engine=verification.engine,
            checks=tuple(schema.Check(rule=c.rule, passed=c.passed, detail=c.detail) for c in verification.checks),
        ),
        serve=_serve_lines(verification, output),
        command=command_line(prepared, output),
        neighbours=planned_neighbours(prepared),
    )


def command_line(prepared: Prepared | PreparedGGUF, output: Path) -> str:
    """The command that makes it again, with the settings that are not the defaults."""
    settings = prepared.plan.settings
    converted = any(tensor.repack for tensor in prepared.plan.tensors) and prepared.plan.format != "gguf"
    words = ["lowbit", "convert" if converted else "quantize", prepared.source, "-o", str(output)]
    given = {name: getattr(settings, name) for name in _FLAGS
             if name in settings.model_fields_set}  # fmt: skip
    if converted:
        given = {"format": prepared.plan.format} | given
    elif "scheme" not in given:
        given = {"scheme": settings.scheme} | given
    for name, value in given.items():
        flag = "--" + name.removesuffix("s" if isinstance(value, dict) else "").replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else []
        elif isinstance(value, dict):
            words += [word for pattern, chosen in value.items() for word in (flag, f"{pattern}={chosen}")]
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [word for each in values for word in (flag, str(each))]
    return shlex.join(words)


def _settings(prepared: Prepared | PreparedGGUF) -> schema.Settings:
    plan = prepared.plan
    settings = plan.settings
    return schema.Settings(
        scheme=plan.scheme_name,
        method=settings.method,
        range=plan.range_method,
        group_size=settings.group_size,
        percentile=settings.percentile if settings.range == "percentile" else None,
        shard_size=settings.shard_size if plan.format == "gguf" else settings.bytes_per_shard,
        ignore=settings.ignore,
        overrides=tuple(f"{pattern}={name}" for pattern, name in settings.overrides.items()),
        seed=settings.seed,
        method_overrides=tuple(f"{pattern}={name}" for pattern, name in settings.method_overrides.items()),
        options={name: getattr(settings, name) for name in _OPTIONS if _was_changed(settings, name)},
        kv_cache=settings.kv_cache,
        imatrix=settings.imatrix,
        pure=settings.pure,
        calibration=_calibration(prepared),
    )


def write_report(report: schema.Report, output: Path) -> None:
    """lowbit-report.json and report.html in a folder, or beside a GGUF file."""
    schema.dump(report, report_path(output))
    schema.write_text(render_html(report), report_path(output, HTML_NAME))


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


def _calibration(prepared: Prepared | PreparedGGUF) -> schema.Calibration | None:
    text = prepared.calibration
    if text is None:
        return None
    return schema.Calibration(
        name=text.name, sha256=text.sha256, samples=text.windows, sequence_length=text.window_tokens,
        tokens=text.windows * text.window_tokens, notes=text.notes, inputs=_calibration_inputs(prepared),
        vocabulary=None if prepared.decided is None else pack_vocabulary(prepared.decided.windows.ids),
    )  # fmt: skip


def _calibration_inputs(prepared: Prepared | PreparedGGUF) -> tuple[schema.InputRecord, ...]:
    """What inputs of some blocks looked like on the calibration text."""
    if prepared.decided is None:
        return ()
    records = prepared.decided.store.records.values()
    return tuple(schema.InputRecord(**each) for record in records for each in record.inputs.values())


def _was_changed(settings: Settings, name: str) -> bool:
    return getattr(settings, name) != type(settings).model_fields[name].default


def _decided_notes(prepared: Prepared | PreparedGGUF) -> tuple[str, ...]:
    """What was rounded otherwise than asked for, counted."""
    decided = prepared.decided
    if decided is None:
        return ()
    results = [result for record in decided.store.records.values() for result in record.linears.values()]
    notes = Counter(note for result in results for note in result.notes)
    return (*decided.notes, *(f"{note} ({count} linears)" for note, count in notes.items()))


def _transforms(prepared: Prepared | PreparedGGUF) -> tuple[schema.TransformEntry, ...]:
    if prepared.decided is None:
        return ()
    records = prepared.decided.store.records.values()
    return tuple(schema.TransformEntry(**note) for record in records for note in record.transforms)


def _serve_lines(verification: Verification, output: Path) -> tuple[schema.ServeLine, ...]:
    """How to run it: the engine where its rules hold, and in any case our own command."""
    ours = schema.ServeLine(engine="lowbit", command=f'lowbit generate {shlex.quote(str(output.absolute()))} -p "…"')
    theirs = {"vllm": "vllm serve {}", "llama.cpp": "llama-server -m {}"}.get(verification.engine)
    if not verification.ok or theirs is None:
        return (ours,)
    command = theirs.format(shlex.quote(str(output.absolute())))
    return (schema.ServeLine(engine=verification.engine, command=command), ours)


def _kept_histograms(
    histograms: dict[str, WeightHistogram], results: dict[str, TensorResult]
) -> dict[str, WeightHistogram]:
    """All of them, or where there are too many those of the tensors that lost most."""
    if len(histograms) <= _HISTOGRAMS:
        return histograms
    worst = sorted(histograms, key=lambda name: -results[name].relative_error if name in results else 1.0)
    return {name: histograms[name] for name in worst[:_HISTOGRAMS]}


def _entry(
    tensor: PlannedTensor | PlannedBlocks, result: TensorResult | None, histogram: WeightHistogram | None
) -> schema.TensorEntry:
    decided = None if result is None else result.decided
    linear = getattr(tensor, "linear", None)  # tensors of a GGUF file may be made of several
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
        method=None if decided is None else decided.method,
        layer_error=None if decided is None else decided.layer_error,
        nearest_error=None if decided is None else decided.nearest_error,
        tokens=None if decided is None else decided.tokens,
        repacked=tensor.repack,
        reason=tensor.reason,
        notes=tensor.notes if decided is None else (*tensor.notes, *decided.notes),
        reads=None if linear is None else linear.reads,
        histogram=None if histogram is None else schema.Histogram(**asdict(histogram)),
    )
