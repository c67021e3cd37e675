"""`Evaluation`: one row of figures, with everything needed to repeat it, and what it says in a sentence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

    from lowbit.evaluation.samples import GeneratedSample


@dataclass(frozen=True)
class TextRecord:
    """Which text: name, SHA-256 of its bytes, tokens in all of it."""

    name: str
    sha256: str
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """What one model did on one text. Figures after `ppl_se` that need a reference are None without one.

    model, reference    as given; reference_from says who named the reference
    scheme              of the quantized linears, "W4A16" or "FP8 + W4A16"; None for a plain checkpoint
    windows             scored, of `windows_asked`; scored_tokens over all of them
    activations         "simulated": quantized at run time as an engine would; "none": weights alone
    ppl_ratio           PPL over the reference's, paired over tokens
    kld_*               nats per token, KL(reference ‖ model)
    same_top1, delta_p  fractions, not percent
    seconds             of the whole evaluation this row belongs to, loading included
    peak_memory_bytes   highest resident memory of the process meanwhile (plus device memory on CUDA)
    bits_per_weight     of the decoder's linear weights as stored, scales included; bits_from says where it was read
    notes               what a reader should know: fewer windows, a source that no longer opens
    reference_sha256    fingerprint of the reference (`footprint.fingerprint`)
    samples             what both say to a few prompts, where that was asked for; of the variant that an engine runs
    """

    model: str
    reference: str | None
    reference_from: Literal["given", "report", "none"]
    scheme: str | None
    text: TextRecord
    protocol: str
    windows: int
    windows_asked: int
    window_tokens: int
    bos: bool
    scored_tokens: int
    activations: Literal["none", "simulated"]
    dtype: str
    ppl: float
    ppl_se: float
    ppl_reference: float | None
    ppl_ratio: float | None
    ppl_ratio_se: float | None
    kld_mean: float | None
    kld_se: float | None
    kld_median: float | None
    kld_p99: float | None
    kld_p999: float | None
    kld_max: float | None
    same_top1: float | None
    same_top1_se: float | None
    delta_p_mean: float | None
    delta_p_rms: float | None
    seconds: float
    peak_memory_bytes: int
    file_bytes: int
    bits_per_weight: float
    bits_from: Literal["report", "tensors"]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    reference_sha256: str | None = None
    samples: tuple[GeneratedSample, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "notes": list(self.notes), "samples": [asdict(sample) for sample in self.samples]}

    @property
    def label(self) -> str:
        """What the row is called: the scheme, and whether activations are in it."""
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
    """What was judged, against what, on what: one line each."""
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
    for name, cells in _rows(evaluations):
        table.add_row(name, *cells)
    return table


def _rows(evaluations: list[Evaluation]) -> list[tuple[str, list[str]]]:
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, cells: list[str]) -> None:
        rows.append((name, cells))

    if all(e.kld_mean is not None for e in evaluations):
        add("mean KLD (nats)", [f"{e.kld_mean:.5f} ± {e.kld_se:.5f}" for e in evaluations])
        add("KLD median", [f"{e.kld_median:.5f}" for e in evaluations])
        add("KLD 99 %", [f"{e.kld_p99:.4f}" for e in evaluations])
        add("KLD 99.9 %", [f"{e.kld_p999:.4f}" for e in evaluations])
        add("KLD max", [f"{e.kld_max:.4f}" for e in evaluations])
        add("same top-1", [_percent(e.same_top1, e.same_top1_se) for e in evaluations])
        add("PPL ratio", [f"{e.ppl_ratio:.4f} ± {e.ppl_ratio_se:.4f}" for e in evaluations])
        add("mean Δp", [_percent(e.delta_p_mean) for e in evaluations])
        add("PPL, reference", [f"{e.ppl_reference:.4f}" for e in evaluations])
    add("PPL", [f"{e.ppl:.4f} ± {e.ppl_se:.4f}" for e in evaluations])
    add("bits per weight", [f"{e.bits_per_weight:.3f}" for e in evaluations])
    add("file size", [f"{e.file_bytes / 1e6:.1f} MB" for e in evaluations])
    return rows


def _percent(value: float | None, error: float | None = None) -> str:
    assert value is not None
    return f"{100 * value:.2f} %" + ("" if error is None else f" ± {100 * error:.2f} %")
