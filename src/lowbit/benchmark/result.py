"""`Bench`: what an engine reached with a model on a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import AwareDatetime

from lowbit.records import Count, NonNegative, Record

if TYPE_CHECKING:
    from rich.table import Table


class BenchRow(Record):
    """One load: `batch` prompts of `context` tokens at once, each followed by `tokens` tokens.

    prefill, decode   tokens/s of all sequences together: the median of the runs
    *_least, *_most   the slowest and the quickest run
    runs              that were counted
    """

    batch: Count
    context: Count
    tokens: Count
    prefill: NonNegative
    prefill_least: NonNegative
    prefill_most: NonNegative
    decode: NonNegative
    decode_least: NonNegative
    decode_most: NonNegative
    runs: Count

    @property
    def decode_each(self) -> float:
        """tokens/s of one sequence."""
        return self.decode / self.batch if self.batch else 0.0


class Bench(Record):
    """A model in an engine on this machine.

    through      what ran it: "xllamacpp 2026.10", "llama-bench", "vllm 0.32.0", the address of a server
    device       as the engine or the system names it; threads: of a processor, None where the engine chooses
    file_bytes   of the weights
    peak_memory_bytes  of the engine's process, and of the card where the engine says; None of a server
    warmups, repeats   runs that were not counted, and that were, of each row
    """

    model: str
    engine: str
    through: str
    device: str
    threads: Count | None = None
    file_bytes: Count
    rows: tuple[BenchRow, ...]
    warmups: Count
    repeats: Count
    seed: Count
    peak_memory_bytes: Count | None = None
    load_seconds: NonNegative | None = None
    created: AwareDatetime
    notes: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, str, int | None]:
        """Results of one engine on one device replace each other in a report."""
        return self.engine, self.device, self.threads


def bench_table(found: Bench) -> Table:
    """A rich table, a row per load."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("batch", "context", "prefill, tok/s", "decode, tok/s", "of one sequence"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(str(row.batch), str(row.context), spread(row.prefill, row.prefill_least, row.prefill_most),
                      spread(row.decode, row.decode_least, row.decode_most), rate(row.decode_each))  # fmt: skip
    return table


def spread(middle: float, least: float, most: float) -> str:
    """ "120 (115 to 123)" """
    return f"{rate(middle)} ({rate(least)} to {rate(most)})"


def rate(value: float) -> str:
    """Three significant digits: a clock on a machine that does other things gives no more."""
    if value >= 100:
        digits = len(str(int(value))) - 3
        return f"{round(value, -digits):,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
