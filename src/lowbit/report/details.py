"""The sections below the top, as rows of text: evaluation, samples, groups of tensors, bytes, all tensors, facts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lowbit.benchmark.result import Bench, rate, spread
from lowbit.evaluation.result import Continuation, Evaluation, GeneratedSample
from lowbit.report.heatmap import recorded_inputs
from lowbit.report.plot import order_roles
from lowbit.report.schema import Report, ReportSettings, TensorEntry
from lowbit.report.summary import rounds_activations
from lowbit.report.units import (
    DASH,
    NBSP,
    decibel,
    decibel_text,
    duration,
    number,
    percent,
    plural,
    plus_minus,
    significant,
    size,
)
from lowbit.tasks.result import TaskResult, task_sentence

WORST_SHOWN = 5
NAMES_SHOWN = 400  # per reason; the tensor table has them all
# What unmeasured and exact tensors sort as: unmeasured first, then exact, then by decibels.
UNMEASURED, EXACT = -1e9, -1e6

Row = tuple[str, list[str]]  # (name, a value per column)


def conditions(runs: Sequence[Evaluation], scheme: str) -> list[Row]:
    """What was measured, on what."""
    rows = [
        ("Model", [run.model for run in runs]),
        ("Reference", [_reference(run) for run in runs]),
        ("Text", [f"{run.text.name}, {run.text.tokens:,} tokens, sha256 {run.text.sha256[:12]}" for run in runs]),
        ("Protocol", [f"{run.protocol}{', each opened by BOS' if run.bos else ''}" for run in runs]),
        ("Windows", [_windows(run) for run in runs]),
        ("Activations", [_activations(run, scheme) for run in runs]),
        ("Computed in", [run.dtype for run in runs]),
        ("Bits per weight, decoder", [number(run.bits_per_weight, 3) for run in runs]),
        ("Size on disk", [size(run.file_bytes) for run in runs]),
        ("Time", [duration(run.seconds) for run in runs]),
        ("Peak memory", [DASH if run.peak_memory_bytes is None else size(run.peak_memory_bytes) for run in runs]),
        ("Notes", ["; ".join(run.notes) for run in runs]),
    ]
    return [row for row in rows if any(row[1])]


def figures(runs: Sequence[Evaluation]) -> list[Row]:
    """What came out; rows in which nothing was measured are left out."""
    of_all, unit = f"{NBSP}%", 100
    rows = [
        ("KL divergence, mean", [plus_minus(run.kld_mean, run.kld_se) for run in runs]),
        ("KL divergence, median", [plus_minus(run.kld_median) for run in runs]),
        ("KL divergence, 99 %", [plus_minus(run.kld_p99) for run in runs]),
        ("KL divergence, 99.9 %", [plus_minus(run.kld_p999) for run in runs]),
        ("KL divergence, max", [plus_minus(run.kld_max) for run in runs]),
        ("Perplexity", [plus_minus(run.ppl, run.ppl_se) for run in runs]),
        ("Perplexity of reference", [plus_minus(run.ppl_reference) for run in runs]),
        ("Perplexity ratio", [plus_minus(run.ppl_ratio, run.ppl_ratio_se) for run in runs]),
        ("Same next token", [plus_minus(run.same_top1, run.same_top1_se, unit, of_all) for run in runs]),
        ("Change of p, mean", [plus_minus(run.delta_p_mean, None, unit, of_all) for run in runs]),
        ("Change of p, RMS", [plus_minus(run.delta_p_rms, None, unit, of_all) for run in runs]),
    ]
    return [row for row in rows if set(row[1]) != {DASH}]


def speeds(run: Bench) -> list[list[str]]:
    """A row of cells for each load: batch, context, prefill, decode, decode of one."""
    return [
        [str(row.batch), f"{row.context:,}", spread(row.prefill, row.prefill_least, row.prefill_most),
         spread(row.decode, row.decode_least, row.decode_most), rate(row.decode_each)]
        for row in run.rows
    ]  # fmt: skip


def speed_conditions(run: Bench) -> str:
    """How it was measured, in a sentence."""
    threads = "" if run.threads is None else f", {plural(run.threads, 'thread')}"
    peak = "" if run.peak_memory_bytes is None else f"; peak memory of the engine {size(run.peak_memory_bytes)}"
    notes = "".join(f"; {note}" for note in run.notes)
    return (f"Measured {run.created:%Y-%m-%d} with {run.through}{threads}: median of {plural(run.repeats, 'run')}, "
            f"slowest and quickest beside it, all sequences together{peak}{notes}.")  # fmt: skip


def tasks(run: TaskResult) -> list[list[str]]:
    """A row of cells for each category."""
    return [
        [row.category, f"{row.items:,}",
         DASH if row.reference_right is None else percent(row.reference_right / max(1, row.items)),
         percent(row.accuracy), plus_minus(row.difference, row.difference_se, 100, f"{NBSP}%"),
         DASH if row.lost is None else str(row.lost), DASH if row.gained is None else str(row.gained),
         DASH if row.p is None else f"{row.p:.2g}"]
        for row in run.rows
    ]  # fmt: skip


def task_words(run: TaskResult) -> str:
    """The result in a sentence, and how it was made."""
    rounding = "activations rounded as the engine would" if run.activations == "simulated" else "weights alone"
    notes = "".join(f"; {note}" for note in run.notes)
    return f"It {task_sentence(run)}. Computed in {run.dtype}, {rounding}, seed {run.seed}{notes}."


def _reference(run: Evaluation) -> str:
    if run.reference is None:
        return "none"
    return f"{run.reference} (named by the report)" if run.reference_from == "report" else run.reference


def _windows(run: Evaluation) -> str:
    asked = f" ({run.windows_asked:,} asked for)" if run.windows_asked != run.windows else ""
    return f"{run.windows:,}{asked} of {run.window_tokens:,} tokens; {run.scored_tokens:,} tokens scored"


def _activations(run: Evaluation, scheme: str) -> str:
    if run.activations == "simulated":
        return "rounded as the engine would"
    return "not rounded, although the scheme does" if rounds_activations(scheme) else "not rounded: weight-only scheme"


@dataclass(frozen=True)
class Answer:
    """What one model says. mark: the first token that differs, None if nothing is marked; whole: beside several."""

    name: str
    shared: str
    mark: str | None
    rest: str
    about: str
    whole: bool = False


@dataclass(frozen=True)
class Prompt:
    asked: str
    prompt: str
    answers: list[Answer]


def prompts(columns: Sequence[tuple[str, Sequence[GeneratedSample]]]) -> list[Prompt]:
    """The source's answer, then each model's; with several models the source's is marked nowhere.

    columns  (name of a quantized model, its samples); prompts are those of the first that has any
    """
    columns = [(name, samples) for name, samples in columns if samples]
    several, shown = len(columns) > 1, []
    for first in columns[0][1] if columns else ():
        answers = [_whole(first) if several else _answer("Source", first, first.reference)]
        answers += [_answer(name, sample, sample.quantized) for name, samples in columns for sample in samples
                    if sample.prompt == first.prompt]  # fmt: skip
        shown.append(Prompt("Asked" if first.chat else "To be continued", first.prompt, answers))
    return shown


def _whole(sample: GeneratedSample) -> Answer:
    own = sample.reference
    text, tokens = ("", 0) if own is None else (own.token + own.rest, own.tokens)
    return Answer("Source", sample.shared + text, None, "", plural(sample.shared_tokens + tokens, "token"), whole=True)


def _answer(name: str, sample: GeneratedSample, own: Continuation | None) -> Answer:
    if own is None:
        return Answer(name, sample.shared, None, "", f"the same to the end, {plural(sample.shared_tokens, 'token')}")
    gave = f"the source gave this one {percent(own.token_probability, 0)}"
    about = f"parts at token {sample.shared_tokens + 1}; {gave}"
    if own.ended and not own.tokens:
        about = f"stops after {plural(sample.shared_tokens, 'token')}"
    mark = own.token if own.token.strip() else "⏹" if own.ended else "␣"
    return Answer(name, sample.shared, mark, own.rest, about)


def worst(tensors: Sequence[TensorEntry]) -> list[tuple[int, str, str]]:
    """(table row, name, error in words) of the largest errors."""
    measured = [(tensor.relative_error, row) for row, tensor in enumerate(tensors) if tensor.relative_error is not None]
    return [(row, tensors[row].name, f"{decibel_text(error)}{NBSP}dB, {significant(100 * error)}{NBSP}%")
            for error, row in sorted(measured, key=lambda entry: -entry[0])[:WORST_SHOWN]]  # fmt: skip


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that share a reason or a note; more: how many names are left out."""

    title: str
    amount: str
    names: list[str]
    more: int


def left_alone(tensors: Iterable[TensorEntry]) -> list[TensorGroup]:
    """What was not quantized, grouped by reason, most bytes first."""
    groups: dict[str, list[TensorEntry]] = defaultdict(list)
    for tensor in tensors:
        if tensor.reason is not None:
            groups[tensor.reason].append(tensor)
    bytes_of = {reason: sum(tensor.bytes for tensor in members) for reason, members in groups.items()}
    return [_group(reason, groups[reason], f", {size(bytes_of[reason])}")
            for reason in sorted(groups, key=lambda reason: -bytes_of[reason])]  # fmt: skip


def noted(tensors: Iterable[TensorEntry]) -> list[TensorGroup]:
    """What was changed for single tensors, grouped by note."""
    groups: dict[str, list[TensorEntry]] = defaultdict(list)
    for tensor in tensors:
        for note in tensor.notes:
            groups[note].append(tensor)
    return [_group(note, members, "") for note, members in groups.items()]


def _group(title: str, members: Sequence[TensorEntry], amount: str) -> TensorGroup:
    names = [tensor.name for tensor in members[:NAMES_SHOWN]]
    return TensorGroup(title, plural(len(members), "tensor") + amount, names, len(members) - len(names))


@dataclass(frozen=True)
class RoleRow:
    """bars: (kind, width in percent of the largest role's)"""

    role: str
    bars: list[tuple[str, float]]
    figures: tuple[str, ...]


def bytes_by_role(tensors: Sequence[TensorEntry]) -> list[RoleRow]:
    """Most bytes first."""
    by_role: dict[str, list[TensorEntry]] = defaultdict(list)
    for tensor in tensors:
        by_role[tensor.role].append(tensor)
    bytes_of = {role: sum(tensor.bytes for tensor in members) for role, members in by_role.items()}
    largest, total, rows = max(bytes_of.values(), default=0), sum(bytes_of.values()), []
    for role in sorted(by_role, key=lambda role: -bytes_of[role]):
        members, stored = by_role[role], bytes_of[role]
        quantized = sum(tensor.bytes for tensor in members if tensor.scheme)
        parts = (("quantized", quantized), ("alone", stored - quantized))
        bars = [(kind, 100 * count / largest if largest else 0.0) for kind, count in parts if count]
        errors = [tensor.relative_error for tensor in members if tensor.relative_error is not None]
        weights = sum(math.prod(tensor.shape) for tensor in members)
        mean_error = decibel_text(sum(errors) / len(errors)) if errors else DASH
        share = percent(stored / total if total else 0.0)
        bits = number(8 * stored / max(weights, 1), 2)
        rows.append(RoleRow(role, bars, (size(stored), share, bits, f"{len(members):,}", mean_error)))
    return rows


def whole_bar(tensors: Sequence[TensorEntry]) -> list[tuple[str, float, str]]:
    """(kind, share, words) of what is quantized and what is left alone."""
    total = sum(tensor.bytes for tensor in tensors)
    quantized = sum(tensor.bytes for tensor in tensors if tensor.scheme)
    parts = (("quantized", "quantized", quantized), ("alone", "left alone", total - quantized))
    shares = [count / total if total else 0.0 for _, _, count in parts]
    return [(kind, share, f"{size(count)} {words}, {percent(share)}")
            for (kind, words, count), share in zip(parts, shares, strict=True)]  # fmt: skip


@dataclass(frozen=True)
class TensorRow:
    """style: position of its role among the plotted ones, None without a marker; input: the strip that it reads"""

    tensor: TensorEntry
    style: int | None
    error: str
    error_key: float
    max_error: str
    max_error_key: float
    weights: int
    notes: str
    input: str | None


def tensor_rows(report: Report) -> Iterator[TensorRow]:
    """Every tensor, in file order; report.js sorts and filters."""
    roles = order_roles(tensor.role for tensor in report.tensors if tensor.relative_error is not None)
    style_of, recorded = {role: i for i, role in enumerate(roles)}, recorded_inputs(report)
    for tensor in report.tensors:
        error, largest = tensor.relative_error, tensor.max_error
        yield TensorRow(
            tensor,
            None if error is None else style_of[tensor.role],
            DASH if error is None else decibel_text(error),
            UNMEASURED if error is None else decibel(error) if error > 0 else EXACT,
            DASH if largest is None else significant(largest),
            UNMEASURED if largest is None else largest,
            math.prod(tensor.shape),
            " · ".join(([tensor.reason] if tensor.reason else []) + list(tensor.notes)),
            tensor.reads if tensor.reads in recorded else None,
        )


def provenance(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything that one needs to do it again: (title, facts)."""
    source, output = report.source, report.output
    of_source = [
        ("Model", source.model),
        ("Kind", source.kind),
        ("Architecture", source.architecture),
        ("Size", f"{size(source.bytes)} ({source.bytes:,} bytes)"),
    ]
    of_source += [("Headers", f"sha256 {source.sha256_of_headers}")] if source.sha256_of_headers else []
    of_source += [("Adapter", f"{source.adapter} (sha256 {source.adapter_sha256})")] if source.adapter else []
    of_output = [
        ("Format", output.format),
        ("Data type", output.dtype),
        ("Size", f"{size(output.bytes)} ({output.bytes:,} bytes)"),
        *((file.name, f"{file.bytes:,} bytes") for file in output.files),
    ]
    versions = [
        ("lowbit", report.lowbit),
        *((name, version) for name, version in report.versions.items() if name != "lowbit"),
        ("Created", f"{report.created:%Y-%m-%d %H:%M:%S %Z}"),
        ("Report schema", str(report.schema_version)),
    ]
    settings = list(_settings(report.settings))
    return [("Settings", settings), ("Source", of_source), ("Output", of_output), ("Versions", versions)]


def _settings(settings: ReportSettings) -> Iterator[tuple[str, str]]:
    yield "Scheme", settings.scheme
    yield "Method", settings.method
    yield "Range", settings.range
    text = settings.calibration
    if text is None:
        yield "Calibration", "none"
    else:
        digest = f", sha256 {text.sha256}" if text.sha256 else ""
        counts = f"{text.samples:,} samples of {text.sequence_length:,} tokens, {text.tokens:,} in all"
        yield "Calibration", f"{text.name}, {counts}{digest}"
    for name, value in settings.given.items():
        label = name.replace("_", " ").capitalize()
        if name == "group_size":
            yield label, "one scale per row" if value == -1 else str(value)
        elif isinstance(value, tuple | dict):
            patterns = value if isinstance(value, tuple) else (f"{pattern}={each}" for pattern, each in value.items())
            yield label, ", ".join(patterns)
        elif name not in ("scheme", "method", "range", "calib", "samples", "seqlen"):
            yield label, "yes" if value is True else str(value)
