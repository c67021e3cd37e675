"""`Evaluation`: one row of figures, with everything needed to repeat it, and its sentence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from lowbit.records import Count, NonNegative, Record, Share

if TYPE_CHECKING:
    from rich.table import Table


class TextRecord(Record):
    """Which text: name, SHA-256 of its bytes, tokens in all of it."""

    name: str
    sha256: str
    tokens: Count


class Continuation(Record):
    """The rest of one model's answer, from the first token that differs.

    token_probability  of this token in the reference
    ended              True if the model stopped instead
    """

    token: str
    rest: str
    tokens: Count
    token_probability: Share
    ended: bool = False


class GeneratedSample(Record):
    """Answers of reference and quantized model to one prompt, always with the most probable token.

    chat    True if the prompt went through the chat template
    shared, shared_tokens   common beginning of both answers
    reference, quantized    the rest of each; both None if the answers are equal
    """

    prompt: str
    chat: bool
    shared: str
    shared_tokens: Count
    reference: Continuation | None = None
    quantized: Continuation | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> GeneratedSample:
        if (self.reference is None) != (self.quantized is None):
            raise ValueError("either both models go on, or none does")
        return self


class Evaluation(Record):
    """The quantized model against its source, over the same tokens. Without a reference only `ppl` is known.

    model, reference   as given; reference_from says who named the reference: the user, or the report
    scheme             of the quantized linears, "W4A16" or "FP8 + W4A16"; None for a plain checkpoint
    protocol           how the tokens were cut and scored, in words
    windows            scored, of `windows_asked`; scored_tokens over all of them
    activations        "simulated": rounded as the engine would; "none": the weights' error alone
    ppl_ratio          ppl / ppl_reference, with the standard error of the paired difference
    kld_*              KL(reference ‖ quantized) per token, in nats
    same_top1          share of tokens where both prefer the same next token
    delta_p_*          change in the probability of the text's next token
    seconds            of the whole evaluation this row belongs to, loading included
    peak_memory_bytes  highest resident memory of the process meanwhile (plus device memory on CUDA)
    bits_per_weight    of the decoder's linear weights as stored, scales included; bits_from: its source
    notes              for the reader: fewer windows, a source that no longer opens
    reference_sha256   fingerprint of the reference (`footprint.fingerprint`)
    samples            answers to a few prompts, for the variant that an engine runs; empty if not requested
    """

    model: str
    reference: str | None
    reference_from: Literal["given", "report", "none"]
    scheme: str | None
    text: TextRecord
    protocol: str
    windows: Count
    windows_asked: Count
    window_tokens: Count
    bos: bool
    scored_tokens: Count
    activations: Literal["none", "simulated"]
    dtype: str
    ppl: NonNegative
    ppl_se: NonNegative
    ppl_reference: NonNegative | None
    ppl_ratio: NonNegative | None
    ppl_ratio_se: NonNegative | None
    kld_mean: float | None
    kld_se: NonNegative | None
    kld_median: float | None
    kld_p99: float | None
    kld_p999: float | None
    kld_max: float | None
    same_top1: Share | None
    same_top1_se: NonNegative | None
    delta_p_mean: float | None
    delta_p_rms: NonNegative | None
    seconds: NonNegative
    peak_memory_bytes: Count | None
    file_bytes: Count
    bits_per_weight: NonNegative
    bits_from: Literal["report", "tensors"]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    reference_sha256: str | None = None
    samples: tuple[GeneratedSample, ...] = ()

    @property
    def label(self) -> str:
        """Name of the row: the scheme, and whether activations are simulated."""
        name = self.scheme or self.model.rstrip("/").rsplit("/", 1)[-1]
        return f"{name} with activations simulated" if self.activations == "simulated" else name


def sentence(evaluation: Evaluation) -> str:
    """The row in words: "W4A16 keeps 93.1 % of top-1 tokens; perplexity rises 2.3 % ± 0.2 %"."""
    if evaluation.same_top1 is None or evaluation.ppl_ratio is None or evaluation.ppl_ratio_se is None:
        ppl = f"{evaluation.ppl:.3f} ± {evaluation.ppl_se:.3f}"
        return f"{evaluation.label} has perplexity {ppl}; there is no reference to compare with"
    change = 100 * (evaluation.ppl_ratio - 1)
    error = 100 * evaluation.ppl_ratio_se
    if change == 0:
        moved = "perplexity is unchanged"
    else:
        digits = 1 if abs(change) >= 1 else 2
        verb = "rises" if change > 0 else "falls"
        moved = f"perplexity {verb} {abs(change):.{digits}f} % ± {error:.{digits}f} %"
    return f"{evaluation.label} keeps {100 * evaluation.same_top1:.1f} % of top-1 tokens; {moved}"


def heading(evaluations: list[Evaluation]) -> str:
    """Model, reference and text, one line each."""
    first = evaluations[0]
    bos = ", each opened with BOS" if first.bos else ""
    windows = f"{first.windows} windows × {first.window_tokens} tokens, {first.protocol}{bos}"
    source = " (named by its report)" if first.reference_from == "report" else ""
    return "\n".join(
        (
            f"model      {first.model}",
            f"reference  {first.reference or 'none'}{source}",
            f"text       {first.text.name}: {windows}; {first.scored_tokens} tokens scored",
        )
    )


def evaluation_table(evaluations: list[Evaluation]) -> Table:
    """A rich table, one column per evaluation."""
    from rich.table import Table

    table = Table()
    table.add_column("")
    for evaluation in evaluations:
        table.add_column(evaluation.label, justify="right")

    def add(name: str, cells: Iterable[str]) -> None:
        table.add_row(name, *cells)

    if all(e.kld_mean is not None for e in evaluations):
        add("mean KLD (nats)", (f"{e.kld_mean:.5f} ± {e.kld_se:.5f}" for e in evaluations))
        add("KLD median", (f"{e.kld_median:.5f}" for e in evaluations))
        add("KLD 99 %", (f"{e.kld_p99:.4f}" for e in evaluations))
        add("KLD 99.9 %", (f"{e.kld_p999:.4f}" for e in evaluations))
        add("KLD max", (f"{e.kld_max:.4f}" for e in evaluations))
        add("same top-1", (_percent(e.same_top1, e.same_top1_se) for e in evaluations))
        add("PPL ratio", (f"{e.ppl_ratio:.4f} ± {e.ppl_ratio_se:.4f}" for e in evaluations))
        add("mean Δp", (_percent(e.delta_p_mean) for e in evaluations))
        add("PPL, reference", (f"{e.ppl_reference:.4f}" for e in evaluations))
    add("PPL", (f"{e.ppl:.4f} ± {e.ppl_se:.4f}" for e in evaluations))
    add("bits per weight", (f"{e.bits_per_weight:.3f}" for e in evaluations))
    add("file size", (f"{e.file_bytes / 1e6:.1f} MB" for e in evaluations))
    return table


def _percent(value: float | None, error: float | None = None) -> str:
    assert value is not None
    return f"{100 * value:.2f} %" + ("" if error is None else f" ± {100 * error:.2f} %")
