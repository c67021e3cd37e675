"""What reference and quantized model say to the same prompts, side by side, the first differing token marked."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.report.elements import section
from lowbit.report.markup import Html, escape, tag
from lowbit.report.schema import Continuation, GeneratedSample
from lowbit.report.units import percent, plural


def samples_section(columns: Sequence[tuple[str, Sequence[GeneratedSample]]], note: str | None = None) -> Html | None:
    """One article per prompt; None where nothing was generated.

    columns  (name of a quantized model, its samples); prompts are those of the first
    note     said below the heading
    """
    columns = [(name, samples) for name, samples in columns if samples]
    if not columns:
        return None
    several = len(columns) > 1
    words = (
        f"The same prompts to {'all' if several else 'both'}, always the most probable token. The text shared with the "
        "source is grey; the first token that differs is marked, with the probability that the source gave it."
    )
    articles = (_prompt(sample, columns) for sample in columns[0][1])
    return section(
        "samples",
        "What it says",
        tag("p", words, class_="caption"),
        tag("p", note, class_="caption") if note else None,
        *articles,
    )


def _prompt(first: GeneratedSample, columns: Sequence[tuple[str, Sequence[GeneratedSample]]]) -> Html:
    """The source's answer, then each model's; with several models the source's is marked nowhere."""
    several = len(columns) > 1
    answers = [(name, sample) for name, samples in columns for sample in samples if sample.prompt == first.prompt]
    said = [_answer("Source", first, first.reference, marked=not several)]
    said += [_answer(name, sample, sample.quantized, marked=True) for name, sample in answers]
    asked = "Asked" if first.chat else "To be continued"
    heading = tag("h3", tag("span", f"{asked}: "), _lines(first.prompt))
    return tag("article", heading, tag("div", *said, class_="answers many" if several else "answers"), class_="sample")


def _answer(name: str, sample: GeneratedSample, own: Continuation | None, marked: bool) -> Html:
    """What is shared is grey and the parting token marked; not in a source that is beside several models."""
    if not marked:
        text = [_lines(sample.shared + (own.token + own.rest if own else ""))]
    elif own is None:
        text = [tag("span", _lines(sample.shared), class_="shared")]
    else:
        token = _lines(own.token) if own.token.strip() else escape("⏹" if own.ended else "␣")
        text = [tag("span", _lines(sample.shared), class_="shared"), tag("mark", token), _lines(own.rest)]
    return tag(
        "div",
        tag("h4", name),
        tag("p", *text, class_="said"),
        tag("p", _about(sample, own, marked), class_="about"),
        class_="answer" if marked else "answer whole",
    )


def _about(sample: GeneratedSample, own: Continuation | None, marked: bool) -> str:
    if not marked:
        return plural(sample.shared_tokens + (own.tokens if own else 0), "token")
    if own is None:
        return f"the same to the end, {plural(sample.shared_tokens, 'token')}"
    if own.ended and not own.tokens:
        return f"stops after {plural(sample.shared_tokens, 'token')}"
    return f"parts at token {sample.shared_tokens + 1}; the source gave this one {percent(own.token_probability, 0)}"


def _lines(text: str) -> Html:
    """Escaped, with the text's own line breaks and tabs kept."""
    pieces = text.replace("\t", "    ").replace("\r\n", "\n").split("\n")
    return Html("\n".join(escape(piece) for piece in pieces))
