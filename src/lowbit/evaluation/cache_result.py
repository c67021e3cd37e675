"""`CacheEvaluation`: what one cache type costs a model at one context length, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lowbit.evaluation.result import TextRecord
from lowbit.records import Count, NonNegative, Record, Share

if TYPE_CHECKING:
    from rich.table import Table


class LayerLoss(Record):
    """Mean KLD per token, in nats, with the cache of this layer alone quantized."""

    layer: Count
    kld_mean: NonNegative
    kld_se: NonNegative


class CacheEvaluation(Record):
    """A model with a quantized KV cache against itself with a cache in the compute dtype, over the same tokens.

    scheme           of the model's own weights; activations of its scheme are simulated in both
    type             name of the cache type (`lowbit.kv.CACHE_TYPES`), or a pair KEYS/VALUES
    engines          that run it; per, how, source: of the row in that table
    bits_per_value   of a cached value, scales included, over all layers; a window in 16 bits is not counted
    bytes_per_token  of all layers that keep every token; None where config.json says too little
    scales           "stored" in the checkpoint, "calibrated" on the packaged text, "none" needed
    context          tokens of a window; first_scored: the first of them that is scored
    layers           indices of the layers whose cache was quantized
    by_layer         on request: each of them alone
    kld_*, ppl_*, same_top1   as in `Evaluation`
    """

    model: str
    scheme: str | None
    type: str
    engines: tuple[str, ...]
    per: str
    how: str
    source: str
    bits_per_value: NonNegative
    bytes_per_token: NonNegative | None
    scales: Literal["none", "stored", "calibrated"]
    text: TextRecord
    protocol: str
    context: Count
    windows: Count
    first_scored: Count
    scored_tokens: Count
    bos: bool
    dtype: str
    layers: tuple[Count, ...]
    kld_mean: NonNegative
    kld_se: NonNegative
    kld_p99: NonNegative
    kld_max: NonNegative
    same_top1: Share
    same_top1_se: NonNegative
    ppl: NonNegative
    ppl_ratio: NonNegative
    ppl_ratio_se: NonNegative
    by_layer: tuple[LayerLoss, ...] = ()
    seconds: NonNegative
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, int]:
        """Where it stands in a report: a newer figure of the same type and length replaces it."""
        return self.type, self.context

    @property
    def rounds(self) -> bool:
        """False where the type's window in 16 bits holds the whole context, so that the figure says nothing of it."""
        from lowbit.kv.types import CACHE_TYPES

        return self.type not in CACHE_TYPES or CACHE_TYPES[self.type].rounds_at(self.context)


def cache_heading(rows: Sequence[CacheEvaluation]) -> str:
    """Model, text and what is compared, one line each."""
    first = rows[0]
    text = f"{first.text.name}, {first.protocol}{', each window opened with BOS' if first.bos else ''}"
    return f"model      {first.model}\ntext       {text}\nreference  the same model with its cache in {first.dtype}"


def cache_table(rows: Sequence[CacheEvaluation]) -> Table:
    """A rich table, one row per type; a column of KLD ± its error for each context."""
    from rich.table import Table

    contexts = sorted({row.context for row in rows})
    table = Table()
    table.add_column("cache type", no_wrap=True)
    for column in ("bits", "bytes/token", *(f"mean KLD, {context_label(context)}" for context in contexts)):
        table.add_column(column, justify="right")
    for column in (f"PPL ratio, {context_label(contexts[-1])}", f"same top-1, {context_label(contexts[-1])}"):
        table.add_column(column, justify="right")
    found = {(row.type, row.context): row for row in rows}
    for name in dict.fromkeys(row.type for row in rows):
        last = found[name, contexts[-1]]
        size = "" if last.bytes_per_token is None else f"{last.bytes_per_token:,.0f}"
        table.add_row(
            name, f"{last.bits_per_value:.2f}", size,
            *(f"{found[name, each].kld_mean:.5f} ± {found[name, each].kld_se:.5f}" for each in contexts),
            f"{last.ppl_ratio:.4f} ± {last.ppl_ratio_se:.4f}", f"{100 * last.same_top1:.2f} %",
        )  # fmt: skip
    return table


def layer_lines(rows: Sequence[CacheEvaluation], shown: int = 6) -> list[str]:
    """One line per type and context: the layers whose cache alone costs most, with the KLD of each."""
    lines = []
    for row in rows:
        costly = sorted(row.by_layer, key=lambda each: -each.kld_mean)[:shown]
        found = ", ".join(f"{each.layer} ({each.kld_mean:.2g} ± {each.kld_se:.1g})" for each in costly)
        lines.append(f"{row.type} at {context_label(row.context)}, costliest layers: {found}")
    return lines


def cache_sentence(rows: Sequence[CacheEvaluation]) -> str:
    """The type of least KLD among those of at most 8.5, 6 and 4.5 bits, at the longest context, of those that round
    there."""
    longest = max(row.context for row in rows)
    at = [row for row in rows if row.context == longest and row.rounds]
    best = []
    for limit in (8.5, 6.0, 4.5):
        fits = [row for row in at if row.bits_per_value <= limit]
        if fits:
            least = min(fits, key=lambda row: (row.kld_mean, row.bits_per_value))
            best.append(f"up to {limit:g} bits {least.type}")
    return f"least KLD at {context_label(longest)}: " + ", ".join(dict.fromkeys(best)) if best else ""


def context_label(tokens: int) -> str:
    """8192 → "8k", 512 → "512"."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
