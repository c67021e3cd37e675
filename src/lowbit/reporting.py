"""From a finished run to its report: lowbit-report.json and the page beside the weights."""

from __future__ import annotations

import datetime
import platform
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowbit.architecture.shape import shape_of
from lowbit.benchmark.result import Bench
from lowbit.calibrate.summary import InputSummary, pack_vocabulary
from lowbit.checkpoint.adapter import adapter_sha256
from lowbit.checkpoint.base import HTML_NAME, IN_MEMORY, report_path
from lowbit.engines import find_engine
from lowbit.errors import LowbitError
from lowbit.evaluation.cache_result import CacheEvaluation
from lowbit.files.hashes import as_text
from lowbit.files.system import locked
from lowbit.knobs import command_line
from lowbit.measure import Meter
from lowbit.pipeline import TensorResult, Written
from lowbit.plan.plan import Making, PlannedTensor, Prepared
from lowbit.registry import load
from lowbit.report import schema
from lowbit.report.neighbours import planned_neighbours, with_neighbours_beside
from lowbit.report.next_steps import next_steps
from lowbit.report.page import render_html
from lowbit.rounding.extremes import tells_of_extremes, tells_of_loss
from lowbit.rounding.histogram import WeightHistogram
from lowbit.tasks.result import TaskResult
from lowbit.verification import Verification
from lowbit.verification.result import MMPROJ
from lowbit.version import __version__, version_of

# More histograms would make a report of many megabytes; those with the largest errors are kept.
_HISTOGRAMS = 2000
# Contexts that the cost of the cache is told for, in tokens, besides the model's longest.
CONTEXTS = (2048, 8192, 32768)
# Types of the cache beside 16 bits, in the order of their bits, of which an engine's are told.
CACHE_TYPES = ("fp8", "q8_0", "q4_0")
_WRITES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")  # classes of models that write text
_CACHE = "lowbit.estimation.serving:cache_of"  # which stands to the right of the report
# Notes on extreme values and on zeros in the summary; each tensor has all of its own.
_EXTREMES = 5


def build_report(
    prepared: Prepared, written: Written, output: Path, verification: Verification, meter: Meter
) -> schema.Report:
    """The report of a finished run; `output` is its final name."""
    plan, checkpoint, calibrated = prepared.plan, prepared.checkpoint, prepared.calibrated
    files, beside = (_files(paths, written) for paths in (written.files, written.beside))
    weights = sum(tensor.weights for tensor in plan.tensors)
    shown = _kept_histograms(written.histograms, written.results)
    bytes_in, bytes_out = sum(tensor.source_bytes for tensor in plan.tensors), sum(file.bytes for file in files)
    report = schema.Report(
        schema=schema.SCHEMA,
        lowbit=__version__,
        created=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        source=schema.ReportSource(
            model=prepared.source,
            kind=checkpoint.kind,
            architecture=plan.model_class,
            notes=(*checkpoint.notes, *plan.notes, *_extreme_notes(prepared, written),
                   *_calibration_notes(prepared), *filter(None, [plan.shortfall])),
            bytes=bytes_in,
            adapter=prepared.options.adapter,
            adapter_sha256=adapter_sha256(prepared.options),
        ),
        output=schema.Output(
            format=plan.format.name, files=files, beside=beside, bytes=bytes_out,
            dtype=str(plan.dtype).removeprefix("torch."),
        ),
        settings=schema.ReportSettings(
            scheme=plan.scheme_name,
            method=prepared.made_by or plan.settings.method,
            range=plan.range_method,
            given=plan.settings.given,
            calibration=_calibration(prepared),
        ),
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
            seconds_by_work={} if calibrated is None else calibrated.seconds,
            accounts=tuple(account_of(what, tensors) for what, tensors in plan.accounts.items()),
            decoder_quantized=plan.decoder_quantized,
        ),
        transforms=() if calibrated is None else tuple(
            schema.TransformEntry(**note) for record in calibrated.store.records.values() for note in record.transforms
        ),
        distillation=_distillation(prepared),
        tensors=tuple(
            _entry(t, written.results.get(t.name), shown.get(t.name), written.notes.get(t.name, ()))
            for t in plan.tensors
        ),
        verification=verification,
        serve=_serve_lines(verification, output),
        command=_command(prepared, output),
        neighbours=planned_neighbours(prepared),
        cache_costs=None if verification.format == MMPROJ else cache_costs(prepared, verification.engine),
    )  # fmt: skip
    return report.model_copy(update={"next_steps": next_steps(report, output)})


def account_of(what: str, tensors: list[PlannedTensor]) -> schema.Account:
    """The sum of one entry of `Plan.accounts`."""
    return schema.Account(
        what=what,  # type: ignore[arg-type]
        tensors=len(tensors),
        weights=sum(tensor.weights for tensor in tensors),
        bytes_in=sum(tensor.source_bytes for tensor in tensors),
        bytes_out=sum(tensor.stored_bytes for tensor in tensors),
    )


def _files(paths: list[Path], written: Written) -> tuple[schema.OutputFile, ...]:
    found = []
    for path in sorted(paths):
        name = path.relative_to(written.files[0].parent).as_posix()
        hashes = as_text(written.digests[name]) if name in written.digests else None
        found.append(schema.OutputFile(name=name, bytes=path.stat().st_size, hashes=hashes))
    return tuple(found)


def _command(prepared: Prepared, output: Path) -> str | None:
    """The command that repeats the run; None where the model or the text was in memory."""
    if prepared.checkpoint.kind == IN_MEMORY or prepared.text is not None:
        return None
    plan, given = prepared.plan, prepared.plan.settings.given
    if prepared.start is not None:
        trust = asdict(prepared.options)
        distill = plan.settings.method.endswith("+distill")
        asked = {"reference": prepared.source, "distill": distill, **prepared.held_out}
        return command_line("refine", prepared.start, output, asked, _own(given), trust)
    repacked = any(tensor.making is Making.repacked for tensor in plan.tensors)
    if repacked and plan.format.suffix is None:
        return command_line("convert", prepared.source, output, given, asdict(prepared.options))
    scheme = {"scheme": plan.settings.scheme}
    return command_line("quantize", prepared.source, output, scheme | given, asdict(prepared.options))


def _own(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a refinement that its command takes: not the method, and not the format, which the file has."""
    return {name: value for name, value in given.items() if name not in ("method", "format", "scheme")}


def cache_costs(prepared: Prepared, engine_name: str) -> schema.CacheCosts | None:
    """Bytes of the KV cache at some contexts, in 16 bits and in the engine's narrower types; None of a model that keeps
    another kind of state, or none."""
    config, engine = prepared.checkpoint.config(), find_engine(engine_name)
    classes = f"{config.get('architectures')} {prepared.plan.model_class}"
    if not any(kind in classes for kind in _WRITES):
        return None
    try:
        shape = shape_of(config)
        longest = shape.max_positions or CONTEXTS[-1]
        contexts = tuple(sorted({min(context, longest) for context in (*CONTEXTS, longest)}))
        types = ("auto", *(name for name in CACHE_TYPES if name in engine.memory.cache_types))
        caches = {name: load(_CACHE)(shape, engine, name) for name in types}
    except LowbitError:
        return None
    rows = tuple(
        schema.CacheCost(type="16 bits" if name == "auto" else name, bits=cache.bits,
                         bytes=tuple(cache.sequence_bytes(context) for context in contexts))
        for name, cache in caches.items()
    )  # fmt: skip
    whole = caches["auto"]
    return schema.CacheCosts(engine=engine.name, contexts=contexts, rows=rows, layers=len(whole.layers),
                             bounded=whole.bounded)  # fmt: skip


def write_report(report: schema.Report, output: Path) -> None:
    """Write lowbit-report.json and report.html into the folder, or beside a GGUF file."""
    schema.dump(report, report_path(output))
    schema.write_text(render_html(report), report_path(output, HTML_NAME))


def add_bench(output: Path, found: Bench) -> schema.Report | None:
    """Add measured speeds, in place of earlier ones of the same engine on the same device."""
    if not report_path(output).is_file():
        return None
    kept = [each for each in schema.load(report_path(output)).bench if each.place != found.place]
    return add_to_report(output, bench=(*kept, found))


def add_caches(output: Path, found: Sequence[CacheEvaluation]) -> schema.Report | None:
    """Add what cache types cost, in place of earlier figures of the same types at the same lengths."""
    new = {row.place for row in found}
    return _changed(
        output, lambda report: {"kv_cache": (*(row for row in report.kv_cache if row.place not in new), *found)}
    )


def add_tasks(output: Path, found: TaskResult) -> schema.Report | None:
    """Add figures of tasks, in place of earlier ones of the same suite."""
    return _changed(
        output, lambda report: {"tasks": (*(each for each in report.tasks if each.suite != found.suite), found)}
    )


def add_to_report(output: Path, **parts: Any) -> schema.Report | None:
    """Replace parts of the report and its page; None where the output has no report.

    parts  fields of `Report`: evaluation, kv_cache, diagnosis, neighbours, bench, tasks
    """
    return _changed(output, lambda report: parts)


def _changed(output: Path, change: Callable[[schema.Report], dict[str, Any]]) -> schema.Report | None:
    """The report with parts in place of its own; runs that measure at once change it one after the other."""
    path = report_path(output)
    if not path.is_file():
        return None
    with locked(path.parent):
        report = schema.load(path)
        report = report.model_copy(update=change(report))
        report = report.model_copy(update={"neighbours": with_neighbours_beside(report, output)})
        report = report.model_copy(update={"next_steps": next_steps(report, output)})
        write_report(report, output)
    return report


def versions() -> dict[str, str]:
    """Versions of the software, and the instruction set of the kernels."""
    import torch

    from lowbit import kernels

    return {
        "lowbit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "kernels": kernels.isa(),
    }


def _calibration(prepared: Prepared) -> schema.Calibration | None:
    text, calibrated = prepared.calibration, prepared.calibrated
    if text is None:
        return None
    records = () if calibrated is None else calibrated.store.records.values()
    return schema.Calibration(
        name=text.name, sha256=text.sha256, samples=text.windows, sequence_length=text.window_tokens,
        tokens=text.windows * text.window_tokens, notes=text.notes,
        inputs=tuple(InputSummary(**summary) for record in records for summary in record.inputs.values()),
        vocabulary=None if calibrated is None else pack_vocabulary(calibrated.windows.ids),
    )  # fmt: skip


def _distillation(prepared: Prepared) -> schema.Distillation | None:
    done = prepared.distilled
    if done is None:
        return None
    return schema.Distillation(
        parameters=done.parameters, windows=done.windows[0], held_out=done.windows[1], kld_start=done.start,
        kld_end=done.end, steps=done.steps, best_step=done.best_step, rate=done.rate,
    )  # fmt: skip


def _calibration_notes(prepared: Prepared) -> tuple[str, ...]:
    """Notes on linears that were not rounded as requested, counted."""
    if prepared.calibrated is None:
        return ()
    records = prepared.calibrated.store.records.values()
    notes = Counter(note for record in records for result in record.linears.values() for note in result.notes
                    if not tells_of_extremes(note))  # fmt: skip
    learned = () if prepared.distilled is None else prepared.distilled.notes
    return (*prepared.calibrated.notes, *learned, *(f"{note} ({count} linears)" for note, count in notes.items()))


def _serve_lines(verification: Verification, output: Path) -> tuple[schema.ServeLine, ...]:
    """Commands that run the model: the engine's, if all its rules passed, and lowbit's; none without a tokenizer."""
    if any(check.rule in ("tokenizer", "gguf-text") and not check.passed for check in verification.checks):
        return ()
    place = str(output.absolute())
    ours = schema.ServeLine(engine="lowbit", command=f'lowbit generate {shlex.quote(place)} -p "…"')
    engine = find_engine(verification.engine)
    if verification.format == MMPROJ:
        command = f"{engine.serve_line('MODEL.gguf')} --mmproj {shlex.quote(place)}"
        return (schema.ServeLine(engine=engine.name, command=command),)
    if not verification.ok or not engine.serves:
        return (ours,)
    return (schema.ServeLine(engine=engine.name, command=engine.serve_line(place)), ours)


def _kept_histograms(
    histograms: dict[str, WeightHistogram], results: dict[str, TensorResult]
) -> dict[str, WeightHistogram]:
    """The histograms of the tensors with the largest errors, at most _HISTOGRAMS."""
    if len(histograms) <= _HISTOGRAMS:
        return histograms
    worst = sorted(histograms, key=lambda name: -results[name].relative_error if name in results else 1.0)
    return {name: histograms[name] for name in worst[:_HISTOGRAMS]}


def extremes_of(prepared: Prepared, written: Written) -> list[str]:
    """Tensors with values that their format cannot hold, and what became of them, or with nothing but zeros; large
    values first, which make their neighbours zero."""
    found = [(name, note) for name, notes in written.notes.items() for note in notes]
    for record in () if prepared.calibrated is None else prepared.calibrated.store.records.values():
        found += [(f"{name}.weight", note) for name, result in record.linears.items() for note in result.notes
                  if tells_of_extremes(note)]  # fmt: skip
    found.sort(key=lambda pair: pair[1].startswith(("the values", "the weights")))
    return [f"{name}: {note}" for name, note in found]


def _extreme_notes(prepared: Prepared, written: Written) -> tuple[str, ...]:
    """The first few, each with what keeps such a tensor as it is, and how many more there are."""
    found, notes = extremes_of(prepared, written), []
    for note in found[:_EXTREMES]:
        keep = prepared.plan.keeping(note.partition(":")[0])
        notes.append(f"{note}; {keep} of quantize keeps it in 16 bits" if tells_of_loss(note) else note)
    if len(found) > _EXTREMES:
        notes.append(f"{len(found) - _EXTREMES} more notes of this kind stand with their tensors in the report")
    return tuple(notes)


def _entry(
    tensor: PlannedTensor, result: TensorResult | None, histogram: WeightHistogram | None, notes: tuple[str, ...]
) -> schema.TensorEntry:
    calibrated = None if result is None else result.linear
    return schema.TensorEntry(
        name=tensor.name,
        role=tensor.role,
        block=tensor.block,
        shape=tensor.shape,
        scheme=tensor.stored_as if tensor.is_quantized else None,
        bits_per_weight=8 * tensor.stored_bytes / tensor.weights if tensor.weights else 0.0,
        bytes=tensor.stored_bytes,
        relative_error=None if result is None else result.relative_error,
        max_error=None if result is None else result.max_error,
        method=None if calibrated is None else calibrated.method,
        layer_error=None if calibrated is None else calibrated.layer_error,
        nearest_error=None if calibrated is None else calibrated.nearest_error,
        start_error=None if calibrated is None else calibrated.start_error,
        tokens=None if calibrated is None else calibrated.tokens,
        repacked=tensor.making is Making.repacked and tensor.is_quantized,
        reason=tensor.reason,
        notes=(*tensor.notes, *notes, *(() if calibrated is None else calibrated.notes)),
        reads=None if tensor.linear is None else tensor.linear.reads,
        histogram=histogram,
    )
