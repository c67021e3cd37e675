"""The top of the page: what the model became, what that cost, and whether anything says otherwise.

Sentences state measurements and their error. One phrase judges them, by the mean KL divergence, and the page says how:

    mean KLD in nats per token      called
    at most 0.005                   practically the same as the source
    at most 0.02                    very close to the source
    at most 0.1                     slightly worse than the source
    at most 0.5                     noticeably worse than the source
    more                            much worse than the source

The phrases are a convention; the figures stand beside them. Where the standard error reaches over a limit, both are
given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from lowbit.evaluation.result import Evaluation
from lowbit.report.schema import Report
from lowbit.report.units import DASH, NBSP, duration, number, percent, plural, plus_minus, quantity, significant, size
from lowbit.report.units import with_error as value_and_error
from lowbit.schemes import SCHEMES

LEVELS = (
    (0.005, "practically the same as the source"),
    (0.02, "very close to the source"),
    (0.1, "slightly worse than the source"),
    (0.5, "noticeably worse than the source"),
    (math.inf, "much worse than the source"),
)


def quality_words(evaluation: Evaluation | None) -> str | None:
    """ "slightly worse than the source"; two phrases where the error bar reaches over a limit; None if not compared."""
    if evaluation is None or evaluation.kld_mean is None:
        return None
    ends = (evaluation.kld_mean + step * (evaluation.kld_se or 0.0) for step in (-1, 1))
    low, high = (next(i for i, (limit, _) in enumerate(LEVELS) if end <= limit) for end in ends)
    return " or ".join(LEVELS[index][1] for index in range(low, high + 1))


def quality_limits() -> list[tuple[str, str]]:
    """(range of the divergence, what it is called)."""
    limits = [significant(limit, 1) for limit, _ in LEVELS[:-1]]
    ranges = [f"at most {limits[0]}", *(f"{low} to {high}" for low, high in pairwise(limits)), f"above {limits[-1]}"]
    return [(f"{limits}{NBSP}nats", called) for limits, (_, called) in zip(ranges, LEVELS, strict=True)]


def headline_evaluation(report: Report) -> Evaluation | None:
    """The latest evaluation against the source; the latest of any kind where there is none."""
    against_source = [evaluation for evaluation in report.evaluation if evaluation.kld_mean is not None]
    candidates = against_source or report.evaluation
    return candidates[-1] if candidates else None


def run_name(run: Evaluation) -> str:
    """What a column of figures is called on the page."""
    name = run.scheme or run.model
    return f"{name}, activations rounded" if run.activations == "simulated" else name


def rounds_activations(scheme: str) -> bool:
    """Whether an engine rounds activations under this scheme; ggml types and unknown names are weight-only."""
    known = SCHEMES.get(scheme.upper())
    return known is not None and known.activation is not None


def engine_name(engine: str) -> str:
    """As the project spells itself."""
    return {"vllm": "vLLM", "sglang": "SGLang", "tensorrt-llm": "TensorRT-LLM"}.get(engine, engine)


def what_was_done(report: Report) -> str:
    """Method, group size, format and day in one line."""
    settings = report.settings
    size_of_groups = settings.given.get("group_size", -1)
    groups = [] if size_of_groups == -1 else [f"groups of {size_of_groups}"]
    day = f"{report.created:%d %B %Y}".lstrip("0")
    return " · ".join([settings.method.upper(), *groups, report.output.format, day])


def verdict(report: Report) -> str:
    """What the user got and what it cost, in a few sentences; that it would not load comes first."""
    refused, evaluation = "", headline_evaluation(report)
    if report.verification and not report.verification.ok:
        refused = f"{engine_name(report.verification.engine)} would refuse this checkpoint or misread it. "
    bits = number(report.totals.decoder_bits_per_weight, 2)
    got = f"{refused}{bits} bits per weight, {size(report.totals.bytes_out)} ({_size_change(report)})"
    if evaluation is None:
        return f"{got}. What that cost in quality has not been measured yet."
    if evaluation.same_top1 is None or evaluation.kld_mean is None:
        return f"{got}. Perplexity is {number(evaluation.ppl, 2)}; it was not compared with the source model."
    divergence = f"mean KLD {plus_minus(evaluation.kld_mean, evaluation.kld_se)}"
    kept = f"keeps {percent(evaluation.same_top1)} of the source's top tokens"
    return f"{got}; {kept}; {divergence}; {_perplexity_change(evaluation)}: {quality_words(evaluation)}."


def _size_change(report: Report) -> str:
    """Smaller than the source, or larger: a source may already be quantized."""
    before, after = report.totals.bytes_in, report.totals.bytes_out
    if not before or not after:
        return "the size of its source is not known"
    change = after / before - 1
    if abs(change) < 0.005:
        return "as large as its source"
    if change > 1:
        return f"{number(1 + change, 1)} times the size of its source"
    return f"{percent(abs(change), 0)} {'larger' if change > 0 else 'smaller'} than its source"


def _perplexity_change(evaluation: Evaluation) -> str:
    if evaluation.ppl_ratio is None:
        return f"perplexity is {number(evaluation.ppl, 2)}"
    change, error = evaluation.ppl_ratio - 1, evaluation.ppl_ratio_se
    if error is not None and abs(change) < 2 * error:
        return f"perplexity did not change measurably ({percent(change, 2)} ±{NBSP}{percent(error, 2)})"
    direction = "higher" if change > 0 else "lower"
    if error is None:
        return f"perplexity is {percent(abs(change))} {direction}"
    return f"perplexity is {plus_minus(abs(change), error, 100, f'{NBSP}%')} {direction}"


@dataclass(frozen=True)
class Chip:
    """What a reader must not miss, with a sign and words besides its colour. kind: "good", "bad" or "open"."""

    kind: str
    sign: str
    text: str
    href: str = ""


def chips(report: Report) -> list[Chip]:
    verification, evaluation = report.verification, headline_evaluation(report)
    if verification is None:
        shown = [Chip("open", DASH, "not verified against an engine")]
    else:
        engine, count = engine_name(verification.engine), plural(len(verification.checks), "check")
        failed = f"{engine}: {len(verification.failed)} of {count} failed"
        passed = Chip("good", "✓", f"{engine}: {count} passed")
        shown = [passed if verification.ok else Chip("bad", "✗", failed, "#verification")]
    if evaluation is None:
        shown.append(Chip("open", DASH, "quality not measured"))
    elif evaluation.activations == "none" and rounds_activations(report.settings.scheme):
        shown.append(Chip("open", "!", "activations were not rounded in the evaluation", "#evaluation"))
    noted = sum(bool(tensor.notes) for tensor in report.tensors)
    return [*shown, Chip("open", "i", f"{plural(noted, 'tensor')} with notes", "#notes")] if noted else shown


@dataclass(frozen=True)
class Card:
    """A figure that one compares models by."""

    label: str
    value: str
    beside: str
    error: str | None = None
    unit: str = ""


def cards(report: Report) -> list[Card]:
    """Behind the size on disk, which has a picture of its own."""
    totals, run = report.totals, headline_evaluation(report)
    whole_file = f"decoder; {number(totals.file_bits_per_weight, 2)} for the whole file"
    shown = [Card("Bits per weight", number(totals.decoder_bits_per_weight, 2), whole_file)]
    if run is not None and run.kld_mean is None:
        shown.append(Card("Perplexity", number(run.ppl, 2), "not compared with the source"))
    elif run is not None and run.kld_mean is not None:
        rounded = ", activations rounded" if run.activations == "simulated" else ""
        value, error = value_and_error(run.kld_mean, run.kld_se)
        shown.append(Card("KL divergence", value, f"nats per token{rounded}", error))
        if run.ppl_ratio is not None:
            beside = "quantized / source"
            if run.ppl_reference is not None:
                beside = f"{number(run.ppl, 2)} from {number(run.ppl_reference, 2)}"
            value, error = value_and_error(run.ppl_ratio, run.ppl_ratio_se)
            shown.append(Card("Perplexity ratio", value, beside, error))
        if run.same_top1 is not None:
            value, error = value_and_error(run.same_top1, run.same_top1_se, scale=100)
            shown.append(Card("Same next token", value, "of predictions agree", error, f"{NBSP}%"))
    shown.append(Card("Time", duration(totals.seconds), f"for {quantity(totals.weights)} weights"))
    peak = totals.peak_memory_bytes
    memory = ("could not be measured", DASH) if peak is None else ("of the whole process", size(peak))
    return [*shown, Card("Peak memory", memory[1], memory[0])]
