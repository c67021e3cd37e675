"""What to try next with an output, as commands, by what its report has measured.

    not verified well             lowbit verify                        the rules that failed, one by one
    never compared                lowbit evaluate                      or, of fewer than FEW_BITS rounded to nearest,
                                  lowbit quantize --quality good       which are known to lose more than they need
    mean KLD above LARGE          lowbit diagnose                      which tensors cost it, unless that was done
                                  lowbit quantize, a better method     nearest → good → best (`--quality`)
                                  lowbit quantize, more of the text    where it had fewer windows than by default
                                  lowbit quantize, --override          for sets whose error stands out
    rounded activations cost most lowbit quantize, SmoothQuant         INT8 activations only
    at most LARGE                 lowbit quantize, the next smaller    a planned neighbour
    a cache larger than weights   lowbit evaluate --kv-cache           at the longest context

The commands are that of the report with some words changed, so options of trust, adapters and the like stay; those that
the changed run would not read, and so refuse, go. Nothing is proposed where that command is not known (a model in
memory), for a vision tower by itself, or where it was no `lowbit quantize`. A set stands out if its mean error is
STANDS_OUT times the median of its scheme; engines fuse some linears, so whole sets are named. What an override gains is
not known before `lowbit diagnose` has measured it.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean, median

from lowbit.architecture.roles import fused_names
from lowbit.errors import LowbitError
from lowbit.knobs import Facts
from lowbit.methods import parse_method
from lowbit.patterns import pattern_for
from lowbit.report.diagnosis import Suggestion
from lowbit.report.schema import Report, TensorEntry
from lowbit.report.summary import engine_name, headline_evaluation
from lowbit.report.units import number, size
from lowbit.schemes import SCHEMES, WIDER
from lowbit.settings import Settings, make_settings, unread_flags

LARGE = 0.02  # nats per token; above, `summary.LEVELS` calls a model worse than its source
FEW_BITS = 5.0  # a weight of the decoder
STANDS_OUT = 2.5
SETS = 3  # at most so many sets get an override
MOST = 5
# Formats in which linears of one model may have schemes of different width, as every engine of theirs reads it.
_MIXES = ("compressed-tensors", "gguf")
_SWITCHES = frozenset(row.flag for row in Settings.rows().values() if row.kind is bool)
_PART = re.compile(r"-\d{5}-of-\d{5}$")  # of a split GGUF


def next_steps(report: Report, output: Path) -> tuple[Suggestion, ...]:
    """At most MOST commands, the most useful first; `output` is the folder or file of the report."""
    return tuple(_steps(report, str(output)))[:MOST]


def _steps(report: Report, output: str) -> Iterator[Suggestion]:
    known = shlex.split(report.command or "")
    source = report.source.model
    if report.verification is not None and not report.verification.ok:
        engine = report.verification.engine
        yield _step(f"see what {engine_name(engine)} would refuse, rule by rule",
                    "verify", output, "--engine", engine, "--reference", source)  # fmt: skip
    if not report.command or not any(line.engine == "lowbit" for line in report.serve):  # a vision tower by itself
        return
    run = headline_evaluation(report)
    of_quantize = known[:2] == ["lowbit", "quantize"] and report.totals.quantized_weights > 0
    if run is None or run.kld_mean is None:
        yield _step("measure what it cost", "evaluate", output, "--reference", source)
        if of_quantize and report.totals.decoder_bits_per_weight < FEW_BITS and _is_uncalibrated(report):
            yield _with_text(report)
        return
    if run.kld_mean > LARGE:
        if report.diagnosis is None:
            yield _step("find out which tensors cost it, and why", "diagnose", output, "--reference", source)
        if of_quantize:
            yield from _made_better(report)
    elif of_quantize:
        yield from _smaller(report, known)
    yield from _smaller_cache(report, output)


def _made_better(report: Report) -> Iterator[Suggestion]:
    method = parse_method(report.settings.method).name.split("+")
    if _activations_cost_most(report) and "smoothquant" not in method:
        smooth = "smoothquant+gptq" if "gptq" in method else "smoothquant"
        yield _step("rounded activations cost most: move their outliers into the weights",
                    *_again(report, "smooth", {"--method": smooth, "--quality": None}))  # fmt: skip
    elif _is_uncalibrated(report):
        yield _with_text(report)
    elif method == ["gptq"]:
        yield _step("learn the scales too: the same bytes, and several times as long",
                    *_again(report, "best", {"--quality": "best", "--method": None}))  # fmt: skip
    text, usual = report.settings.calibration, Settings().samples
    if text is not None and text.samples < usual and not text.notes:
        yield _step(f"calibrate on {usual} windows of text, not {text.samples}",
                    *_again(report, f"{usual}-windows", {"--samples": str(usual)}))  # fmt: skip
    found = _standing_out(report)
    if found:
        words = [word for pattern, scheme, _ in found for word in ("--override", f"{pattern}={scheme}")]
        names = ", ".join(f"{name} {number(times, 1)} times" for _, _, (name, times) in found)
        yield _step(f"more bits where the error stands out ({names} the median)",
                    *_again(report, "wider", {}, first=words))  # fmt: skip


def _is_uncalibrated(report: Report) -> bool:
    """True if no text had a say in the codes."""
    return not {"gptq", "distill", "sign-sgd"} & set(parse_method(report.settings.method).name.split("+"))


def _with_text(report: Report) -> Suggestion:
    return _step("choose codes on a text (GPTQ): the same bytes, and longer",
                 *_again(report, "good", {"--quality": "good", "--method": None}))  # fmt: skip


def _smaller(report: Report, known: list[str]) -> Iterator[Suggestion]:
    """The largest of the planned neighbours that are smaller by a twentieth."""
    own = report.totals.bytes_out
    planned = [each for each in report.neighbours if each.origin == "plan" and each.bytes < 0.95 * own]
    if planned and not {"--override", "--group-size", "--recipe"} & set(known):
        best = max(planned, key=lambda each: each.bytes)
        yield _step(f"as close to the source as this is, {best.scheme} may be enough: {size(best.bytes)}",
                    *_again(report, best.scheme, {"--scheme": best.scheme}))  # fmt: skip


def _smaller_cache(report: Report, output: str) -> Iterator[Suggestion]:
    costs = report.cache_costs
    if costs is None or report.kv_cache or not costs.rows:
        return
    largest, context = costs.rows[0].bytes[-1], costs.contexts[-1]
    narrower = [row.type for row in costs.rows[1:]]
    if narrower and largest > report.totals.bytes_out:
        kind = "fp8_e4m3" if narrower[0] == "fp8" else narrower[0]
        yield _step(
            f"at {context:,} tokens the KV cache ({size(largest)}) is larger than the weights: measure a smaller type",
            "evaluate", output, "--kv-cache", kind,
        )  # fmt: skip


def _activations_cost_most(report: Report) -> bool:
    """True where the scheme rounds activations to integers, and they cost more than the weights do."""
    scheme = SCHEMES.get(report.settings.scheme.upper())
    if scheme is None or scheme.activation is None or scheme.activation.number != "int":
        return False
    alone = [run.kld_mean for run in report.evaluation if run.activations == "none" and run.kld_mean is not None]
    both = [run.kld_mean for run in report.evaluation if run.activations == "simulated" and run.kld_mean is not None]
    return bool(alone and both) and both[-1] > 2 * alone[-1]


def _standing_out(report: Report) -> list[tuple[str, str, tuple[str, float]]]:
    """(pattern, wider scheme, (name, times the median)) of the sets of largest error, worst first."""
    if report.output.format not in _MIXES:
        return []
    gguf = report.output.format == "gguf"
    suffix = "" if gguf else ".weight"
    measured = [tensor for tensor in report.tensors if tensor.scheme is not None and _error(tensor) is not None]
    usual = {
        scheme: median(_error(tensor) or 0.0 for tensor in measured if tensor.scheme == scheme)
        for scheme in {tensor.scheme for tensor in measured}
    }
    sets: dict[str, list[TensorEntry]] = defaultdict(list)
    names = {tensor.name.removesuffix(suffix) for tensor in measured}
    fused = {} if gguf else _fused(names)
    for tensor in measured:
        name = tensor.name.removesuffix(suffix)
        sets[fused.get(name, name)].append(tensor)
    every = [tensor.name.removesuffix(suffix) for tensor in report.tensors]
    found = []
    for name, members in sets.items():
        middle = usual[members[0].scheme]
        wider = WIDER.get(members[0].scheme or "", ())
        times = fmean(_error(tensor) or 0.0 for tensor in members) / middle if middle else 0.0
        if times >= STANDS_OUT and wider and len({tensor.scheme for tensor in members}) == 1:
            pattern = pattern_for([tensor.name.removesuffix(suffix) for tensor in members], every)
            found.append((pattern, wider[0], (name.removesuffix(".weight"), times)))
    return sorted(found, key=lambda entry: -entry[2][1])[:SETS]


def _error(tensor: TensorEntry) -> float | None:
    """Of the outputs where a text was run, else of the weights."""
    return tensor.relative_error if tensor.layer_error is None else tensor.layer_error


def _fused(names: set[str]) -> dict[str, str]:
    """Name → the name of the fused set that it is of."""
    leaves: dict[str, list[str]] = defaultdict(list)
    for name in names:
        module, _, leaf = name.rpartition(".")
        leaves[module].append(leaf)
    return {
        f"{module}.{member}": f"{module}.{fused}"
        for module, members in leaves.items()
        for member, fused in fused_names(members).items()
    }


def _again(report: Report, suffix: str, changes: Mapping[str, str | None], first: list[str] | None = None) -> list[str]:
    """The words of the report's `lowbit quantize` with an output of another name, options replaced (None: left out),
    and `first` before all other options, where the first override that matches counts."""
    known = shlex.split(report.command or "")
    left_out = changes.keys() | _unread(report, changes)
    words = known[1:3]
    rest = iter(known[3:])
    for word in rest:
        if word == "-o":
            output = Path(next(rest))
            stem = _PART.sub("", output.stem) if output.suffix == ".gguf" else output.name
            words += [
                word,
                str(output.with_name(f"{stem}-{suffix}{output.suffix if output.suffix == '.gguf' else ''}")),
            ]
            words += first or []
        elif word in left_out:
            if word not in _SWITCHES:
                next(rest)
        else:
            words.append(word)
    return [*words, *(each for flag, value in changes.items() if value is not None for each in (flag, value))]


def _unread(report: Report, changes: Mapping[str, str | None]) -> frozenset[str]:
    """Options of the report that the run would refuse once they are changed."""
    changed = {flag.removeprefix("--").replace("-", "_"): value for flag, value in changes.items()}
    kept = {name: value for name, value in report.settings.given.items() if name not in changed}
    try:
        settings = make_settings(None, **kept, **changed)
    except LowbitError:  # a report of another version
        return frozenset()
    return unread_flags(settings, Facts(gguf=report.output.format == "gguf"))


def _step(text: str, *words: str) -> Suggestion:
    return Suggestion(text=text, command=shlex.join(["lowbit", *words]))
