"""The sections of sentences, lists and facts: evaluation, errors, what was left alone, verification, provenance."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence

from lowbit.report.activations import activation_strips, recorded_inputs
from lowbit.report.elements import column_heads, command_line, scrolling, search_box, section
from lowbit.report.histogram import weights_figure
from lowbit.report.markup import Html, join, tag
from lowbit.report.plot import error_plot
from lowbit.report.quality import heat_maps
from lowbit.report.schema import Calibration, Check, Evaluation, Output, Report, Settings, Source, TensorEntry
from lowbit.report.summary import engine_name, rounds_activations
from lowbit.report.units import (
    DASH,
    NBSP,
    decibel_text,
    duration,
    number,
    plural,
    significant,
    size,
    with_error,
)

WORST_SHOWN = 5
NAMES_SHOWN = 400  # per reason; the tensor table has them all


def evaluation(report: Report) -> Html:
    """One column per evaluation: first what was measured on which text, then the figures."""
    if not report.evaluation:
        command = f"lowbit evaluate OUT --reference {shlex.quote(report.source.model)}"
        return section(
            "evaluation", "Evaluation", tag("p", "Not evaluated yet. To measure what it cost:"), command_line(command)
        )
    conditions = _conditions(report.evaluation, report.settings.scheme)
    halves = (("Conditions", conditions), ("Figures", _figures(report.evaluation)))
    several = len(report.evaluation) > 1
    heads = column_heads("", *(run.label for run in report.evaluation)) if several else None
    tables = (scrolling(tag("table", heads, _facts_body(rows), class_="facts"), label) for label, rows in halves)
    return section("evaluation", "Evaluation", tag("div", *tables, class_="stacked" if several else "side-by-side"))


def _facts_body(rows: Iterable[tuple[str, list[str]]]) -> Html:
    body = (tag("tr", tag("th", label, scope="row"), *(tag("td", value) for value in values)) for label, values in rows)
    return tag("tbody", *body)


def _conditions(runs: Sequence[Evaluation], scheme: str) -> Iterable[tuple[str, list[str]]]:
    yield "Model", [run.model for run in runs]
    yield "Reference", [_reference(run) for run in runs]
    yield "Text", [f"{run.text.name}, {run.text.tokens:,} tokens, sha256 {run.text.sha256[:12]}" for run in runs]
    yield "Protocol", [f"{run.protocol}{', each opened by BOS' if run.bos else ''}" for run in runs]
    yield "Windows", [_windows(run) for run in runs]
    yield "Activations", [_activations(run, scheme) for run in runs]
    yield "Computed in", [run.dtype for run in runs]
    yield "Bits per weight, decoder", [number(run.bits_per_weight, 3) for run in runs]
    yield "Size on disk", [size(run.file_bytes) for run in runs]
    yield "Time", [duration(run.seconds) for run in runs]
    yield "Peak memory", [DASH if run.peak_memory_bytes is None else size(run.peak_memory_bytes) for run in runs]
    if any(run.notes for run in runs):
        yield "Notes", ["; ".join(run.notes) for run in runs]


def _figures(runs: Sequence[Evaluation]) -> Iterable[tuple[str, list[str]]]:
    yield "KL divergence, mean", [_measured(run.kld_mean, run.kld_se) for run in runs]
    yield "KL divergence, median", [_measured(run.kld_median) for run in runs]
    yield "KL divergence, 99 %", [_measured(run.kld_p99) for run in runs]
    yield "KL divergence, 99.9 %", [_measured(run.kld_p999) for run in runs]
    yield "KL divergence, max", [_measured(run.kld_max) for run in runs]
    yield "Perplexity", [_measured(run.ppl, run.ppl_se) for run in runs]
    yield "Perplexity of reference", [_measured(run.ppl_reference) for run in runs]
    yield "Perplexity ratio", [_measured(run.ppl_ratio, run.ppl_ratio_se) for run in runs]
    yield "Same next token", [_measured(run.same_top1, run.same_top1_se, percent=True) for run in runs]
    yield "Change of p, mean", [_measured(run.delta_p_mean, percent=True) for run in runs]
    yield "Change of p, RMS", [_measured(run.delta_p_rms, percent=True) for run in runs]


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


def _measured(value: float | None, error: float | None = None, percent: bool = False) -> str:
    if value is None:
        return DASH
    shown, uncertainty = with_error(value, error, scale=100 if percent else 1)
    unit = f"{NBSP}%" if percent else ""
    return f"{shown} ±{NBSP}{uncertainty}{unit}" if uncertainty else f"{shown}{unit}"


def errors(report: Report) -> Html:
    """Heat maps, the weights of a tensor, the plot with the search box that it shares with the table, the worst."""
    plot, weights = error_plot(report.tensors), weights_figure(report.tensors, recorded_inputs(report))
    calibration = report.settings.calibration
    inputs = activation_strips(calibration.inputs) if calibration is not None else None
    if plot is None:
        nothing = tag("p", "No tensor has a measured error.")
        return section("errors", "Where the error is", nothing, weights, inputs)
    words = (
        "Relative error ‖W − Ŵ‖² ∕ ‖W‖² of every quantized tensor, by transformer block. "
        f"Lower is better; {number(-20, 0)}{NBSP}dB is 1{NBSP}%."
    )
    caption = tag("p", words, class_="caption")
    maps = heat_maps(report.tensors)
    heading = tag("h3", "Error by tensor") if maps else None
    by = "By transformer block, from left to right, and by role; of experts the worst. The more colour, the worse."
    hint = tag("p", by, class_="caption") if maps else None
    parts = (hint, maps, weights, inputs, heading, caption, search_box("find-plot"), plot, _worst(report.tensors))
    return section("errors", "Where the error is", *parts)


def _worst(tensors: Sequence[TensorEntry]) -> Html:
    measured = [row for row, tensor in enumerate(tensors) if tensor.relative_error is not None]
    measured.sort(key=lambda row: -(tensors[row].relative_error or 0.0))
    items = (
        tag(
            "li",
            tag("a", tensors[row].name, href=f"#t{row}"),
            " ",
            tag("span", _error_words(tensors[row].relative_error or 0.0)),
        )
        for row in measured[:WORST_SHOWN]
    )
    return join(tag("h3", "Largest errors"), tag("ol", *items, class_="worst"))


def _error_words(relative_error: float) -> str:
    return f"{decibel_text(relative_error)}{NBSP}dB, {significant(100 * relative_error)}{NBSP}%"


def left_alone(report: Report) -> Html:
    """What was not quantized, grouped by reason."""
    groups: dict[str, list[TensorEntry]] = defaultdict(list)
    for tensor in report.tensors:
        if tensor.reason is not None:
            groups[tensor.reason].append(tensor)
    if not groups:
        return section("skipped", "Left alone", tag("p", "Every tensor was quantized."))
    by_bytes = sorted(groups.items(), key=lambda group: -sum(tensor.bytes for tensor in group[1]))
    lists = (
        _named_group(reason, members, f"{plural(len(members), 'tensor')}, {size(sum(t.bytes for t in members))}")
        for reason, members in by_bytes
    )
    return section("skipped", "Left alone, and why", *lists)


def notes(report: Report) -> Html | None:
    """What one should know of the source, and what was changed for single tensors, grouped by note."""
    groups: dict[str, list[TensorEntry]] = defaultdict(list)
    for tensor in report.tensors:
        for note in tensor.notes:
            groups[note].append(tensor)
    if not groups and not report.source.notes:
        return None
    of_source = tag("ul", *(tag("li", "Source: ", note) for note in report.source.notes), class_="plain")
    lists = (_named_group(note, members, plural(len(members), "tensor")) for note, members in groups.items())
    return section("notes", "Notes", of_source if report.source.notes else None, *lists)


def _named_group(title: str, members: Sequence[TensorEntry], amount: str) -> Html:
    names = [tag("li", tensor.name) for tensor in members[:NAMES_SHOWN]]
    if len(members) > NAMES_SHOWN:
        names.append(tag("li", f"and {len(members) - NAMES_SHOWN:,} more, in the table of all tensors"))
    summary = tag("summary", tag("span", title), tag("span", amount, class_="amount"))
    return tag("details", summary, tag("ul", *names, class_="names"))


def verification(report: Report) -> Html:
    """The engine's rules; the failed ones first."""
    checked = report.verification
    if checked is None:
        return section(
            "verification",
            "Verification",
            tag("p", "Not verified yet. To check what an engine would say:"),
            command_line("lowbit verify OUT --engine vllm"),
        )
    failed = [check for check in checked.checks if not check.passed]
    engine = engine_name(checked.engine)
    verdict = f"{engine} would load it."
    if failed:
        verdict = f"{engine} would refuse it or misread it: {plural(len(failed), 'check')} failed."
    items = [_check(check) for check in failed] + [_check(check) for check in checked.checks if check.passed]
    return section("verification", "Verification", tag("p", verdict), tag("ul", *items, class_="checks"))


def _check(check: Check) -> Html:
    sign, words, seen = ("✓", "passed: ", "unseen") if check.passed else ("✗", "failed: ", "outcome")
    return tag(
        "li",
        tag("span", sign, class_="sign", aria_hidden="true"),
        tag("span", tag("span", words, class_=seen), check.rule),
        tag("span", check.detail, class_="detail") if check.detail else None,
        class_="good" if check.passed else "bad",
    )


def serve(report: Report) -> Html | None:
    if not report.serve:
        return None
    lines = (join(tag("h3", engine_name(line.engine)), command_line(line.command)) for line in report.serve)
    return section("serve", "Serve it", *lines)


def provenance(report: Report) -> Html:
    """Everything that one needs to do it again."""
    groups = (
        _facts("Settings", _settings_facts(report.settings)),
        _facts("Source", _source_facts(report.source)),
        _facts("Output", _output_facts(report.output)),
        _facts("Versions", _version_facts(report)),
    )
    again = None if report.command is None else join(tag("h3", "To make it again"), command_line(report.command))
    return section("provenance", "How it was made", again, tag("div", *groups, class_="fact-groups"))


def _settings_facts(settings: Settings) -> Iterable[tuple[str, str]]:
    yield "Scheme", settings.scheme
    yield "Method", settings.method
    percentile = f" ({settings.percentile:g} %)" if settings.range == "percentile" and settings.percentile else ""
    yield "Range", f"{settings.range}{percentile}"
    if settings.group_size is not None:
        yield "Group size", "one scale per row" if settings.group_size < 0 else str(settings.group_size)
    yield "Calibration", _calibration(settings.calibration)
    yield "Seed", str(settings.seed)
    yield "Ignore", ", ".join(settings.ignore) or "none"
    yield "Overrides", ", ".join(settings.overrides) or "none"
    if settings.shard_size:
        yield "Shard size", size(settings.shard_size)


def _calibration(text: Calibration | None) -> str:
    if text is None:
        return "none"
    digest = f", sha256 {text.sha256}" if text.sha256 else ""
    return f"{text.name}, {text.samples:,} samples of {text.sequence_length:,} tokens, {text.tokens:,} in all{digest}"


def _source_facts(source: Source) -> Iterable[tuple[str, str]]:
    yield "Model", source.model
    yield "Kind", source.kind
    yield "Architecture", source.architecture
    yield "Size", f"{size(source.bytes)} ({source.bytes:,} bytes)"
    if source.sha256_of_headers:
        yield "Headers", f"sha256 {source.sha256_of_headers}"


def _output_facts(output: Output) -> Iterable[tuple[str, str]]:
    yield "Format", output.format
    yield "Data type", output.dtype
    yield "Size", f"{size(output.bytes)} ({output.bytes:,} bytes)"
    for file in output.files:
        yield file.name, f"{file.bytes:,} bytes"


def _version_facts(report: Report) -> Iterable[tuple[str, str]]:
    yield "lowbit", report.lowbit
    for name, version in report.versions.items():
        if name != "lowbit":
            yield name, version
    yield "Created", f"{report.created:%Y-%m-%d %H:%M:%S %Z}"
    yield "Report schema", str(report.schema_version)


def _facts(title: str, pairs: Iterable[tuple[str, str]]) -> Html:
    items = (tag("div", tag("dt", term), tag("dd", value)) for term, value in pairs)
    return tag("div", tag("h3", title), tag("dl", *items))
