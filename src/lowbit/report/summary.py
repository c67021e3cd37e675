"""The top of the page: what the model became, what that cost, and whether anything says otherwise.

Sentences state measurements and their error; the one phrase that judges them has limits that the page states
(verdict.py).
"""

from __future__ import annotations

from lowbit.report import verdict as wording
from lowbit.report.markup import Html, join, tag
from lowbit.report.schema import Evaluation, Report
from lowbit.report.units import DASH, NBSP, duration, number, percent, plural, quantity, size
from lowbit.report.units import with_error as value_and_error
from lowbit.schemes import SCHEMES


def headline_evaluation(report: Report) -> Evaluation | None:
    """The latest evaluation against the source; the latest of any kind where there is none."""
    against_source = [evaluation for evaluation in report.evaluation if evaluation.kld_mean is not None]
    candidates = against_source or report.evaluation
    return candidates[-1] if candidates else None


def rounds_activations(scheme: str) -> bool:
    """Whether an engine rounds activations under this scheme; ggml types and unknown names are weight-only."""
    known = SCHEMES.get(scheme.upper())
    return known is not None and known.activation is not None


def engine_name(engine: str) -> str:
    """As the project spells itself."""
    return {"vllm": "vLLM", "sglang": "SGLang", "tensorrt-llm": "TensorRT-LLM"}.get(engine, engine)


def masthead(report: Report) -> Html:
    """Title, what was done in one line, the verdict."""
    settings = report.settings
    done = [settings.method.upper(), report.output.format]
    if settings.group_size and settings.group_size > 0:
        done.insert(1, f"groups of {settings.group_size}")
    return tag(
        "header",
        tag("p", "lowbit report", class_="kicker"),
        tag("h1", report.source.model, tag("span", f" in {settings.scheme}")),
        tag("p", " · ".join([*done, f"{report.created:%d %B %Y}".lstrip("0")]), class_="meta"),
        tag("p", verdict(report), class_="verdict"),
        tag("p", *status(report), class_="status"),
        wording.explained() if wording.words(headline_evaluation(report)) else None,
    )


def verdict(report: Report) -> str:
    """What the user got and what it cost, in a few sentences; that it would not load comes first."""
    if report.verification and not report.verification.ok:
        engine = engine_name(report.verification.engine)
        return f"{engine} would refuse this checkpoint or misread it. {_measured(report)}"
    return _measured(report)


def _measured(report: Report) -> str:
    evaluation = headline_evaluation(report)
    bits = number(report.totals.decoder_bits_per_weight, 2)
    got = f"{bits} bits per weight, {size(report.totals.bytes_out)} ({_size_change(report)})"
    if evaluation is None:
        return f"{got}. What that cost in quality has not been measured yet."
    if evaluation.same_top1 is None or evaluation.kld_mean is None:
        return f"{got}. Perplexity is {number(evaluation.ppl, 2)}; it was not compared with the source model."
    value, error = value_and_error(evaluation.kld_mean, evaluation.kld_se)
    divergence = f"mean KLD {value}" + (f" ±{NBSP}{error}" if error else "")
    kept = f"keeps {percent(evaluation.same_top1)} of the source's top tokens"
    return f"{got}; {kept}; {divergence}; {_perplexity_change(evaluation)}: {wording.words(evaluation)}."


def status(report: Report) -> list[Html]:
    """Chips for what a reader must not miss; each has a sign and words besides its colour."""
    chips = []
    verification = report.verification
    engine = engine_name(verification.engine) if verification else ""
    if verification is None:
        chips.append(_chip("open", DASH, "not verified against an engine"))
    elif verification.ok:
        chips.append(_chip("good", "✓", f"{engine}: {plural(len(verification.checks), 'check')} passed"))
    else:
        failed = sum(not check.passed for check in verification.checks)
        text = f"{engine}: {failed} of {plural(len(verification.checks), 'check')} failed"
        chips.append(_chip("bad", "✗", text, href="#verification"))
    evaluation = headline_evaluation(report)
    if evaluation is None:
        chips.append(_chip("open", DASH, "quality not measured"))
    elif evaluation.activations == "none" and rounds_activations(report.settings.scheme):
        chips.append(_chip("open", "!", "activations were not rounded in the evaluation", href="#evaluation"))
    noted = sum(bool(tensor.notes) for tensor in report.tensors)
    if noted:
        chips.append(_chip("open", "i", f"{plural(noted, 'tensor')} with notes", href="#notes"))
    return chips


def cards(report: Report) -> Html:
    """The figures that one compares models by."""
    totals, evaluation = report.totals, headline_evaluation(report)
    shown = [
        _size_card(report),
        _card(
            "Bits per weight",
            number(totals.decoder_bits_per_weight, 2),
            None,
            f"decoder; {number(totals.file_bits_per_weight, 2)} for the whole file",
        ),
        *(_quality_cards(evaluation) if evaluation else []),
        _card("Time", duration(totals.seconds), None, f"for {quantity(totals.weights)} weights"),
        _card("Peak memory", *_memory(totals.peak_memory_bytes)),
    ]
    return tag("section", *shown, class_="cards" if evaluation else "cards few", aria_label="Key figures")


def _quality_cards(evaluation: Evaluation) -> list[Html]:
    if evaluation.kld_mean is None:
        return [_card("Perplexity", number(evaluation.ppl, 2), None, "not compared with the source")]
    rounded = ", activations rounded" if evaluation.activations == "simulated" else ""
    shown = [
        _card("KL divergence", *value_and_error(evaluation.kld_mean, evaluation.kld_se), f"nats per token{rounded}")
    ]
    if evaluation.ppl_ratio is not None:
        beside = "quantized / source"
        if evaluation.ppl_reference is not None:
            beside = f"{number(evaluation.ppl, 2)} from {number(evaluation.ppl_reference, 2)}"
        shown.append(_card("Perplexity ratio", *value_and_error(evaluation.ppl_ratio, evaluation.ppl_ratio_se), beside))
    if evaluation.same_top1 is not None:
        value, error = value_and_error(evaluation.same_top1, evaluation.same_top1_se, scale=100)
        shown.append(_card("Same next token", value, error, "of predictions agree", unit=f"{NBSP}%"))
    return shown


def _card(label: str, value: str, error: str | None, beside: str, unit: str = "") -> Html:
    uncertainty = tag("span", f" ±{NBSP}{error}", class_="error") if error else None
    return tag(
        "div",
        tag("h3", label),
        tag("p", tag("b", value), uncertainty, unit or None, class_="figure"),
        tag("p", beside, class_="beside"),
        class_="card",
    )


def _memory(peak: int | None) -> tuple[str, None, str]:
    return (DASH, None, "could not be measured") if peak is None else (size(peak), None, "of the whole process")


def _size_card(report: Report) -> Html:
    before, after = report.totals.bytes_in, report.totals.bytes_out
    largest = max(before, after, 1)
    bars = (
        tag("div", tag("i", class_=name, style=f"width:{100 * count / largest:.1f}%"), tag("span", words))
        for name, count, words in (("before", before, "before"), ("after", after, "after"))
    )
    figure = tag("p", f"{size(before)} →{NBSP}", tag("b", size(after)), class_="figure")
    picture = tag("div", *bars, class_="size-bars", aria_hidden="true")
    return tag("div", tag("h3", "Size on disk"), figure, picture, class_="card wide")


def _chip(kind: str, sign: str, text: str, href: str | None = None) -> Html:
    content = join(tag("span", sign, class_="sign", aria_hidden="true"), text)
    return tag("a" if href else "span", content, class_=f"chip {kind}", href=href)


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
    if error is None:
        return f"perplexity is {percent(abs(change))} {'higher' if change > 0 else 'lower'}"
    if abs(change) < 2 * error:
        return f"perplexity did not change measurably ({percent(change, 2)} ±{NBSP}{percent(error, 2)})"
    value, uncertainty = value_and_error(abs(change), error, scale=100)
    direction = "higher" if change > 0 else "lower"
    return f"perplexity is {value} ±{NBSP}{uncertainty}{NBSP}% {direction}"
